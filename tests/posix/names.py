"""Names: creating, linking, removing, renaming them; who may, what replaces what, which times and counts move."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tests.posix import calls
from tests.posix.table import Row, Table, wait_for_a_tick

names = Table("names")
renames = Table("renames")

KINDS = ("file", "dir", "fifo", "char", "block", "socket", "link-to-nowhere")
NOT_DIRECTORIES = tuple(kind for kind in KINDS if kind != "dir")
TYPE_OF = {"link-to-nowhere": "symlink"}


def type_of(kind: str) -> str:
    """The type that lstat tells of what the verb made."""
    return TYPE_OF.get(kind, kind)


MAKERS = (
    ("open %s w,creat,excl 0644", "file mode=0644 nlink=1 size=0"),
    ("open %s w,creat 0600", "file mode=0600"),
    ("open %s r,creat 0400", "file mode=0400"),
    ("mkdir %s 0755", "dir mode=0755 nlink=2"),
    ("mkdir %s 0151", "dir mode=0151"),
    ("mkfifo %s 0644", "fifo mode=0644"),
    ("mknod %s file 0640", "file mode=0640"),
    ("mknod %s fifo 0151", "fifo mode=0151"),
    ("mknod %s socket 0600", "socket mode=0600"),
    ("mknod %s char 0644", "char mode=0644"),
    ("mknod %s block 0644", "block mode=0644"),
    ("bind %s 0755", "socket mode=0755"),
    ("symlink target %s", "symlink target=target size=6"),
)


@names.rows
def what_is_made() -> Iterator[Row]:
    """Type, mode, owner, fresh times; the directory's mtime and ctime move, its atime does not."""
    for call, made in MAKERS:
        verb = " ".join(call.split()[::2])
        yield Row(f"{verb}: made", "dir d", call % "d/x", "ok", f"d/x {made} uid=0 gid=0; d +mc -a")
        if not verb.startswith("bind"):
            yield Row(f"{verb}: new times", "dir d", call % "d/x", "ok", "d/x fresh")
        if "char" in call or "block" in call:
            yield Row(f"{verb} by a user", "dir d 0777", call % "d/x", "EPERM", "d/x absent; d -amc", "alice")
            continue
        yield Row(f"{verb}: owner", "dir d 0777", call % "d/x", "ok", "d/x uid=1001 gid=1001", "alice")
        yield Row(
            f"{verb}: group of a directory with sgid",
            "dir d 0777 0 2001;chmod d 02777",
            call % "d/x",
            "ok",
            f"d/x uid=1001 gid=2001 {'mode=02755' if made.startswith('dir mode=0755') else ''}",
            "alice",
        )
        yield Row(f"{verb}: refused", "dir d;file d/x", call % "d/x", refusal(verb), "d -amc; d/x file -mc")


def refusal(verb: str) -> str:
    """The answer when the name is taken by a file."""
    plain_open = verb.startswith("open") and "excl" not in verb
    return "ok" if plain_open else "EADDRINUSE" if verb.startswith("bind") else "EEXIST"


@names.rows
def umasks() -> Iterator[Row]:
    for mask in ("0022", "0077", "0070", "0501", "0777"):
        for call in (
            "open x w,creat 0777",
            "mkdir x 0777",
            "mkfifo x 0777",
            "mknod x file 0777",
            "mknod x socket 0777",
        ):
            mode = 0o777 & ~int(mask, 8)
            yield Row(f"{call} with umask {mask}", "", f"umask {mask};{call}", "ok", f"x mode=0{mode:o}")
    yield Row("a symlink has all rights whatever the umask", "", "umask 0777;symlink t x", "ok", "x mode=0777")
    yield Row("umask does not touch the sticky bit", "", "umask 0777;mkdir x 01777", "ok", "x mode=01000")


