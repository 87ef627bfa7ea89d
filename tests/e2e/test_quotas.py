"""Directory quotas and the usage of trees, on real mounts."""

from __future__ import annotations

import errno
import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.places import Place
from tests.support.cluster import FRONTEND, LocalCluster

pytestmark = [pytest.mark.mounted, pytest.mark.skipif(os.geteuid() != 0, reason="root sets quotas")]

MIB = 1 << 20
STEPS = 150
EXPECTED = (0, errno.EEXIST, errno.ENOENT, errno.ENOTEMPTY, errno.EISDIR, errno.ENOTDIR, errno.EINVAL)


@pytest.fixture
def cluster_of(place: Place) -> LocalCluster:
    if place.cluster is None:
        pytest.skip("quotas are those of fsd")
    return place.cluster


def limit(path: Path, *, size: int | None = None, inodes: int | None = None) -> None:
    for name, most in (("bytes", size), ("inodes", inodes)):
        if most is not None:
            os.setxattr(path, f"fsd.quota.{name}", b"%d" % most)


def usage(path: Path) -> tuple[int, int]:
    """Bytes and inodes below a directory, without walking."""
    return int(os.getxattr(path, "fsd.usage.bytes")), int(os.getxattr(path, "fsd.usage.inodes"))


def walked(path: Path) -> tuple[int, int]:
    """The same as du(1) sees it: blocks of 512 bytes, and inodes, each once."""
    seen: dict[int, int] = {}
    for directory, subdirectories, files in os.walk(path):
        for name in (*subdirectories, *files):
            found = os.lstat(os.path.join(directory, name))
            seen[found.st_ino] = found.st_blocks
    return sum(seen.values()), len(seen)


def refused(act: Callable[[], object]) -> None:
    assert errno_of(act) == errno.EDQUOT


def errno_of(act: Callable[..., object], *arguments: object) -> int:
    """0: it was done."""
    try:
        act(*arguments)
    except OSError as error:
        return error.errno or -1
    return 0


