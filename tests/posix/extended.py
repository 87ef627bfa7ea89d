"""Extended attributes, access control lists, inode flags."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator

from tests.posix import acl, calls
from tests.posix.calls import descriptor
from tests.posix.files import told
from tests.posix.table import Row, Table

xattrs = Table("xattrs")
acls = Table("acls")
flags = Table("inode-flags")

KINDS = ("file", "dir")
SPECIAL = ("fifo", "char", "block", "socket")


def empty_value() -> bytes:
    """Set an empty value; what comes back."""
    os.setxattr("x", "user.e", b"")
    return os.getxattr("x", "user.e")


@xattrs.rows
def basics() -> Iterator[Row]:
    for kind in KINDS:
        yield Row(f"set and get on a {kind}", f"{kind} x;setxattr x user.a one", "getxattr x user.a", "one")
        yield Row(
            f"set again on a {kind}", f"{kind} x;setxattr x user.a one;setxattr x user.a 2", "getxattr x user.a", "2"
        )
        made = f"{kind} x;setxattr x user.b 1;setxattr x user.a 1;setxattr x trusted.t 1"
        yield Row(f"list of a {kind}", made, "listxattr x", ["trusted.t", "user.a", "user.b"])
        yield Row(
            f"trusted ones are not listed for users, {kind}", made, "listxattr x", ["user.a", "user.b"], user="alice"
        )
        removed = f"{made};removexattr x user.a"
        yield Row(f"remove from a {kind}", made, "removexattr x user.a", "ok", "x +c -am")
        yield Row(f"what was removed from a {kind} is gone", removed, "getxattr x user.a", "ENODATA")
        yield Row(f"get what is not there, {kind}", f"{kind} x", "getxattr x user.a", "ENODATA")
        yield Row(f"remove what is not there, {kind}", f"{kind} x", "removexattr x user.a", "ENODATA", "x -amc")
        yield Row(
            f"XATTR_CREATE of what is there, {kind}", f"{kind} x;setxattr x user.a 1", "setxattr x user.a 2 1", "EEXIST"
        )
        yield Row(f"XATTR_CREATE of a new one, {kind}", f"{kind} x", "setxattr x user.a 2 1", "ok", "x +c")
        yield Row(
            f"XATTR_REPLACE of what is there, {kind}", f"{kind} x;setxattr x user.a 1", "setxattr x user.a 2 2", "ok"
        )
        yield Row(f"XATTR_REPLACE of a new one, {kind}", f"{kind} x", "setxattr x user.a 2 2", "ENODATA", "x -c")
        yield Row(f"both flags, {kind}", f"{kind} x", "setxattr x user.a 2 3", "ENODATA", needs=("xattr-both-flags",))
        yield Row(f"an unknown flag, {kind}", f"{kind} x", "setxattr x user.a 2 4", "EINVAL")
        yield Row(f"security by root, {kind}", f"{kind} x;setxattr x security.foo 1", "getxattr x security.foo", "1")
        yield Row(f"an empty value, {kind}", f"{kind} x", empty_value, b"")
    for kind in SPECIAL:
        yield Row(f"user on a {kind}", f"{kind} x", "setxattr x user.a 1", "EPERM")
        yield Row(f"user of a {kind} is not there", f"{kind} x", "getxattr x user.a", "ENODATA")
        yield Row(f"trusted on a {kind}", f"{kind} x;setxattr x trusted.a 1", "getxattr x trusted.a", "1")


@xattrs.rows
def names_and_sizes() -> Iterator[Row]:
    long = "user." + "n" * 250
    yield Row("a name of 255 bytes", f"file x;setxattr x {long} 1", f"getxattr x {long}", "1")
    yield Row("a name of 256 bytes", "file x", f"setxattr x {long}n 1", "ERANGE")
    yield Row("a name of a namespace alone", "file x", "setxattr x user. 1", "EINVAL")
    yield Row("no namespace", "file x", "setxattr x a 1", "EOPNOTSUPP")
    yield Row("an unknown namespace", "file x", "setxattr x other.a 1", "EOPNOTSUPP")
    yield Row("an unknown name of system", "file x", "setxattr x system.a 1", "EOPNOTSUPP")
    yield Row("a value of 65537 bytes", "file x", lambda: os.setxattr("x", "user.a", bytes(65537)), "E2BIG")


@xattrs.case("values of any bytes, of 0 to 3000", setup="file x", expect=True)
def _() -> bool:
    for size in (0, 1, 255, 256, 1024, 3000):
        value = os.urandom(size)
        os.setxattr("x", "user.v", value)
        assert os.getxattr("x", "user.v") == value
    return True


@xattrs.case("a buffer that is too small", setup="file x;setxattr x user.a 12345", expect=["ERANGE", "ERANGE", 5, 7])
def _() -> object:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(4)

    def size(result: int) -> int:
        if result < 0:
            raise OSError(ctypes.get_errno(), "")
        return result

    return [
        told(lambda: size(libc.getxattr(b"x", b"user.a", buffer, 4))),
        told(lambda: size(libc.listxattr(b"x", buffer, 4))),
        told(lambda: size(libc.getxattr(b"x", b"user.a", None, 0))),
        told(lambda: size(libc.listxattr(b"x", None, 0))),
    ]


@xattrs.case("of a symlink itself", setup="file x;symlink x l", expect=["EPERM", "ok", ["trusted.t"], []])
def _() -> object:
    return [
        told(lambda: os.setxattr("l", "user.a", b"1", follow_symlinks=False)),
        told(lambda: os.setxattr("l", "trusted.t", b"1", follow_symlinks=False)),
        os.listxattr("l", follow_symlinks=False),
        os.listxattr("x"),
    ]


@xattrs.case("by descriptor, and of a removed file", setup="file x", expect=[b"1", ["user.a"], "ENODATA"])
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        os.unlink("x")
        os.setxattr(opened, "user.a", b"1")
        found: list[object] = [os.getxattr(opened, "user.a"), os.listxattr(opened)]
        os.removexattr(opened, "user.a")
        return [*found, told(os.getxattr, opened, "user.a")]


@xattrs.case(
    "they go with a rename and are the inode's by every name",
    setup="file x;setxattr x user.a 1;link x y",
    expect=[b"1", b"2"],
)
def _() -> object:
    os.rename("x", "z")
    first = os.getxattr("z", "user.a")
    os.setxattr("y", "user.a", b"2")
    return [first, os.getxattr("z", "user.a")]


@xattrs.rows
def who_may() -> Iterator[Row]:
    """User attributes need the rights of the file's bytes; trusted ones the superuser."""
    for mode, owner, user, reads, writes in (
        ("0644", "1001 1001", "alice", "1", "ok"),
        ("0444", "1001 1001", "alice", "1", "EACCES"),
        ("0200", "1001 1001", "alice", "EACCES", "ok"),
        ("0644", "1002 1002", "alice", "1", "EACCES"),
        ("0660", "1002 1001", "carol", "1", "ok"),
        ("0600", "1002 1001", "carol", "EACCES", "EACCES"),
        ("0000", "1002 1002", "root", "1", "ok"),
    ):
        setup = f"file x {mode} {owner};setxattr x user.a 1"
        told_ = f"{mode} of {owner} by {user}"
        yield Row(f"get, {told_}", setup, "getxattr x user.a", reads, "", user)
        yield Row(f"set, {told_}", setup, "setxattr x user.a 2", writes, "", user)
        yield Row(f"remove, {told_}", setup, "removexattr x user.a", writes, "", user)
        yield Row(f"list, {told_}", setup, "listxattr x", ["user.a"], "", user)
    trusted = "file x 0666 1001 1001;setxattr x trusted.a 1"
    yield Row("get trusted by a user", trusted, "getxattr x trusted.a", "ENODATA", user="alice")
    yield Row("set trusted by a user", trusted, "setxattr x trusted.a 2", "EPERM", user="alice")
    yield Row("remove trusted by a user", trusted, "removexattr x trusted.a", "EPERM", user="alice")
    sticky = "dir x 0777 1002 1002;chmod x 01777"
    yield Row("user on a sticky directory of another", sticky, "setxattr x user.a 1", "EPERM", user="alice")
    yield Row("user on a sticky directory by its owner", sticky, "setxattr x user.a 1", "ok", user="bob")
    yield Row("security by a user", "file x 0666 1001 1001", "setxattr x security.foo 1", "EPERM", user="alice")
    yield Row(
        "security is read by all", "file x;setxattr x security.foo 1", "getxattr x security.foo", "1", user="alice"
    )


CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")
"""cap_net_raw+ep, as of revision 2."""


@xattrs.case(
    "writing and chown take a file's capabilities away", setup="data x 5 0777", expect=["ENODATA", "ENODATA", "ENODATA"]
)
def _() -> object:
    found = []
    changes: list[Callable[[], object]] = [lambda: os.truncate("x", 3), lambda: os.chown("x", 5, 5), write_a_byte]
    for change in changes:
        os.setxattr("x", "security.capability", CAPABILITY)
        assert os.getxattr("x", "security.capability") == CAPABILITY
        change()
        found.append(told(os.getxattr, "x", "security.capability"))
    return found


def write_a_byte() -> None:
    """To the file x."""
    with descriptor("x", os.O_WRONLY) as opened:
        os.write(opened, b"w")


# --- access control lists ---

NEEDS_ACL = ("acl",)
BASE = "acl x u:rw- U1002:r-- g:r-- m:rw- o:---"


@acls.rows
def access_lists() -> Iterator[Row]:
    for who, call, expect in (
        ("bob", "open x r", "ok"),
        ("bob", "open x w", "EACCES"),
        ("alice", "open x r", "EACCES"),
        ("carol", "open x r", "EACCES"),
        ("root", "open x rw", "ok"),
    ):
        yield Row(f"named user: {call} by {who}", f"file x 0600 1000 1000;{BASE}", call, expect, "", who, NEEDS_ACL)
    groups = "file x 0600 1000 1000;acl x u:rw- g:--- G1001:r-- G2001:rw- m:rw- o:rw-"
    for who, call, expect in (
        ("alice", "open x r", "ok"),
        ("alice", "open x w", "EACCES"),
        ("carol", "open x r", "ok"),
        ("dave", "open x w", "ok"),  # Any of his groups may allow it.
        ("bob", "open x rw", "ok"),  # In none of them: others.
    ):
        yield Row(f"named group: {call} by {who}", groups, call, expect, "", who, NEEDS_ACL)
    masked = "file x 0600 1000 1000;acl x u:rwx U1002:rwx g:rwx m:r-- o:---"
    yield Row("the mask bounds a named user", masked, "open x w", "EACCES", "", "bob", NEEDS_ACL)
    yield Row("and leaves what it has", masked, "open x r", "ok", "", "bob", NEEDS_ACL)
    yield Row("the mode shows the mask as the group", masked, "stat x", "ok", "x mode=0740", needs=NEEDS_ACL)
    yield Row("chmod sets the mask", f"{masked};chmod x 0770", "open x w", "ok", "x mode=0770", "bob", NEEDS_ACL)
    yield Row("a list moves ctime", "file x", BASE, "ok", "x +c -am mode=0660", needs=NEEDS_ACL)
    yield Row(
        "a list that says what a mode can say",
        "file x 0600",
        "acl x u:rw- g:r-- o:r--",
        "ok",
        "x mode=0644",
        needs=NEEDS_ACL,
    )
    yield Row("by another than the owner", "file x 0666 1002 1002", BASE, "EPERM", "", "alice", NEEDS_ACL)
    yield Row("by the owner", "file x 0666 1001 1001", BASE, "ok", "x mode=0660", "alice", NEEDS_ACL)
    yield Row("named entries without a mask", "file x", "acl x u:rw- U1002:r-- g:r-- o:---", "EINVAL", needs=NEEDS_ACL)
    yield Row("no entry for others", "file x", "acl x u:rw- g:r--", "EINVAL", needs=NEEDS_ACL)
    yield Row("a default list of a file", "file x", "default-acl x u:rw- g:r-- o:---", "EACCES", needs=NEEDS_ACL)
    yield Row(
        "sgid goes when the setter is not in the group",
        "file x 02755 1001 2999",
        BASE,
        "ok",
        "x mode=0660",
        "alice",
        NEEDS_ACL,
    )


