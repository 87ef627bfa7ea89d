"""Access control lists, immutable and append-only, files without a name, whiteouts: on a mount, with the usual tools.

Each script runs on the mount and on the machine's own file system, and must say the same.
"""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from metadata.protocol import FS_IMMUTABLE_FL
from tests.e2e.places import Place
from tests.support import linux
from tests.support.cluster import FRONTEND
from tests.support.twin import acting_as, renameat2

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.skipif(os.geteuid() != 0, reason="acts as several users, sets flags"),
    pytest.mark.skipif(FRONTEND != "direct", reason="pyfuse3 carries none of these"),
]

LISTS = r"""
exec 2>&1
umask 022
mkdir d && setfacl -m u:1000:rwx,g:2000:r-x d && getfacl -n d
as 1000 touch d/by-1000; as 1001 touch d/by-1001; as 2000 ls d
chmod 750 d; getfacl -n d; as 1000 touch d/again
setfacl -d -m u:1001:rw,g::r d && getfacl -n d
(umask 077; touch d/file; mkdir d/sub; mkfifo d/fifo; ln -s to d/link)
getfacl -n d/file d/sub d/fifo; stat -c '%n %A' d/link
cp -a d copy; getfacl -nR copy
tar --acls -cf t.tar d && mkdir out && tar --acls -xf t.tar -C out && getfacl -nR out/d
rsync -aA d/ synced && getfacl -nR synced
setfacl -b d; setfacl -k d; getfacl -n d; stat -c %A d
touch f; setfacl -m g:2000:rw f; setfacl -x g:2000 f; getfacl -n f; setfacl -b f; getfacl -n f
setfacl -d -m u:1:r f
as 1000 setfacl -m u:1000:rwx f
chown 1000:2000 f; chmod 2755 f; as 1000 setfacl -m u:1:r f; stat -c %A f
"""
FLAGS = r"""
exec 2>&1
echo one > f; mkdir d; echo two > d/g
chattr +i f; flags f
echo more >> f; rm f; mv f h; ln f h; chmod 600 f; touch f; truncate -s 0 f; setfattr -n user.a -v b f; cat f
chattr -i +a f; flags f
echo two >> f; echo three > f; touch f; rm f; mv f h; ln f h; chmod 600 f; cat f
chattr -a f; rm f && echo removed
chattr +a d; touch d/new; rm d/g; mv d/g d/h; mkdir d/sub; rmdir d/sub; mv d e; ls d
chattr -a +i d; touch d/newer; rm d/g; rmdir d/sub; echo more >> d/g; cat d/g; rm -r d 2>&1 | sort
as 1000 chattr -i d; flags d
chattr -i d; rm -r d && echo removed
"""
PRELUDE = r"""
as() { id=$1; shift; setpriv --reuid $id --regid $id --clear-groups "$@"; }
flags() { lsattr -d "$1" | cut -c 1-22 | tr -d e-; }
"""


@pytest.fixture
def local() -> Iterator[Path]:
    with linux.public_directory() as made:
        yield made


def run(script: str, directory: Path) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", PRELUDE + script], cwd=directory, stdout=subprocess.PIPE, text=True, check=False, timeout=120
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize("script", [LISTS, FLAGS], ids=["lists", "flags"])
def test_the_usual_tools_say_what_they_say_of_a_local_directory(place: Place, local: Path, script: str) -> None:
    wanted = run(script, local)
    assert len(wanted) > 30
    assert run(script, place.directory) == wanted


def test_another_mount_sees_a_list_at_once_and_is_bound_by_it(place: Place) -> None:
    file = place.directory / "file"
    file.write_bytes(b"bytes")
    file.chmod(0o600)
    with place.second_mount() as other:
        assert refused(lambda: as_user(1000, lambda: (other / "file").read_bytes())) == errno.EACCES
        subprocess.run(["setfacl", "-m", "u:1000:r", file], check=True)
        assert as_user(1000, lambda: (other / "file").read_bytes()) == b"bytes"
        assert (other / "file").stat().st_mode & 0o777 == 0o640
        subprocess.run(["setfacl", "-b", other / "file"], check=True)
        assert refused(lambda: as_user(1000, lambda: file.read_bytes())) == errno.EACCES


