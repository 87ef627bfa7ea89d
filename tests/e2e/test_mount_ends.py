"""Every way in which a mount of the direct front end can end: nothing that was written is lost while its daemon lives.

Each test mounts the cluster a second time, by a process of its own, and looks through the first mount afterwards.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cluster import FRONTEND, LocalCluster, wait_until
from tests.support.daemon_process import daemon

pytestmark = [pytest.mark.mounted, pytest.mark.skipif(FRONTEND != "direct", reason="of the direct front end")]

CONTENT = b"0123456789abcdef" * 8192


@pytest.fixture
def fusectl(tmp_path: Path) -> Iterator[Path]:
    """The directory with an entry for each FUSE mount; not mounted everywhere."""
    where = tmp_path / "fusectl"
    where.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "fusectl", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


def unmounted(mountpoint: Path) -> bool:
    return f" {mountpoint} " not in Path("/proc/self/mounts").read_text()


END_BY: dict[str, Callable[[Path], list[str]]] = {
    "umount": lambda mountpoint: ["umount", str(mountpoint)],
    "fusermount3 -u": lambda mountpoint: ["fusermount3", "-u", str(mountpoint)],
    "umount -l": lambda mountpoint: ["umount", "-l", str(mountpoint)],
}


@pytest.mark.parametrize("how", END_BY)
def test_an_unmount_writes_back_what_was_written_and_mapped(how: str, cluster: LocalCluster, directory: Path) -> None:
    relative = directory.relative_to(cluster.mountpoint)
    with daemon(cluster) as (process, mountpoint):
        there = mountpoint / relative
        (there / "written").write_bytes(CONTENT)
        (there / "mapped").write_bytes(bytes(len(CONTENT)))
        with open(there / "mapped", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            mapped[:] = CONTENT
        subprocess.run(END_BY[how](mountpoint), check=True)
        wait_until(lambda: process.poll() is not None, "the daemon to end")
        assert process.returncode == 0
        assert unmounted(mountpoint)
    assert (directory / "written").read_bytes() == CONTENT
    assert (directory / "mapped").read_bytes() == CONTENT


def test_after_a_lazy_unmount_open_files_go_on_until_they_are_closed(cluster: LocalCluster, directory: Path) -> None:
    relative = directory.relative_to(cluster.mountpoint)
    with daemon(cluster) as (process, mountpoint):
        with open(mountpoint / relative / "file", "w+b", buffering=0) as file:
            subprocess.run(["umount", "-l", mountpoint], check=True)
            assert unmounted(mountpoint)
            file.write(CONTENT)
            assert os.pread(file.fileno(), 100, 0) == CONTENT[:100]
            assert process.poll() is None
        wait_until(lambda: process.poll() is not None, "the daemon to end")
        assert process.returncode == 0
    assert (directory / "file").read_bytes() == CONTENT


def test_sigterm_writes_back_what_open_files_and_mappings_hold(cluster: LocalCluster, directory: Path) -> None:
    relative = directory.relative_to(cluster.mountpoint)
    with daemon(cluster) as (process, mountpoint):
        there = mountpoint / relative
        (there / "mapped").write_bytes(bytes(len(CONTENT)))
        file = os.open(there / "mapped", os.O_RDWR)
        written = os.open(there / "written", os.O_WRONLY | os.O_CREAT)
        mapped = mmap.mmap(file, len(CONTENT))
        mapped[:] = CONTENT
        os.write(written, CONTENT)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: process.poll() is not None, "the daemon to end")
        assert process.returncode == 0
        assert unmounted(mountpoint)
        for descriptor in (written, file):
            with pytest.raises(OSError) as raised:
                os.close(descriptor)
            assert raised.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        mapped.close()
    assert (directory / "written").read_bytes() == CONTENT
    assert (directory / "mapped").read_bytes() == CONTENT


def test_an_abort_ends_the_daemon_and_keeps_what_it_had(cluster: LocalCluster, directory: Path, fusectl: Path) -> None:
    relative = directory.relative_to(cluster.mountpoint)
    with daemon(cluster) as (process, mountpoint):
        device = os.stat(mountpoint).st_dev
        file = os.open(mountpoint / relative / "file", os.O_WRONLY | os.O_CREAT)
        os.write(file, CONTENT)
        number = os.major(device) << 20 | os.minor(device)
        (fusectl / str(number) / "abort").write_text("1")
        wait_until(lambda: process.poll() is not None, "the daemon to end")
        assert process.returncode == 0
        assert unmounted(mountpoint)
        with pytest.raises(OSError) as raised:
            os.write(file, b"more")
        assert raised.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
        with pytest.raises(OSError):
            os.close(file)
    assert (directory / "file").read_bytes() == CONTENT


def test_after_sigkill_the_same_place_can_be_mounted_again(victim: LocalCluster) -> None:
    path = victim.mountpoint / "file"
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(file, CONTENT)
    os.fsync(file)
    victim.kill("mount")
    for call in (path.read_bytes, lambda: os.close(file)):
        with pytest.raises(OSError) as raised:
            call()
        assert raised.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    victim.mount()
    assert path.read_bytes() == CONTENT


STUCK_READS = """
class Stuck(fsd.daemon.FileSystem):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.read = self.stuck
    async def stuck(self, *args):
        await trio.sleep_forever()