@acls.rows
def default_lists() -> Iterator[Row]:
    default = "dir d 0777 1000 1000;default-acl d u:rwx U1002:rwx g:r-x m:rwx o:---"
    yield Row(
        "a file inherits, its mode bounds it", default, "open d/x w,creat 0640", "ok", "d/x mode=0640", needs=NEEDS_ACL
    )
    yield Row(
        "the umask does not count",
        f"{default}",
        "umask 0077;open d/x w,creat 0666",
        "ok",
        "d/x mode=0660",
        needs=NEEDS_ACL,
    )
    yield Row("a directory inherits", default, "umask 0077;mkdir d/x 0777", "ok", "d/x mode=0770", needs=NEEDS_ACL)
    yield Row("a fifo inherits", default, "umask 0077;mkfifo d/x 0666", "ok", "d/x mode=0660", needs=NEEDS_ACL)
    yield Row("what is inherited lets in", f"{default};mknod d/x file 0660", "open d/x rw", "ok", "", "bob", NEEDS_ACL)
    yield Row("and keeps out", f"{default};mknod d/x file 0660", "open d/x r", "EACCES", "", "alice", NEEDS_ACL)
    yield Row("a symlink inherits nothing", default, "symlink t d/x", "ok", "d/x mode=0777", needs=NEEDS_ACL)
    yield Row(
        "a default list leaves the directory's mode",
        "dir d 0700",
        "default-acl d u:rwx g:rwx o:rwx",
        "ok",
        "d mode=0700 +c",
        needs=NEEDS_ACL,
    )
    mask_less = "dir d 0777;default-acl d u:rwx g:r-x o:r--"
    yield Row(
        "three entries and no mask",
        mask_less,
        "umask 0077;open d/x w,creat 0666",
        "ok",
        "d/x mode=0644",
        needs=NEEDS_ACL,
    )


