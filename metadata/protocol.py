"""Messages between a mount and the inode service.

Every request of a mount names its session.  Every Mutation also carries a sequence number, unique in its session: a
retry with the same number gets the first answer, also after the service was restarted.  The numbers in flight of one
session span less than SEQUENCE_WINDOW.  Acknowledged means committed and flushed.

Permission checks: with `Caller.check` False the kernel has made them (default_permissions); with True the service
makes them with the uid, gid and groups given here.
"""

from __future__ import annotations

import enum
from typing import Annotated, ClassVar

import msgspec

from blockstore.core.cluster_map import ClusterMap
from blockstore.protocol import BlockId, BlockServerStatus
from metadata.core.locks import LAST_BYTE, SESSION_SEGMENTS_MAX, SESSION_WAITERS_MAX, LockKind, LockSpace
from metadata.core.schema import (
    INLINE_SIZE_MAX,
    NAME_SIZE_MAX,
    SYMLINK_SIZE_MAX,
    XATTR_NAME_SIZE_MAX,
    XATTR_VALUE_SIZE_MAX,
    Extent,
    Inode,
    Unsigned,
)
from wire.message import Message, Notice, R_co, Request, method_table, notice_table

SEQUENCE_WINDOW = 1024
"""Mutations of one session that may be unanswered at a time; the service keeps this many answers for retries."""
EXTENTS_PER_MESSAGE_MAX = 4096
"""Extents in one commit or one reply; about 100 KiB encoded."""
ENTRIES_PER_PAGE_MAX = 4096
"""Directory entries in one reply; with attributes and long names about 1 MiB, the frame's bound for a body."""
OPENS_PER_MESSAGE_MAX = 1024
"""Inodes in one RegisterOpens or ReleaseInode: a few milliseconds of the writer's time."""
TOUCHES_PER_MESSAGE_MAX = 1024
"""Access times in one TouchAtimes: 5 ms of the writer's time."""
RECALL_ITEMS_MAX = 1024
"""Items in one Recall: about 300 KB with the longest names; one that would have more recalls everything."""
GROUPS_MAX = 1024
LISTED_SESSIONS_MAX = 2000
"""Sessions in one list; with long names of clients and mount points it stays below the frame's bound for a body."""
LISTED_LOCKS_MAX = 10_000
"""Locks in one list; about 600 KiB."""
FIRST_COOKIE = 16
"""Cookies below this one are the front end's, for "." and ".."; an entry's cookie is at least this and below 2**63."""

# A name is at most 4 times NAME_SIZE_MAX on the wire, so that the service can answer ENAMETOOLONG instead of breaking
# the connection.
Name = Annotated[bytes, msgspec.Meta(max_length=4 * NAME_SIZE_MAX)]
Target = Annotated[bytes, msgspec.Meta(max_length=2 * SYMLINK_SIZE_MAX)]
XattrName = Annotated[bytes, msgspec.Meta(max_length=4 * XATTR_NAME_SIZE_MAX)]
XattrValue = Annotated[bytes, msgspec.Meta(max_length=2 * XATTR_VALUE_SIZE_MAX)]
InlineData = Annotated[bytes, msgspec.Meta(max_length=INLINE_SIZE_MAX)]
Extents = Annotated[tuple[Extent, ...], msgspec.Meta(max_length=EXTENTS_PER_MESSAGE_MAX)]


class Caller(Message, frozen=True, array_like=True):
    """Who asks."""

    uid: Unsigned = 0
    gid: Unsigned = 0
    groups: Annotated[tuple[int, ...], msgspec.Meta(max_length=GROUPS_MAX)] = ()
    check: bool = False  # True: the service checks permissions; False: the kernel has.
    umask: Unsigned = 0  # Of what makes an inode; counts unless the directory has a default access control list.


class Mutation(Request[R_co], frozen=True, array_like=True):
    """A request that changes something, exactly once."""

    session: Unsigned
    sequence: Annotated[int, msgspec.Meta(ge=1)]


class Done(Message, frozen=True, array_like=True):
    """It is done and durable."""


class InodeReply(Message, frozen=True, array_like=True):
    """An inode and its attributes after the request."""

    ino: int
    inode: Inode
    parent: Inode | None = None  # Of what makes an entry: its directory's attributes after it.


# --- sessions: 1 to 9 ------------------------------------------------------------------------------------------------


class OpenSessionDone(Message, frozen=True, array_like=True):
    """The session's terms."""

    session: int
    lease_ms: int  # The session ends when it was not renewed for this long.
    root_ino: int  # Of the directory that was asked for.
    root: Inode
    alone: bool  # No other session is open: everything may be cached until RenewSession says otherwise.
    map: ClusterMap
    turn: int = 0  # For RenewSession.turn.
    life: str = ""  # Of the service, for RenewSession.life and Reclaim.


class OpenSession(Request[OpenSessionDone], frozen=True, array_like=True):
    """Begin a session.

    A session of the same host boot and mount point is replaced: nothing is mounted there any more.  Its daemon may live
    (a lazy unmount with files in use); it then opens a session anew, which replaces nobody.
    Not answered before every other live session has acknowledged, by RenewSession with alone=False, that it is no
    longer alone, or its lease has run out.  Idempotent: the same `opening` is answered with the session it has made.
    Errors: NoSuchEntry, NotDirectory (subdirectory), WrongCluster.
    """

    METHOD: ClassVar[int] = 1
    REPLY: ClassVar[type[Message]] = OpenSessionDone

    client: Annotated[str, msgspec.Meta(max_length=255)]  # For people: host, pid, version.
    host_boot_id: Annotated[str, msgspec.Meta(max_length=64)]
    mountpoint: Annotated[bytes, msgspec.Meta(max_length=4096)]
    subdirectory: Annotated[bytes, msgspec.Meta(max_length=4096)] = b"/"
    opening: Annotated[str, msgspec.Meta(max_length=64)] = ""  # Random, the same in every retry; "": never a retry.
    anew: bool = False  # The daemon's session was lost, and this one is instead of it.


