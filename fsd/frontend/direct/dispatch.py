"""What becomes of each kind of request: the call of Operations, and the reply of its answer.

TABLE has one row for each opcode:

    call(operations, request, body)   takes the body apart and calls one operation; the answer may be a coroutine
    reply(unique, answer)             the answer as a message to the kernel: bytes, or a list of buffers
    untake(operations, answer)        undoes what counts only if the kernel has taken the reply: look-ups, handles
    interruptible                     what an INTERRUPT of this request does (Interruptible)
    is_bounded                        False: may wait for as long as another program likes

To add an opcode: its struct in requests.py, a function here that calls the operation, and a row in TABLE:

    def _lseek(operations, request, body):
        fh, offset, whence = LSEEK_IN.unpack_from(body)
        return operations.seek(fh, offset, whence)

    Opcode.LSEEK: Row(_lseek, replies.number),

An errno as the answer to everything (`refused`) is a row too: it says how the kernel is to do without.  `request` is
the header's fields (requests.IN_HEADER).  Pure: no I/O here, no waiting, no clock.
"""

from __future__ import annotations

import enum
import errno
import stat
from collections.abc import Callable, Coroutine
from types import CoroutineType
from typing import Any, Final, TypeAlias

from fsd.frontend.direct import replies
from fsd.frontend.direct.protocol import (
    EXTENDED_FLAGS,
    FATTR_ATIME,
    FATTR_ATIME_NOW,
    FATTR_CTIME,
    FATTR_GID,
    FATTR_KILL_SUIDGID,
    FATTR_MODE,
    FATTR_MTIME,
    FATTR_MTIME_NOW,
    FATTR_SIZE,
    FATTR_UID,
    FS_IOC_FSGETXATTR,
    FS_IOC_FSSETXATTR,
    FS_IOC_GETFLAGS,
    FS_IOC_SETFLAGS,
    FSYNC_FDATASYNC,
    LK_FLOCK,
    OPEN_KILL_SUIDGID,
    RELEASE_FLOCK_UNLOCK,
    SETXATTR_ACL_KILL_SGID,
    WRITE_CACHE,
    WRITE_KILL_SUIDGID,
    Opcode,
)
from fsd.frontend.direct.requests import (
    COPY_FILE_RANGE_IN,
    CREATE_IN,
    FALLOCATE_IN,
    FLAGS,
    FLUSH_IN,
    FORGET_IN,
    FSXATTR,
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
    SETXATTR_IN_SHORT,
    WRITE_IN,
    Malformed,
    cut_extensions,
    forgotten,
    name_and_value,
    name_at,
    names_at,
)
from fsd.frontend.ports import ROOT_NODEID, Answer, Changes, Entry, FileLock, Opened, Operations
from metadata.core.locks import LAST_BYTE, LockKind
from metadata.protocol import Caller
from wire.errors import ResultTooLarge, StoreError

Request: TypeAlias = tuple[int, int, int, int, int, int, int, int]
"""len, opcode, unique, nodeid, uid, gid, pid, extensions."""
Reply: TypeAlias = bytes | list[bytes | memoryview]
Call: TypeAlias = Callable[[Operations, Request, bytes], object]
Untake: TypeAlias = Callable[[Operations, Any], Coroutine[Any, Any, None] | None]
"""May give a coroutine that undoes the rest."""


class Interruptible(enum.Enum):
    """What an INTERRUPT does: the kernel sends one for every signal, also for those that leave the call going."""

    NEVER = 0  # It changes something: it ends as if there had been no signal, as on a disk.
    KILLED = 1  # It ends with EINTR if the caller is being killed: nobody is there to see the errno.
    SIGNALLED = 2  # It ends with EINTR: a wait for a lock.


class Refused(StoreError):
    """An errno that tells the kernel how to do without this operation."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode[number])
        self.errno = number  # type: ignore[misc]  # Of this one error; the class has EIO.


class Row:
    """See the module's docstring."""

    __slots__ = ("call", "interruptible", "is_bounded", "reply", "untake")

    def __init__(
        self,
        call: Call,
        reply: Callable[[int, Any], Reply],
        *,
        untake: Untake | None = None,
        interruptible: Interruptible = Interruptible.NEVER,
        is_bounded: bool = True,
    ) -> None:
        self.call = call
        self.reply = reply
        self.untake = untake
        self.interruptible = interruptible
        self.is_bounded = is_bounded


