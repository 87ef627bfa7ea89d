"""The direct front end's table: which operation a request becomes, with which arguments, and what its reply is."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import cast

import pytest

from fsd.frontend.direct import dispatch
from fsd.frontend.direct.dispatch import Request
from fsd.frontend.direct.protocol import (
    FATTR_ATIME,
    FATTR_ATIME_NOW,
    FATTR_MTIME,
    FATTR_MTIME_NOW,
    FS_IOC_FSGETXATTR,
    FS_IOC_FSSETXATTR,
    FS_IOC_GETFLAGS,
    FS_IOC_SETFLAGS,
    Opcode,
)
from fsd.frontend.direct.requests import (
    BATCH_FORGET_IN,
    COPY_FILE_RANGE_IN,
    CREATE_IN,
    FALLOCATE_IN,
    FLUSH_IN,
    FORGET_IN,
    FORGET_ONE,
    FSYNC_IN,
    GETXATTR_IN,
    IOCTL_IN,
    LINK_IN,
    LOCK_IN,
    LSEEK_IN,
    MKDIR_IN,
    MKNOD_IN,
    OPEN_IN,
    READ_IN,
    RELEASE_IN,
    RENAME2_IN,
    RENAME_IN,
    SETATTR_IN,
    SETXATTR_IN,
    WRITE_IN,
    Malformed,
)
from fsd.frontend.ports import Changes, FileLock, Operations
from metadata.core.locks import LAST_BYTE, LockKind
from metadata.protocol import Caller

CALLER = Caller(1000, 100)
MAKER = Caller(1000, 100, umask=0o22)
IN_CASE_OF_GROUPS = (2).to_bytes(4, "little") + (7).to_bytes(4, "little") + (8).to_bytes(4, "little")


class Noting:
    """Operations that only take notes."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[object, ...], dict[str, object]]] = []

    def __getattr__(self, name: str) -> Callable[..., object]:
        def operation(*arguments: object, **more: object) -> object:
            self.calls.append((name, arguments, more))
            return {"getxattr": b"value", "listxattr": (b"user.a", b"user.b")}.get(name)

        return operation


def request(opcode: Opcode, *, extensions: int = 0) -> Request:
    return (0, opcode, 1, 9, 1000, 100, 77, extensions)


def call(opcode: Opcode, body: bytes, *, extensions: int = 0) -> tuple[str, tuple[object, ...], dict[str, object]]:
    noting = Noting()
    row = dispatch.TABLE[opcode]
    row.call(cast(Operations, noting), request(opcode, extensions=extensions), body)
    (made,) = noting.calls
    return made