class RenewSessionDone(Message, frozen=True, array_like=True):
    """The lease runs again from now on."""

    alone: bool
    map: ClusterMap | None  # None: the client's epoch is the newest.
    turn: int = 0  # How often the session has been told that it is alone.
    life: str = ""  # Random, anew with every start of the service: another one has forgotten all locks (Reclaim).
    ready_locks: tuple[int, ...] = ()  # Waiters (WaitLock.number) that may try now, with SetLock.
    wants_locks: bool = False  # Somebody asks for a list of locks: a client that is alone answers with Reclaim.
    register: bool = False  # The service does not know what the session has open: RegisterOpens is wanted.


class RenewSession(Request[RenewSessionDone], frozen=True, array_like=True):
    """Renew the lease; wait at the service up to `wait_ms` for news (a newer map, a change of `alone`, another life of
    the service, locks that may be had now).

    Errors: SessionExpired.
    """

    METHOD: ClassVar[int] = 2
    REPLY: ClassVar[type[Message]] = RenewSessionDone

    session: Unsigned
    epoch: Unsigned
    # What the client acts on: False acknowledges that it has dropped what only a lone client may cache, and has told
    # what it has open (RegisterOpens).
    alone: bool
    wait_ms: Annotated[int, msgspec.Meta(ge=0, le=60_000)] = 0
    turn: Unsigned = 0  # Of the last answer: a delayed copy of an older request acknowledges nothing.
    life: Annotated[str, msgspec.Meta(max_length=64)] = ""  # Of the service that knows this session's locks.


class CloseSession(Request[Done], frozen=True, array_like=True):
    """End the session: its open-unlinked inodes go.  Idempotent."""

    METHOD: ClassVar[int] = 3
    REPLY: ClassVar[type[Message]] = Done

    session: Unsigned


# --- locks: 4 to 7, 64 ------------------------------------------------------------------------------------------------

Byte = Annotated[int, msgspec.Meta(ge=0, le=LAST_BYTE)]


class Lock(Message, frozen=True, array_like=True):
    """One locked range of one owner of a session, or one that is asked for."""

    ino: Unsigned
    space: LockSpace
    owner: Unsigned  # The kernel's lock owner, 64 bits.
    kind: LockKind
    start: Byte
    end: Byte  # The last byte; LAST_BYTE: to the end, wherever that is.
    pid: Unsigned = 0  # Of the process, for F_GETLK and for people.


class SetLockDone(Message, frozen=True, array_like=True):
    """The lock is held (or gone)."""

    inode: Inode | None = None  # After a lock was got: what is cached of an older content is no good.


class SetLock(Request[SetLockDone], frozen=True, array_like=True):
    """Lock, or with kind UNLOCK unlock, at once or not at all.  Idempotent.

    With `number` the caller would wait: it gives way to those who were promised the lock, and if it was promised
    itself, that is over with this request.  A refused flock of another kind than before has lost the one before.
    Errors: WouldBlock, GracePeriod (not for UNLOCK), NoLocks, SessionExpired.
    """

    METHOD: ClassVar[int] = 4
    REPLY: ClassVar[type[Message]] = SetLockDone

    session: Unsigned
    lock: Lock
    number: Unsigned = 0  # Of its WaitLock; 0: it will not wait.


class GetLockDone(Message, frozen=True, array_like=True):
    """What F_GETLK tells; None: nothing is in the way."""

    lock: Lock | None  # `pid` 0: a process of another host.
    session: int = 0  # Whose it is.


class GetLock(Request[GetLockDone], frozen=True, array_like=True):
    """The first lock that would be in the way of `lock`.  Errors: GracePeriod, SessionExpired."""

    METHOD: ClassVar[int] = 5
    REPLY: ClassVar[type[Message]] = GetLockDone

    session: Unsigned
    lock: Lock


class WaitLockDone(Message, frozen=True, array_like=True):
    """The waiter is known; `ready`: it may try now, and no RenewSessionDone will say so."""

    ready: bool


class WaitLock(Request[WaitLockDone], frozen=True, array_like=True):
    """Wait for a lock, or with `withdraw` do so no more.

    Answered at once; when it may try later, RenewSessionDone.ready_locks says so.
    Nothing is ever granted to a waiter: it tries, with SetLock.  Idempotent.
    Errors: Deadlock, NoLocks, SessionExpired.
    """

    METHOD: ClassVar[int] = 6
    REPLY: ClassVar[type[Message]] = WaitLockDone

    session: Unsigned
    number: Annotated[int, msgspec.Meta(ge=1)]  # Names the waiter in its session; never used for another.
    lock: Lock
    withdraw: bool = False


class ReclaimDone(Message, frozen=True, array_like=True):
    """The service's life; another one than the request's: nothing was taken, tell again."""

    life: str


