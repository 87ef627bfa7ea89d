"""The front end on pyfuse3: the kernel's requests as calls of fsd.frontend.ports.Operations.

Tasks: pyfuse3's workers, at most WORKERS_MAX; each takes one request and carries it out, so that is also the bound of
the requests under way.  What is in a handler's way becomes an errno: a StoreError its own, anything else EIO and a log
line; the mount lives on.  trio.Cancelled passes.

There is no await between a handler's answer and pyfuse3's write of the reply, so the validity times in it are true.

What libfuse 3.14 negotiates for pyfuse3, and what follows from it:
- ATOMIC_O_TRUNC: open comes with O_TRUNC, and no setattr.
- HANDLE_KILLPRIV: the kernel does not clear suid and sgid itself.  Before a write by somebody without CAP_FSETID it
  sends a setattr that asks for nothing; FileSystem.setattr takes that as the request to clear them.
- AUTO_INVAL_DATA: when the kernel learns of another mtime, it drops the file's pages.
- READDIRPLUS without AUTO: every listing brings attributes.
- no WRITEBACK_CACHE, no POSIX or flock locks (the kernel keeps them, for this mount only).
- no POSIX_ACL, as DONT_MASK is missing that goes with it: the kernel would check access control lists, but take the
  umask from what inherits one.  Lists are hidden here; of files that have one the kernel checks the mode, whose group
  bits are then those of the list's mask.

A limit of pyfuse3: it reads the device when it is readable; if the kernel withdraws that one request in between
(its process was killed), the read waits for the next request, and the whole daemon with it.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3

from fsd.frontend.direct import replies
from fsd.frontend.kernel_notifier import ThreadNotifier
from fsd.frontend.ports import BLOCK_SIZE, PREFERRED_IO_SIZE, Changes, Entry, Opened, Operations
from metadata.core.posix_acl import XATTR_NAMES
from metadata.core.schema import NAME_SIZE_MAX
from metadata.protocol import Caller, SetXattrMode
from wire.errors import NotSupported, StoreError
from wire.log import get_logger

WORKERS_MAX = 64
"""Requests under way: enough for a group commit's worth of mutations."""

P = ParamSpec("P")
R = TypeVar("R")

log = get_logger("fsd.frontend")