def refused(number: int) -> Row:
    """A row that answers every request with this errno."""

    def call(operations: Operations, request: Request, body: bytes) -> None:
        raise Refused(number)

    return Row(call, replies.done)


def _caller(request: Request) -> Caller:
    """Who asks; the kernel has checked permissions (default_permissions)."""
    return Caller(request[4], request[5])


def _groups(request: Request, body: bytes) -> tuple[bytes, tuple[int, ...]]:
    """The body without its extensions, and the groups that the kernel tells of somebody who makes something."""
    return cut_extensions(body, request[7]) if request[7] else (body, ())


# --- what must be undone when the kernel does not take a reply ----------------------------------------------------


def _untake_entry(operations: Operations, found: Entry) -> None:
    if found.nodeid > ROOT_NODEID:
        operations.forget(((found.nodeid, 1),))


def _untake_handle(operations: Operations, opened: Opened) -> Coroutine[Any, Any, None] | None:
    answer = operations.release(opened.fh)
    return answer if isinstance(answer, CoroutineType) else None


def _untake_created(operations: Operations, made: tuple[Opened, Entry]) -> Coroutine[Any, Any, None] | None:
    rest = _untake_handle(operations, made[0])
    _untake_entry(operations, made[1])
    return rest


def _untake_directory(operations: Operations, opened: Opened) -> None:
    operations.releasedir(opened.fh)


def _untake_listing(operations: Operations, filled: replies.ListingPlus) -> None:
    operations.forget([(nodeid, 1) for nodeid in filled.counted() if nodeid != ROOT_NODEID])


# --- names --------------------------------------------------------------------------------------------------------


def _lookup(operations: Operations, request: Request, body: bytes) -> object:
    return operations.lookup(request[3], name_at(body, 0))


def _mknod(operations: Operations, request: Request, body: bytes) -> object:
    body, groups = _groups(request, body)
    mode, rdev, umask = MKNOD_IN.unpack_from(body)
    caller = Caller(request[4], request[5], groups, umask=umask)
    return operations.mknod(request[3], name_at(body, MKNOD_IN.size), mode, rdev, caller)


def _mkdir(operations: Operations, request: Request, body: bytes) -> object:
    body, groups = _groups(request, body)
    mode, umask = MKDIR_IN.unpack_from(body)
    caller = Caller(request[4], request[5], groups, umask=umask)
    return operations.mkdir(request[3], name_at(body, MKDIR_IN.size), mode, caller)


def _symlink(operations: Operations, request: Request, body: bytes) -> object:
    body, groups = _groups(request, body)
    name, target = names_at(body, 0)
    return operations.symlink(request[3], name, target, Caller(request[4], request[5], groups))


def _link(operations: Operations, request: Request, body: bytes) -> object:
    (nodeid,) = LINK_IN.unpack_from(body)
    return operations.link(nodeid, request[3], name_at(body, LINK_IN.size), _caller(request))


def _unlink(operations: Operations, request: Request, body: bytes) -> object:
    return operations.unlink(request[3], name_at(body, 0), _caller(request))


def _rmdir(operations: Operations, request: Request, body: bytes) -> object:
    return operations.rmdir(request[3], name_at(body, 0), _caller(request))


def _rename(operations: Operations, request: Request, body: bytes) -> object:
    (new_parent,) = RENAME_IN.unpack_from(body)
    name, new_name = names_at(body, RENAME_IN.size)
    return operations.rename(request[3], name, new_parent, new_name, 0, _caller(request))


def _rename2(operations: Operations, request: Request, body: bytes) -> object:
    new_parent, flags = RENAME2_IN.unpack_from(body)
    name, new_name = names_at(body, RENAME2_IN.size)
    return operations.rename(request[3], name, new_parent, new_name, flags, _caller(request))


def _readlink(operations: Operations, request: Request, body: bytes) -> object:
    return operations.readlink(request[3])


# --- attributes ---------------------------------------------------------------------------------------------------


def _getattr(operations: Operations, request: Request, body: bytes) -> object:
    return operations.getattr(request[3])


_CHANGES: Final = (
    FATTR_MODE
    | FATTR_UID
    | FATTR_GID
    | FATTR_SIZE
    | FATTR_ATIME
    | FATTR_MTIME
    | FATTR_ATIME_NOW
    | FATTR_MTIME_NOW
    | FATTR_CTIME
    | FATTR_KILL_SUIDGID
)