@names.rows
def modes_with_special_bits() -> Iterator[Row]:
    yield Row("mkdir with the sticky bit", "", "mkdir x 01755", "ok", "x mode=01755")
    yield Row("mkdir ignores sgid of the mode", "", "mkdir x 02755", frozenset(["ok"]), "x mode=0755")
    yield Row("creat with suid", "", "open x w,creat 04755", "ok", "x mode=04755")
    yield Row("creat with sgid", "", "open x w,creat 02755", "ok", "x mode=02755")
    yield Row("creat with sticky", "", "open x w,creat 01644", "ok", "x mode=01644")
    sgid = "dir d 0777 0 2001;chmod d 02777"
    yield Row("sgid for a group one is not in", sgid, "open d/x w,creat 02775", "ok", "d/x mode=0775 gid=2001", "alice")
    yield Row("sgid for a supplementary group", sgid, "open d/x w,creat 02775", "ok", "d/x mode=02775 gid=2001", "dave")
    yield Row("sgid without group execution", sgid, "open d/x w,creat 02745", "ok", "d/x mode=02745 gid=2001", "alice")
    yield Row("a directory in one with sgid has it", sgid, "mkdir d/x 0700", "ok", "d/x mode=02700 gid=2001", "alice")


@names.rows
def symlinks() -> Iterator[Row]:
    yield Row("a target of 4095 bytes", "", "symlink {t4095} x", "ok", "x size=4095 target={t4095}")
    yield Row("a target of 4096 bytes", "", "symlink {t4096} x", "ENAMETOOLONG", "x absent")
    yield Row("a target of any bytes", "", "symlink %ff/%01 x", "ok", "x size=3 target=%ff/%01")
    yield Row("a target that is a path of its own", "dir d;file d/f", "symlink ../d/f d/l;stat d/l", "ok")
    yield Row("readlink of a file", "file x", "readlink x", "EINVAL")
    yield Row("readlink of a directory", "dir x", "readlink x", "EINVAL")
    yield Row("readlink moves no mtime", "symlink t x", "readlink x", "t", "x -mc")
    yield Row("the size of the target of a symlink", "", "symlink a/b/c x", "ok", "x size=5 nlink=1 uid=0")


@names.case("a symlink to the empty name cannot be made", expect="ENOENT")
def _() -> None:
    os.symlink(b"", b"x")


@names.rows
def links() -> Iterator[Row]:
    for kind in NOT_DIRECTORIES:
        yield Row(
            f"link of a {kind}",
            f"{kind} x;dir d",
            "link x d/y",
            "ok",
            f"d/y {type_of(kind)} same=x nlink=2; x nlink=2 +c -am; d +mc -a",
        )
        yield Row(f"unlink of one of two names of a {kind}", f"{kind} x;link x y", "unlink y", "ok", "x nlink=1 +c -am")
        yield Row(f"unlink of a {kind}", f"dir d;{kind} d/x", "unlink d/x", "ok", "d/x absent; d +mc -a")
    yield Row("link of a directory", "dir x", "link x y", "EPERM", "y absent; x -amc nlink=2")
    yield Row(
        "link of a directory by a user", "chmod . 0777;dir x 0777 1001 1001", "link x y", "EPERM", "y absent", "alice"
    )
    yield Row("unlink of a directory", "dir x", "unlink x", "EISDIR", "x dir -amc")
    yield Row(
        "unlink of a directory by a user", "chmod . 0777;dir x 0777 1001 1001", "unlink x", "EISDIR", "x dir", "alice"
    )
    yield Row("link from a name to itself", "file x", "link x x", "EEXIST", "x nlink=1 -amc")
    yield Row(
        "a refused link changes nothing", "dir d;file x;file d/y", "link x d/y", "EEXIST", "x nlink=1 -amc; d -amc"
    )
    yield Row("three names", "file x;link x y", "link y z", "ok", "x nlink=3; z same=x")
    yield Row("mode by another name", "file x;link x y", "chmod y 0600", "ok", "x mode=0600 +c -am")
    yield Row("size by another name", "file x;link x y", "truncate y 123", "ok", "x size=123 +mc")


