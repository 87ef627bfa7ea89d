"""Obvious mistakes are told in a sentence that says what to do, with the documented exit code, never a traceback."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.support.cluster import LocalCluster

pytestmark = pytest.mark.mounted


def told(cluster: LocalCluster, *words: str | Path, code: int = 1) -> str:
    done = cluster.fsd(*words, status=[code])
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize("command", ["up", "mount"])
def test_a_wrong_mount_point(own_cluster: LocalCluster, command: str) -> None:
    first: list[str | Path] = ["up", "--data", str(own_cluster.data)] if command == "up" else ["mount", "127.0.0.1:1"]
    missing, file = own_cluster.directory / "missing", own_cluster.directory / "file"
    file.touch()
    assert f"fsd {command}: {missing} does not exist; make it with: mkdir -p {missing}\n" == told(
        own_cluster, *first, missing
    )
    assert f"fsd {command}: {file} is not a directory; a mount point must be one\n" == told(own_cluster, *first, file)
    assert "/proc is already a mount (proc) of proc; first run: umount /proc" in told(own_cluster, *first, "/proc")
    assert not own_cluster.data.exists(), "nothing was started"


def test_nobody_serves_there(own_cluster: LocalCluster) -> None:
    log = own_cluster.directory / "m.log"
    words: list[str | Path] = ["mount", "127.0.0.1:1", own_cluster.mountpoint, "--timeout-s", "1", "--log-file", log]
    assert "127.0.0.1:1" in told(own_cluster, *words)
    assert os.listdir(own_cluster.mountpoint) == []
    assert "no inode service answers at 127.0.0.1:1" in told(own_cluster, "status", "127.0.0.1:1", "--timeout-s", "1")


def test_something_else_serves_there(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    block = own_cluster.state().children[1].port
    sentence = told(own_cluster, "status", f"127.0.0.1:{block}", "--timeout-s", "2")
    assert f"127.0.0.1:{block}" in sentence
    assert "block" in sentence


def test_an_address_that_is_none(own_cluster: LocalCluster) -> None:
    assert "HOST:PORT" in told(own_cluster, "mount", "/dev/sda1", own_cluster.mountpoint, code=2)
    assert "brackets" in told(own_cluster, "mount", "::1:7400", own_cluster.mountpoint, code=2)


def test_unknown_settings_are_refused_by_name(own_cluster: LocalCluster, tmp_path: Path) -> None:
    file = tmp_path / "fsd.toml"
    file.write_text("[up]\nsevrers = 3\n")
    up: list[str | Path] = ["up", own_cluster.mountpoint, "--data", own_cluster.data]
    sentence = told(own_cluster, *up, "--config", file, code=2)
    assert sentence == f"fsd up: {file}: unknown key 'sevrers' in [up]; did you mean 'servers'?\n"
    assert "unknown mount option 'budget_mb=3'" in told(own_cluster, *up, "-o", "budget_mb=3", code=2)
    assert "--servers: 'three' is not a whole number" in told(own_cluster, *up, "--servers", "three", code=2)
    assert "--servers: 0 is not between 1 and 64" in told(own_cluster, *up, "--servers", "0", code=2)


def test_no_command_and_an_unknown_one(own_cluster: LocalCluster) -> None:
    assert "COMMAND" in told(own_cluster, code=2)
    assert "invalid choice: 'mnt'" in told(own_cluster, "mnt", code=2)


def test_data_inside_the_mount_point(own_cluster: LocalCluster) -> None:
    inside = own_cluster.mountpoint / "data"
    assert "is inside the mount point" in told(own_cluster, "up", own_cluster.mountpoint, "--data", inside)


def test_what_is_not_mounted_is_not_unmounted(own_cluster: LocalCluster) -> None:
    assert (
        told(own_cluster, "umount", own_cluster.mountpoint) == f"fsd umount: {own_cluster.mountpoint} is not mounted\n"
    )
    assert "does not exist" in told(own_cluster, "umount", own_cluster.directory / "missing")
    assert "not of fsd; use umount" in told(own_cluster, "umount", "/proc")
    assert "no cluster was ever started" in told(
        own_cluster, "down", own_cluster.mountpoint, "--data", own_cluster.data
    )
    assert "no cluster runs in" in told(own_cluster, "status", "--data", own_cluster.data)


def test_a_mount_point_that_is_mounted_already(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    mount: list[str | Path] = ["mount", own_cluster.address, own_cluster.mountpoint]
    assert f"first run: fsd umount {own_cluster.mountpoint}" in told(own_cluster, *mount)
    other: list[str | Path] = ["up", own_cluster.mountpoint, "--data", own_cluster.directory / "data2"]
    assert "already shows" in told(own_cluster, *other)


def test_a_port_that_is_taken(own_cluster: LocalCluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        words: list[str | Path] = ["metadata", "--directory", own_cluster.directory / "m", "--port", port]
        sentence = told(own_cluster, *words)
    assert port in sentence
    assert "--port" in sentence


def test_a_directory_that_another_service_uses(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    words: list[str | Path] = ["metadata", "--directory", own_cluster.data / "metadata", "--port", "0"]
    assert "is in use by another fsd process" in told(own_cluster, *words)
    assert "--directory is needed" in told(own_cluster, "metadata", code=2)
    assert "--metadata is needed" in told(own_cluster, "block", "--directory", own_cluster.directory / "b", code=2)


def test_data_of_a_newer_version(own_cluster: LocalCluster) -> None:
    own_cluster.data.mkdir()
    (own_cluster.data / "cluster.json").write_text(
        '{"format": 99, "version": "9.0", "replicas": 2, "metadata_port": 1, "block_ports": []}'
    )
    assert "was written by fsd 9.0" in told(own_cluster, "up", own_cluster.mountpoint, "--data", own_cluster.data)


def test_a_data_directory_that_cannot_be_made(own_cluster: LocalCluster) -> None:
    (own_cluster.directory / "file").touch()
    data = own_cluster.directory / "file" / "data"
    assert f"cannot make {data}" in told(own_cluster, "up", own_cluster.mountpoint, "--data", data)


def test_a_subdirectory_that_is_not_there(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    other = own_cluster.directory / "other"
    other.mkdir()
    target = f"{own_cluster.address}:/missing"
    sentence = told(own_cluster, "mount", target, other, "--log-file", own_cluster.directory / "m.log")
    assert "missing" in sentence
    assert os.listdir(other) == []
