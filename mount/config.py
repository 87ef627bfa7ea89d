"""Settings: one frozen dataclass per command, from flags, else from a TOML file, else the default.

Each key is described once, here, at its field: the flag's help text and docs/reference/config.md come from it (a test
compares them).  The TOML file has one table per command; a table or key that nobody knows is refused by name, as a
misspelt key that is silently ignored is the worst kind of default.
"""

# ruff: noqa: RUF009 - key() only makes a field; nothing mutable is shared.
from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import tomllib
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mount.outcome import CommandError, Exit
from mount.target import DEFAULT_PORT, parse_address

S = TypeVar("S")
LOG_LEVELS = ("debug", "info", "warning", "error")
FRONTENDS = ("direct", "pyfuse3")


def key(
    default: Any,  # noqa: ANN401 - the type is the field's
    help_text: str,
    *,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:  # noqa: ANN401
    """A dataclass field that is a setting, with the bounds its value must keep."""
    return field(default=default, metadata={"help": help_text, "least": least, "most": most, "choices": choices})


@dataclass(frozen=True)
class UpSettings:
    """`fsd up`: a local cluster."""

    data: Path | None = key(None, "directory of the cluster's data (/var/lib/fsd as root, else ~/.local/share/fsd)")
    servers: int | None = key(
        None, "block servers (default: as before, 3 in a new cluster); fewer than before is refused", least=1, most=64
    )
    replicas: int = key(2, "copies of each block; counts when the cluster is made", least=1, most=8)
    lease_s: float = key(20.0, "seconds after which a mount that says nothing loses its session", least=1, most=3600)
    ready_timeout_s: float = key(60.0, "seconds within which all services must answer", least=1, most=3600)


@dataclass(frozen=True)
class MetadataSettings:
    """`fsd metadata`: the inode service."""

    directory: Path | None = key(None, "directory of the service's data; needed")
    host: str = key("127.0.0.1", "address to listen at; 0.0.0.0 or :: for all")
    port: int = key(DEFAULT_PORT, "port to listen at", least=0, most=65535)
    replicas: int = key(2, "copies of each block in a new cluster", least=1, most=8)
    lease_s: float = key(20.0, "seconds after which a mount that says nothing loses its session", least=1, most=3600)
    server_down_after_s: float = key(
        5.0, "seconds without a heartbeat until a block server is down", least=1, most=3600
    )


@dataclass(frozen=True)
class BlockSettings:
    """`fsd block`: a block server."""

    directory: Path | None = key(None, "directory of the server's data; needed")
    metadata: str = key("", "HOST:PORT of the inode service; needed")
    host: str = key("127.0.0.1", "address to listen at; 0.0.0.0 or :: for all")
    port: int = key(7401, "port to listen at; 0: any free one", least=0, most=65535)
    advertise_host: str = key("", "address under which mounts reach this server (default: host)")
    rack: str = key("", "what fails together with this server; copies go to different racks")
    weight: int | None = key(None, "share of the blocks (default: GiB of the disk)", least=1, most=1 << 30)


@dataclass(frozen=True)
class MountSettings:
    """`fsd mount`, `fsd up`, `mount.fsd`: one mount; each key is also a `-o` option."""

    budget_mib: int = key(512, "memory for data, MiB", least=32, most=1 << 20)
    read_only: bool = key(False, "refuse all changes; `-o ro` is the same")
    allow_other: bool | None = key(None, "let other users in (default: as root); others need user_allow_other")
    timeout_s: float = key(30.0, "seconds to wait for the inode service", least=1, most=3600)
    frontend: str = key("direct", "who speaks with the kernel: fsd itself, or libfuse", choices=FRONTENDS)


@dataclass(frozen=True)
class LogSettings:
    """Every daemon's log."""

    level: str = key("info", "least severe events to log", choices=LOG_LEVELS)
    file: Path | None = key(None, "where to (default: stderr in the foreground, else a file of the command)")
    size_mib: int = key(16, "size at which a log file is put aside; three old ones are kept", least=1, most=4096)


SECTIONS: dict[str, type[Any]] = {
    "up": UpSettings,
    "metadata": MetadataSettings,
    "block": BlockSettings,
    "mount": MountSettings,
    "log": LogSettings,
}
"""Tables of the TOML file."""


def flag_of(section: str, name: str) -> str:
    """The flag of a setting: `budget_mib` is `--budget-mib`; those of [log] are `--log-...`."""
    prefix = "log-" if section == "log" else ""
    return f"--{prefix}{name.replace('_', '-')}"


def add_flags(parser: argparse.ArgumentParser, *sections: str) -> None:
    """Give a command the flags of its settings; a flag that is not used leaves the file's value alone."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with settings (docs/reference/config.md)"
    )
    add_section_flags(parser, *sections)


def add_section_flags(parser: argparse.ArgumentParser, *sections: str) -> None:
    """Only the flags of the settings, for a command that has --config already."""
    for section in sections:
        for one in dataclasses.fields(SECTIONS[section]):
            default = "" if one.default in (None, "") else f" (default: {_shown(one.default)})"
            more: dict[str, Any] = {"metavar": one.name.rpartition("_")[2].upper()}
            if bool in _types(SECTIONS[section], one.name):
                more = {"action": argparse.BooleanOptionalAction}
            parser.add_argument(
                flag_of(section, one.name),
                dest=f"{section}.{one.name}",
                default=None,
                help=one.metadata["help"].replace("%", "%%") + default,
                **more,
            )


def _shown(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def _types(kind: type[Any], name: str) -> tuple[type, ...]:
    hint = typing.get_type_hints(kind)[name]
    return typing.get_args(hint) or (hint,)


def read_file(path: Path | None) -> dict[str, dict[str, object]]:
    """The tables of a configuration file, their names and keys checked; {} for None.

    Raises:
        CommandError: unreadable, not TOML, or with an unknown table or key (exit code 2).
    """
    if path is None:
        return {}
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}", Exit.USAGE) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} is not TOML: {error}", Exit.USAGE) from error
    for table, values in tables.items():
        if table not in SECTIONS:
            raise CommandError(f"{path}: unknown table [{table}]{nearest(table, SECTIONS)}", Exit.USAGE)
        if not isinstance(values, dict):
            raise CommandError(f"{path}: {table} must be a table: [{table}]", Exit.USAGE)
        known = [one.name for one in dataclasses.fields(SECTIONS[table])]
        for name in values:
            if name not in known:
                raise CommandError(f"{path}: unknown key {name!r} in [{table}]{nearest(name, known)}", Exit.USAGE)
    return tables


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean 'x'?` or, when nothing is near, the list of what is known."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are: {', '.join(names)}"


class Settings:
    """Flags and file together; `take` makes the settings of one command from them."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self._flags = vars(flags)
        self._path: Path | None = self._flags.get("config")
        self._tables = read_file(self._path)

    def take(self, kind: type[S], *, options: Mapping[str, object] | None = None) -> S:
        """Settings of one section: flag, else `-o` option, else file, else default.

        Raises:
            CommandError: a value of the wrong type or out of bounds, with its key (exit code 2).
        """
        section = next(name for name, one in SECTIONS.items() if one is kind)
        table = self._tables.get(section, {})
        values: dict[str, object] = {}
        for one in dataclasses.fields(typing.cast(Any, kind)):
            flag = self._flags.get(f"{section}.{one.name}")
            if flag is not None:
                values[one.name] = convert(kind, one.name, flag, place=flag_of(section, one.name), text=True)
            elif options and one.name in options:
                values[one.name] = convert(kind, one.name, options[one.name], place=f"-o {one.name}", text=True)
            elif one.name in table:
                place = f"{self._path}: {one.name} in [{section}]"
                values[one.name] = convert(kind, one.name, table[one.name], place=place, text=False)
        return kind(**values)


def convert(kind: type[Any], name: str, value: object, *, place: str, text: bool) -> object:
    """The value as the field's type, within its bounds; `text` when it came as characters rather than typed.

    Raises:
        CommandError: it is not; the sentence names `place` (exit code 2).
    """
    types = _types(kind, name)
    metadata = next(one for one in dataclasses.fields(kind) if one.name == name).metadata
    reader = next(READERS[one] for one in types if one in READERS)
    try:
        converted = reader(value, text)
    except ValueError as error:
        raise CommandError(f"{place}: {value!r} is not {error}", Exit.USAGE) from None
    least, most, choices = metadata["least"], metadata["most"], metadata["choices"]
    if choices and converted not in choices:
        raise CommandError(f"{place}: {value!r} is none of {', '.join(choices)}", Exit.USAGE)
    if isinstance(converted, int | float) and least is not None and not least <= converted <= most:
        raise CommandError(f"{place}: {value} is not between {least} and {most}", Exit.USAGE)
    return converted


def _read_bool(value: object, text: bool) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, bool):
        return value
    if text and str(value).lower() in words:
        return words[str(value).lower()]
    raise ValueError("true or false")