@names.case("linkat follows a symlink when told to", setup="file f;symlink f l")
def _() -> None:
    calls.linkat(calls.AT_FDCWD, b"l", b"x", calls.AT_SYMLINK_FOLLOW)
    assert os.path.samefile(b"f", b"x")


@names.case("linkat of an O_PATH descriptor gives it a name", setup="file f", expect=2)
def _() -> int:
    with calls.descriptor(b"f", os.O_PATH) as opened:
        calls.linkat(opened, b"", b"x", calls.AT_EMPTY_PATH)
    return os.stat(b"f").st_nlink


@names.case("linkat of a file whose last name is gone", setup="file f", expect="ENOENT")
def _() -> None:
    with calls.descriptor(b"f", os.O_RDONLY) as opened:
        os.unlink(b"f")
        calls.linkat(opened, b"", b"x", calls.AT_EMPTY_PATH)


@names.rows
def protected_hard_links() -> Iterator[Row]:
    """fs.protected_hardlinks is the kernel's; only what holds with and without it is told here."""
    yield Row("link of one's own file", "chmod . 0777;file x 0600 1001 1001", "link x y", "ok", "y same=x", "alice")
    yield Row(
        "link of a file one may write", "chmod . 0777;file x 0666 1002 1002", "link x y", "ok", "y same=x", "alice"
    )


@names.rows
def directories() -> Iterator[Row]:
    yield Row("mkdir counts in the parent", "dir d", "mkdir d/x", "ok", "d nlink=3; d/x nlink=2")
    yield Row("rmdir counts in the parent", "dir d;dir d/x", "rmdir d/x", "ok", "d nlink=2 +mc -a; d/x absent")
    yield Row("a file does not count", "dir d", "mknod d/x file", "ok", "d nlink=2")
    for kind in KINDS:
        yield Row(f"rmdir of a directory with a {kind}", f"dir d;{kind} d/x", "rmdir d", "ENOTEMPTY", "d dir -amc")
        if kind != "dir":
            yield Row(f"rmdir of a {kind}", f"{kind} x", "rmdir x", "ENOTDIR", f"x {type_of(kind)} -amc")
    yield Row("rmdir of a symlink to a directory", "dir d;symlink d l", "rmdir l", "ENOTDIR", "d dir")
    yield Row(
        "a refused rmdir leaves the parent's times", "dir d;dir d/e;file d/e/x", "rmdir d/e", "ENOTEMPTY", "d -amc"
    )


@names.case(
    "a removed directory that is still open has no names and takes none", setup="dir d", expect=[[], "ENOENT", 0]
)
def _() -> list[object]:
    with calls.descriptor(b"d", os.O_RDONLY) as opened:
        os.rmdir(b"d")
        answers: list[object] = [os.listdir(opened)]
        try:
            os.mkdir(b"x", dir_fd=opened)
        except FileNotFoundError:
            answers.append("ENOENT")
        return [*answers, os.fstat(opened).st_nlink]


@names.case("a removed working directory", setup="dir d", expect=["ENOENT", "ENOENT", "ENOENT"])
def _() -> list[object]:
    here = os.open(b".", os.O_PATH)
    answers: list[object] = []
    try:
        os.chdir(b"d")
        os.rmdir(b"../d")
        for call in (lambda: os.mkdir(b"x"), lambda: os.stat(b"x"), os.getcwd):
            try:
                call()
            except FileNotFoundError:
                answers.append("ENOENT")
    finally:
        os.fchdir(here)
        os.close(here)
    return answers