def _setattr(operations: Operations, request: Request, body: bytes) -> object:
    (
        valid, _, size, _, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, uid, gid,
    ) = SETATTR_IN.unpack_from(body)  # fmt: skip
    if not valid & _CHANGES:  # A write takes a capability away, which is another request; suid may stay (root's write).
        return operations.getattr(request[3])
    changes = Changes(
        mode=stat.S_IMODE(mode) if valid & FATTR_MODE else None,
        uid=uid if valid & FATTR_UID else None,
        gid=gid if valid & FATTR_GID else None,
        size=size if valid & FATTR_SIZE else None,
        atime_ns=atime * replies.NS_PER_S + atime_ns
        if valid & (FATTR_ATIME | FATTR_ATIME_NOW) == FATTR_ATIME
        else None,
        mtime_ns=mtime * replies.NS_PER_S + mtime_ns
        if valid & (FATTR_MTIME | FATTR_MTIME_NOW) == FATTR_MTIME
        else None,
        ctime_ns=ctime * replies.NS_PER_S + ctime_ns if valid & FATTR_CTIME else None,
        atime_now=bool(valid & FATTR_ATIME_NOW),
        mtime_now=bool(valid & FATTR_MTIME_NOW),
        kill_privileges=bool(valid & FATTR_KILL_SUIDGID),
    )
    return operations.setattr(request[3], changes, _caller(request))


def _statfs(operations: Operations, request: Request, body: bytes) -> object:
    return operations.statfs()


# --- files --------------------------------------------------------------------------------------------------------


def _create(operations: Operations, request: Request, body: bytes) -> object:
    body, groups = _groups(request, body)
    flags, mode, umask, _ = CREATE_IN.unpack_from(body)
    caller = Caller(request[4], request[5], groups, umask=umask)
    return operations.create(request[3], name_at(body, CREATE_IN.size), mode, flags, caller)


def _tmpfile(operations: Operations, request: Request, body: bytes) -> object:
    """As CREATE; the name is the kernel's, and means nothing."""
    body, groups = _groups(request, body)
    flags, mode, umask, _ = CREATE_IN.unpack_from(body)
    return operations.tmpfile(request[3], mode, flags, Caller(request[4], request[5], groups, umask=umask))


def _open(operations: Operations, request: Request, body: bytes) -> object:
    flags, open_flags = OPEN_IN.unpack_from(body)
    kill_privileges = bool(open_flags & OPEN_KILL_SUIDGID)
    return operations.open(request[3], flags, _caller(request), kill_privileges=kill_privileges)


def _read(operations: Operations, request: Request, body: bytes) -> object:
    fh, offset, size, _, _, _ = READ_IN.unpack_from(body)
    return operations.read(fh, offset, size)


def write(operations: Operations, request: Request, body: bytes, content: bytes) -> object:
    """Carry out WRITE, whose content lies in a buffer of its own."""
    fh, offset, size, flags, _, _ = WRITE_IN.unpack_from(body)
    if size != len(content):
        raise Malformed(f"a write of {size} bytes with {len(content)}")
    if flags & (WRITE_KILL_SUIDGID | WRITE_CACHE):
        return operations.write(
            fh,
            offset,
            content,
            kill_privileges=bool(flags & WRITE_KILL_SUIDGID),
            caller=_caller(request),
            from_pages=bool(flags & WRITE_CACHE),
        )
    return operations.write(fh, offset, content, from_pages=False)


def _write(operations: Operations, request: Request, body: bytes) -> object:
    return write(operations, request, body, body[WRITE_IN.size :])


def _fallocate(operations: Operations, request: Request, body: bytes) -> object:
    fh, offset, length, mode = FALLOCATE_IN.unpack_from(body)
    return operations.fallocate(fh, mode, offset, length, kill_privileges=_loses_privileges(request))


def _loses_privileges(request: Request) -> bool:
    """Of changes for which the kernel does not tell whether the caller has CAP_FSETID (HANDLE_KILLPRIV_V2): by uid."""
    return request[4] != 0


def _lseek(operations: Operations, request: Request, body: bytes) -> object:
    fh, offset, whence = LSEEK_IN.unpack_from(body)
    return operations.seek(fh, offset, whence)