def write_all(path: Path, data: bytes) -> None:
    """Write and fsync; the close after an error is quiet."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        at = 0
        while at < len(data):
            at += os.pwrite(descriptor, data[at : at + MIB], at)
        os.fsync(descriptor)
    finally:
        assert errno_of(os.close, descriptor) in (0, errno.EDQUOT)


def test_inodes_stop_at_the_limit_and_come_back_with_deletion(place: Place, cluster_of: LocalCluster) -> None:
    top = place.directory / "top"
    (top / "sub").mkdir(parents=True)
    limit(top, inodes=3)
    (top / "sub" / "a").touch()
    (top / "sub" / "b").symlink_to("a")
    refused(lambda: (top / "c").touch())
    refused(lambda: (top / "d").mkdir())
    refused(lambda: (top / "e").symlink_to("x"))
    refused(lambda: os.mkfifo(top / "f"))
    (top / "sub" / "a").unlink()
    (top / "c").touch()
    assert usage(top) == (0, 3)


def test_bytes_stop_at_the_limit_and_come_back_with_deletion(place: Place, cluster_of: LocalCluster) -> None:
    top = place.directory / "top"
    top.mkdir()
    limit(top, size=8 * MIB)
    write_all(top / "one", os.urandom(5 * MIB))
    refused(lambda: write_all(top / "two", os.urandom(4 * MIB)))
    assert usage(top)[0] <= 8 * MIB
    (top / "one").unlink()
    (top / "two").unlink()
    write_all(top / "three", os.urandom(8 * MIB))
    refused(lambda: write_all(top / "small", b"x" * 100))
    assert usage(top)[0] == 8 * MIB
    limit(top, size=9 * MIB)
    write_all(top / "small", b"x" * 100)
    assert usage(top)[0] == 8 * MIB + 100


def test_a_writer_goes_on_when_the_limit_was_raised(place: Place, cluster_of: LocalCluster) -> None:
    """Its bytes have stayed: what fsync could not store is stored by a later one, without being written again."""
    top = place.directory / "top"
    top.mkdir()
    limit(top, size=1000)
    data = os.urandom(300_000)
    with (top / "f").open("wb", buffering=0) as file:
        file.write(data)
        refused(lambda: os.fsync(file.fileno()))
        limit(top, size=MIB)
        os.fsync(file.fileno())
        file.write(b"more")
        os.fsync(file.fileno())
    place.remount()
    assert (top / "f").read_bytes() == data + b"more"
    assert usage(top) == (300_004, 1)


@pytest.mark.parametrize("seed", range(2))
def test_usage_is_what_du_finds_after_random_work(seed: int, place: Place, cluster_of: LocalCluster) -> None:
    chance = random.Random(seed)
    top = place.directory / "top"
    top.mkdir()
    for _ in range(STEPS):
        assert errno_of(any_work, chance, top) in EXPECTED
    os.sync()
    for directory, _, _ in os.walk(top):
        blocks, inodes = walked(Path(directory))
        told = usage(Path(directory))
        links = any(os.lstat(os.path.join(at, one)).st_nlink > 1 for at, _, files in os.walk(top) for one in files)
        if not links or directory == str(top):  # A file with names in two places counts in one of them.
            assert told[1] == inodes
            assert 0 <= blocks * 512 - told[0] < 512 * (inodes + 1)


def any_work(chance: random.Random, top: Path) -> None:
    directories = [Path(directory) for directory, _, _ in os.walk(top)]
    names = list(top.rglob("*")) or [top / "none"]
    new, old = chance.choice(directories) / f"n{chance.randrange(8)}", chance.choice(names)
    work: list[Callable[[], object]] = [
        lambda: new.mkdir(),
        lambda: write_all(new, os.urandom(chance.choice((10, 5000, 20_000, 200_000)))),
        lambda: os.rename(old, new),
        lambda: os.rename(old, new),
        lambda: os.link(old, new, follow_symlinks=False) if stat.S_ISREG(os.lstat(old).st_mode) else None,
        lambda: os.unlink(old),
        lambda: os.rmdir(old),
        lambda: os.truncate(old, chance.randrange(30_000)),
        lambda: os.symlink("x", new),
    ]
    chance.choice(work)()


def test_renames_into_a_quota_need_room_and_out_of_it_give_room(place: Place, cluster_of: LocalCluster) -> None:
    quota, outside = place.directory / "quota", place.directory / "outside"
    (quota / "in").mkdir(parents=True)
    (outside / "tree" / "sub").mkdir(parents=True)
    write_all(outside / "tree" / "sub" / "f", bytes(50_000))
    limit(quota, size=49_999)
    refused(lambda: os.rename(outside / "tree", quota / "tree"))
    limit(quota, size=50_000)
    os.rename(outside / "tree", quota / "tree")
    assert (usage(quota), usage(outside)) == ((50_000, 4), (0, 0))
    refused(lambda: write_all(quota / "g", b"x"))
    os.rename(quota / "tree", quota / "in" / "tree")
    os.rename(quota / "in" / "tree" / "sub", outside / "sub")
    os.unlink(quota / "g")
    write_all(quota / "h", bytes(50_000))
    assert (usage(quota), usage(outside)) == ((50_000, 3), (50_000, 2))


def test_hard_links_over_the_border_of_a_quota_count_where_they_were_made(
    place: Place, cluster_of: LocalCluster
) -> None:
    quota, outside = place.directory / "quota", place.directory / "outside"
    quota.mkdir()
    outside.mkdir()
    write_all(outside / "f", bytes(20_000))
    limit(quota, size=19_999)
    refused(lambda: os.link(outside / "f", quota / "f"))
    limit(quota, size=20_000)
    os.link(outside / "f", quota / "f")
    assert (usage(quota), usage(outside)) == ((0, 0), (20_000, 1))
    os.unlink(outside / "f")
    assert (usage(quota), usage(outside)) == ((20_000, 1), (0, 0))


def test_attributes_of_quotas_are_not_listed_and_not_kept(place: Place, cluster_of: LocalCluster) -> None:
    top = place.directory / "top"
    top.mkdir()
    (top / "f").touch()
    with pytest.raises(OSError) as caught:
        os.getxattr(top, "fsd.quota.bytes")
    assert caught.value.errno == errno.ENODATA
    os.setxattr(top, "fsd.quota.bytes", b"3K")
    assert os.getxattr(top, "fsd.quota.bytes") == b"3072"
    assert os.listxattr(top) == []
    with pytest.raises(OSError) as caught:
        os.getxattr(top / "f", "fsd.usage.bytes")
    assert caught.value.errno == errno.ENODATA
    with place.second_mount() as other:
        write_all(other / "top" / "g", b"12345")
        os.setxattr(other / "top", "fsd.quota.bytes", b"4K")
        assert usage(top) == (5, 2)
        assert os.getxattr(top, "fsd.quota.bytes") == b"4096"
    os.removexattr(top, "fsd.quota.bytes")
    with pytest.raises(OSError):
        os.getxattr(top, "fsd.quota.bytes")


def test_df_of_a_mounted_subdirectory_shows_its_quota(place: Place, cluster_of: LocalCluster) -> None:
    top = place.directory / "top"
    (top / "sub").mkdir(parents=True)
    write_all(top / "sub" / "f", bytes(MIB))
    limit(top, size=10 * MIB, inodes=100)
    inside = top.relative_to(cluster_of.mountpoint)
    mountpoint = cluster_of.directory / "mnt3"
    mountpoint.mkdir(exist_ok=True)
    for subdirectory in (inside, inside / "sub"):
        cluster_of.fsd("mount", f"{cluster_of.address}:/{subdirectory}", mountpoint, "--frontend", FRONTEND)
        try:
            told = os.statvfs(mountpoint)
        finally:
            cluster_of.fsd("umount", mountpoint)
        assert told.f_blocks * told.f_frsize == 10 * MIB
        assert told.f_bavail * told.f_frsize == told.f_bfree * told.f_frsize == 9 * MIB
        assert (told.f_files, told.f_ffree) == (100, 98)
    whole = os.statvfs(cluster_of.mountpoint)
    assert whole.f_blocks * whole.f_frsize > 10 * MIB


def test_two_mounts_share_one_quota(place: Place, cluster_of: LocalCluster) -> None:
    top = place.directory / "top"
    top.mkdir()
    limit(top, inodes=20, size=MIB)
    with place.second_mount() as other:
        made = 0
        for index in range(40):
            file = (place.directory, other)[index % 2] / "top" / f"f{index}"
            made += errno_of(write_all, file, bytes(10_000)) == 0
        assert made == 20
        assert usage(top) == usage(other / "top") == (200_000, 20)


def test_the_commands_set_show_list_and_clear(place: Place, cluster_of: LocalCluster) -> None:
    fsd, top = cluster_of.fsd, place.directory / "top"
    (top / "sub").mkdir(parents=True)
    fsd("quota", "set", top, "--bytes", "10M")
    fsd("quota", "set", top, "--inodes", "1K")
    fsd("quota", "set", top / "sub", "--inodes", "0")
    write_all(top / "f", bytes(1000))
    shown = json.loads(fsd("quota", "show", top / "sub", "--json").stdout)
    assert (shown["bytes_used"], shown["bytes_max"], shown["inodes_max"]) == (0, None, None)
    assert [(one["path"], one["bytes_used"], one["bytes_max"]) for one in shown["above"]] == [
        (str(top), 1000, 10 * MIB)
    ]
    assert "10.0 MiB" in fsd("quota", "show", top / "sub").stdout
    path = "/" + str(top.relative_to(cluster_of.mountpoint))
    listed = json.loads(fsd("quota", "list", cluster_of.mountpoint, "--json").stdout)
    assert [(one["path"], one["inodes_used"], one["inodes_max"]) for one in listed["quotas"]] == [(path, 2, 1024)]
    assert path in fsd("quota", "list", cluster_of.address).stdout
    assert "already" in fsd("quota", "set", top, "--bytes", "100").stderr
    fsd("quota", "set", top, "--bytes", "none")
    fsd("quota", "clear", top)
    fsd("quota", "clear", top)
    assert "no directory" in fsd("quota", "list", cluster_of.mountpoint).stderr


def test_commands_that_cannot_work_say_why(place: Place, cluster_of: LocalCluster) -> None:
    fsd, file = cluster_of.fsd, place.directory / "f"
    file.touch()
    assert "quotas are of directories" in fsd("quota", "set", file, "--bytes", "1M", status=[1]).stderr
    assert "not on an fsd mount" in fsd("quota", "show", cluster_of.data, status=[1]).stderr
    assert "--bytes SIZE, --inodes COUNT" in fsd("quota", "set", place.directory, status=[2]).stderr
    assert "is no limit" in fsd("quota", "set", place.directory, "--bytes", "much", status=[2]).stderr
    assert "No such file" in fsd("quota", "show", place.directory / "none", status=[1]).stderr


def test_a_stream_is_told_by_write_and_what_was_taken_is_stored(place: Place, cluster_of: LocalCluster) -> None:
    top = place.directory / "top"
    top.mkdir()
    limit(top, size=10 * MIB + 12_345)
    written = 0
    with (top / "f").open("wb", buffering=0) as file:

        def write_on() -> None:
            nonlocal written
            while written < 64 * MIB:
                written += file.write(bytes(300_000))

        refused(write_on)
        os.fsync(file.fileno())
    assert (top / "f").stat().st_size == written == 10 * MIB + 12_345
    assert usage(top) == (written, 1)


@pytest.mark.skipif(FRONTEND == "pyfuse3", reason="libfuse, as pyfuse3 has it, carries neither call")
def test_allocated_and_copied_ranges_stop_at_the_limit(place: Place, cluster_of: LocalCluster) -> None:
    top = place.directory / "top"
    top.mkdir()
    limit(top, size=3 * MIB)
    write_all(top / "f", os.urandom(MIB))
    with (top / "f").open("rb") as source, (top / "g").open("w+b") as target:
        refused(lambda: os.posix_fallocate(target.fileno(), 0, 2 * MIB + 1))
        os.truncate(target.fileno(), 0)
        os.posix_fallocate(target.fileno(), 0, MIB)
        assert os.copy_file_range(source.fileno(), target.fileno(), MIB, 0, MIB) == MIB
        refused(lambda: os.copy_file_range(source.fileno(), target.fileno(), MIB, 0, 2 * MIB))
        assert os.copy_file_range(source.fileno(), target.fileno(), MIB, 0, 0) == MIB
    assert usage(top) == (3 * MIB, 2)


def test_two_mounts_that_append_to_one_file_stop_at_the_limit(place: Place, cluster_of: LocalCluster) -> None:
    top = place.directory / "top"
    top.mkdir()
    limit(top, size=500_000)
    with place.second_mount() as other:
        taken = 0
        for index in range(100):
            side = (place.directory, other)[index % 2]
            taken += errno_of(append, side / "top" / "log", bytes(7000)) == 0
    assert taken == 500_000 // 7000
    assert (top / "log").stat().st_size == taken * 7000


def append(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        assert errno_of(os.close, descriptor) in (0, errno.EDQUOT)
