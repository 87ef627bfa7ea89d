"""Access times as programs see them, under each option of mount(8)."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mount import mount_table
from tests.e2e.places import Place
from tests.support.cluster import FRONTEND, LocalCluster

pytestmark = pytest.mark.mounted

SIZE = 300_000
PATIENCE_S = 10.0
"""How long a stopped daemon stays stopped at most."""


def atime(path: Path) -> int:
    return os.lstat(path).st_atime_ns


def cat(path: Path) -> None:
    subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)


def list_names(path: Path) -> None:
    os.listdir(path)


def map_and_look(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[0] is not None


def read_link(path: Path) -> None:
    os.readlink(path)


def changes(path: Path, act: Callable[[Path], None]) -> bool:
    """Whether the access time is another one after `act`, and then lies between."""
    before, began = atime(path), time.time_ns()
    act(path)
    after = atime(path)
    if after == before:
        return False
    assert began <= after <= time.time_ns()
    return True


def make(directory: Path, name: str, content: bytes = b"x" * SIZE) -> Path:
    path = directory / name
    path.write_bytes(content)
    return path


@contextmanager
def mounted_with(cluster: LocalCluster, place: Place, *options: str) -> Iterator[Path]:
    """The place, through the mount of a cluster that was mounted again with these options."""
    cluster.remount("-o", ",".join(options))
    try:
        yield place.directory
    finally:
        cluster.remount()


def kernel_options(place: Place) -> set[str]:
    assert place.cluster is not None
    entry = mount_table.find(str(place.cluster.mountpoint))
    assert entry is not None
    return set(entry.options.split(","))


# --- relatime ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"small", b"x" * SIZE], ids=["empty", "inline", "blocks"])
@pytest.mark.parametrize("again", [False, True], ids=["warm", "cold"])
def test_relatime_counts_the_first_read_after_each_change(place: Place, content: bytes, again: bool) -> None:
    path = make(place.directory, "f", content)
    if again:
        place.remount()
    assert changes(path, cat)
    assert not changes(path, cat)
    path.chmod(0o600)
    assert changes(path, cat)
    assert not changes(path, cat)
    with path.open("ab") as file:
        file.write(b"more")
    assert changes(path, cat)
    assert not changes(path, cat)


def test_touch_and_cat(place: Place) -> None:
    path = place.directory / "f"
    subprocess.run(["touch", path], check=True)
    assert changes(path, cat)
    assert not changes(path, cat)


def test_directories_symlinks_and_mappings_count(place: Place) -> None:
    directory = place.directory / "d"
    directory.mkdir()
    path = make(directory, "f")
    link = place.directory / "l"
    link.symlink_to("d/f")
    for what, act in ((directory, list_names), (path, map_and_look), (link, read_link)):
        assert changes(what, act)
        assert not changes(what, act)
    make(directory, "g")
    assert changes(directory, list_names)
    assert not changes(directory, list_names)


def test_what_does_not_read_does_not_count(place: Place) -> None:
    path = make(place.directory, "f")

    def read_unnoticed(path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOATIME)
        os.read(descriptor, SIZE)
        os.close(descriptor)

    def write_only(path: Path) -> None:
        os.close(os.open(path, os.O_WRONLY))

    def look(path: Path) -> None:
        os.stat(path)
        os.listxattr(path)
        os.access(path, os.R_OK)

    for act in (read_unnoticed, write_only, look):
        assert not changes(path, act)
    assert changes(path, cat)


def test_an_open_of_a_file_that_was_never_read_here_does_not_count(place: Place) -> None:
    path = make(place.directory, "f")
    place.remount()
    assert not changes(path, lambda path: os.close(os.open(path, os.O_RDONLY)))
    assert changes(path, cat)


def test_a_time_that_is_set_after_a_read_stays(place: Place) -> None:
    path = make(place.directory, "f")
    original = atime(path)
    cat(path)
    os.utime(path, ns=(original, path.stat().st_mtime_ns))
    assert atime(path) == original
    place.remount()
    assert atime(path) == original


def test_access_times_last(place: Place) -> None:
    path = make(place.directory, "f")
    cat(path)
    told = atime(path)
    place.remount()
    assert atime(path) == told
    assert not changes(path, cat)


def test_another_mount_sees_what_was_read_before_it_came(place: Place) -> None:
    path = make(place.directory, "f")
    cat(path)
    told = atime(path)
    with place.second_mount() as second:
        assert atime(second / "f") == told
        assert not changes(second / "f", cat)
        os.chmod(second / "f", 0o600)
        assert changes(second / "f", cat)


def test_what_is_read_again_comes_from_the_kernels_pages(place: Place) -> None:
    """With the daemon stopped: any request would hang until it is let go on."""
    if place.cluster is None:
        pytest.skip("there is no daemon to stop")
    path = make(place.directory, "f")
    cat(path)
    with path.open("rb", buffering=0) as file:
        daemon = place.cluster.process("mount")
        go_on = threading.Timer(PATIENCE_S, daemon.signal, [signal.SIGCONT])
        go_on.start()
        assert daemon.signal(signal.SIGSTOP)
        try:
            assert os.pread(file.fileno(), SIZE, 0) == b"x" * SIZE
            assert go_on.is_alive()
        finally:
            go_on.cancel()
            daemon.signal(signal.SIGCONT)


# --- other options ----------------------------------------------------------------------------------


@pytest.fixture
def cluster_of_place(place: Place) -> LocalCluster:
    if place.cluster is None:
        pytest.skip("another directory is not mounted by this test")
    return place.cluster


def test_noatime_never(place: Place, cluster_of_place: LocalCluster) -> None:
    path = make(place.directory, "f")
    with mounted_with(cluster_of_place, place, "noatime"):
        assert "noatime" in kernel_options(place)
        assert not changes(path, cat)
        assert not changes(place.directory, list_names)
    assert "relatime" in kernel_options(place)
    assert changes(path, cat)


def test_strictatime_always(place: Place, cluster_of_place: LocalCluster) -> None:
    path = make(place.directory, "f")
    with mounted_with(cluster_of_place, place, "strictatime"):
        assert FRONTEND == "pyfuse3" or not kernel_options(place) & {"noatime", "relatime"}
        for _ in range(3):
            assert changes(path, cat)
            assert changes(place.directory, list_names)


def test_nodiratime_spares_directories(place: Place, cluster_of_place: LocalCluster) -> None:
    path = make(place.directory, "f")
    with mounted_with(cluster_of_place, place, "nodiratime"):
        assert not changes(place.directory, list_names)
        assert changes(path, cat)


def test_a_read_only_mount_never(place: Place, cluster_of_place: LocalCluster) -> None:
    path = make(place.directory, "f")
    with mounted_with(cluster_of_place, place, "ro", "strictatime"):
        assert not changes(path, cat)
        assert not changes(place.directory, list_names)