def test_what_one_mount_makes_immutable_the_other_cannot_change(place: Place) -> None:
    file = place.directory / "file"
    file.write_bytes(b"bytes")
    with place.second_mount() as other:
        subprocess.run(["chattr", "+i", file], check=True)
        try:
            assert linux.get_flags(other / "file") == FS_IMMUTABLE_FL
            assert refused(lambda: (other / "file").write_bytes(b"other")) == errno.EPERM
            assert refused(lambda: (other / "file").unlink()) == errno.EPERM
            assert (other / "file").read_bytes() == b"bytes"
        finally:
            subprocess.run(["chattr", "-i", other / "file"], check=True)
        (other / "file").write_bytes(b"other")


@pytest.mark.parametrize("size", [5, 5 << 20])
def test_a_file_without_a_name_gets_one_by_its_descriptor(place: Place, size: int) -> None:
    descriptor = os.open(place.directory, os.O_TMPFILE | os.O_RDWR, 0o640)
    try:
        os.write(descriptor, b"x" * size)
        assert (os.fstat(descriptor).st_nlink, os.listdir(place.directory)) == (0, [])
        link_descriptor(descriptor, place.directory / "name")
        assert os.fstat(descriptor).st_nlink == 1
        os.write(descriptor, b"more")
    finally:
        os.close(descriptor)
    place.remount()
    assert (place.directory / "name").read_bytes() == b"x" * size + b"more"


def test_a_file_that_never_gets_a_name_leaves_nothing(place: Place) -> None:
    before = os.statvfs(place.directory)
    descriptor = os.open(place.directory, os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o640)
    os.write(descriptor, b"x" * 100)
    assert refused(lambda: link_descriptor(descriptor, place.directory / "name")) == errno.ENOENT
    os.close(descriptor)
    place.remount()
    after = os.statvfs(place.directory)
    assert after.f_files - after.f_ffree <= before.f_files - before.f_ffree
    assert os.listdir(place.directory) == []


def test_a_whiteout_is_left_by_rename(place: Place) -> None:
    old, new = place.directory / "old", place.directory / "new"
    old.write_bytes(b"bytes")
    renameat2(os.fsencode(old), os.fsencode(new), 4)
    assert new.read_bytes() == b"bytes"
    place.remount()
    left = old.lstat()
    assert (left.st_mode, left.st_rdev, left.st_nlink) == (0o020000, 0, 1)
    assert refused(lambda: renameat2(os.fsencode(new), os.fsencode(old), 4 | 2)) == errno.EINVAL
    assert refused(lambda: renameat2(os.fsencode(new), os.fsencode(old), 4 | 1)) == errno.EEXIST


def test_overlayfs_takes_the_mount_as_its_upper_layer(place: Place, tmp_path: Path) -> None:
    """Copies up, whiteouts, opaque directories: all through the kernel's overlayfs, and kept over a remount of it."""
    if "overlay" not in Path("/proc/filesystems").read_text():
        pytest.skip("the kernel has no overlayfs")
    lower, merged = tmp_path / "lower", tmp_path / "merged"
    upper, work = place.directory / "upper", place.directory / "work"
    for directory in (lower / "emptied", merged, upper, work):
        directory.mkdir(parents=True)
    for name in ("changed", "removed", "moved", "emptied/inside"):
        (lower / name).write_bytes(b"below")
    command = [
        "mount",
        "-t",
        "overlay",
        "overlay",
        "-o",
        f"lowerdir={lower},upperdir={upper},workdir={work}",
        str(merged),
    ]
    for is_first in (True, False):
        subprocess.run(command, check=True)
        try:
            if is_first:
                (merged / "changed").write_bytes(b"above")
                (merged / "removed").unlink()
                (merged / "moved").rename(merged / "elsewhere")
                (merged / "emptied/inside").unlink()
                (merged / "emptied").rmdir()
                (merged / "emptied").mkdir()
                (merged / "new").write_bytes(b"new")
            seen = {path.name: path.read_bytes() if path.is_file() else None for path in merged.rglob("*")}
            assert seen == {"changed": b"above", "elsewhere": b"below", "emptied": None, "new": b"new"}
        finally:
            subprocess.run(["umount", merged], check=True)


def as_user(user: int, act: Callable[[], bytes]) -> bytes:
    with acting_as(user):
        return act()


def refused(act: Callable[[], object]) -> int | None:
    """The errno; None: it was done."""
    try:
        act()
    except OSError as error:
        return error.errno
    return None


def link_descriptor(descriptor: int, path: Path) -> None:
    """linkat(2) of /proc/self/fd, as open(2) tells it for O_TMPFILE."""
    at_cwd, follow = -100, 0x400
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.linkat(at_cwd, b"/proc/self/fd/%d" % descriptor, at_cwd, os.fsencode(path), follow) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
