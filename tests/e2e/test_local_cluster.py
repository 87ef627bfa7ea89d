"""`fsd up`, `fsd down` and what may happen between them: real processes, a real mount, real signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mount import mount_table
from mount.processes import identify
from tests.support.cluster import LocalCluster, wait_until

pytestmark = pytest.mark.mounted

ROOT = Path(__file__).resolve().parents[2]
DATA = bytes(range(256)) * 1024 * 20  # 5 MiB: two blocks, the last one short.


def write_flushed(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def sitting_in(directory: Path) -> Iterator[int]:
    """A process that has its working directory there; its pid."""
    code = "import time; print('on', flush=True); time.sleep(300)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=directory, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"on\n"
        try:
            yield process.pid
        finally:
            process.kill()


def test_data_stay_over_down_and_up(own_cluster: LocalCluster) -> None:
    assert str(own_cluster.mountpoint) in own_cluster.up()
    (own_cluster.mountpoint / "d").mkdir()
    (own_cluster.mountpoint / "d" / "small").write_text("hello")
    (own_cluster.mountpoint / "large").write_bytes(DATA)
    before = [
        own_cluster.process(part) for part in ("mount", "supervisor", "metadata", "block-1", "block-2", "block-3")
    ]
    ports = [child.port for child in own_cluster.state().children]
    assert "stopped" in own_cluster.down()
    assert os.listdir(own_cluster.mountpoint) == []
    assert not [process for process in before if process.alive()]
    assert own_cluster.records() == []
    own_cluster.up()
    assert (own_cluster.mountpoint / "d" / "small").read_text() == "hello"
    assert (own_cluster.mountpoint / "large").read_bytes() == DATA
    assert [child.port for child in own_cluster.state().children] == ports


def test_up_again_changes_nothing(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    before = [own_cluster.process(part) for part in ("mount", "supervisor", "metadata", "block-1")]
    assert "is mounted already" in own_cluster.up()
    assert [own_cluster.process(part) for part in ("mount", "supervisor", "metadata", "block-1")] == before
    assert len([one for one in mount_table.all_mounts() if one.mountpoint == str(own_cluster.mountpoint)]) == 1


def test_ups_at_the_same_time_make_one_cluster(own_cluster: LocalCluster) -> None:
    other = own_cluster.directory / "other"
    other.mkdir()
    threads = [threading.Thread(target=own_cluster.up, kwargs={"mountpoint": where}) for where in (None, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (own_cluster.mountpoint / "file").write_text("one cluster")
    assert (other / "file").read_text() == "one cluster"
    assert "stays up" in own_cluster.fsd("down", other).stdout
    assert (own_cluster.mountpoint / "file").read_text() == "one cluster"
    assert "stopped" in own_cluster.fsd("down", own_cluster.mountpoint).stdout


def test_a_killed_fuse_daemon_is_replaced_by_up(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    write_flushed(own_cluster.mountpoint / "file", DATA)
    own_cluster.kill("mount")
    with pytest.raises(OSError, match=r"Transport endpoint|connection abort"):
        os.listdir(own_cluster.mountpoint)
    done = own_cluster.fsd("up", own_cluster.mountpoint, "--data", own_cluster.data)
    assert "is gone" in done.stderr
    assert (own_cluster.mountpoint / "file").read_bytes() == DATA


def test_a_killed_fuse_daemon_is_cleared_away_by_down(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    own_cluster.kill("mount")
    assert "stopped" in own_cluster.down()
    assert mount_table.find(str(own_cluster.mountpoint)) is None


def test_a_fuse_daemon_ends_cleanly_on_sigterm(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    (own_cluster.mountpoint / "file").write_bytes(DATA)
    daemon = own_cluster.kill("mount", signal.SIGTERM)
    assert daemon.wait_end(30)
    assert mount_table.find(str(own_cluster.mountpoint)) is None
    own_cluster.up()
    assert (own_cluster.mountpoint / "file").read_bytes() == DATA


@pytest.mark.parametrize("part", ["metadata", "block-2"])
def test_a_killed_service_is_back_within_seconds(own_cluster: LocalCluster, part: str) -> None:
    own_cluster.up()
    write_flushed(own_cluster.mountpoint / "before", DATA)
    killed = own_cluster.kill(part)
    took_s = own_cluster.wait_back(part, killed)
    assert took_s < 5, "a second on a quiet machine"
    assert (own_cluster.mountpoint / "before").read_bytes() == DATA
    write_flushed(own_cluster.mountpoint / "after", DATA)
    own_cluster.wait_healthy()
    assert "service_died" in own_cluster.log_text("supervisor")


def test_services_end_with_a_killed_supervisor_and_up_brings_them_back(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    write_flushed(own_cluster.mountpoint / "file", DATA)
    services = [own_cluster.process(part) for part in ("metadata", "block-1", "block-2", "block-3")]
    own_cluster.kill("supervisor")
    assert all(service.wait_end(30) for service in services)
    told = own_cluster.fsd("status", own_cluster.mountpoint, "--timeout-s", "1", status=[1]).stderr
    assert f"the local cluster in {own_cluster.data} is not running" in told
    assert "is mounted already" in own_cluster.up()
    assert (own_cluster.mountpoint / "file").read_bytes() == DATA
    write_flushed(own_cluster.mountpoint / "file2", DATA)
    assert "stopped" in own_cluster.down()


def test_a_service_that_outlived_its_supervisor_is_ended_by_up(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    own_cluster.umount()
    stuck = own_cluster.kill("block-1", signal.SIGSTOP)
    own_cluster.kill("supervisor")
    assert stuck.alive()
    own_cluster.up(f"--ready-timeout-s={60}")
    assert not stuck.alive()
    assert own_cluster.process("block-1") != stuck
    own_cluster.wait_healthy()


def test_a_taken_port_is_replaced_at_the_next_start(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    write_flushed(own_cluster.mountpoint / "file", DATA)
    own_cluster.down()
    taken = [child.port for child in own_cluster.state().children[:2]]
    with socket.create_server(("127.0.0.1", taken[0])), socket.create_server(("127.0.0.1", taken[1])):
        own_cluster.up()
    assert not {child.port for child in own_cluster.state().children} & set(taken)
    assert (own_cluster.mountpoint / "file").read_bytes() == DATA


def test_a_busy_mount_point_is_not_taken_away(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    with sitting_in(own_cluster.mountpoint) as pid:
        refused = own_cluster.fsd("down", own_cluster.mountpoint, status=[1])
        assert f"(pid {pid})" in refused.stderr
        assert "in use" in refused.stderr
        assert own_cluster.process("metadata")
        (own_cluster.mountpoint / "file").write_text("still works")
        own_cluster.fsd("umount", own_cluster.mountpoint, "--lazy")
    assert "stopped" in own_cluster.down()


def test_daemons_have_no_terminal_and_their_own_session(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    for part in ("supervisor", "metadata", "block-1", "mount"):
        pid = own_cluster.process(part).pid
        assert os.getsid(pid) == pid
        assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
        assert os.readlink(f"/proc/{pid}/cwd") == "/"


def test_more_servers_can_be_added_and_fewer_not(own_cluster: LocalCluster) -> None:
    own_cluster.up("--servers", "1", "--replicas", "1")
    write_flushed(own_cluster.mountpoint / "file", DATA)
    refused = own_cluster.fsd("up", own_cluster.mountpoint, "--data", own_cluster.data, "--servers", "2", status=[1])
    assert "runs with 1 block servers" in refused.stderr
    own_cluster.down()
    own_cluster.up("--servers", "2")
    assert len(own_cluster.status()["servers"]) == 2
    assert (own_cluster.mountpoint / "file").read_bytes() == DATA
    own_cluster.down()
    refused = own_cluster.fsd("up", own_cluster.mountpoint, "--data", own_cluster.data, "--servers", "1", status=[1])
    assert "2 block servers with data" in refused.stderr
    own_cluster.up()
    assert len(own_cluster.status()["servers"]) == 2


def test_status_tells_programs_and_people(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    report = own_cluster.status()
    assert report["format"] == 1
    assert report["healthy"] is True
    assert report["address"] == own_cluster.address
    assert [one["state"] for one in report["servers"]] == ["up"] * 3
    assert all(0 < one["space_free"] <= one["space_total"] for one in report["servers"])
    assert report["mounts_here"] == [str(own_cluster.mountpoint)]
    assert [one["mountpoint"] for one in report["sessions"]] == [str(own_cluster.mountpoint)]
    assert report["placement_groups"] > 0
    assert report["bad_blocks"] == []
    for what in (str(own_cluster.mountpoint), own_cluster.address):
        text = own_cluster.fsd("status", what).stdout
        assert own_cluster.address in text
        assert "healthy" in text


def test_status_tells_a_server_that_is_down(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    stopped = own_cluster.kill("block-3", signal.SIGSTOP)
    wait_until(lambda: not own_cluster.status()["healthy"], "the stopped server is down")
    told = own_cluster.fsd("status", own_cluster.mountpoint, status=[3]).stdout
    assert "ATTENTION: block server 3 is down" in told
    stopped.signal(signal.SIGCONT)
    own_cluster.wait_healthy()


def test_the_umask_of_the_caller_does_not_open_the_data(own_cluster: LocalCluster) -> None:
    before = os.umask(0)
    try:
        own_cluster.up()
    finally:
        os.umask(before)
    assert own_cluster.data.stat().st_mode & 0o077 == 0
    for file in own_cluster.data.rglob("*"):
        assert file.stat().st_mode & 0o077 == 0 or file.is_socket(), file


def test_a_subdirectory_can_be_mounted_read_only(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    (own_cluster.mountpoint / "sub" / "dir").mkdir(parents=True)
    (own_cluster.mountpoint / "sub" / "dir" / "file").write_text("x")
    other = own_cluster.directory / "other"
    other.mkdir()
    own_cluster.fsd(
        "mount", f"{own_cluster.address}:/sub/dir", other, "-o", "ro,noatime", "--log-file", other.with_suffix(".log")
    )
    assert os.listdir(other) == ["file"]
    with pytest.raises(OSError, match="Read-only"):
        (other / "new").touch()
    entry = mount_table.find(str(other))
    assert entry is not None
    assert entry.source == f"{own_cluster.address}:/sub/dir"
    assert "ro" in entry.options.split(",")
    own_cluster.fsd("umount", other)
    assert identify(own_cluster.process("mount").pid) is not None


@contextmanager
def mount_helper() -> Iterator[None]:
    """mount.fsd where mount(8) looks for it: this checkout's that scripts/up has linked, else one for this test."""
    helper = Path("/usr/sbin/mount.fsd")
    if helper.is_symlink() or helper.exists():
        ours = ROOT / ".venv" / "bin" / "mount.fsd"
        if not (helper.is_symlink() and helper.readlink() == ours):
            pytest.skip(f"{helper} is not of this checkout, and is left alone")
        yield
        return
    helper.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m mount.mount_fsd "$@"\n')
    helper.chmod(0o755)
    try:
        yield
    finally:
        helper.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="mount(8) runs helpers only as root")