def _read_int(value: object, text: bool) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if text and isinstance(value, str) and value.isascii() and value.strip().lstrip("-").isdigit():
        return int(value)
    raise ValueError("a whole number")


def _read_float(value: object, text: bool) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not (text and isinstance(value, str)):
        raise ValueError("a number")
    try:
        return float(value)
    except ValueError:
        raise ValueError("a number") from None


def _read_str(value: object, text: bool) -> str:
    if isinstance(value, str) and "\0" not in value:
        return value
    raise ValueError("a string")


def _read_path(value: object, text: bool) -> Path:
    if isinstance(value, str | Path) and str(value) and "\0" not in str(value):
        return Path(os.path.abspath(os.path.expanduser(value)))
    raise ValueError("a path")


READERS: dict[type, Callable[[object, bool], object]] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_float,
    str: _read_str,
    Path: _read_path,
}


def needed(value: S | None, flag: str) -> S:
    """The value of a setting without a default.

    Raises:
        CommandError: it was not given (exit code 2).
    """
    if value is None or value == "":
        raise CommandError(f"{flag} is needed (as a flag or in the --config file)", Exit.USAGE)
    return value


def reference() -> Iterator[str]:
    """docs/reference/config.md's tables, line by line."""
    for section, kind in SECTIONS.items():
        yield f"## [{section}]"
        yield f"{kind.__doc__}"
        yield ""
        yield "| key | type | default | flag | meaning |"
        yield "|---|---|---|---|---|"
        for one in dataclasses.fields(kind):
            kinds = [t.__name__.lower() for t in _types(kind, one.name) if t is not type(None)]
            default = "-" if one.default in (None, "") else f"`{_shown(one.default)}`"
            bounds = "" if one.metadata["least"] is None else f"; {one.metadata['least']} to {one.metadata['most']}"
            choices = "" if not one.metadata["choices"] else f"; one of {', '.join(one.metadata['choices'])}"
            meaning = one.metadata["help"] + bounds + choices
            yield f"| `{one.name}` | {kinds[0]} | {default} | `{flag_of(section, one.name)}` | {meaning} |"
        yield ""


def metadata_address(settings: BlockSettings) -> tuple[str, int]:
    """Host and port of the inode service a block server reports to."""
    address = parse_address(needed(settings.metadata, "--metadata"), default_port=DEFAULT_PORT)
    return address.host, address.port