CASES: list[tuple[Opcode, bytes, tuple[str, tuple[object, ...], dict[str, object]]]] = [
    (Opcode.LOOKUP, b"n\0", ("lookup", (9, b"n"), {})),
    (Opcode.READLINK, b"", ("readlink", (9,), {})),
    (Opcode.SYMLINK, b"n\0to/there\0", ("symlink", (9, b"n", b"to/there", CALLER), {})),
    (Opcode.MKNOD, MKNOD_IN.pack(0o10644, 5, 0o22) + b"n\0", ("mknod", (9, b"n", 0o10644, 5, MAKER), {})),
    (Opcode.MKDIR, MKDIR_IN.pack(0o755, 0o22) + b"n\0", ("mkdir", (9, b"n", 0o755, MAKER), {})),
    (Opcode.UNLINK, b"n\0", ("unlink", (9, b"n", CALLER), {})),
    (Opcode.RMDIR, b"n\0", ("rmdir", (9, b"n", CALLER), {})),
    (Opcode.RENAME, RENAME_IN.pack(8) + b"a\0b\0", ("rename", (9, b"a", 8, b"b", 0, CALLER), {})),
    (Opcode.RENAME2, RENAME2_IN.pack(8, 2) + b"a\0b\0", ("rename", (9, b"a", 8, b"b", 2, CALLER), {})),
    (Opcode.LINK, LINK_IN.pack(8) + b"n\0", ("link", (8, 9, b"n", CALLER), {})),
    (Opcode.GETATTR, bytes(16), ("getattr", (9,), {})),
    (Opcode.STATX, bytes(24), ("getattr", (9,), {})),
    (Opcode.STATFS, b"", ("statfs", (), {})),
    (Opcode.OPEN, OPEN_IN.pack(2, 0), ("open", (9, 2, CALLER), {"kill_privileges": False})),
    (Opcode.OPEN, OPEN_IN.pack(0o1001, 1), ("open", (9, 0o1001, CALLER), {"kill_privileges": True})),
    (Opcode.CREATE, CREATE_IN.pack(2, 0o100644, 0o22, 0) + b"n\0", ("create", (9, b"n", 0o100644, 2, MAKER), {})),
    (Opcode.TMPFILE, CREATE_IN.pack(2, 0o100644, 0o22, 0) + b"/\0", ("tmpfile", (9, 0o100644, 2, MAKER), {})),
    (Opcode.READ, READ_IN.pack(5, 4096, 100, 0, 0, 0), ("read", (5, 4096, 100), {})),
    (Opcode.WRITE, WRITE_IN.pack(5, 10, 3, 0, 0, 0) + b"abc", ("write", (5, 10, b"abc"), {"from_pages": False})),
    (
        Opcode.WRITE,
        WRITE_IN.pack(5, 10, 3, 5, 0, 0) + b"abc",
        ("write", (5, 10, b"abc"), {"kill_privileges": True, "caller": CALLER, "from_pages": True}),
    ),
    (Opcode.FALLOCATE, FALLOCATE_IN.pack(5, 10, 99, 3), ("fallocate", (5, 3, 10, 99), {"kill_privileges": True})),
    (Opcode.LSEEK, LSEEK_IN.pack(5, 10, 4), ("seek", (5, 10, 4), {})),
    (
        Opcode.COPY_FILE_RANGE,
        COPY_FILE_RANGE_IN.pack(5, 10, 8, 6, 20, 99, 0),
        ("copy_range", (5, 10, 6, 20, 99), {"kill_privileges": True}),
    ),
    (
        Opcode.COPY_FILE_RANGE_64,
        COPY_FILE_RANGE_IN.pack(5, 10, 8, 6, 20, 1 << 40, 0),
        ("copy_range", (5, 10, 6, 20, 1 << 40), {"kill_privileges": True}),
    ),
    (Opcode.SYNCFS, bytes(8), ("sync", (), {})),
    (Opcode.FLUSH, FLUSH_IN.pack(5, 99), ("flush", (5, 99), {})),
    (Opcode.FSYNC, FSYNC_IN.pack(5, 1), ("fsync", (5, True), {})),
    (Opcode.RELEASE, RELEASE_IN.pack(5, 0, 2, 99), ("release", (5,), {"lock_owner": 99, "flock": True})),
    (Opcode.OPENDIR, OPEN_IN.pack(0x10000, 0), ("opendir", (9, 0x10000), {})),
    (Opcode.RELEASEDIR, RELEASE_IN.pack(5, 0, 0, 0), ("releasedir", (5,), {})),
    (Opcode.FSYNCDIR, FSYNC_IN.pack(5, 0), ("fsyncdir", (5,), {})),
    (Opcode.GETXATTR, GETXATTR_IN.pack(0) + b"user.a\0", ("getxattr", (9, b"user.a", CALLER), {})),
    (Opcode.LISTXATTR, GETXATTR_IN.pack(0), ("listxattr", (9, CALLER), {})),
    (
        Opcode.SETXATTR,
        SETXATTR_IN.pack(2, 1, 0) + b"user.a\0\0v",
        ("setxattr", (9, b"user.a", b"\0v", 1, CALLER), {"drop_sgid": False}),
    ),
    (
        Opcode.SETXATTR,
        SETXATTR_IN.pack(1, 0, 1) + b"system.posix_acl_access\0v",
        ("setxattr", (9, b"system.posix_acl_access", b"v", 0, CALLER), {"drop_sgid": True}),
    ),
    (Opcode.REMOVEXATTR, b"user.a\0", ("removexattr", (9, b"user.a", CALLER), {})),
]


@pytest.mark.parametrize(
    ("opcode", "flags", "name", "how"),
    [
        (Opcode.GETLK, 0, "get_lock", {}),
        (Opcode.SETLK, 0, "set_lock", {"flock": False, "wait": False}),
        (Opcode.SETLK, 1, "set_lock", {"flock": True, "wait": False}),
        (Opcode.SETLKW, 0, "set_lock", {"flock": False, "wait": True}),
    ],
)
@pytest.mark.parametrize("kind", LockKind)
def test_a_lock_is_asked_for_as_the_kernel_says(
    opcode: Opcode, flags: int, name: str, how: dict[str, object], kind: LockKind
) -> None:
    made, (fh, owner, lock), more = call(opcode, LOCK_IN.pack(5, 1 << 63 | 9, 7, LAST_BYTE, kind, 44, flags))
    assert (made, fh, owner, more) == (name, 5, 1 << 63 | 9, how)
    assert isinstance(lock, FileLock)
    assert (lock.kind, lock.start, lock.end, lock.pid) == (kind, 7, LAST_BYTE, 44)


