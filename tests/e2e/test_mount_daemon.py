"""The FUSE daemon itself: mounts that cannot be made, handlers that fail, ends that lose nothing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from fsd.daemon import MountConfig, MountError, run_mount
from tests.support.cluster import FRONTEND, LocalCluster, wait_until
from tests.support.daemon_process import DAEMON, ROOT, address, daemon
from wire.errors import NoSuchEntry, StoreError

pytestmark = pytest.mark.mounted

BROKEN_HANDLERS = """
class Broken(fsd.daemon.FileSystem):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.statfs = self.readlink = self.fail
        self.mkdir = self.fail_later
    def fail(self, *args):
        raise ZeroDivisionError("planted")
    async def fail_later(self, *args):
        await trio.sleep(0)
        raise ZeroDivisionError("planted later")
fsd.daemon.FileSystem = Broken
"""


def inode_count(cluster: LocalCluster) -> int:
    return int(cluster.status()["inodes"])


# --- mounts that cannot be made ---------------------------------------------------------------------------------------


async def mount_error(config: MountConfig) -> StoreError:
    """Why it cannot be mounted."""
    with pytest.raises(StoreError) as raised:
        await run_mount(config)
    return raised.value


async def test_a_mount_point_that_is_missing_or_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name, sentence in (("missing", "does not exist"), ("file", "is not a directory")):
        error = await mount_error(MountConfig(tmp_path / name, "127.0.0.1", 1))
        assert isinstance(error, MountError)
        assert sentence in error.detail
        assert str(tmp_path / name) in error.detail


async def test_a_busy_mount_point_is_named() -> None:
    error = await mount_error(MountConfig(Path("/proc"), "127.0.0.1", 1))
    assert "busy" in error.detail


async def test_a_service_that_is_away_is_told_in_time(tmp_path: Path) -> None:
    with trio.fail_after(10):
        error = await mount_error(MountConfig(tmp_path, "127.0.0.1", 1, timeout_s=1.0))
    assert "127.0.0.1" in error.detail
    assert str(tmp_path) not in await trio.Path("/proc/mounts").read_text()


async def test_a_missing_subdirectory_is_told(cluster: LocalCluster, tmp_path: Path) -> None:
    host, port = address(cluster)
    error = await mount_error(MountConfig(tmp_path, host, port, subdirectory=b"/no/such"))
    assert isinstance(error, NoSuchEntry)
    assert str(tmp_path) not in await trio.Path("/proc/mounts").read_text()


# --- handlers that fail -----------------------------------------------------------------------------------------------


def test_a_handler_that_fails_is_an_io_error_and_the_mount_lives(cluster: LocalCluster, directory: Path) -> None:
    with daemon(cluster, BROKEN_HANDLERS) as (process, mountpoint):
        there = mountpoint / directory.relative_to(cluster.mountpoint)
        (there / "link").symlink_to("x")
        for call in (lambda: os.statvfs(there), lambda: os.readlink(there / "link"), lambda: os.mkdir(there / "d")):
            for _ in range(3):
                with pytest.raises(OSError) as raised:
                    call()
                assert raised.value.errno == errno.EIO
        (there / "file").write_text("still works")
        assert (there / "file").read_text() == "still works"
        assert process.poll() is None
    assert process.returncode == 0


# --- ends that lose nothing -------------------------------------------------------------------------------------------


def test_bytes_of_an_open_file_survive_a_termination(cluster: LocalCluster, directory: Path) -> None:
    name = directory.relative_to(cluster.mountpoint) / "file"
    with daemon(cluster) as (process, mountpoint):
        descriptor = os.open(mountpoint / name, os.O_RDWR | os.O_CREAT)
        os.write(descriptor, b"x" * 10_000_000)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: process.poll() is not None, "the daemon to end")
        assert process.returncode == 0
        assert not os.path.ismount(mountpoint)
        with pytest.raises(OSError) as raised:
            os.close(descriptor)
        assert raised.value.errno == errno.ENOTCONN
    assert (cluster.mountpoint / name).read_bytes() == b"x" * 10_000_000


def test_an_unlinked_open_file_is_gone_when_its_mount_ends(cluster: LocalCluster, directory: Path) -> None:
    name = directory.relative_to(cluster.mountpoint) / "file"
    before = inode_count(cluster)
    with daemon(cluster) as (process, mountpoint):
        descriptor = os.open(mountpoint / name, os.O_RDWR | os.O_CREAT)
        os.write(descriptor, b"x" * 100)
        os.unlink(mountpoint / name)
        os.close(descriptor)
        subprocess.run(["umount", str(mountpoint)], check=True)
        wait_until(lambda: process.poll() is not None, "the daemon to end")
        assert process.returncode == 0
    wait_until(lambda: inode_count(cluster) <= before, "the inode to be reclaimed")


def test_a_mount_of_a_subdirectory_sees_only_that(cluster: LocalCluster, directory: Path, tmp_path: Path) -> None:
    (directory / "inside").write_text("x")
    path = os.fsencode(Path("/") / directory.relative_to(cluster.mountpoint))
    code = DAEMON.format(extra="").replace("timeout_s=20", f"timeout_s=20, subdirectory={path!r}")
    host, port = address(cluster)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), host, str(port), FRONTEND],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "mounted\n"
        assert os.listdir(tmp_path) == ["inside"]
        assert os.stat(tmp_path / "..").st_ino == os.stat(tmp_path.parent).st_ino
        (tmp_path / "made").mkdir()
        assert os.stat(tmp_path / "made" / "..").st_ino == os.stat(tmp_path).st_ino
        assert sorted(os.listdir(directory)) == ["inside", "made"]
        assert f"{host}:{port}:{os.fsdecode(path)} {tmp_path} fuse.fsd" in Path("/proc/mounts").read_text()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=False)
        process.communicate(timeout=60)


# --- alone and sharing ------------------------------------------------------------------------------------------------

NO_EPOCHS = """
from fsd.frontend.kernel_notifier import ThreadNotifier
ThreadNotifier._drop_all_names = lambda self: False
"""
"""As on a kernel before Linux 6.16, which must be told of every name."""


@pytest.mark.parametrize("extra", ["", NO_EPOCHS], ids=["names at once", "names one by one"])
def test_what_the_kernel_kept_alone_is_not_seen_again_when_another_mount_comes(
    own_cluster: LocalCluster, extra: str
) -> None:
    own_cluster.up()
    own_cluster.umount()
    with daemon(own_cluster, extra) as (_, first):
        (first / "d").mkdir()
        for name in ("changed", "removed", "renamed", "replaced", "grown"):
            (first / "d" / name).write_text("before")
        assert not (first / "d" / "missing").exists()
        listed = sorted(os.listdir(first / "d"))
        kept = [(first / "d" / name).read_text() for name in listed]
        assert set(kept) == {"before"}
        reader = os.open(first / "d" / "grown", os.O_RDONLY)
        with daemon(own_cluster) as (_, second):
            there = second / "d"
            (there / "changed").write_text("after!")
            (there / "removed").unlink()
            (there / "renamed").rename(there / "new")
            (there / "other").write_text("another")
            (there / "other").rename(there / "replaced")
            (there / "missing").write_text("made")
            with (there / "grown").open("a") as file:
                file.write(" and after")
            (there / "changed").chmod(0o600)
            seen = {name: (first / "d" / name).read_text() for name in sorted(os.listdir(first / "d"))}
            assert seen == {
                "changed": "after!",
                "grown": "before and after",
                "missing": "made",
                "new": "before",
                "replaced": "another",
            }
            assert (first / "d" / "changed").stat().st_mode & 0o777 == 0o600
            assert not (first / "d" / "removed").exists()
            assert not (first / "d" / "renamed").exists()
            (there / "changed").write_text("at last")
        wait_until(lambda: len(own_cluster.status()["sessions"]) == 1, "the second session to end")
        assert (first / "d" / "changed").read_text() == "at last"
        assert os.pread(reader, 100, 0) == b"before and after"
        os.close(reader)