def _copy_file_range(operations: Operations, request: Request, body: bytes) -> object:
    fh_in, offset_in, _, fh_out, offset_out, length, _ = COPY_FILE_RANGE_IN.unpack_from(body)
    return operations.copy_range(
        fh_in, offset_in, fh_out, offset_out, length, kill_privileges=_loses_privileges(request)
    )


def _syncfs(operations: Operations, request: Request, body: bytes) -> object:
    return operations.sync()


def _flush(operations: Operations, request: Request, body: bytes) -> object:
    fh, lock_owner = FLUSH_IN.unpack_from(body)
    return operations.flush(fh, lock_owner)


def _fsync(operations: Operations, request: Request, body: bytes) -> object:
    fh, flags = FSYNC_IN.unpack_from(body)
    return operations.fsync(fh, bool(flags & FSYNC_FDATASYNC))


def _release(operations: Operations, request: Request, body: bytes) -> object:
    fh, _, flags, lock_owner = RELEASE_IN.unpack_from(body)
    return operations.release(fh, lock_owner=lock_owner, flock=bool(flags & RELEASE_FLOCK_UNLOCK))


# --- locks --------------------------------------------------------------------------------------------------------

LOCK_KINDS: Final = {int(kind): kind for kind in LockKind}
"""F_RDLCK, F_WRLCK and F_UNLCK."""


def _lock_request(body: bytes) -> tuple[int, int, FileLock, bool]:
    """(handle, owner, lock, whether it is of flock(2))."""
    fh, owner, start, end, kind, pid, flags = LOCK_IN.unpack_from(body)
    if kind not in LOCK_KINDS or not start <= end <= LAST_BYTE:
        raise Malformed(f"a lock of kind {kind} from {start} to {end}")
    return fh, owner, FileLock(LOCK_KINDS[kind], start, end, pid), bool(flags & LK_FLOCK)


def _getlk(operations: Operations, request: Request, body: bytes) -> object:
    fh, owner, lock, _ = _lock_request(body)
    return operations.get_lock(fh, owner, lock)


def _setlk(operations: Operations, request: Request, body: bytes) -> object:
    fh, owner, lock, flock = _lock_request(body)
    return operations.set_lock(fh, owner, lock, flock=flock, wait=False)


def _setlkw(operations: Operations, request: Request, body: bytes) -> object:
    fh, owner, lock, flock = _lock_request(body)
    return operations.set_lock(fh, owner, lock, flock=flock, wait=True)


# --- directories --------------------------------------------------------------------------------------------------


def _opendir(operations: Operations, request: Request, body: bytes) -> object:
    flags, _ = OPEN_IN.unpack_from(body)
    return operations.opendir(request[3], flags)


def _list(operations: Operations, body: bytes, filled: replies.Listing, *, plus: bool) -> object:
    fh, cookie, _, _, _, _ = READ_IN.unpack_from(body)
    answer = operations.readdir(fh, cookie, plus, filled.add)
    return _when_listed(answer, filled) if isinstance(answer, CoroutineType) else filled


async def _when_listed(answer: Coroutine[Any, Any, None], filled: replies.Listing) -> replies.Listing:
    await answer
    return filled


def _readdir(operations: Operations, request: Request, body: bytes) -> object:
    return _list(operations, body, replies.Listing(READ_IN.unpack_from(body)[2]), plus=False)


def _readdirplus(operations: Operations, request: Request, body: bytes) -> object:
    return _list(operations, body, replies.ListingPlus(READ_IN.unpack_from(body)[2]), plus=True)


def _releasedir(operations: Operations, request: Request, body: bytes) -> None:
    operations.releasedir(RELEASE_IN.unpack_from(body)[0])


def _fsyncdir(operations: Operations, request: Request, body: bytes) -> None:
    operations.fsyncdir(FSYNC_IN.unpack_from(body)[0])


# --- extended attributes ------------------------------------------------------------------------------------------


class _Sized:
    """A value, and how many bytes the caller has room for; 0: it asks how many there are."""

    __slots__ = ("room", "value")

    def __init__(self, value: bytes, room: int) -> None:
        if room and len(value) > room:
            raise ResultTooLarge(f"{len(value)} bytes of {room}")
        self.value = value
        self.room = room


def _sized(unique: int, answer: _Sized) -> Reply:
    if answer.room == 0:
        return replies.written(unique, len(answer.value))
    return replies.data(unique, answer.value)