@pytest.mark.parametrize(("start", "end", "kind"), [(0, 1, 3), (2, 1, 0), (0, 1 << 63, 1)])
def test_a_lock_that_cannot_be_is_malformed(start: int, end: int, kind: int) -> None:
    with pytest.raises(Malformed):
        call(Opcode.SETLK, LOCK_IN.pack(5, 9, start, end, kind, 44, 0))


def test_waits_for_locks_end_by_a_signal_and_leave_room_for_others() -> None:
    row = dispatch.TABLE[Opcode.SETLKW]
    assert row.interruptible is dispatch.Interruptible.SIGNALLED
    assert not row.is_bounded


def test_the_lock_in_the_way_is_told_and_that_there_is_none() -> None:
    reply = dispatch.TABLE[Opcode.GETLK].reply
    assert reply(1, FileLock(LockKind.WRITE, 5, LAST_BYTE, 44)) == struct.pack(
        "=IiQQQII", 40, 0, 1, 5, LAST_BYTE, 1, 44
    )
    assert reply(1, None) == struct.pack("=IiQQQII", 40, 0, 1, 0, 0, 2, 0)


@pytest.mark.parametrize(("opcode", "body", "expected"), CASES, ids=lambda value: getattr(value, "name", ""))
def test_a_request_becomes_this_call(
    opcode: Opcode, body: bytes, expected: tuple[str, tuple[object, ...], dict[str, object]]
) -> None:
    assert call(opcode, body) == expected


def test_every_opcode_has_an_answer() -> None:
    apart = {Opcode.INIT, Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT}
    assert set(dispatch.TABLE) == set(Opcode) - apart


def test_setattr_asks_for_what_is_valid_and_nothing_else() -> None:
    body = SETATTR_IN.pack(1 << 3 | 1 << 5 | 1 << 11, 0, 70, 0, 1, -2, 3, 4, 5, 6, 0o104755, 7, 8)
    name, (nodeid, changes, caller), _ = call(Opcode.SETATTR, body)
    assert (name, nodeid, caller) == ("setattr", 9, CALLER)
    asked = {slot: getattr(changes, slot) for slot in Changes.__slots__}
    wanted = {"size": 70, "mtime_ns": -2_000_000_000 + 5, "kill_privileges": True}
    assert {name: value for name, value in asked.items() if value not in (None, False)} == wanted


def test_setattr_tells_times_that_are_now_from_those_that_are_given() -> None:
    now = FATTR_ATIME_NOW | FATTR_MTIME_NOW
    _, (_, changes, _), _ = call(Opcode.SETATTR, SETATTR_IN.pack(FATTR_ATIME | FATTR_MTIME | now, *range(1, 13)))
    assert isinstance(changes, Changes)
    assert (changes.atime_ns, changes.mtime_ns, changes.atime_now, changes.mtime_now) == (None, None, True, True)
    _, (_, changes, _), _ = call(Opcode.SETATTR, SETATTR_IN.pack(FATTR_MTIME, *[0] * 12))
    assert isinstance(changes, Changes)
    assert (changes.atime_ns, changes.mtime_ns, changes.atime_now, changes.mtime_now) == (None, 0, False, False)


@pytest.mark.parametrize(
    ("command", "content", "flags"),
    [
        (FS_IOC_SETFLAGS, b"\x30\0\0\0", 0x30),
        (FS_IOC_FSSETXATTR, b"\x08\0\0\0" + bytes(24), 0x10),
        (FS_IOC_FSSETXATTR, b"\x10\0\0\0" + bytes(24), 0x20),
    ],
)
async def test_chattr_sets_flags(command: int, content: bytes, flags: int) -> None:
    noting = Noting()
    body = IOCTL_IN.pack(5, 0, command, 0, len(content), 0) + content
    answer = dispatch.TABLE[Opcode.IOCTL].call(cast(Operations, noting), request(Opcode.IOCTL), body)
    assert await cast(Coroutine[object, object, bytes], answer) == b""
    assert noting.calls == [("set_flags", (9, flags, CALLER), {})]


