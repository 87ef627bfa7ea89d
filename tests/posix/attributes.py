"""chmod, chown, utimensat, truncate: who may, what they clear, and which times they move."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from tests.posix import calls
from tests.posix.table import Row, Table, acting_as

modes = Table("modes")
times = Table("times")
sizes = Table("sizes")

KINDS = ("file", "dir", "fifo", "char", "block", "socket")


@modes.rows
def chmods() -> Iterator[Row]:
    for kind in KINDS:
        for mode in ("0000", "0111", "0644", "0777", "01000", "02755", "04755", "06777", "07777"):
            yield Row(f"chmod {mode} of a {kind}", f"{kind} x", f"chmod x {mode}", "ok", f"x {kind} mode={mode} +c -am")
        yield Row(
            f"chmod of another's {kind}", f"{kind} x 0644 1002 1002", "chmod x 0600", "EPERM", "x mode=0644 -c", "alice"
        )
        yield Row(
            f"chmod of one's own {kind}", f"{kind} x 0644 1001 1001", "chmod x 0600", "ok", "x mode=0600", "alice"
        )
    yield Row("chmod of root's file", "file x", "chmod x 0777", "EPERM", "x mode=0644 -c", "alice")
    yield Row("group does not make one an owner", "file x 0664 1002 1001", "chmod x 0666", "EPERM", "", "carol")
    yield Row("chmod through a symlink", "file x;symlink x l", "chmod l 0600", "ok", "x mode=0600; l mode=0777")
    yield Row("chmod to what it is moves ctime", "file x", "chmod x 0644", "ok", "x +c -am")
    for user, group, kept in (
        ("alice", 1001, True),
        ("carol", 1001, True),
        ("dave", 2003, True),
        ("alice", 2001, False),
    ):
        uid = {"alice": 1001, "carol": 1003, "dave": 1004}[user]
        after = f"x mode=0{2755 if kept else 755}"
        told = f"sgid by {user} on a file of group {group}"
        yield Row(told, f"file x 0755 {uid} {group}", "chmod x 02755", "ok", after, user)
        told = f"sgid by {user} on a directory of group {group}"
        yield Row(told, f"dir x 0755 {uid} {group}", "chmod x 02755", "ok", after, user)
    yield Row("sticky on one's own file", "file x 0644 1001 1001", "chmod x 01644", "ok", "x mode=01644", "alice")
    yield Row("sticky on one's own directory", "dir x 0755 1001 1001", "chmod x 01755", "ok", "x mode=01755", "alice")
    yield Row("sgid by root for a foreign group", "file x 0755 1001 2001", "chmod x 02755", "ok", "x mode=02755")


@modes.case("fchmod of an open file", setup="file x", expect=0o4711)
def _() -> int:
    with calls.descriptor("x", os.O_RDONLY) as opened:
        os.fchmod(opened, 0o4711)
        return stat.S_IMODE(os.fstat(opened).st_mode)


@modes.case("the mode counts at open, not afterwards", setup="chmod . 0777;file x 0600 1001 1001", user="alice")
def _() -> None:
    with calls.descriptor("x", os.O_RDWR) as opened:
        os.chmod("x", 0)
        os.write(opened, b"still mine")
        assert os.pread(opened, 20, 0) == b"still mine"


@modes.rows
def what_a_mode_allows() -> Iterator[Row]:
    """Class by class: the first that fits decides, even when a later one would allow."""
    tries = (("r", "open x r", 4), ("w", "open x w", 2), ("rw", "open x rw", 6), ("access x", "access x x", 1))
    for user, shift in (("alice", 6), ("carol", 3), ("dave", 3), ("bob", 0)):
        for told, call, bits in tries:
            only = bits << shift
            setup = f"file x 0{only:o} 1001 1001"
            yield Row(f"{told} by {user} with just 0{only:o}", setup, call, "ok", "", user)
            others = 0o777 & ~(7 << shift)
            setup = f"file x 0{others:o} 1001 1001"
            yield Row(f"{told} by {user} with all but his own 0{others:o}", setup, call, "EACCES", "", user)
    yield Row("root reads and writes everything", "file x 0000 1001 1001", "open x rw", "ok")
    yield Row("root executes what anybody may", "file x 0001 1001 1001", "access x x", "ok")
    yield Row("root does not execute what nobody may", "file x 0666 1001 1001", "access x x", "EACCES")
    yield Row("root searches a directory without bits", "dir x 0000 1001 1001", "access x rwx", "ok")
    yield Row("listing needs the read bit", "dir x 0311 1001 1001", "listdir x", "EACCES", "", "alice")
    yield Row("listing without search", "dir x 0444 1001 1001;file x/f", "listdir x", [b"f"], "", "alice")
    yield Row("O_TRUNC needs the write bit", "data x 3 0444 1001 1001", "open x r,trunc", "EACCES", "x size=3", "alice")
    yield Row(
        "truncate needs the write bit", "data x 3 0444 1001 1001", "truncate x 0", "EACCES", "x size=3 -mc", "alice"
    )


@modes.rows
def chowns() -> Iterator[Row]:
    for kind in KINDS:
        yield Row(f"chown of a {kind}", f"{kind} x", "chown x 123 456", "ok", "x uid=123 gid=456 +c -am")
        yield Row(f"lchown of a {kind}", f"{kind} x", "lchown x 123 456", "ok", "x uid=123 gid=456 +c -am")
        yield Row(f"uid alone of a {kind}", f"{kind} x 0644 5 6", "chown x 123 -1", "ok", "x uid=123 gid=6")
        yield Row(f"gid alone of a {kind}", f"{kind} x 0644 5 6", "chown x -1 456", "ok", "x uid=5 gid=456")
    yield Row("large ids", "file x", "chown x 4294967294 4294967294", "ok", "x uid=4294967294 gid=4294967294")
    yield Row("chown follows a symlink", "file x;symlink x l", "chown l 123 456", "ok", "x uid=123; l uid=0")
    yield Row("lchown does not", "file x;symlink x l", "lchown l 123 456", "ok", "x uid=0; l uid=123 gid=456")
    mine = "file x 0644 1004 1004"
    for gid in ("1004", "2001", "2002", "1001", "2003"):
        yield Row(f"one's own file to one's group {gid}", mine, f"chown x -1 {gid}", "ok", f"x gid={gid} +c", "dave")
        yield Row(f"with one's uid, to {gid}", mine, f"chown x 1004 {gid}", "ok", f"x gid={gid}", "dave")
    yield Row("to a group one is not in", mine, "chown x -1 2999", "EPERM", "x gid=1004 -c", "dave")
    yield Row("giving a file away", mine, "chown x 1001 -1", "EPERM", "x uid=1004 -c", "dave")
    yield Row("taking a file", "file x 0666 1002 1004", "chown x 1004 -1", "EPERM", "x uid=1002", "dave")
    yield Row("the group of another's file", "file x 0666 1002 1004", "chown x -1 2001", "EPERM", "x gid=1004", "dave")
    yield Row("nothing, by the owner", mine, "chown x -1 -1", "ok", "x uid=1004 gid=1004", "dave")
    yield Row("what it is, by the owner", mine, "chown x 1004 1004", "ok", "x uid=1004 gid=1004", "dave")


@modes.rows
def bits_that_chown_clears() -> Iterator[Row]:
    """By anybody, root included: suid, and sgid if the group may execute; of a directory neither."""
    for user, setup in (("root", "{} x {} 0 0"), ("dave", "{} x {} 1004 1004;chmod x {}")):
        for mode, left in (
            ("04755", "0755"),
            ("06755", "0755"),
            ("02755", "0755"),
            ("02710", "0710"),
            ("06777", "0777"),
            ("01755", "01755"),
            ("04644", "0644"),
        ):
            made = setup.replace("{}", "file", 1).replace("{}", mode)
            yield Row(
                f"chown of {mode} by {user}",
                made,
                "chown x -1 2001" if user == "dave" else "chown x 5 6",
                "ok",
                f"x mode={left}",
                user,
            )
        made = setup.replace("{}", "dir", 1).replace("{}", "06755")
        call = "chown x -1 2001" if user == "dave" else "chown x 5 6"
        yield Row(f"chown of a directory 06755 by {user}", made, call, "ok", "x mode=06755", user)
    yield Row("sgid without group execution, by root", "file x 02745 0 0", "chown x 5 6", "ok", "x mode=02745")


@modes.rows
def bits_that_writing_clears() -> Iterator[Row]:
    for mode, left in (("04777", "0777"), ("02777", "0777"), ("06777", "0777"), ("01777", "01777"), ("06666", "02666")):
        setup = f"data x 5 {mode} 1002 1001"
        yield Row(f"write to {mode} by another", setup, "write x 3", "ok", f"x mode={left} +mc", "alice")
        yield Row(f"truncate of {mode} by another", setup, "truncate x 3", "ok", f"x mode={left} +mc", "alice")
        yield Row(f"O_TRUNC of {mode} by another", setup, "open x w,trunc", "ok", f"x mode={left} +mc", "alice")
        yield Row(f"reading of {mode} by another", setup, "read x", b"ddddd", f"x mode={mode} -mc", "alice")
        yield Row(f"write to {mode} by root", setup, "write x 3", "ok", f"x mode={mode} +mc")
        yield Row(f"opening {mode} for writing", setup, "open x w", "ok", f"x mode={mode} -mc", "alice")
    yield Row("write by the owner", "data x 5 06777 1001 1001", "write x 3", "ok", "x mode=0777", "alice")


@times.rows
def setting_times() -> Iterator[Row]:
    for kind in KINDS:
        yield Row(f"both times of a {kind}", f"{kind} x", "utimens x 1 2", "ok", "x atime=1 mtime=2 +c")
        yield Row(f"now of a {kind}", f"{kind} x;utimens x 1 2", "utimens x now now", "ok", "x +amc")
        yield Row(f"neither of a {kind}", f"{kind} x;utimens x 1 2", "utimens x omit omit", "ok", "x -amc")
        yield Row(
            f"mtime alone of a {kind}", f"{kind} x;utimens x 1 2", "utimens x omit 5", "ok", "x atime=1 mtime=5 +c"
        )
        yield Row(
            f"atime alone of a {kind}", f"{kind} x;utimens x 1 2", "utimens x 5 omit", "ok", "x atime=5 mtime=2 +c"
        )
        yield Row(
            f"atime now, mtime set, of a {kind}", f"{kind} x;utimens x 1 2", "utimens x now 5", "ok", "x mtime=5 +ac"
        )
        yield Row(
            f"atime set, mtime now, of a {kind}", f"{kind} x;utimens x 1 2", "utimens x 5 now", "ok", "x atime=5 +mc"
        )
        yield Row(f"now alone, of a {kind}", f"{kind} x;utimens x 1 2", "utimens x omit now", "ok", "x atime=1 +mc")
    for when in (
        "0",
        "0.000000001",
        "1.999999999",
        "1600000000.123456789",
        "2147483647.999999999",
        "2147483648",
        "4294967296.5",
    ):
        shown = when if "." not in when else when.split(".")[0] + "." + when.split(".")[1]
        yield Row(f"the time {when}", "file x", f"utimens x {when} {when}", "ok", f"x atime={shown} mtime={shown}")
    for when in ("-1", "-2147483648"):
        yield Row(
            f"the time {when}, before 1970", "file x", f"utimens x {when} {when}", "ok", f"x atime={when} mtime={when}"
        )
    yield Row("the end of ext4's times", "file x", "utimens x 15032385535 15032385535", "ok", "x mtime=15032385535")
    yield Row("times of a symlink", "file x;symlink x l", "lutimens l 1 2", "ok", "l atime=1 mtime=2; x -amc")
    yield Row("times through a symlink", "file x;symlink x l", "utimens l 1 2", "ok", "x atime=1 mtime=2; l -m")
    yield Row("too many nanoseconds", "file x", "utimens x 1.1000000000 2", "EINVAL", "x -amc")
    yield Row("negative nanoseconds", "file x", "utimens x 1.-5 2", "EINVAL", "x -amc")
    yield Row("a time keeps its order with the clock", "file x;utimens x 1 2", "touch x", "ok", "x +amc")


@times.case("a time that no inode can have becomes the nearest that it can", setup="file x", expect=[True] * 2)
def _() -> object:
    found = []
    for seconds in (1 << 40, -(1 << 40)):
        calls.utimensat(b"x", ((seconds, 0), (seconds, 0)))
        status = os.stat("x")
        bound = 9_000_000_000 if seconds > 0 else 2_000_000_000  # The years 2255 and 1907: nobody should have less.
        found.append(status.st_mtime_ns == status.st_atime_ns and abs(status.st_mtime_ns) > bound * 10**9)
    return found


@times.rows
def who_may_set_times() -> Iterator[Row]:
    """A given time: the owner.  Now, for both: whoever may write."""
    for mode, owner, user, may_set, may_touch in (
        ("0444", "1001 1001", "alice", "ok", "ok"),
        ("0000", "1001 1001", "alice", "ok", "ok"),
        ("0644", "1002 1002", "alice", "EPERM", "EACCES"),
        ("0666", "1002 1002", "alice", "EPERM", "ok"),
        ("0664", "1002 1001", "alice", "EPERM", "ok"),
        ("0664", "1002 1001", "carol", "EPERM", "ok"),
        ("0604", "1002 1001", "carol", "EPERM", "EACCES"),
        ("0000", "1002 1002", "root", "ok", "ok"),
    ):
        setup = f"file x {mode} {owner}"
        told = f"{mode} of {owner} by {user}"
        yield Row(f"set, {told}", setup, "utimens x 1 2", may_set, "", user)
        yield Row(f"set mtime alone, {told}", setup, "utimens x omit 2", may_set, "", user)
        yield Row(f"now and a given time, {told}", setup, "utimens x now 2", may_set, "", user)
        yield Row(f"now alone, {told}", setup, "utimens x now omit", may_set, "", user)
        yield Row(f"now, {told}", setup, "utimens x now now", may_touch, "", user)
        yield Row(f"without times, {told}", setup, "touch x", may_touch, "", user)
        yield Row(f"omit, {told}", setup, "utimens x omit omit", "ok", "x -amc", user)


@times.rows
def times_that_calls_move() -> Iterator[Row]:
    yield Row("write", "data x 5", "write x 3", "ok", "x +mc size=5")
    yield Row("write of nothing", "data x 5", "write x 0", "ok", "x -mc")
    yield Row("truncate to less", "data x 5", "truncate x 3", "ok", "x +mc")
    yield Row("truncate to more", "data x 5", "truncate x 9", "ok", "x +mc")
    yield Row("truncate to what it is", "data x 5", "truncate x 5", "ok", "x +mc")
    yield Row("O_TRUNC", "data x 5", "open x w,trunc", "ok", "x +mc size=0")
    yield Row("O_TRUNC of an empty file", "file x", "open x w,trunc", "ok", "x +mc size=0")
    yield Row("open for writing", "data x 5", "open x rw", "ok", "x -mc")
    yield Row("setxattr", "file x", "setxattr x user.a 1", "ok", "x +c -am")
    yield Row("removexattr", "file x;setxattr x user.a 1", "removexattr x user.a", "ok", "x +c -am")
    yield Row("a refused setxattr", "file x;setxattr x user.a 1", "setxattr x user.a 1 1", "EEXIST", "x -amc")
    yield Row("stat moves nothing", "file x", "stat x", "ok", "x -amc")
    yield Row("a listing moves no mtime", "dir x", "listdir x", [], "x -mc")
    yield Row("a lookup moves nothing", "dir x;file x/y", "stat x/y", "ok", "x -amc")


@times.case("times by descriptor", setup="file x", expect=(1_000_000_001, 2_000_000_002))
def _() -> object:
    with calls.descriptor("x", os.O_RDONLY) as opened:
        os.utime(opened, ns=(1_000_000_001, 2_000_000_002))
        found = os.fstat(opened)
        return found.st_atime_ns, found.st_mtime_ns


@times.case("mtime that was set stays over the close of a file that was written before", setup="file x", expect=5)
def _() -> object:
    with calls.descriptor("x", os.O_WRONLY) as opened:
        os.write(opened, b"some bytes")
        os.utime(opened, ns=(5, 5))
    return os.stat("x").st_mtime_ns


@times.case("a birth time that nothing moves", setup="file x", expect=True, needs=("btime",))
def _() -> object:
    born = calls.statx(b"x").btime_ns
    os.chmod("x", 0o600)
    os.utime("x", ns=(1, 1))
    os.rename("x", "y")
    with calls.descriptor("y", os.O_WRONLY | os.O_TRUNC) as opened:
        os.write(opened, b"more")
    found = calls.statx(b"y")
    return bool(found.mask & calls.STATX_BTIME) and found.btime_ns == born and born <= os.stat("y").st_ctime_ns


@times.rows
def access_times() -> Iterator[Row]:
    """relatime: reading moves an atime that is older than mtime or ctime."""
    needs = ("relatime",)
    yield Row("reading moves an old atime", "data x 5;utimens x 1 2", "read x", b"ddddd", "x +a -mc", needs=needs)
    yield Row("reading nothing", "file x;utimens x 1 2", "read x", b"", "x -mc", needs=needs)
    yield Row("a listing moves an old atime", "dir x;utimens x 1 2", "listdir x", [], "x +a -mc", needs=needs)
    yield Row("readlink moves an old atime", "symlink t x;lutimens x 1 2", "readlink x", "t", "x +a -mc", needs=needs)
    yield Row("O_NOATIME moves none", "data x 5;utimens x 1 2", "open x r,noatime", "ok", "x -amc", needs=needs)
    yield Row("O_NOATIME on another's file", "data x 5 0666 1002 1002", "open x r,noatime", "EPERM", "", "alice")
    yield Row("O_NOATIME on one's own file", "data x 5 0666 1001 1001", "open x r,noatime", "ok", "", "alice")


@sizes.rows
def truncations() -> Iterator[Row]:
    for size in ("0", "1", "4095", "4096", "4097", "16384", "16385", "1048576", "4194305", "5000000000"):
        yield Row(f"of an empty file to {size}", "file x", f"truncate x {size}", "ok", f"x size={size} +mc")
        yield Row(f"of 20000 bytes to {size}", "data x 20000", f"truncate x {size}", "ok", f"x size={size} +mc")
    yield Row("an extended file reads zeros", "data x 3;truncate x 6", "read x", b"ddd\0\0\0")
    yield Row("bytes that were cut do not come back", "data x 6;truncate x 3;truncate x 6", "read x", b"ddd\0\0\0")
    yield Row(
        "bytes cut and grown over a page",
        "data x 5000;truncate x 10;truncate x 5000",
        "read x",
        b"d" * 10 + bytes(4990),
    )
    yield Row("to a negative size", "data x 3", "truncate x -1", "EINVAL", "x size=3 -mc")
    yield Row("of a directory", "dir x", "truncate x 0", "EISDIR", "x -mc")
    yield Row("of a directory one may not write", "dir x 0555 1002 1002", "truncate x 0", "EISDIR", "", "alice")
    for kind in ("fifo", "socket", "char"):
        yield Row(f"of a {kind}", f"{kind} x", "truncate x 0", "EINVAL", "x -mc")
    yield Row(
        "of another's file that may be written", "data x 5 0666 1002 1002", "truncate x 2", "ok", "x size=2", "alice"
    )
    yield Row("holes take no room", "file x;truncate x 100000000", "stat x", "ok", "x blocks=0 size=100000000")


@sizes.case("ftruncate of what was opened for reading", setup="data x 5", expect="EINVAL")
def _() -> None:
    with calls.descriptor("x", os.O_RDONLY) as opened:
        os.ftruncate(opened, 2)


@sizes.case("ftruncate needs no right but the descriptor", setup="data x 5 0600 1001 1001", expect=2)
def _() -> int:
    with calls.descriptor("x", os.O_RDWR) as opened:
        with acting_as("bob"):
            os.ftruncate(opened, 2)
        return os.fstat(opened).st_size


@sizes.case("ftruncate of a file without names", setup="data x 5", expect=(b"dd\0\0", 0))
def _() -> object:
    with calls.descriptor("x", os.O_RDWR) as opened:
        os.unlink("x")
        os.ftruncate(opened, 2)
        os.ftruncate(opened, 4)
        return os.pread(opened, 10, 0), os.fstat(opened).st_nlink


@sizes.case("ftruncate does not move the position", setup="data x 10", expect=(7, 7))
def _() -> object:
    with calls.descriptor("x", os.O_RDWR) as opened:
        os.lseek(opened, 7, os.SEEK_SET)
        os.ftruncate(opened, 3)
        first = os.lseek(opened, 0, os.SEEK_CUR)
        assert os.read(opened, 5) == b""
        return first, os.lseek(opened, 0, os.SEEK_CUR)


@sizes.case("st_blocks of a file with a hole counts the bytes that are there", setup="file x", expect=True)
def _() -> bool:
    with calls.descriptor("x", os.O_WRONLY) as opened:
        os.pwrite(opened, b"x" * 65536, 0)
        os.pwrite(opened, b"x" * 65536, 10 << 20)
        os.fsync(opened)
        blocks = os.fstat(opened).st_blocks
    return 131072 <= blocks * 512 <= 131072 + 4 * 4096