class Reclaim(Request[ReclaimDone], frozen=True, array_like=True):
    """All that the session holds, in place of what the service knows of that.

    Told when the service has begun a new life, before the session acknowledges that it shares, and to a service that
    wants to list the locks of a session that is alone.  At any other time the service knows better, and takes nothing.
    Errors: SessionExpired.
    """

    METHOD: ClassVar[int] = 7
    REPLY: ClassVar[type[Message]] = ReclaimDone

    session: Unsigned
    life: Annotated[str, msgspec.Meta(max_length=64)]
    locks: Annotated[tuple[Lock, ...], msgspec.Meta(max_length=SESSION_SEGMENTS_MAX)] = ()
    waiting: Annotated[tuple[Lock, ...], msgspec.Meta(max_length=SESSION_WAITERS_MAX)] = ()  # For lists only.


class LockHolder(Message, frozen=True, array_like=True):
    """A session in a list of locks."""

    session: int
    client: str  # For people: host, pid, version.
    mountpoint: bytes
    answered: bool = True  # False: it is alone, was asked for its locks and did not answer in time.


class ListedLock(Message, frozen=True, array_like=True):
    """A lock in a list."""

    session: int
    lock: Lock
    waiting: bool = False


class ListLocksDone(Message, frozen=True, array_like=True):
    """Locks that are held and waited for, with the sessions they belong to."""

    holders: tuple[LockHolder, ...]
    locks: tuple[ListedLock, ...]  # At most LISTED_LOCKS_MAX.
    total: int  # How many there are.
    grace: bool = False  # The service was started again and some sessions have not told their locks yet.


class ListLocks(Request[ListLocksDone], frozen=True, array_like=True):
    """All locks, or those of one inode; needs no session."""

    METHOD: ClassVar[int] = 64
    REPLY: ClassVar[type[Message]] = ListLocksDone

    ino: Unsigned = 0  # 0: all.


# --- opens: 8 ---------------------------------------------------------------------------------------------------------


class RegisterOpens(Request[Done], frozen=True, array_like=True):
    """The session has these inodes open, or holds them; those that do not exist any more are passed over.

    Sent by a session that was alone, before it acknowledges that it shares, and after a restart of the service
    (RenewSessionDone.register); in pages, of which the last one is `complete`.  When all sessions have told, the
    service lets go of what it held without knowing for whom.  Idempotent.
    Errors: SessionExpired, ServerOverloaded.
    """

    METHOD: ClassVar[int] = 8
    REPLY: ClassVar[type[Message]] = Done

    session: Unsigned
    inos: Annotated[tuple[int, ...], msgspec.Meta(max_length=OPENS_PER_MESSAGE_MAX)]
    complete: bool


# --- recalls: 9 -------------------------------------------------------------------------------------------------------


class RecallKind(enum.IntEnum):
    """What a session must stop believing."""

    ATTRS = 1  # Attributes of inode `ino`, extended ones too; its content is as it was.
    CONTENT = 2  # The same, and its layout, pages and symlink target.
    NAME = 3  # Entry `name` of directory `ino`, there or not, and with it the directory's listing.
    ALL_NAMES = 4  # Every entry of directory `ino`, and its listing; and its attributes.
    FLUSH = 5  # It may write `ino` behind: commit what is written, and write through until told otherwise.
    EVERYTHING = 6  # All that it holds, bytes to be written too (FLUSH); `ino` is 0.


class RecallItem(Message, frozen=True, array_like=True):
    """One thing that a session must stop believing."""

    ino: int
    kind: RecallKind
    name: bytes = b""  # Of NAME.


class Recall(Notice, frozen=True, array_like=True):
    """Stop believing these, the kernel included, and say so with AckRecalls.

    The recalls of a session are numbered 1, 2, 3 ... in each life of the service.  Those without an acknowledgement
    are sent again over the session's next connection, so one may come twice.
    """

    NOTICE: ClassVar[int] = 1

    session: int
    life: str  # Of the service, to which `number` belongs.
    number: int
    items: Annotated[tuple[RecallItem, ...], msgspec.Meta(max_length=RECALL_ITEMS_MAX)]


METADATA_NOTICES = notice_table([Recall])


class AckRecalls(Request[Done], frozen=True, array_like=True):
    """Nothing of what the recalls up to `number` named is believed any more, nor answered by the kernel.

    What was asked before this acknowledgement was sent must not be believed either: its answer may be from before the
    change.  Idempotent; of another life of the service it says nothing.
    Errors: SessionExpired.
    """

    METHOD: ClassVar[int] = 9
    REPLY: ClassVar[type[Message]] = Done

    session: Unsigned
    life: Annotated[str, msgspec.Meta(max_length=64)]
    number: Unsigned


# --- reads: 10 to 29 --------------------------------------------------------------------------------------------------


class Lookup(Request[InodeReply], frozen=True, array_like=True):
    """Errors: NoSuchEntry, NotDirectory, NameTooLong, AccessDenied."""

    METHOD: ClassVar[int] = 10
    REPLY: ClassVar[type[Message]] = InodeReply

    session: Unsigned
    parent: Unsigned
    name: Name
    caller: Caller = Caller()


class GetAttr(Request[InodeReply], frozen=True, array_like=True):
    """Errors: NoSuchEntry."""

    METHOD: ClassVar[int] = 11
    REPLY: ClassVar[type[Message]] = InodeReply

    session: Unsigned
    ino: Unsigned


class ReadLinkDone(Message, frozen=True, array_like=True):
    """The target's bytes."""

    target: bytes


class ReadLink(Request[ReadLinkDone], frozen=True, array_like=True):
    """Errors: NoSuchEntry, InvalidArgument (not a symlink)."""

    METHOD: ClassVar[int] = 12
    REPLY: ClassVar[type[Message]] = ReadLinkDone

    session: Unsigned
    ino: Unsigned


