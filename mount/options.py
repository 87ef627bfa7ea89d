"""Options of `-o`, as mount(8) and fstab write them: for us, for the kernel, or for somebody else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

from mount.config import MountSettings, nearest
from mount.outcome import CommandError, Exit

# fmt: off
KERNEL_OPTIONS = frozenset({
    "suid", "nosuid", "dev", "nodev", "exec", "noexec", "atime", "noatime", "relatime", "norelatime", "strictatime",
    "diratime", "nodiratime", "sync", "async", "dirsync",
})
"""Passed on to mount(2)."""

IGNORED_OPTIONS = frozenset({
    "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev", "silent", "loud",
    "mand", "nomand", "iversion", "noiversion", "lazytime", "nolazytime",
})
"""Meant for mount(8), fstab's readers or file systems on disks; without a meaning here."""
# fmt: on

IGNORED_PREFIXES = ("x-", "X-", "comment=", "helper=", "uhelper=")


@dataclass(frozen=True)
class MountOptions:
    """A list of options, sorted by whom they are for."""

    settings: dict[str, object] = field(default_factory=dict)  # Keys of MountSettings.
    kernel: tuple[str, ...] = ()
    config: str | None = None  # config=FILE: the TOML file.


def parse_options(texts: Iterable[str]) -> MountOptions:
    """Read the arguments of all `-o`; a later one of the same name counts.

    Raises:
        CommandError: an option that nobody knows (exit code 2), with the nearest known one.
    """
    known = {one.name for one in dataclasses.fields(MountSettings)}
    settings: dict[str, object] = {}
    kernel: list[str] = []
    config: str | None = None
    for option in (option for text in texts for option in text.split(",") if option):
        name, equals, value = option.partition("=")
        if option in ("ro", "rw"):
            settings["read_only"] = option == "ro"
        elif name == "config" and equals:
            config = value
        elif name in known:
            settings[name] = value if equals else "true"
        elif option in KERNEL_OPTIONS:
            kernel.append(option)
        elif option not in IGNORED_OPTIONS and not option.startswith(IGNORED_PREFIXES):
            hint = nearest(name, known | KERNEL_OPTIONS | {"ro", "rw", "config"})
            raise CommandError(f"unknown mount option {option!r}{hint}", Exit.USAGE)
    return MountOptions(settings, tuple(kernel), config)