def guarded(
    handler: Callable[Concatenate[Pyfuse3Operations, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Pyfuse3Operations, P], Coroutine[Any, Any, R]]:
    """Make every exception of a handler an errno."""

    @functools.wraps(handler)
    async def run(self: Pyfuse3Operations, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.operations.woken()
        try:
            return await handler(self, *args, **kwargs)
        except StoreError as error:
            code = error.errno
        except Exception:
            log.exception("handler_failed", operation=handler.__name__)
            code = errno.EIO
        raise pyfuse3.FUSEError(code)

    return run


def attributes_of(entry: Entry) -> pyfuse3.EntryAttributes:
    """As pyfuse3 wants it."""
    inode = entry.inode
    attributes = pyfuse3.EntryAttributes()
    attributes.st_ino = entry.nodeid
    attributes.entry_timeout = entry.entry_timeout_s
    attributes.attr_timeout = entry.attr_timeout_s
    attributes.st_mode = inode.mode
    attributes.st_nlink = inode.nlink
    attributes.st_uid = inode.uid
    attributes.st_gid = inode.gid
    attributes.st_rdev = inode.rdev
    attributes.st_size = inode.size
    attributes.st_blksize = PREFERRED_IO_SIZE
    attributes.st_blocks = (inode.allocated + 511) >> 9
    attributes.st_atime_ns = inode.atime_ns
    attributes.st_mtime_ns = inode.mtime_ns
    attributes.st_ctime_ns = inode.ctime_ns
    return attributes


def file_info(opened: Opened) -> pyfuse3.FileInfo:
    """As pyfuse3 wants it.

    O_DIRECT needs nothing here: the kernel passes by its pages for such descriptors by itself, and with FOPEN_DIRECT_IO
    it would refuse shared mappings.
    """
    return pyfuse3.FileInfo(fh=opened.fh, keep_cache=opened.keep_cache, direct_io=opened.direct_io)


def caller_of(context: pyfuse3.RequestContext) -> Caller:
    """Who asks; the kernel has checked permissions (default_permissions)."""
    return Caller(context.uid, context.gid)


def may_lack_fsetid(context: pyfuse3.RequestContext) -> bool:
    """Whether to take suid and sgid away at a truncation: libfuse 3.14 does not tell if the caller has CAP_FSETID."""
    return bool(context.uid != 0)


def refuse_acl(name: bytes) -> None:
    """Raises: NotSupported, for an access control list."""
    if name in XATTR_NAMES:
        raise NotSupported(f"extended attribute {name!r}")


class Pyfuse3Operations(pyfuse3.Operations):
    """Handlers that pyfuse3 calls; what each promises is told in fsd.frontend.ports.Operations."""

    # ruff: noqa: D102

    supports_dot_lookup = True
    enable_writeback_cache = False
    enable_acl = False

    operations: Operations  # Set before the first request is read.

    # --- names ---

    @guarded
    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        answer = self.operations.lookup(parent_inode, name)
        return attributes_of(await answer if isinstance(answer, Coroutine) else answer)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        try:
            self.operations.forget(inode_list)
        except Exception:
            log.exception("handler_failed", operation="forget")

    @guarded
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        answer = self.operations.readlink(inode)
        return await answer if isinstance(answer, Coroutine) else answer

    @guarded
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        answer = self.operations.mknod(parent_inode, name, mode, rdev, caller_of(ctx))
        return attributes_of(await answer if isinstance(answer, Coroutine) else answer)

    @guarded
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        answer = self.operations.mkdir(parent_inode, name, mode, caller_of(ctx))
        return attributes_of(await answer if isinstance(answer, Coroutine) else answer)

    @guarded
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        answer = self.operations.symlink(parent_inode, name, target, caller_of(ctx))
        return attributes_of(await answer if isinstance(answer, Coroutine) else answer)

    @guarded
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        answer = self.operations.link(inode, new_parent_inode, new_name, caller_of(ctx))
        return attributes_of(await answer if isinstance(answer, Coroutine) else answer)

    @guarded
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        answer = self.operations.unlink(parent_inode, name, caller_of(ctx))
        if isinstance(answer, Coroutine):
            await answer

    @guarded
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        answer = self.operations.rmdir(parent_inode, name, caller_of(ctx))
        if isinstance(answer, Coroutine):
            await answer

    @guarded
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        answer = self.operations.rename(parent_inode_old, name_old, parent_inode_new, name_new, flags, caller_of(ctx))
        if isinstance(answer, Coroutine):
            await answer

    # --- attributes ---

    @guarded
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        answer = self.operations.getattr(inode)
        return attributes_of(await answer if isinstance(answer, Coroutine) else answer)

    @guarded
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        changes = Changes(
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            ctime_ns=attr.st_ctime_ns if fields.update_ctime else None,
            kill_privileges=fields.update_size and may_lack_fsetid(ctx),
        )
        answer = self.operations.setattr(inode, changes, caller_of(ctx))
        return attributes_of(await answer if isinstance(answer, Coroutine) else answer)

    @guarded
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        answer = self.operations.statfs()
        figures = await answer if isinstance(answer, Coroutine) else answer
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK_SIZE
        data.f_blocks = figures.space_total // BLOCK_SIZE
        data.f_bfree = data.f_bavail = figures.space_free // BLOCK_SIZE
        data.f_ffree = data.f_favail = figures.inodes_free
        data.f_files = figures.inodes_total
        data.f_namemax = NAME_SIZE_MAX
        return data

    # --- files ---

    @guarded
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        answer = self.operations.create(parent_inode, name, mode, flags, caller_of(ctx))
        opened, entry = await answer if isinstance(answer, Coroutine) else answer
        return file_info(opened), attributes_of(entry)

    @guarded
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        answer = self.operations.open(inode, flags, caller_of(ctx), kill_privileges=may_lack_fsetid(ctx))
        return file_info(await answer if isinstance(answer, Coroutine) else answer)

    @guarded
    async def read(self, fh: int, off: int, size: int) -> bytes:
        answer = self.operations.read(fh, off, size)
        return await answer if isinstance(answer, Coroutine) else answer  # type: ignore[return-value]

    @guarded
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        answer = self.operations.write(fh, off, buf)
        return await answer if isinstance(answer, Coroutine) else answer

    @guarded
    async def flush(self, fh: int) -> None:
        answer = self.operations.flush(fh)
        if isinstance(answer, Coroutine):
            await answer

    @guarded
    async def fsync(self, fh: int, datasync: bool) -> None:
        answer = self.operations.fsync(fh, datasync)
        if isinstance(answer, Coroutine):
            await answer

    @guarded
    async def release(self, fh: int) -> None:
        answer = self.operations.release(fh)
        if isinstance(answer, Coroutine):
            await answer

    # --- directories ---

    @guarded
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        answer = self.operations.opendir(inode)
        return (await answer if isinstance(answer, Coroutine) else answer).fh

    @guarded
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        def add(name: bytes, entry: Entry, cookie: int) -> bool:
            return pyfuse3.readdir_reply(token, name, attributes_of(entry), cookie)

        answer = self.operations.readdir(fh, start_id, True, add)
        if isinstance(answer, Coroutine):
            await answer

    @guarded
    async def releasedir(self, fh: int) -> None:
        self.operations.releasedir(fh)

    @guarded
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        self.operations.fsyncdir(fh)

    # --- extended attributes ---

    @guarded
    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        refuse_acl(name)
        answer = self.operations.getxattr(inode, name, caller_of(ctx))
        return await answer if isinstance(answer, Coroutine) else answer

    @guarded
    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        answer = self.operations.listxattr(inode, caller_of(ctx))
        names = await answer if isinstance(answer, Coroutine) else answer
        return [name for name in names if name not in XATTR_NAMES]

    @guarded
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext) -> None:
        refuse_acl(name)
        # pyfuse3 has asked getxattr already if the caller wants the attribute to be there, or not to be there.
        answer = self.operations.setxattr(inode, name, value, SetXattrMode.EITHER, caller_of(ctx))
        if isinstance(answer, Coroutine):
            await answer

    @guarded
    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        refuse_acl(name)
        answer = self.operations.removexattr(inode, name, caller_of(ctx))
        if isinstance(answer, Coroutine):
            await answer


class Pyfuse3Channel:
    """Notifications through libfuse (see kernel_notifier.Channel)."""

    def __init__(self, device: int | None) -> None:
        """`device`: descriptor of the mount's /dev/fuse, for what libfuse has no function for; None: do without."""
        self._device = device

    def forget_attributes(self, nodeid: int) -> None:
        """See kernel_notifier.Channel."""
        pyfuse3.invalidate_inode(nodeid, attr_only=True)

    def forget_pages(self, nodeid: int, offset: int, size: int) -> None:
        """See kernel_notifier.Channel; pyfuse3 can only say: all of them."""
        pyfuse3.invalidate_inode(nodeid, attr_only=False)

    def forget_entry(self, parent: int, name: bytes) -> None:
        """See kernel_notifier.Channel."""
        pyfuse3.invalidate_entry(parent, name)

    def doubt_entry(self, parent: int, name: bytes) -> None:
        """See kernel_notifier.Channel."""
        if self._device is None:
            pyfuse3.invalidate_entry(parent, name)
        else:
            os.write(self._device, replies.doubt_entry(parent, name))

    def forget_all_names(self) -> None:
        """See kernel_notifier.Channel."""
        if self._device is None:
            raise OSError(errno.EINVAL, "the device is not known")
        os.write(self._device, replies.forget_all_names())


class Pyfuse3Mount:
    """One mount through libfuse; at most one in a process, as pyfuse3 has it."""

    def __init__(self, mountpoint: str, options: Iterable[str]) -> None:
        """Mount; requests wait until `serve`.  Raises RuntimeError when libfuse cannot (it says why on stderr)."""
        self._handlers = Pyfuse3Operations()
        self._is_serving = False
        before = fuse_descriptors()
        pyfuse3.init(self._handlers, mountpoint, set(options))
        new = fuse_descriptors() - before
        self.notifier = ThreadNotifier(Pyfuse3Channel(new.pop() if len(new) == 1 else None))
        self.notifier.start()

    async def serve(self, operations: Operations) -> None:
        """Answer requests until the file system is unmounted or `stop` is called."""
        self._handlers.operations = operations
        self._is_serving = True
        try:
            await pyfuse3.main(min_tasks=1, max_tasks=WORKERS_MAX)
        finally:
            self._is_serving = False

    def stop(self) -> None:
        """Make `serve` return, if it runs; the mount stays until `close`."""
        if self._is_serving:  # libfuse would follow a null pointer after `close`.
            pyfuse3.terminate()

    def close(self) -> None:
        """Unmount if that has not been done (lazily: who still uses it gets ENOTCONN), and let go of the device."""
        pyfuse3.close(unmount=True)
        self.notifier.stop()


def fuse_descriptors() -> set[int]:
    """Descriptors of this process that are /dev/fuse."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found.add(int(name))
        except FileNotFoundError:  # The descriptor of the listing itself.
            continue
    return found