class Dirent(Message, frozen=True, array_like=True):
    """One directory entry.  `cookie` says where to go on after it."""

    name: bytes
    ino: int
    file_type: int  # The S_IFMT bits of its mode.
    cookie: int
    inode: Inode | None = None  # With ReadDir.plus.


class ReadDirDone(Message, frozen=True, array_like=True):
    """A page, in ascending order of cookie; entries of equal cookie are never cut apart."""

    entries: tuple[Dirent, ...]
    end: bool


class ReadDir(Request[ReadDirDone], frozen=True, array_like=True):
    """Entries with a cookie above `after` (0: all); "." and ".." are not among them.

    A cookie stays valid while entries come and go: an entry that was there all the time is listed exactly once.
    Errors: NoSuchEntry, NotDirectory, AccessDenied.
    """

    METHOD: ClassVar[int] = 13
    REPLY: ClassVar[type[Message]] = ReadDirDone

    session: Unsigned
    ino: Unsigned
    after: Unsigned
    count: Annotated[int, msgspec.Meta(ge=1, le=ENTRIES_PER_PAGE_MAX)]
    plus: bool = False
    caller: Caller = Caller()


class XattrReply(Message, frozen=True, array_like=True):
    """An attribute's value."""

    value: bytes


class GetXattr(Request[XattrReply], frozen=True, array_like=True):
    """Errors: NoSuchAttribute, NotSupported (namespace), NotPermitted, AccessDenied, ResultTooLarge (name)."""

    METHOD: ClassVar[int] = 14
    REPLY: ClassVar[type[Message]] = XattrReply

    session: Unsigned
    ino: Unsigned
    name: XattrName
    caller: Caller = Caller()


class ListXattrDone(Message, frozen=True, array_like=True):
    """Names in ascending order."""

    names: tuple[bytes, ...]


class ListXattr(Request[ListXattrDone], frozen=True, array_like=True):
    """Names this caller may see: `trusted.` ones only for uid 0."""

    METHOD: ClassVar[int] = 15
    REPLY: ClassVar[type[Message]] = ListXattrDone

    session: Unsigned
    ino: Unsigned
    caller: Caller = Caller()


class StatFsDone(Message, frozen=True, array_like=True):
    """Space in bytes, already divided by the number of copies new files get."""

    space_total: int
    space_free: int
    inode_count: int  # In use.
    inodes_total: int = -1  # With a quota of inodes: its limit; -1: no quota.
    inodes_free: int = -1  # With a quota of inodes: how many more there may be.
    quota_free: int = -1  # Bytes that the quotas alone leave for this inode; -1: no quota.


class StatFs(Request[StatFsDone], frozen=True, array_like=True):
    """Figures of statvfs(3); where quotas at or above `ino` say less than the cluster has, what they say."""

    METHOD: ClassVar[int] = 16
    REPLY: ClassVar[type[Message]] = StatFsDone

    session: Unsigned
    ino: Unsigned


class LayoutReply(Message, frozen=True, array_like=True):
    """Attributes and bytes (inline) or extents of one snapshot.

    `extents` cover what of the asked range is not a hole, in ascending order, not overlapping, cut at neither end.
    `complete_until`: up to this offset the extents are complete; ask again from there if it is below what you need.
    """

    ino: int
    inode: Inode
    inline: bytes | None  # When inode.flags has INLINE: the file's first bytes; zeros follow up to its size.
    extents: tuple[Extent, ...]
    complete_until: int
    parent: Inode | None = None  # Of Create: the directory's attributes after it.
    write_lease: bool = False  # The session may write behind until FLUSH is recalled; else each write is committed.


class GetLayout(Request[LayoutReply], frozen=True, array_like=True):
    """Attributes and layout from `offset` for `length` bytes: what open(2) and the first read need, in one trip.

    `open`: the session opens the inode from now on, until it says ReleaseInode; sent while other sessions are there.
    `write`: and would write behind (LayoutReply.write_lease), which it may while nobody else has it open.
    Errors: NoSuchEntry; ServerOverloaded (with `open`).
    """

    METHOD: ClassVar[int] = 17
    REPLY: ClassVar[type[Message]] = LayoutReply

    session: Unsigned
    ino: Unsigned
    offset: Unsigned = 0
    length: Unsigned = 1 << 62
    open: bool = False
    write: bool = False


# --- mutations: 30 to 59 ----------------------------------------------------------------------------------------------


class SetAttrMask(enum.IntFlag):
    """Which fields of SetAttr count."""

    MODE = 1
    UID = 2
    GID = 4
    SIZE = 8
    ATIME = 16
    MTIME = 32
    ATIME_NOW = 64
    MTIME_NOW = 128
    CTIME = 256


class SetAttr(Mutation[InodeReply], frozen=True, array_like=True):
    """chmod, chown, truncate, utimensat in one; all of it or nothing.

    Truncation drops extents and inline bytes beyond the new size and moves nothing: what lies between the bytes that
    exist and the size reads as zeros, of an inline file too.
    Errors: NoSuchEntry, NotPermitted, AccessDenied, FileTooLarge, InvalidArgument, IsDirectory.
    """

    METHOD: ClassVar[int] = 30
    REPLY: ClassVar[type[Message]] = InodeReply

    ino: Unsigned
    mask: Unsigned
    mode: Unsigned = 0
    uid: Unsigned = 0
    gid: Unsigned = 0
    size: Unsigned = 0
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    caller: Caller = Caller()