def test_mount_8_mounts_it_as_fstab_would(own_cluster: LocalCluster, tmp_path: Path) -> None:
    own_cluster.up()
    other = own_cluster.directory / "other"
    other.mkdir()
    config = tmp_path / "fsd.toml"
    config.write_text(f'[log]\nfile = "{own_cluster.data / "log" / "mount-8.log"}"\n')

    def mount_8(options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["mount", "-t", "fsd", own_cluster.address, str(other), "-o", options],
            env=own_cluster.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    with mount_helper():
        done = mount_8(f"rw,noatime,_netdev,nofail,x-systemd.automount,budget_mib=64,config={config}")
        assert done.returncode == 0, done.stderr
        (other / "file").write_text("through mount(8)")
        assert (own_cluster.mountpoint / "file").read_text() == "through mount(8)"
        subprocess.run(["umount", str(other)], check=True)
        refused = mount_8("budget_mb=3")
        assert refused.returncode == 1
        assert "did you mean 'budget_mib'?" in refused.stderr


def test_a_daemon_that_hangs_is_told_and_can_be_taken_away(own_cluster: LocalCluster) -> None:
    own_cluster.up()
    hanging = own_cluster.kill("mount", signal.SIGSTOP)
    assert mount_table.answers(str(own_cluster.mountpoint), timeout_s=0.5) is None
    own_cluster.fsd("umount", own_cluster.mountpoint, "--lazy")
    assert mount_table.find(str(own_cluster.mountpoint)) is None
    hanging.signal(signal.SIGCONT)
    assert hanging.wait_end(30)
