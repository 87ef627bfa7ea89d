"""Numbered errors: what may travel back over a connection instead of a reply.

Two kinds: a *refusal* is an answer POSIX knows (EEXIST, ENOENT ...): nothing was changed, and asking again gives the
same answer.  A *fault* is the world's (a dead connection, a full disk, a stale map): its class says what the caller
does next.  A bug is neither: it is an AssertionError and is never sent as one of these.

Numbers are never used twice; an error that goes out of use moves its number to RETIRED_CODES.
"""

from __future__ import annotations

import enum
import errno as os_errno
from typing import ClassVar

DETAIL_SIZE_MAX = 1024
"""Bytes of explanation that travel with an error; enough for a path and a sentence."""


class Retry(enum.Enum):
    """What the caller does next."""

    NEVER = "never"  # The answer stands.
    LATER = "later"  # The same request, to the same server, after a pause.
    ELSEWHERE = "elsewhere"  # Another replica may do better.
    REFRESH = "refresh"  # First take the newer cluster map or session, then ask again.


RETIRED_CODES: frozenset[int] = frozenset()
BY_CODE: dict[int, type[StoreError]] = {}


class StoreError(Exception):
    """Base of every expected failure.  A bug is an AssertionError, never a StoreError."""

    code: ClassVar[int] = 1
    errno: ClassVar[int] = os_errno.EIO
    retry: ClassVar[Retry] = Retry.NEVER
    maybe_applied: ClassVar[bool] = False  # True: the request may have taken effect.

    def __init_subclass__(cls) -> None:
        if "code" not in cls.__dict__:  # An abstract kind, such as Refusal.
            return
        assert cls.code not in RETIRED_CODES, f"{cls.__name__} uses a retired wire code"
        assert cls.code not in BY_CODE, f"{cls.__name__}: code {cls.code} is taken"
        BY_CODE[cls.code] = cls

    @property
    def detail(self) -> str:
        """What happened, to which file or server; at most DETAIL_SIZE_MAX bytes when encoded."""
        return str(self.args[0]) if self.args else ""


BY_CODE[StoreError.code] = StoreError


def from_code(code: int, detail: str) -> StoreError:
    """The error that a peer sent; a code that this version does not know becomes a plain StoreError (EIO)."""
    known = BY_CODE.get(code)
    if known is None:
        return StoreError(f"unknown error {code} from a newer peer: {detail}")
    return known(detail)


# --- refusals: POSIX's own answers; 100 + errno where that is below 400 ---------------------------------------------


class Refusal(StoreError):
    """An answer that POSIX knows; nothing was changed."""


class NotPermitted(Refusal):
    """The caller does not own it, or the operation is never allowed (EPERM)."""

    code = 101
    errno = os_errno.EPERM


class NoSuchEntry(Refusal):
    """No entry of that name, or no such inode any more (ENOENT)."""

    code = 102
    errno = os_errno.ENOENT


class NoSuchData(Refusal):
    """There are no data, or no byte at all, from that offset on (ENXIO, lseek(2))."""

    code = 106
    errno = os_errno.ENXIO


class ArgumentListTooLong(Refusal):
    """A value is larger than its kind allows (E2BIG)."""

    code = 107
    errno = os_errno.E2BIG


class WouldBlock(Refusal):
    """Another owner holds a lock that forbids this one (EAGAIN)."""

    code = 111
    errno = os_errno.EAGAIN


class AccessDenied(Refusal):
    """Mode bits or the sticky bit forbid it (EACCES)."""

    code = 113
    errno = os_errno.EACCES


class Busy(Refusal):
    """It is in use in a way that forbids this, such as renaming "." (EBUSY)."""

    code = 116
    errno = os_errno.EBUSY


class EntryExists(Refusal):
    """The name is taken (EEXIST)."""

    code = 117
    errno = os_errno.EEXIST


class NotDirectory(Refusal):
    """A directory was needed (ENOTDIR)."""

    code = 120
    errno = os_errno.ENOTDIR


class IsDirectory(Refusal):
    """Anything but a directory was needed (EISDIR)."""

    code = 121
    errno = os_errno.EISDIR


class InvalidArgument(Refusal):
    """An argument makes no sense here (EINVAL)."""

    code = 122
    errno = os_errno.EINVAL


class FileTooLarge(Refusal):
    """Beyond the largest size of a file (EFBIG)."""

    code = 127
    errno = os_errno.EFBIG


class NoRoom(Refusal):
    """There is no room to take this in: of a nearly full store, or of one inode's attributes (ENOSPC).

    Unlike NoSpace it concerns this request only: others, above all those that free space, may succeed.
    """

    code = 128
    errno = os_errno.ENOSPC


class ReadOnly(Refusal):
    """The mount is read-only (EROFS)."""

    code = 130
    errno = os_errno.EROFS


class TooManyLinks(Refusal):
    """The link count is at its limit (EMLINK)."""

    code = 131
    errno = os_errno.EMLINK