class Create(Mutation[LayoutReply], frozen=True, array_like=True):
    """open(O_CREAT): make the regular file, or, unless `exclusive`, answer with the one that is there.

    Errors: EntryExists, NoSuchEntry, NotDirectory, IsDirectory, NameTooLong, AccessDenied, NoSpace.
    """

    METHOD: ClassVar[int] = 31
    REPLY: ClassVar[type[Message]] = LayoutReply

    parent: Unsigned
    name: Name
    mode: Unsigned  # As asked for; or the kernel has applied the umask, and `caller.umask` is 0.
    exclusive: bool
    caller: Caller = Caller()
    open: bool = False  # As GetLayout with `open` and `write`.


class MakeNode(Mutation[InodeReply], frozen=True, array_like=True):
    """mknod: regular file, fifo, socket, block or character device."""

    METHOD: ClassVar[int] = 32
    REPLY: ClassVar[type[Message]] = InodeReply

    parent: Unsigned
    name: Name
    mode: Unsigned
    rdev: Unsigned
    caller: Caller = Caller()


class MakeDirectory(Mutation[InodeReply], frozen=True, array_like=True):
    """mkdir."""

    METHOD: ClassVar[int] = 33
    REPLY: ClassVar[type[Message]] = InodeReply

    parent: Unsigned
    name: Name
    mode: Unsigned
    caller: Caller = Caller()


class MakeSymlink(Mutation[InodeReply], frozen=True, array_like=True):
    """symlink."""

    METHOD: ClassVar[int] = 34
    REPLY: ClassVar[type[Message]] = InodeReply

    parent: Unsigned
    name: Name
    target: Target
    caller: Caller = Caller()


class Link(Mutation[InodeReply], frozen=True, array_like=True):
    """link: one more name for `ino`, or the first of what MakeTemporary made.

    Errors: NotPermitted (a directory), TooManyLinks, EntryExists ...
    """

    METHOD: ClassVar[int] = 35
    REPLY: ClassVar[type[Message]] = InodeReply

    ino: Unsigned
    parent: Unsigned
    name: Name
    caller: Caller = Caller()


class Removed(Message, frozen=True, array_like=True):
    """What happened to the inode whose name went.

    `held`: it has no name any more and is kept for this session, which must say ReleaseInode when nobody has it open
    there.  It may be kept for other sessions whatever this says.
    """

    ino: int  # 0: no name was removed (a rename onto nothing).
    nlink: int
    held: bool
    ctime_ns: int = 0
    parent: Inode | None = None  # Of Unlink and RemoveDirectory: the directory's attributes after it.


class Unlink(Mutation[Removed], frozen=True, array_like=True):
    """unlink.  `closed_ino`: the inode the client believes the name to be, and knows not to be open, else 0.

    If the name is that inode's last one, this session does not hold it; any other inode losing its last name is held.
    Sessions that have it open hold it as well; without any it goes at once.
    Errors: NoSuchEntry, IsDirectory, NotDirectory, AccessDenied, NotPermitted (sticky).
    """

    METHOD: ClassVar[int] = 36
    REPLY: ClassVar[type[Message]] = Removed

    parent: Unsigned
    name: Name
    closed_ino: Unsigned = 0
    caller: Caller = Caller()


class RemoveDirectory(Mutation[Removed], frozen=True, array_like=True):
    """rmdir.  A directory is never held: once removed nothing can be made in it.

    `expected_ino`: what the name was when the client's kernel looked it up; 0: not known.  The kernel takes that one
    for removed, whichever was, and lets nothing be made in it any more.
    Errors: NotEmpty, NotDirectory, StaleInode (the name is another directory by now) ...
    """

    METHOD: ClassVar[int] = 37
    REPLY: ClassVar[type[Message]] = Removed

    parent: Unsigned
    name: Name
    caller: Caller = Caller()
    expected_ino: Unsigned = 0


class RenameFlags(enum.IntFlag):
    """As renameat2(2)."""

    NOREPLACE = 1
    EXCHANGE = 2
    WHITEOUT = 4  # A character device 0:0 stays at the old name.


class RenameDone(Message, frozen=True, array_like=True):
    """The inode that moved, and what became of the one that was replaced."""

    ino: int
    removed: Removed
    inode: Inode | None = None  # Of the one that moved, after it.
    exchanged_ino: int = 0  # With EXCHANGE: the other one.
    exchanged: Inode | None = None
    parent: Inode | None = None  # The two directories' attributes after it, the same twice if it is one.
    new_parent: Inode | None = None
    whiteout_ino: int = 0  # With WHITEOUT: what is at the old name now.
    whiteout: Inode | None = None


class Rename(Mutation[RenameDone], frozen=True, array_like=True):
    """rename, renameat2.  `closed_ino` is of the target's name, as in Unlink.

    `expected_ino` and `expected_target`: what the two names were when the client's kernel looked them up; 0: not known.
    The kernel moves, and takes for replaced, those.
    Errors: EntryExists (NOREPLACE), NoSuchEntry, NotEmpty, IsDirectory, NotDirectory, InvalidArgument (into its own
    subtree; EXCHANGE with another flag), StaleInode (the name, or that of a directory to be replaced, is another) ...
    """

    METHOD: ClassVar[int] = 38
    REPLY: ClassVar[type[Message]] = RenameDone

    parent: Unsigned
    name: Name
    new_parent: Unsigned
    new_name: Name
    flags: Unsigned = 0
    closed_ino: Unsigned = 0
    caller: Caller = Caller()
    expected_ino: Unsigned = 0
    expected_target: Unsigned = 0