@names.rows
def sticky_directories() -> Iterator[Row]:
    """In a sticky directory a name goes only by the owner of the file, the owner of the directory, or root."""
    owners = (("alice", 1001), ("bob", 1002), ("root", 0))
    for kind in ("file", "dir", "fifo", "socket", "link-to-nowhere"):
        verb = "rmdir" if kind == "dir" else "unlink"
        for directory_owner, uid in owners:
            for file_owner, file_uid in owners:
                setup = f"dir d 0777 {uid} {uid};chmod d 01777;{kind} d/x 0644 {file_uid} {file_uid}"
                allowed = "alice" in (directory_owner, file_owner)
                told = f"a {kind} of {file_owner} in a sticky directory of {directory_owner}"
                expect, left = ("ok", "absent") if allowed else (sticky_errno(), type_of(kind))
                yield Row(f"{verb} by alice of {told}", setup, f"{verb} d/x", expect, f"d/x {left}", "alice")
                yield Row(f"{verb} by root of {told}", setup, f"{verb} d/x", "ok", "d/x absent")
                yield Row(f"rename by alice of {told}", setup, "rename d/x d/y", expect, f"d/x {left}", "alice")
                yield Row(
                    f"rename by alice over {told}",
                    f"{setup};{kind} d/z 0644 1001 1001",
                    "rename d/z d/x",
                    expect,
                    f"d/z {'absent' if allowed else type_of(kind)}",
                    "alice",
                )
        not_sticky = f"dir d 0777 0 0;{kind} d/x 0644 1002 1002"
        yield Row(f"{verb} of another's {kind} without sticky", not_sticky, f"{verb} d/x", "ok", "d/x absent", "alice")


def sticky_errno() -> str:
    """Linux says EPERM."""
    return "EPERM"


@names.rows
def creating_in_sticky_directories() -> Iterator[Row]:
    setup = "dir d 0777 0 0;chmod d 01777;file d/x 0666 1002 1002"
    yield Row("creat of another's file in a sticky directory, no O_CREAT", setup, "open d/x w", "ok", user="alice")
    yield Row("link of another's file in a sticky directory", setup, "link d/x d/y", "ok", user="alice")
    yield Row("hiding by mkdir", setup, "mkdir d/x", "EEXIST", user="alice")


@renames.rows
def rename_in_place() -> Iterator[Row]:
    for kind in KINDS:
        kept = f"{type_of(kind)} uid=1001 gid=1002"
        yield Row(
            f"rename of a {kind}",
            f"dir d;{kind} d/x 0751 1001 1002",
            "rename d/x d/y",
            "ok",
            f"d/x absent; d/y {kept}; d +mc -a",
        )
        yield Row(
            f"rename of a {kind} to another directory",
            f"dir d;dir e;{kind} d/x 0751 1001 1002",
            "rename d/x e/y",
            "ok",
            f"d/x absent; e/y {kept}; d +mc -a; e +mc -a",
        )
        yield Row(
            f"rename of a {kind} to itself", f"dir d;{kind} d/x", "rename d/x d/x", "ok", f"d/x {type_of(kind)}; d -amc"
        )
    yield Row("a renamed inode's ctime moves", "file x;chmod x 0600", "rename x y", "ok", "y file mode=0600")
    yield Row("to another name of the same inode", "file x;link x y", "rename x y", "ok", "x file nlink=2; y same=x")
    yield Row("a name with itself by another path", "dir d;file d/x", "rename d/x d/../d/x", "ok", "d/x file")


@renames.case("ctime of what is renamed moves", setup="dir d;file x", expect=[True, True])
def _() -> list[object]:
    moved: list[object] = []
    for name in ("x", "d"):
        before = os.lstat(name).st_ctime_ns
        wait_for_a_tick()
        os.rename(name, "renamed")
        moved.append(os.lstat("renamed").st_ctime_ns > before)
        os.rename("renamed", name)
    return moved