async def _when_valued(answer: Coroutine[Any, Any, bytes], room: int) -> _Sized:
    return _Sized(await answer, room)


async def _when_named(answer: Coroutine[Any, Any, tuple[bytes, ...]], room: int) -> _Sized:
    return _Sized(_joined(await answer), room)


def _joined(names: tuple[bytes, ...]) -> bytes:
    return b"".join([name + b"\0" for name in names])


def _getxattr(operations: Operations, request: Request, body: bytes) -> object:
    (room,) = GETXATTR_IN.unpack_from(body)
    answer = operations.getxattr(request[3], name_at(body, GETXATTR_IN.size), _caller(request))
    return _Sized(answer, room) if isinstance(answer, bytes) else _when_valued(answer, room)


def _listxattr(operations: Operations, request: Request, body: bytes) -> object:
    (room,) = GETXATTR_IN.unpack_from(body)
    answer = operations.listxattr(request[3], _caller(request))
    return _Sized(_joined(answer), room) if isinstance(answer, tuple) else _when_named(answer, room)


def _setxattr(operations: Operations, request: Request, body: bytes) -> object:
    size, flags, more = SETXATTR_IN.unpack_from(body)
    name, value = name_and_value(body, SETXATTR_IN.size, size)
    drop_sgid = bool(more & SETXATTR_ACL_KILL_SGID)
    return operations.setxattr(request[3], name, value, flags, _caller(request), drop_sgid=drop_sgid)


def _setxattr_short(operations: Operations, request: Request, body: bytes) -> object:
    size, flags = SETXATTR_IN_SHORT.unpack_from(body)
    name, value = name_and_value(body, SETXATTR_IN_SHORT.size, size)
    return operations.setxattr(request[3], name, value, flags, _caller(request))


def _removexattr(operations: Operations, request: Request, body: bytes) -> object:
    return operations.removexattr(request[3], name_at(body, 0), _caller(request))


# --- flags --------------------------------------------------------------------------------------------------------


def _ioctl(operations: Operations, request: Request, body: bytes) -> object:
    """chattr and lsattr, which the kernel has checked; it opens the file for the request by itself."""
    _, _, command, _, in_size, _ = IOCTL_IN.unpack_from(body)
    content = body[IOCTL_IN.size :]
    if len(content) != in_size:
        raise Malformed(f"an ioctl of {in_size} bytes with {len(content)}")
    if command in (FS_IOC_GETFLAGS, FS_IOC_FSGETXATTR):
        encode = FLAGS.pack if command == FS_IOC_GETFLAGS else _extended_flags
        answer = operations.get_flags(request[3])
        return encode(answer) if isinstance(answer, int) else _when_flagged(answer, encode)
    if command == FS_IOC_SETFLAGS:
        return _when_set(operations.set_flags(request[3], FLAGS.unpack_from(content)[0], _caller(request)))
    if command == FS_IOC_FSSETXATTR:
        return _when_set(operations.set_flags(request[3], _plain_flags(content), _caller(request)))
    raise Refused(errno.ENOTTY)


async def _when_flagged(answer: Coroutine[Any, Any, int], encode: Callable[[int], bytes]) -> bytes:
    return encode(await answer)


async def _when_set(answer: Answer[None]) -> bytes:
    if answer is not None:
        await answer
    return b""


def _extended_flags(flags: int) -> bytes:
    """FS_IOC_GETFLAGS's flags as struct fsxattr."""
    return FSXATTR.pack(sum(extended for plain, extended in EXTENDED_FLAGS.items() if flags & plain), 0, 0, 0, 0)


def _plain_flags(content: bytes) -> int:
    """Struct fsxattr as FS_IOC_SETFLAGS's flags.  What has no place there is refused."""
    extended, extent_size, _, project, copy_size = FSXATTR.unpack_from(content)
    if extended & ~sum(EXTENDED_FLAGS.values()) or extent_size or project or copy_size:
        raise Refused(errno.EOPNOTSUPP)
    return sum(plain for plain, flag in EXTENDED_FLAGS.items() if extended & flag)


# --- the rest -----------------------------------------------------------------------------------------------------


def _destroy(operations: Operations, request: Request, body: bytes) -> None:
    return None


def forget(operations: Operations, request: Request, body: bytes) -> None:
    """FORGET and BATCH_FORGET, which have no reply."""
    if request[1] == Opcode.FORGET:
        operations.forget(((request[3], *FORGET_IN.unpack_from(body)),))
    else:
        operations.forget(forgotten(body))