@acls.case("lists come back as they were set", setup="dir d", expect=True, needs=NEEDS_ACL)
def _() -> bool:
    entries = ["u:rwx", "U0:r--", "U1002:r-x", "g:r-x", "G7:-w-", "m:rwx", "o:--x"]
    for name in (acl.ACCESS, acl.DEFAULT):
        os.setxattr("d", name, acl.pack(entries))
        assert acl.unpack(os.getxattr("d", name)) == entries
    return sorted(os.listxattr("d")) == [acl.ACCESS, acl.DEFAULT]


@acls.case(
    "a removed list leaves the mode",
    setup="file x 0600;acl x u:rw- U1002:rw- g:r-- m:rw- o:---",
    expect=["ENODATA", 0o660, []],
    needs=NEEDS_ACL,
)
def _() -> object:
    os.removexattr("x", acl.ACCESS)
    return [told(os.getxattr, "x", acl.ACCESS), os.stat("x").st_mode & 0o777, os.listxattr("x")]


@acls.case("a list that is a mode is not stored", setup="file x", expect=["ENODATA", []], needs=NEEDS_ACL)
def _() -> object:
    os.setxattr("x", acl.ACCESS, acl.pack(["u:rw-", "g:r--", "o:---"]))
    return [told(os.getxattr, "x", acl.ACCESS), os.listxattr("x")]


@acls.case(
    "a subdirectory has the default list as its own and as its access list",
    setup="dir d;default-acl d u:rwx U1002:r-x g:r-x m:r-x o:---",
    expect=True,
    needs=NEEDS_ACL,
)
def _() -> bool:
    os.mkdir("d/x", 0o750)
    default = acl.unpack(os.getxattr("d/x", acl.DEFAULT))
    access = acl.unpack(os.getxattr("d/x", acl.ACCESS))
    return default == ["u:rwx", "U1002:r-x", "g:r-x", "m:r-x", "o:---"] and access == default


@acls.case(
    "chmod changes owner, mask and others of a list",
    setup="file x;acl x u:rw- U1002:rw- g:rw- m:rw- o:---",
    expect=["u:r--", "U1002:rw-", "g:rw-", "m:r-x", "o:--x"],
    needs=NEEDS_ACL,
)
def _() -> object:
    os.chmod("x", 0o451)
    return acl.unpack(os.getxattr("x", acl.ACCESS))


@acls.case("a value that is no list", setup="file x", expect=["EINVAL", "EOPNOTSUPP", "EINVAL"], needs=NEEDS_ACL)
def _() -> object:
    values = (
        b"\2\0\0\0abc",
        b"\1\0\0\0" + acl.pack(["u:rw-", "g:r--", "o:---"])[4:],
        acl.pack(["u:rw-", "u:rw-", "g:r--", "o:---"]),
    )
    return [told(os.setxattr, "x", acl.ACCESS, value) for value in values]