class SetXattrMode(enum.IntEnum):
    """As the flags of setxattr(2)."""

    EITHER = 0
    CREATE = 1
    REPLACE = 2
    NEITHER = 3  # Both flags at once: refused, whether it is there or not.


class SetXattr(Mutation[InodeReply], frozen=True, array_like=True):
    """setxattr.  Errors: NotSupported, EntryExists, NoSuchAttribute, ArgumentListTooLong, ResultTooLarge, NoSpace.

    An access control list (system.posix_acl_access, system.posix_acl_default) also sets the mode, and may be refused
    with InvalidArgument or AccessDenied.
    """

    METHOD: ClassVar[int] = 39
    REPLY: ClassVar[type[Message]] = InodeReply

    ino: Unsigned
    name: XattrName
    value: XattrValue
    how: SetXattrMode = SetXattrMode.EITHER
    caller: Caller = Caller()
    drop_sgid: bool = False  # Of an access list: the kernel found that the caller may not keep the setgid bit.


class RemoveXattr(Mutation[InodeReply], frozen=True, array_like=True):
    """removexattr."""

    METHOD: ClassVar[int] = 40
    REPLY: ClassVar[type[Message]] = InodeReply

    ino: Unsigned
    name: XattrName
    caller: Caller = Caller()


class WriteInline(Mutation[InodeReply], frozen=True, array_like=True):
    """Write `data` at `offset` of a file that is inline or has no bytes yet.

    Errors: MovedOutOfLine (it has extents, or the write ends above INLINE_SIZE_MAX, or `data_version` is not the
    file's), NoSuchEntry, NoSpace.
    """

    METHOD: ClassVar[int] = 41
    REPLY: ClassVar[type[Message]] = InodeReply

    ino: Unsigned
    offset: Unsigned
    data: InlineData
    mtime_ns: int  # 0: the service's clock.
    keep_privileges: bool = False  # As in CommitExtents.
    data_version: int = -1  # Of the content that `data` repeats between its new bytes; -1: it repeats nothing.
    append: bool = False  # `offset` counts from the end of the file as it is then.


class DegradedBlock(Message, frozen=True, array_like=True):
    """A block that was written with fewer copies than asked for, or not where placement wants them."""

    block: BlockId
    copies: int  # How many servers took it.


class CommitExtents(Mutation[InodeReply], frozen=True, array_like=True):
    """Make durable blocks part of a file: newer extents replace what they cover; all at once.

    Inline data must have been written into the extents by the caller when the file is INLINE: the inline bytes are
    dropped by the first commit (with `inline_moved` True; if False and the file is inline, MovedOutOfLine; also if the
    file is not the inline one of `data_version` that the caller has moved: another mount has written to it).
    The size becomes at least `size_min`.
    A slice is named by one commit only, which names all of its bytes that will ever count: when a slice's last extent
    goes, its blocks are deleted, and a later commit would name bytes that are gone.  So whoever flushes often begins a
    new slice with each flush, and packs no more ranges into a slice than one commit carries.
    Errors: NoSuchEntry (gone meanwhile: the slices become garbage), FileTooLarge, MovedOutOfLine, NoSpace,
    InvalidArgument (a slice named before, bytes outside their slice), ContentChanged (`data_version` is not the
    file's), ServerOverloaded (the rest of a long truncation is still being deleted; ask again).
    """

    METHOD: ClassVar[int] = 42
    REPLY: ClassVar[type[Message]] = InodeReply

    ino: Unsigned
    extents: Extents  # Ascending, not overlapping.
    slice_sizes: Annotated[
        tuple[tuple[int, int], ...], msgspec.Meta(max_length=EXTENTS_PER_MESSAGE_MAX)
    ]  # (slice id, its bytes), once for every slice the extents name.
    size_min: Unsigned
    mtime_ns: int  # 0: the service's clock.
    inline_moved: bool = False
    degraded: Annotated[tuple[DegradedBlock, ...], msgspec.Meta(max_length=EXTENTS_PER_MESSAGE_MAX)] = ()
    # suid and sgid are cleared unless this is True: the writer may keep them (CAP_FSETID), or they were set after the
    # bytes had been written and before they were flushed.
    keep_privileges: bool = False
    data_version: int = -1  # With inline_moved, of the inline bytes that were moved; -1: of any.
    append: bool = False  # All offsets and `size_min` count from the end of the file as it is then.


class AllocateSlicesDone(Message, frozen=True, array_like=True):
    """Slice ids first to first + count - 1 are this session's, never anybody else's."""

    first: int
    count: int


class AllocateSlices(Mutation[AllocateSlicesDone], frozen=True, array_like=True):
    """Reserve slice ids."""

    METHOD: ClassVar[int] = 43
    REPLY: ClassVar[type[Message]] = AllocateSlicesDone

    count: Annotated[int, msgspec.Meta(ge=1, le=65_536)]


class ReleaseInode(Mutation[Done], frozen=True, array_like=True):
    """The session has closed inodes that it had open or held after their last name went (Removed.held).  Idempotent."""

    METHOD: ClassVar[int] = 44
    REPLY: ClassVar[type[Message]] = Done

    inos: Annotated[tuple[int, ...], msgspec.Meta(max_length=OPENS_PER_MESSAGE_MAX)]


FS_IMMUTABLE_FL = 0x10
"""chattr +i, in the flags of FS_IOC_GETFLAGS and FS_IOC_SETFLAGS."""
FS_APPEND_FL = 0x20
"""chattr +a."""