fsd.daemon.FileSystem = Stuck
import fsd.frontend.direct.loop
fsd.frontend.direct.loop.FINISH_TIMEOUT_S = 1.0
"""


def test_a_process_that_waits_for_a_read_can_be_killed_and_a_harmless_signal_does_not_end_its_read(
    cluster: LocalCluster, directory: Path
) -> None:
    """The read never comes back: SIGKILL ends the process all the same; SIGWINCH, which does nothing, ends nothing."""
    name = directory.relative_to(cluster.mountpoint) / "file"
    (directory / "file").write_bytes(CONTENT)
    with daemon(cluster, STUCK_READS) as (process, mountpoint):
        reader = subprocess.Popen(["cat", mountpoint / name], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_until(lambda: waits_for_fuse(reader.pid), "the reader to wait")
        reader.send_signal(signal.SIGWINCH)
        assert waits_for_fuse(reader.pid)
        reader.kill()
        assert reader.wait(timeout=20) == -signal.SIGKILL
        assert reader.stderr is not None
        assert reader.stderr.read() == b""
        reader.stderr.close()
        assert process.poll() is None


def waits_for_fuse(pid: int) -> bool:
    """Whether it waits for an answer, or for a page that read-ahead has asked for."""
    stack = Path(f"/proc/{pid}/stack").read_text()
    return ("fuse" in stack or "folio_wait" in stack) and os.listdir(f"/proc/{pid}/fd") != []


def test_two_daemons_end_at_once_and_a_thread_that_notifies_holds_neither_up(
    cluster: LocalCluster, directory: Path
) -> None:
    """Both share, so the notifiers are at work while requests come and the daemons are told to end."""
    relative = directory.relative_to(cluster.mountpoint)
    with daemon(cluster) as (one, first), daemon(cluster) as (other, second):
        stop = threading.Event()

        def work(there: Path) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                try:
                    (there / f"f{number % 7}").write_bytes(CONTENT[:100])
                    (there / f"f{number % 5}").unlink(missing_ok=True)
                    os.listdir(there)
                except OSError:
                    continue

        threads = [threading.Thread(target=work, args=(mounted / relative,)) for mounted in (first, second)]
        for thread in threads:
            thread.start()
        try:
            for process in (one, other):
                process.send_signal(signal.SIGTERM)
            for process in (one, other):
                wait_until(lambda process=process: process.poll() is not None, "the daemon to end")  # type: ignore[misc]
                assert process.returncode == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert unmounted(first)
        assert unmounted(second)
