"""The words of the tables: each is one system call on names relative to the row's directory.

A step is a verb and its arguments, separated by blanks; several steps are separated by semicolons.  `{n255}` is a name
of 255 bytes, `{n256}` one byte more, `{p4095}` and `{p4096}` are paths of so many bytes that lead to the name x.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable

from tests.posix import calls

NAMES = {
    "n255": "n" * 255,
    "n256": "n" * 256,
    "p4095": "./" * 2047 + "x",  # PATH_MAX counts the NUL: 4095 is the longest there is.
    "p4096": ".//" + "./" * 2046 + "x",
    "t4095": "t" * 4095,
    "t4096": "t" * 4096,
    "u108": "s" * 107,
}

OPEN_FLAGS = {
    "r": os.O_RDONLY,
    "w": os.O_WRONLY,
    "rw": os.O_RDWR,
    "wr": os.O_WRONLY | os.O_RDWR,
    "creat": os.O_CREAT,
    "excl": os.O_EXCL,
    "trunc": os.O_TRUNC,
    "append": os.O_APPEND,
    "dir": os.O_DIRECTORY,
    "nofollow": os.O_NOFOLLOW,
    "nonblock": os.O_NONBLOCK,
    "path": os.O_PATH,
    "tmpfile": os.O_TMPFILE,
    "sync": os.O_SYNC,
    "dsync": os.O_DSYNC,
    "direct": os.O_DIRECT,
    "noatime": os.O_NOATIME,
}

DEVICE = os.makedev(1, 3)  # As /dev/null.


def number(text: str) -> int:
    """A number: octal if it begins with 0, as modes do."""
    return int(text, 8) if text.startswith("0") and len(text) > 1 else int(text, 0)


def encoded(text: str) -> bytes:
    """A name, of which `%XX` is a byte."""
    return os.fsencode(text) if "%" not in text else _percent(text)


def _percent(text: str) -> bytes:
    first, *others = text.split("%")
    return first.encode() + b"".join(bytes.fromhex(one[:2]) + one[2:].encode() for one in others)


def open_flags(words: str) -> int:
    """`rw,creat` and so on."""
    flags = 0
    for word in words.split(","):
        flags |= OPEN_FLAGS[word]
    return flags


# --- making ---


def file(name: str, mode: str = "0644", uid: str = "-1", gid: str = "-1") -> None:
    """A regular file, empty."""
    os.close(os.open(encoded(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    _finish(name, mode, uid, gid)


def data(name: str, size: str, mode: str = "0644", uid: str = "-1", gid: str = "-1") -> None:
    """A regular file of so many bytes, all 'd'."""
    with calls.descriptor(encoded(name), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600) as opened:
        os.write(opened, b"d" * number(size))
    _finish(name, mode, uid, gid)


def directory(name: str, mode: str = "0755", uid: str = "-1", gid: str = "-1") -> None:
    """A directory."""
    os.mkdir(encoded(name), 0o700)
    _finish(name, mode, uid, gid)


def fifo(name: str, mode: str = "0644", uid: str = "-1", gid: str = "-1") -> None:
    """A fifo."""
    os.mkfifo(encoded(name), 0o600)
    _finish(name, mode, uid, gid)


def char(name: str, mode: str = "0644", uid: str = "-1", gid: str = "-1") -> None:
    """A character device, that of /dev/null."""
    os.mknod(encoded(name), stat.S_IFCHR | 0o600, DEVICE)
    _finish(name, mode, uid, gid)


def block(name: str, mode: str = "0644", uid: str = "-1", gid: str = "-1") -> None:
    """A block device."""
    os.mknod(encoded(name), stat.S_IFBLK | 0o600, os.makedev(7, 0))
    _finish(name, mode, uid, gid)


def bind(name: str, mode: str = "0755", uid: str = "-1", gid: str = "-1") -> None:
    """A socket, made by bind(2)."""
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(encoded(name))
    _finish(name, mode, uid, gid)


def symlink(target: str, name: str) -> None:
    """A symlink."""
    os.symlink(encoded(target), encoded(name))


def owned_symlink(name: str, mode: str = "", uid: str = "-1", gid: str = "-1") -> None:
    """A symlink that leads nowhere; for rows that go through all types."""
    os.symlink(b"nowhere", encoded(name))
    os.lchown(encoded(name), int(uid), int(gid))


def _finish(name: str, mode: str, uid: str, gid: str) -> None:
    path = encoded(name)
    if (int(uid), int(gid)) != (-1, -1):
        os.chown(path, int(uid), int(gid))
    os.chmod(path, number(mode))


def xattr_acl(name: str, *entries: str) -> None:
    """Set the access list; see `tests.posix.acl.pack`."""
    from tests.posix.acl import ACCESS, pack

    os.setxattr(encoded(name), ACCESS, pack(entries))


def xattr_default_acl(name: str, *entries: str) -> None:
    """Set the list that new entries of a directory inherit."""
    from tests.posix.acl import DEFAULT, pack

    os.setxattr(encoded(name), DEFAULT, pack(entries))


# --- the calls under test ---


def open_(name: str, flags: str, mode: str = "0644") -> None:
    """Open and close."""
    os.close(os.open(encoded(name), open_flags(flags), number(mode)))


def umask(mask: str) -> None:
    """The mask holds until the end of the row."""
    os.umask(number(mask))


def mkdir(name: str, mode: str = "0755") -> None:
    os.mkdir(encoded(name), number(mode))


def mkfifo(name: str, mode: str = "0644") -> None:
    os.mkfifo(encoded(name), number(mode))


def mknod(name: str, kind: str, mode: str = "0644") -> None:
    kinds = {"file": stat.S_IFREG, "fifo": stat.S_IFIFO, "char": stat.S_IFCHR, "block": stat.S_IFBLK}
    kinds |= {"socket": stat.S_IFSOCK, "dir": stat.S_IFDIR}
    os.mknod(encoded(name), kinds[kind] | number(mode), DEVICE if kind in ("char", "block") else 0)


def link(old: str, new: str) -> None:
    os.link(encoded(old), encoded(new), follow_symlinks=False)


def unlink(name: str) -> None:
    os.unlink(encoded(name))


def rmdir(name: str) -> None:
    os.rmdir(encoded(name))


def rename(old: str, new: str, flags: str = "") -> None:
    bits = {"": 0, "noreplace": calls.RENAME_NOREPLACE, "exchange": calls.RENAME_EXCHANGE, "both": 3}
    bits |= {"whiteout": calls.RENAME_WHITEOUT, "unknown": 128}
    if flags:
        calls.renameat2(encoded(old), encoded(new), bits[flags])
    else:
        os.rename(encoded(old), encoded(new))


def truncate(name: str, size: str) -> None:
    os.truncate(encoded(name), number(size))


def chmod(name: str, mode: str) -> None:
    os.chmod(encoded(name), number(mode))


def chown(name: str, uid: str, gid: str) -> None:
    os.chown(encoded(name), int(uid), int(gid))


def lchown(name: str, uid: str, gid: str) -> None:
    os.lchown(encoded(name), int(uid), int(gid))


def time_pair(text: str) -> tuple[int, int]:
    """`now`, `omit`, or seconds with an optional fraction of nanoseconds."""
    if text in ("now", "omit"):
        return 0, calls.UTIME_NOW if text == "now" else calls.UTIME_OMIT
    seconds, _, fraction = text.partition(".")
    return int(seconds), int(fraction or 0)


def utimens(name: str, atime: str, mtime: str) -> None:
    calls.utimensat(encoded(name), (time_pair(atime), time_pair(mtime)))


def lutimens(name: str, atime: str, mtime: str) -> None:
    calls.utimensat(encoded(name), (time_pair(atime), time_pair(mtime)), calls.AT_SYMLINK_NOFOLLOW)


def touch(name: str) -> None:
    """utimensat without times."""
    calls.utimensat(encoded(name), None)


def stat_(name: str) -> None:
    os.stat(encoded(name))


def lstat(name: str) -> None:
    os.lstat(encoded(name))


def statvfs(name: str) -> None:
    os.statvfs(encoded(name))


def access(name: str, how: str = "f") -> None:
    """access(2) with the effective ids; `how` of the letters r, w, x, f."""
    bits = sum({"r": 4, "w": 2, "x": 1, "f": 0}[letter] for letter in how)
    if not os.access(encoded(name), bits, effective_ids=True):
        os.stat(encoded(name))  # Tells a missing name from a refusal.
        raise PermissionError(13, "access")


def readlink(name: str) -> str:
    return os.fsdecode(os.readlink(encoded(name)))


def chdir(name: str) -> None:
    """Go there, and come back."""
    here = os.open(b".", os.O_PATH)
    try:
        os.chdir(encoded(name))
        os.fchdir(here)
    finally:
        os.close(here)


def listdir(name: str) -> list[bytes]:
    return sorted(os.listdir(encoded(name)))


def read(name: str) -> bytes:
    """All bytes of a file."""
    with open(encoded(name), "rb") as opened:
        return opened.read()


def write(name: str, size: str, flags: str = "w") -> None:
    """So many bytes, all 'w', at the beginning of an existing file."""
    with calls.descriptor(encoded(name), open_flags(flags)) as opened:
        os.write(opened, b"w" * number(size))


def setxattr(name: str, key: str, value: str, flags: str = "0") -> None:
    os.setxattr(encoded(name), key, value.encode(), int(flags))


def getxattr(name: str, key: str) -> str:
    return os.getxattr(encoded(name), key).decode()


def listxattr(name: str) -> list[str]:
    return sorted(os.listxattr(encoded(name)))


def removexattr(name: str, key: str) -> None:
    os.removexattr(encoded(name), key)


def chattr(name: str, flags: str) -> None:
    """Set the inode flags: letters i, a, or -."""
    bits = {"i": calls.FS_IMMUTABLE_FL, "a": calls.FS_APPEND_FL, "-": 0}
    with calls.descriptor(encoded(name), os.O_RDONLY | os.O_NONBLOCK) as opened:
        kept = calls.inode_flags(opened) & ~(calls.FS_IMMUTABLE_FL | calls.FS_APPEND_FL)
        calls.set_inode_flags(opened, kept | sum(bits[letter] for letter in flags))


Verb = Callable[..., object]

VERBS: dict[str, Verb] = {
    "file": file,
    "data": data,
    "dir": directory,
    "fifo": fifo,
    "char": char,
    "block": block,
    "socket": bind,
    "symlink": symlink,
    "link-to-nowhere": owned_symlink,
    "acl": xattr_acl,
    "default-acl": xattr_default_acl,
    "open": open_,
    "umask": umask,
    "mkdir": mkdir,
    "mkfifo": mkfifo,
    "mknod": mknod,
    "bind": bind,
    "link": link,
    "unlink": unlink,
    "rmdir": rmdir,
    "rename": rename,
    "truncate": truncate,
    "chmod": chmod,
    "chown": chown,
    "lchown": lchown,
    "utimens": utimens,
    "lutimens": lutimens,
    "touch": touch,
    "stat": stat_,
    "lstat": lstat,
    "statvfs": statvfs,
    "access": access,
    "readlink": readlink,
    "chdir": chdir,
    "listdir": listdir,
    "read": read,
    "write": write,
    "setxattr": setxattr,
    "getxattr": getxattr,
    "listxattr": listxattr,
    "removexattr": removexattr,
    "chattr": chattr,
}


def perform(steps: str) -> object:
    """Carry out the steps; what the last one returned."""
    result: object = None
    for step in steps.split(";"):
        words = [word.format_map(NAMES) for word in step.split()]
        if words:
            result = VERBS[words[0]](*words[1:])
    return result