class MakeTemporary(Mutation[LayoutReply], frozen=True, array_like=True):
    """open(O_TMPFILE): make a regular file without a name, held for this session; Link may give it its first one.

    Errors: NoSuchEntry, NotDirectory, AccessDenied, NotPermitted, NoRoom.
    """

    METHOD: ClassVar[int] = 45
    REPLY: ClassVar[type[Message]] = LayoutReply

    parent: Unsigned  # The directory it is made in: for owner, lists and copies.
    mode: Unsigned  # As in Create.
    linkable: bool = True  # False: O_EXCL, Link refuses it.
    caller: Caller = Caller()


class SetFlags(Mutation[InodeReply], frozen=True, array_like=True):
    """chattr: an immutable file, directory or name in it cannot be changed; to an append-only one only be added.

    The service refuses names, attributes, truncation and allocation; a mount refuses to open, and to write by what was
    open before.  Bytes written before are taken when they come: their write had been answered.
    Errors: NotSupported (another flag, or neither a file nor a directory), NotPermitted, NoSuchEntry.
    """

    METHOD: ClassVar[int] = 46
    REPLY: ClassVar[type[Message]] = InodeReply

    ino: Unsigned
    flags: Unsigned  # FS_IMMUTABLE_FL, FS_APPEND_FL: all that are to be set.
    caller: Caller = Caller()


class TouchAtimes(Mutation[Done], frozen=True, array_like=True):
    """Inodes were read: each gets its new access time if the one it has is still that from which the reader went.

    So whoever has set it meanwhile has the last word.  What is gone is passed over; ctime stays.
    """

    METHOD: ClassVar[int] = 49
    REPLY: ClassVar[type[Message]] = Done

    # (inode, the time it had, the time it gets)
    touches: Annotated[tuple[tuple[Unsigned, int, int], ...], msgspec.Meta(max_length=TOUCHES_PER_MESSAGE_MAX)]


class RangeOperation(enum.IntEnum):
    """What ChangeRange makes of a range, as fallocate(2)."""

    ALLOCATE = 1  # What is a hole is allocated; nothing that can be read changes, but the size may grow.
    PUNCH = 2  # It becomes a hole.
    ZERO = 3  # It becomes allocated zeros.


class RangeDone(Message, frozen=True, array_like=True):
    """The file after it; the first `done` bytes of the range are as asked: ask again for the rest."""

    ino: int
    inode: Inode
    done: int


class ChangeRange(Mutation[RangeDone], frozen=True, array_like=True):
    """fallocate(2).  A long list of extents is worked on in several requests, each of which leaves a sound file.

    Errors: NoSuchEntry, IsDirectory, InvalidArgument, FileTooLarge, NoRoom (the cluster has less space free),
    MovedOutOfLine (the file is inline and would have to grow beyond that), ServerOverloaded (ask again).
    """

    METHOD: ClassVar[int] = 47
    REPLY: ClassVar[type[Message]] = RangeDone

    ino: Unsigned
    operation: RangeOperation
    offset: Unsigned
    length: Annotated[int, msgspec.Meta(ge=1)]
    keep_size: bool = False  # What is allocated beyond the size stays there, unseen.  PUNCH always keeps the size.
    keep_privileges: bool = False  # As in CommitExtents.


class CopyRange(Mutation[RangeDone], frozen=True, array_like=True):
    """Make a range of one file the same as that of another, or of itself, by sharing its blocks.

    The reply is of the target; `done` is 0 at the end of the source.
    Errors: as ChangeRange; InvalidArgument (the ranges overlap); MovedOutOfLine (the target is inline, and the
    source is not); NotSupported (inline bytes that do not stay inline, or files with unlike numbers of copies).
    """

    METHOD: ClassVar[int] = 48
    REPLY: ClassVar[type[Message]] = RangeDone

    ino: Unsigned  # The source.
    offset: Unsigned
    target: Unsigned
    target_offset: Unsigned
    length: Annotated[int, msgspec.Meta(ge=1)]
    keep_privileges: bool = False  # Of the target, as in CommitExtents.


# --- reports and administration: 60 to 79 ----------------------------------------------------------------------------


class ReportBadCopy(Request[Done], frozen=True, array_like=True):
    """A client read a copy that is damaged or missing; it is kept, durably, for repair and for `fsd status`."""

    METHOD: ClassVar[int] = 60
    REPLY: ClassVar[type[Message]] = Done

    block: BlockId
    server_id: int
    corrupt: bool  # False: missing.


class SessionStatus(Message, frozen=True, array_like=True):
    """One session, for people."""

    session: int
    client: str
    mountpoint: bytes
    lease_left_ms: int
    held_inodes: int


class ServerStatus(Message, frozen=True, array_like=True):
    """One block server as last heard."""

    server_id: int
    seen_ms_ago: int  # -1: not since the service started.
    status: BlockServerStatus | None


class BadBlock(Message, frozen=True, array_like=True):
    """One block that waits for repair."""

    block: BlockId
    server_id: int  # 0: short of copies rather than bad on one server.
    reason: str  # "corrupt", "missing" or "degraded"
    copies: int = 0  # For "degraded": how many there are.


class ClusterStatus(Message, frozen=True, array_like=True):
    """Everything `fsd status` shows."""

    version: str
    cluster_id: str
    map: ClusterMap
    servers: tuple[ServerStatus, ...]
    sessions: tuple[SessionStatus, ...]
    inode_count: int
    deletion_queue: int  # Inodes and slices that wait to be reclaimed.
    bad_block_count: int
    bad_blocks: tuple[BadBlock, ...]  # The first 100.
    metadata_bytes: int  # Size of the engine's file in use.
    metadata_free: int  # Space left on its disk.
    uptime_ms: int
    session_count: int = 0  # Live ones; `sessions` has the first 1,000.
    fenced_count: int = 0  # Sessions that ended, since the service started, because they were silent or were evicted.
    slowest_session: int = 0  # Has not dropped what it was told to for longest; 0: none is waited for.
    slowest_ms: int = 0  # For how long.