# --- inode flags ---

NEEDS_FLAGS = ("inode-flags",)


@flags.rows
def immutable() -> Iterator[Row]:
    setup = "data x 5;chattr x i"
    for call in (
        "open x w",
        "open x rw,trunc",
        "truncate x 0",
        "chmod x 0600",
        "chown x 5 5",
        "utimens x 1 2",
        "touch x",
        "link x y",
        "unlink x",
        "rename x y",
        "setxattr x user.a 1",
    ):
        yield Row(
            f"an immutable file: {call}", setup, call, "EPERM", "x file size=5 mode=0644 nlink=1 -mc", needs=NEEDS_FLAGS
        )
    yield Row("an immutable file is read", setup, "read x", b"ddddd", needs=NEEDS_FLAGS)
    yield Row("over an immutable file", f"{setup};file y", "rename y x", "EPERM", "y file", needs=NEEDS_FLAGS)
    directory = "dir d;file d/x;chattr d i"
    for call in (
        "mkdir d/y",
        "open d/y w,creat",
        "unlink d/x",
        "rename d/x d/y",
        "rename d/x y",
        "rmdir d",
        "symlink t d/y",
    ):
        expect = frozenset(["EPERM", "EACCES", "ENOTEMPTY"])
        yield Row(f"an immutable directory: {call}", directory, call, expect, "d/x file; d/y absent", needs=NEEDS_FLAGS)
    yield Row(
        "a file in an immutable directory is written", directory, "write d/x 5", "ok", "d/x size=5", needs=NEEDS_FLAGS
    )
    yield Row("no longer immutable", f"{setup};chattr x -", "unlink x", "ok", "x absent", needs=NEEDS_FLAGS)
    yield Row("set by a user", "file x 0666 1001 1001", "chattr x i", "EPERM", user="alice", needs=NEEDS_FLAGS)


@flags.rows
def append_only() -> Iterator[Row]:
    setup = "data x 5;chattr x a"
    for call in (
        "open x w",
        "open x rw",
        "open x w,append,trunc",
        "truncate x 0",
        "unlink x",
        "rename x y",
        "link x y",
        "chmod x 0600",
    ):
        yield Row(f"an append-only file: {call}", setup, call, "EPERM", "x size=5 nlink=1", needs=NEEDS_FLAGS)
    yield Row("an append-only file grows", setup, "write x 3 w,append", "ok", "x size=8", needs=NEEDS_FLAGS)
    directory = "dir d;file d/x;chattr d a"
    yield Row("an append-only directory takes names", directory, "mkdir d/y", "ok", "d/y dir", needs=NEEDS_FLAGS)
    yield Row("and loses none", directory, "unlink d/x", "EPERM", "d/x file", needs=NEEDS_FLAGS)
    yield Row("nor renames one", directory, "rename d/x d/y", "EPERM", "d/x file", needs=NEEDS_FLAGS)


@flags.case(
    "flags come back, and an open descriptor goes on", setup="file x", expect=[0x30, "ok", 0], needs=NEEDS_FLAGS
)
def _() -> object:
    mask = calls.FS_IMMUTABLE_FL | calls.FS_APPEND_FL
    with descriptor("x", os.O_RDWR) as opened:
        kept = calls.inode_flags(opened) & ~mask
        calls.set_inode_flags(opened, kept | mask)
        found: list[object] = [calls.inode_flags(opened) & mask]
        calls.set_inode_flags(opened, kept)
        os.write(opened, b"x")
        return [*found, "ok", calls.inode_flags(opened) & mask]


@flags.case("an ioctl that nobody knows", setup="file x", expect="ENOTTY")
def _() -> object:
    with descriptor("x", os.O_RDWR) as opened:
        return fcntl.ioctl(opened, 0x4004FE01, bytes(4))


@flags.case("FICLONE shares a whole file", setup="data x 100000;file y", expect=True, needs=("reflink",))
def _() -> bool:
    with descriptor("x", os.O_RDWR) as source, descriptor("y", os.O_RDWR) as target:
        calls.clone(source, target)
        os.pwrite(source, b"new", 0)
        return os.pread(target, 100001, 0) == b"d" * 100000