@renames.rows
def rename_over() -> Iterator[Row]:
    """Every type over every type."""
    for old in KINDS:
        for new in KINDS:
            setup = f"dir d;dir e;{old} d/x 0751 1001 1001;{new} e/y 0640 1002 1002"
            expect = over(old, new)
            if expect == "ok":
                after = f"d/x absent; e/y {type_of(old)} uid=1001; d +mc -a; e +mc -a"
            else:
                after = f"d/x {type_of(old)} uid=1001 -amc; e/y {type_of(new)} uid=1002 -amc; d -amc; e -amc"
            yield Row(f"rename of a {old} over a {new}", setup, "rename d/x e/y", expect, after)
    yield Row("over a full directory", "dir x;dir y;file y/f", "rename x y", "ENOTEMPTY", "x dir; y/f file")
    yield Row("over an empty directory", "dir x;file x/f;dir y", "rename x y", "ok", "x absent; y/f file")
    yield Row("a replaced file loses a name", "file x;file y;link y z", "rename x y", "ok", "z nlink=1 +c -am")
    yield Row("a directory into itself", "dir x", "rename x x/y", "EINVAL", "x dir")
    yield Row("a directory into a descendant", "dir x;dir x/y", "rename x x/y/z", "EINVAL", "x/y dir")
    yield Row("a descendant over its ancestor", "dir x;dir x/y", "rename x/y x", "ENOTEMPTY", "x/y dir")
    yield Row(
        "a file over its own directory",
        "dir x;file x/y",
        "rename x/y x",
        frozenset(["ENOTEMPTY", "EISDIR"]),
        "x/y file",
    )
    yield Row(
        "a symlink is renamed, not what it leads to", "file f;symlink f l", "rename l m", "ok", "m symlink; f file"
    )
    yield Row("over a symlink replaces it", "file f;file x;symlink f l", "rename x l", "ok", "l file; f file")
    yield Row("counts of both parents", "dir d;dir e;dir d/x", "rename d/x e/x", "ok", "d nlink=2; e nlink=3")
    yield Row(
        "counts when a directory is replaced",
        "dir d;dir e;dir d/x;dir e/x",
        "rename d/x e/x",
        "ok",
        "d nlink=2; e nlink=3",
    )
    yield Row("counts within one parent", "dir d;dir d/x;dir d/y", "rename d/x d/y", "ok", "d nlink=3")
    yield Row("a file with a slash", "file x", "rename x y/", "ENOTDIR", "x file")
    yield Row("a directory with slashes", "dir x", "rename x/ y/", "ok", "y dir")


def over(old: str, new: str) -> str:
    """The answer of a rename of one type over another."""
    if old == "dir":
        return "ok" if new == "dir" else "ENOTDIR"
    return "EISDIR" if new == "dir" else "ok"


@renames.case("..  of a moved directory leads to its new parent", setup="dir d;dir e;dir d/x", expect=True)
def _() -> bool:
    os.rename("d/x", "e/x")
    return os.path.samefile("e/x/..", "e") and os.stat("d").st_nlink == 2


@renames.rows
def rename_rights() -> Iterator[Row]:
    """Both directories must be writable; a directory that changes its parent must be so itself."""
    for source, target in (("0555", "0777"), ("0777", "0555"), ("0666", "0777"), ("0777", "0666")):
        setup = f"dir d 0777 1001 1001;dir e 0777 1001 1001;file d/x 0644 1001 1001;chmod d {source};chmod e {target}"
        yield Row(f"from {source} to {target}", setup, "rename d/x e/y", "EACCES", "d/x file", "alice")
    moved = "dir d 0777 0 0;dir e 0777 0 0;dir d/x {} {}"
    for user, mode, owner, expect in (
        ("alice", "0755", "1001 1001", "ok"),
        ("alice", "0555", "1001 1001", "EACCES"),
        ("alice", "0755", "1002 1002", "EACCES"),
        ("alice", "0757", "1002 1002", "ok"),
        ("carol", "0775", "1002 1001", "ok"),
        ("carol", "0755", "1002 1001", "EACCES"),
        ("root", "0000", "1002 1002", "ok"),
    ):
        setup = moved.format(mode, owner)
        yield Row(
            f"a directory {mode} of {owner} to another parent by {user}", setup, "rename d/x e/x", expect, "", user
        )
        yield Row(f"a directory {mode} of {owner} within its parent by {user}", setup, "rename d/x d/y", "ok", "", user)
    yield Row(
        "a file needs no rights of its own", "chmod . 0777;file x 0000 1002 1002", "rename x y", "ok", "", "alice"
    )


