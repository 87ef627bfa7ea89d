"""Options of mount(8) and fstab."""

from __future__ import annotations

import pytest

from mount.mount_fsd import mount_flags
from mount.options import parse_options
from mount.outcome import CommandError, Exit


def test_options_are_sorted_by_whom_they_are_for() -> None:
    options = parse_options(
        ["rw,noatime,_netdev,nofail,x-systemd.automount", "budget_mib=64,nosuid,config=/etc/fsd.toml"]
    )
    assert options.settings == {"read_only": False, "budget_mib": "64"}
    assert options.kernel == ("noatime", "nosuid")
    assert options.config == "/etc/fsd.toml"


def test_the_last_one_counts() -> None:
    assert parse_options(["ro", "rw"]).settings == {"read_only": False}
    assert parse_options(["rw,ro"]).settings == {"read_only": True}


def test_a_switch_needs_no_value() -> None:
    assert parse_options(["allow_other"]).settings == {"allow_other": "true"}


def test_an_unknown_option_is_refused_with_the_nearest() -> None:
    with pytest.raises(CommandError) as refused:
        parse_options(["budget_mb=64"])
    assert refused.value.code == Exit.USAGE
    assert "did you mean 'budget_mib'?" in refused.value.sentence


def test_what_mount_8_passes_is_understood() -> None:
    flags, wanted = mount_flags(["host:7400:/sub", "/mnt", "-n", "-v", "-o", "rw,_netdev,noatime", "-t", "fsd"])
    assert (flags.target, flags.mountpoint, flags.options) == ("host:7400:/sub", "/mnt", ["rw,_netdev,noatime"])
    assert wanted


def test_a_fake_mount_mounts_nothing() -> None:
    assert mount_flags(["host:7400", "/mnt", "-f"])[1] is False