class ResultTooLarge(Refusal):
    """The caller's buffer is too small for the value (ERANGE)."""

    code = 134
    errno = os_errno.ERANGE


class Deadlock(Refusal):
    """Whoever holds the lock waits, in turns, for the caller (EDEADLK)."""

    code = 135
    errno = os_errno.EDEADLK


class NameTooLong(Refusal):
    """A component is longer than 255 bytes, or a symlink's target longer than 4095 (ENAMETOOLONG)."""

    code = 136
    errno = os_errno.ENAMETOOLONG


class NoLocks(Refusal):
    """The session or the file has as many locks, or waiters, as it may have (ENOLCK)."""

    code = 137
    errno = os_errno.ENOLCK


class NotEmpty(Refusal):
    """The directory has entries (ENOTEMPTY)."""

    code = 139
    errno = os_errno.ENOTEMPTY


class NoSuchAttribute(Refusal):
    """No extended attribute of that name (ENODATA)."""

    code = 161
    errno = os_errno.ENODATA


class NotSupported(Refusal):
    """Not offered here (EOPNOTSUPP)."""

    code = 195
    errno = os_errno.EOPNOTSUPP


class StaleInode(Refusal):
    """The inode is gone, or belongs to an earlier life of its number (ESTALE)."""

    code = 216
    errno = os_errno.ESTALE


class QuotaExceeded(Refusal):
    """A directory's quota is used up (EDQUOT)."""

    code = 222
    errno = os_errno.EDQUOT


# --- faults: the world's; the class tells the caller what to do next ------------------------------------------------


class NoSpace(StoreError):
    """The disk of a server is full; nothing was changed there, and readers go on (ENOSPC)."""

    code = 10
    errno = os_errno.ENOSPC


class ServerOverloaded(StoreError):
    """A bounded queue is full; the request was not begun."""

    code = 11
    errno = os_errno.EAGAIN
    retry = Retry.LATER


class DeadlineExceeded(StoreError):
    """The time allowed for the call ran out; it may have taken effect (ETIMEDOUT)."""

    code = 12
    errno = os_errno.ETIMEDOUT
    maybe_applied = True


class Unreachable(StoreError):
    """No connection could be made; the request was never sent (EIO after the caller's deadline)."""

    code = 13
    errno = os_errno.EIO
    retry = Retry.LATER


class OutcomeUnknown(StoreError):
    """The connection died after the request was sent; a retry must carry the same request id."""

    code = 14
    errno = os_errno.EIO
    retry = Retry.LATER
    maybe_applied = True


class ProtocolViolation(StoreError):
    """The peer sent what the protocol does not allow; the connection was ended."""

    code = 15
    errno = os_errno.EPROTO


class WrongVersion(StoreError):
    """Peer and self have no protocol version in common; the detail names both ranges."""

    code = 16
    errno = os_errno.EPROTO


class WrongCluster(StoreError):
    """The peer belongs to another cluster, or is another kind of service."""

    code = 17
    errno = os_errno.EPROTO


class UnknownMethod(StoreError):
    """The peer does not know this method (it is older)."""

    code = 18
    errno = os_errno.EOPNOTSUPP


class BlockCorrupt(StoreError):
    """The bytes on this replica do not match their checksum."""

    code = 30
    retry = Retry.ELSEWHERE


class NoSuchBlock(StoreError):
    """This server does not have the block."""

    code = 31
    retry = Retry.ELSEWHERE


class BlockExists(StoreError):
    """Another content is stored under this block id: an id was used twice, which the writer must never do."""

    code = 32


class StaleEpoch(StoreError):
    """The sender's cluster map is older than this server's."""

    code = 33
    retry = Retry.REFRESH


class DataLost(StoreError):
    """No replica could give bytes that match their checksum (EIO, never wrong bytes)."""

    code = 34


class TooFewReplicas(StoreError):
    """Fewer servers than `min_replicas` took the block; the write did not happen."""

    code = 35


class SessionExpired(StoreError):
    """The session is unknown or its lease has run out; nothing was changed."""

    code = 40
    errno = os_errno.ESTALE
    retry = Retry.REFRESH


class MovedOutOfLine(StoreError):
    """The file no longer is, or can no longer be, inline; the caller writes blocks instead.  Nothing was changed."""

    code = 41
    retry = Retry.REFRESH


class TooOldRequest(StoreError):
    """The answer to this request id was kept for a while and is gone; nothing was changed now."""

    code = 42


class GracePeriod(StoreError):
    """The inode service has been started again and not every session has told its locks yet; nothing was changed."""

    code = 43
    errno = os_errno.EAGAIN
    retry = Retry.LATER


class ContentChanged(StoreError):
    """The file's content is not that of the version which the request is about; nothing was changed."""

    code = 44
    retry = Retry.REFRESH


class WritesLost(StoreError):
    """Bytes that were written and not flushed are gone: the session ended, and others have changed the file (EIO)."""

    code = 45


class LocksLost(StoreError):
    """The descriptor's locks went with the mount's session, and others may have had them since (EIO)."""

    code = 46