class GetClusterStatus(Request[ClusterStatus], frozen=True, array_like=True):
    """Figures for `fsd status`; needs no session."""

    METHOD: ClassVar[int] = 61
    REPLY: ClassVar[type[Message]] = ClusterStatus


class SessionEnd(enum.IntEnum):
    """How a session ended."""

    CLOSED = 0  # Its mount said so.
    REPLACED = 1  # The same place was mounted again.
    EXPIRED = 2  # It was not renewed within its lease.
    EVICTED = 3  # By hand.


class ListedSession(Message, frozen=True, array_like=True):
    """A live session in a list."""

    session: int
    client: str  # For people: host, pid, version.
    mountpoint: bytes
    opened_ns: int  # The service's clock.
    lease_left_ms: int
    alone: bool  # It may believe that it is, and tells little of what it has.
    reclaimed: bool  # False: it is from before a restart of the service, and has not told yet what it holds.
    open_inodes: int  # That it has told.
    nameless_inodes: int  # Kept for it only, as they have no name any more; counted up to 1,000.
    locks: int
    waiting_locks: int
    leases: int = 0  # Inodes of which it may cache something.
    recalls: int = 0  # That it has not acknowledged.
    recall_age_ms: int = 0  # Of the oldest of these.


class EndedSession(Message, frozen=True, array_like=True):
    """A session that has ended."""

    session: int
    client: str
    mountpoint: bytes
    how: SessionEnd
    ended_ms_ago: int
    cleaned: bool  # What it has left is gone.


class ListSessionsDone(Message, frozen=True, array_like=True):
    """Who has mounted, and who had."""

    sessions: tuple[ListedSession, ...]  # At most LISTED_SESSIONS_MAX.
    total: int  # How many are live.
    ended: tuple[EndedSession, ...]  # The last 100 since the service started, the newest first.
    fenced_count: int  # As in ClusterStatus.
    lease_ms: int


class ListSessions(Request[ListSessionsDone], frozen=True, array_like=True):
    """All sessions, for `fsd sessions`; needs no session."""

    METHOD: ClassVar[int] = 66
    REPLY: ClassVar[type[Message]] = ListSessionsDone


class EvictSession(Request[Done], frozen=True, array_like=True):
    """End a session by hand: nothing that it sends from now on changes anything.  Answered when that is durable.

    Errors: NoSuchEntry (no live session has that number).
    """

    METHOD: ClassVar[int] = 67
    REPLY: ClassVar[type[Message]] = Done

    session: Unsigned


class GetMapDone(Message, frozen=True, array_like=True):
    """The cluster map."""

    map: ClusterMap


class GetMap(Request[GetMapDone], frozen=True, array_like=True):
    """The newest cluster map; needs no session."""

    METHOD: ClassVar[int] = 62
    REPLY: ClassVar[type[Message]] = GetMapDone


class GetUsageDone(Message, frozen=True, array_like=True):
    """What everything below one directory uses, at any depth; the directory itself is not counted."""

    inodes: int
    allocated: int  # Bytes.


class GetUsage(Request[GetUsageDone], frozen=True, array_like=True):
    """Usage of the tree below one directory."""

    METHOD: ClassVar[int] = 63
    REPLY: ClassVar[type[Message]] = GetUsageDone

    ino: Unsigned


class QuotaStatus(Message, frozen=True, array_like=True):
    """One directory's quota and usage; limits: 0 is none."""

    ino: int
    path: bytes | None  # From the root of the file system; None: it could not be found in reasonable time.
    bytes_max: int
    inodes_max: int
    bytes_used: int  # Of the tree below it.
    inodes_used: int


class ListQuotasDone(Message, frozen=True, array_like=True):
    """A page, in ascending order of inode numbers."""

    quotas: tuple[QuotaStatus, ...]
    end: bool


class ListQuotas(Request[ListQuotasDone], frozen=True, array_like=True):
    """Quotas of directories with inode numbers above `after`; needs no session."""

    METHOD: ClassVar[int] = 65
    REPLY: ClassVar[type[Message]] = ListQuotasDone

    after: Unsigned = 0
    count: Annotated[int, msgspec.Meta(ge=1, le=256)] = 64


READS = (Lookup, GetAttr, ReadLink, ReadDir, GetXattr, ListXattr, StatFs, GetLayout)
MUTATIONS = (
    SetAttr,
    Create,
    MakeNode,
    MakeDirectory,
    MakeSymlink,
    Link,
    Unlink,
    RemoveDirectory,
    Rename,
    SetXattr,
    RemoveXattr,
    WriteInline,
    CommitExtents,
    AllocateSlices,
    ReleaseInode,
    MakeTemporary,
    SetFlags,
    TouchAtimes,
    ChangeRange,
    CopyRange,
)
LOCKS = (SetLock, GetLock, WaitLock, Reclaim, ListLocks)
METADATA_METHODS = method_table(
    [
        OpenSession,
        RenewSession,
        CloseSession,
        *LOCKS,
        RegisterOpens,
        AckRecalls,
        *READS,
        *MUTATIONS,
        ReportBadCopy,
        GetClusterStatus,
        GetMap,
        GetUsage,
        ListQuotas,
        ListSessions,
        EvictSession,
    ]
)