def test_lsattr_is_told_the_flags() -> None:
    for command, wanted in ((FS_IOC_GETFLAGS, b"\x30\0\0\0"), (FS_IOC_FSGETXATTR, b"\x18\0\0\0" + bytes(24))):
        operations = SimpleNamespace(get_flags=lambda nodeid: 0x30)
        body = IOCTL_IN.pack(5, 0, command, 0, 0, len(wanted))
        answer = dispatch.TABLE[Opcode.IOCTL].call(cast(Operations, operations), request(Opcode.IOCTL), body)
        assert answer == wanted


@pytest.mark.parametrize(
    ("command", "content", "number"),
    [
        (0x5401, b"", errno.ENOTTY),
        (FS_IOC_FSSETXATTR, b"\x01\0\0\0" + bytes(24), errno.EOPNOTSUPP),
        (FS_IOC_FSSETXATTR, bytes(12) + b"\1" + bytes(15), errno.EOPNOTSUPP),
    ],
)
def test_other_ioctls_are_refused(command: int, content: bytes, number: int) -> None:
    with pytest.raises(dispatch.Refused) as caught:
        call(Opcode.IOCTL, IOCTL_IN.pack(5, 0, command, 0, len(content), 0) + content)
    assert caught.value.errno == number


def test_an_ioctl_that_is_cut_short_is_malformed() -> None:
    for body in (IOCTL_IN.pack(5, 0, FS_IOC_SETFLAGS, 0, 4, 0), IOCTL_IN.pack(5, 0, FS_IOC_SETFLAGS, 0, 2, 0) + b"ab"):
        with pytest.raises((Malformed, struct.error)):
            call(Opcode.IOCTL, body)


def test_setattr_of_nothing_changes_nothing() -> None:
    """The kernel sends it before a write to a file with a capability; root's write leaves suid."""
    body = SETATTR_IN.pack(1 << 6 | 1 << 9, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    assert call(Opcode.SETATTR, body) == ("getattr", (9,), {})


def test_the_groups_that_the_kernel_tells_become_the_callers() -> None:
    extension = (20).to_bytes(4, "little") + (32).to_bytes(4, "little") + IN_CASE_OF_GROUPS + bytes(4)
    body = MKDIR_IN.pack(0o755, 0) + b"n\0" + extension
    name, arguments, _ = call(Opcode.MKDIR, body, extensions=len(extension) // 8)
    assert (name, arguments[3]) == ("mkdir", Caller(1000, 100, (7, 8)))


def test_forgets_are_handed_on() -> None:
    noting = Noting()
    operations = cast(Operations, noting)
    dispatch.forget(operations, request(Opcode.FORGET), FORGET_IN.pack(3))
    batch = BATCH_FORGET_IN.pack(2) + FORGET_ONE.pack(5, 1) + FORGET_ONE.pack(6, 2)
    dispatch.forget(operations, request(Opcode.BATCH_FORGET), batch)
    assert [arguments for _, arguments, _ in noting.calls] == [(((9, 3),),), ([(5, 1), (6, 2)],)]


@pytest.mark.parametrize(("room", "size"), [(0, 24), (5, 21), (100, 21)])
def test_a_value_is_told_whole_or_by_its_size(room: int, size: int) -> None:
    row = dispatch.TABLE[Opcode.GETXATTR]
    answer = row.call(cast(Operations, Noting()), request(Opcode.GETXATTR), GETXATTR_IN.pack(room) + b"user.a\0")
    reply = row.reply(1, answer)
    assert len(reply if isinstance(reply, bytes) else b"".join(reply)) == size


def test_a_value_larger_than_the_callers_room_is_erange() -> None:
    with pytest.raises(Exception, match="5 bytes of 4") as raised:
        dispatch.TABLE[Opcode.GETXATTR].call(
            cast(Operations, Noting()), request(Opcode.GETXATTR), GETXATTR_IN.pack(4) + b"user.a\0"
        )
    assert getattr(raised.value, "errno", 0) == errno.ERANGE


def test_an_operation_that_is_not_there_is_refused_with_its_errno() -> None:
    with pytest.raises(dispatch.Refused) as raised:
        dispatch.TABLE[Opcode.BMAP].call(cast(Operations, SimpleNamespace()), request(Opcode.BMAP), bytes(16))
    assert raised.value.errno == errno.ENOSYS