KILLED: Final = Interruptible.KILLED

TABLE: Final[dict[Opcode, Row]] = {
    Opcode.LOOKUP: Row(_lookup, replies.entry, untake=_untake_entry, interruptible=KILLED),
    Opcode.GETATTR: Row(_getattr, replies.attributes, interruptible=KILLED),
    Opcode.SETATTR: Row(_setattr, replies.attributes),
    Opcode.READLINK: Row(_readlink, replies.data, interruptible=KILLED),
    Opcode.SYMLINK: Row(_symlink, replies.entry, untake=_untake_entry),
    Opcode.MKNOD: Row(_mknod, replies.entry, untake=_untake_entry),
    Opcode.MKDIR: Row(_mkdir, replies.entry, untake=_untake_entry),
    Opcode.UNLINK: Row(_unlink, replies.done),
    Opcode.RMDIR: Row(_rmdir, replies.done),
    Opcode.RENAME: Row(_rename, replies.done),
    Opcode.LINK: Row(_link, replies.entry, untake=_untake_entry),
    Opcode.OPEN: Row(_open, replies.opened_file, untake=_untake_handle),
    Opcode.READ: Row(_read, replies.data, interruptible=KILLED),
    Opcode.WRITE: Row(_write, replies.written),
    Opcode.STATFS: Row(_statfs, replies.statfs, interruptible=KILLED),
    Opcode.RELEASE: Row(_release, replies.done),
    Opcode.FSYNC: Row(_fsync, replies.done),
    Opcode.SETXATTR: Row(_setxattr, replies.done),
    Opcode.GETXATTR: Row(_getxattr, _sized, interruptible=KILLED),
    Opcode.LISTXATTR: Row(_listxattr, _sized, interruptible=KILLED),
    Opcode.REMOVEXATTR: Row(_removexattr, replies.done),
    Opcode.FLUSH: Row(_flush, replies.done),
    Opcode.OPENDIR: Row(_opendir, replies.opened_directory, untake=_untake_directory),
    Opcode.READDIR: Row(_readdir, replies.listing, interruptible=KILLED),
    Opcode.RELEASEDIR: Row(_releasedir, replies.done),
    Opcode.FSYNCDIR: Row(_fsyncdir, replies.done),
    Opcode.GETLK: Row(_getlk, replies.lock, interruptible=KILLED),
    Opcode.SETLK: Row(_setlk, replies.done),
    Opcode.SETLKW: Row(_setlkw, replies.done, interruptible=Interruptible.SIGNALLED, is_bounded=False),
    Opcode.ACCESS: refused(errno.ENOSYS),  # Never asked with default_permissions.
    Opcode.CREATE: Row(_create, replies.created, untake=_untake_created),
    Opcode.BMAP: refused(errno.ENOSYS),  # Of a block device's files only.
    Opcode.DESTROY: Row(_destroy, replies.done),
    Opcode.IOCTL: Row(_ioctl, replies.ioctl),
    Opcode.POLL: refused(errno.ENOSYS),  # Files are always ready; the kernel does not ask again.
    Opcode.FALLOCATE: Row(_fallocate, replies.done),
    Opcode.READDIRPLUS: Row(_readdirplus, replies.listing, untake=_untake_listing, interruptible=KILLED),
    Opcode.RENAME2: Row(_rename2, replies.done),
    Opcode.LSEEK: Row(_lseek, replies.number, interruptible=KILLED),
    Opcode.COPY_FILE_RANGE: Row(_copy_file_range, replies.written),
    Opcode.SYNCFS: Row(_syncfs, replies.done),
    Opcode.TMPFILE: Row(_tmpfile, replies.created, untake=_untake_created),
    Opcode.STATX: Row(_getattr, replies.statx, interruptible=KILLED),
    Opcode.COPY_FILE_RANGE_64: Row(_copy_file_range, replies.number),
}
"""INIT, FORGET, BATCH_FORGET and INTERRUPT, which are not answered by an operation, are the loop's."""


def rows(*, extended_setxattr: bool) -> dict[int, Row]:
    """TABLE by plain numbers, for a kernel that sends these structs."""
    made = {int(opcode): row for opcode, row in TABLE.items()}
    if not extended_setxattr:
        made[Opcode.SETXATTR] = Row(_setxattr_short, replies.done)
    return made