@renames.rows
def rename_flags() -> Iterator[Row]:
    for kind in KINDS:
        yield Row(
            f"NOREPLACE, {kind} to a free name",
            f"{kind} x",
            "rename x y noreplace",
            "ok",
            f"y {type_of(kind)}; x absent",
        )
        yield Row(
            f"NOREPLACE over a {kind}", f"file x;{kind} y", "rename x y noreplace", "EEXIST", "x file -amc; . -amc"
        )
        for other in KINDS:
            yield Row(
                f"EXCHANGE of a {kind} and a {other}",
                f"dir d;dir e;{kind} d/x 0700 1001 1001;{other} e/y 0700 1002 1002",
                "rename d/x e/y exchange",
                "ok",
                f"d/x {type_of(other)} uid=1002; e/y {type_of(kind)} uid=1001;"
                f"d +mc nlink={3 if other == 'dir' else 2}; e +mc nlink={3 if kind == 'dir' else 2}",
            )
    yield Row("NOREPLACE over the same inode", "file x;link x y", "rename x y noreplace", "EEXIST", "x nlink=2")
    yield Row("EXCHANGE with nothing", "file x", "rename x y exchange", "ENOENT", "x file; y absent")
    yield Row("EXCHANGE of nothing", "file y", "rename x y exchange", "ENOENT", "y file; x absent")
    yield Row(
        "EXCHANGE of a directory and what is in it", "dir x;file x/y", "rename x x/y exchange", "EINVAL", "x/y file"
    )
    yield Row(
        "EXCHANGE of what is in a directory and it",
        "dir x;file x/y",
        "rename x/y x exchange",
        frozenset(["EINVAL", "ENOTEMPTY"]),
        "x/y file",
    )
    yield Row(
        "EXCHANGE of full directories",
        "dir x;file x/f;dir y;file y/g",
        "rename x y exchange",
        "ok",
        "x/g file; y/f file",
    )
    yield Row("EXCHANGE of two names of an inode", "file x;link x y", "rename x y exchange", "ok", "x same=y nlink=2")
    yield Row("NOREPLACE with EXCHANGE", "file x;file y", "rename x y both", "EINVAL", "x file")
    yield Row("an unknown flag", "file x", "rename x y unknown", "EINVAL", "x file; y absent")
    yield Row(
        "EXCHANGE in a sticky directory of others",
        "dir d 0777;chmod d 01777;file d/x 0666 1001 1001;file d/y 0666 1002 1002",
        "rename d/x d/y exchange",
        "EPERM",
        "d/x uid=1001",
        "alice",
    )


@renames.rows
def whiteout() -> Iterator[Row]:
    needs = ("rename-whiteout",)
    yield Row(
        "WHITEOUT leaves a device 0:0",
        "dir d;file d/x",
        "rename d/x d/y whiteout",
        "ok",
        "d/x char rdev=0; d/y file",
        needs=needs,
    )
    yield Row(
        "WHITEOUT over a file",
        "file x 0600;file y",
        "rename x y whiteout",
        "ok",
        "x char rdev=0; y file mode=0600",
        needs=needs,
    )
    yield Row("WHITEOUT of a directory", "dir x;file x/f", "rename x y whiteout", "ok", "x char; y/f file", needs=needs)


@renames.case("a file that is open is replaced and stays readable", setup="data x 3;file y", expect=[b"ddd", 0, "ok"])
def _() -> list[object]:
    with calls.descriptor("x", os.O_RDWR) as opened:
        os.rename("y", "x")
        before = os.pread(opened, 10, 0), os.fstat(opened).st_nlink
        os.pwrite(opened, b"more", 100)
        assert os.fstat(opened).st_size == 104
        os.fsync(opened)
        assert os.stat("x").st_size == 0
    return [*before, "ok"]
