"""Settings by flag, by `-o` option and by TOML file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from mount import config
from mount.config import BlockSettings, LogSettings, MountSettings, Settings, UpSettings
from mount.outcome import CommandError, Exit

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "config.md"


def settings(*words: str, toml: str | None = None, tmp_path: Path | None = None) -> Settings:
    parser = argparse.ArgumentParser()
    config.add_flags(parser, *config.SECTIONS) if not words else config.add_flags(parser, "up", "mount", "log")
    if toml is not None and tmp_path is not None:
        file = tmp_path / "fsd.toml"
        file.write_text(toml)
        words = (*words, "--config", str(file))
    return Settings(parser.parse_args(words))


def from_file(toml: str, tmp_path: Path) -> Settings:
    file = tmp_path / "fsd.toml"
    file.write_text(toml)
    return Settings(argparse.Namespace(config=file))


def refusal(toml: str, tmp_path: Path, kind: type[Any] = UpSettings) -> str:
    with pytest.raises(CommandError) as refused:
        from_file(toml, tmp_path).take(kind)
    assert refused.value.code == Exit.USAGE
    return refused.value.sentence


def test_flag_goes_before_option_before_file_before_default(tmp_path: Path) -> None:
    toml = "[mount]\nbudget_mib = 64\nallow_other = true\ntimeout_s = 5\n"
    taken = settings("--budget-mib", "128", toml=toml, tmp_path=tmp_path).take(
        MountSettings, options={"budget_mib": "96", "allow_other": "false"}
    )
    assert taken == MountSettings(budget_mib=128, allow_other=False, timeout_s=5.0, read_only=False)


def test_nothing_given_is_the_default() -> None:
    assert settings("--log-level", "info").take(UpSettings) == UpSettings()


def test_switches_have_a_no(tmp_path: Path) -> None:
    toml = "[mount]\nread_only = true\n"
    assert settings("--no-read-only", toml=toml, tmp_path=tmp_path).take(MountSettings).read_only is False


def test_every_type_is_read_from_a_file(tmp_path: Path) -> None:
    read = from_file('[block]\ndirectory = "/srv/b"\nmetadata = "m:1"\nweight = 7\n[up]\nready_timeout_s = 3', tmp_path)
    assert read.take(BlockSettings) == BlockSettings(directory=Path("/srv/b"), metadata="m:1", weight=7)
    assert read.take(UpSettings).ready_timeout_s == 3.0


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[up]\nsevrers = 3", ["'sevrers'", "[up]", "did you mean 'servers'?"]),
        ("[upp]\nservers = 3", ["[upp]", "did you mean 'up'?"]),
        ("[up]\nzzz = 3", ["'zzz'", "known are: data, "]),
        ("servers = 3", ["servers"]),
        ('[up]\nservers = "3"', ["servers in [up]", "not a whole number"]),
        ("[up]\nservers = true", ["not a whole number"]),
        ("[up]\nservers = 0", ["not between 1 and 64"]),
        ("[up]\nready_timeout_s = true", ["not a number"]),
        ('[up]\nready_timeout_s = "3"', ["not a number"]),
        ("[up]\nready_timeout_s = nan", ["not between"]),
        ('[up]\ndata = ""', ["not a path"]),
        ("[up", ["not TOML"]),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(toml: str, words: list[str], tmp_path: Path) -> None:
    sentence = refusal(toml, tmp_path)
    assert all(word in sentence for word in ["fsd.toml", *words]), sentence


def test_a_choice_is_one_of_the_choices(tmp_path: Path) -> None:
    assert "debug, info, warning, error" in refusal('[log]\nlevel = "loud"', tmp_path, LogSettings)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="cannot read"):
        Settings(argparse.Namespace(config=tmp_path / "none.toml"))


def test_the_reference_lists_every_key_as_it_is() -> None:
    """docs/reference/config.md ends with the tables that mount/config.py makes."""
    tables = "\n".join(config.reference()).strip()
    assert tables in REFERENCE.read_text(), "replace the tables of docs/reference/config.md by:\n" + tables


def test_the_references_example_is_valid(tmp_path: Path) -> None:
    text = REFERENCE.read_text()
    example = text.partition("```toml\n")[2].partition("```")[0]
    assert example
    read = from_file(example, tmp_path)
    for kind in config.SECTIONS.values():
        read.take(kind)
