"""From a request to its operation: the one place that knows both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from metadata import protocol
from metadata.core.namespace import attributes, create, data, held, lookup, quotas, ranges, remove, rename, xattrs
from metadata.core.opens import Opens
from metadata.core.slices import allocate_slices
from metadata.engine.ports import ReadTxn, WriteTxn
from wire.errors import NoRoom
from wire.message import Message, Request

_GROWING = frozenset(
    {
        protocol.Create,
        protocol.MakeTemporary,
        protocol.MakeNode,
        protocol.MakeDirectory,
        protocol.MakeSymlink,
        protocol.Link,
        protocol.SetXattr,
        protocol.WriteInline,
        protocol.CommitExtents,
        protocol.AllocateSlices,
        protocol.ChangeRange,
        protocol.CopyRange,
    }
)
"""What is refused while the store is tight; the others free space, or change nothing of size."""


def apply(txn: WriteTxn, request: protocol.Mutation[Message], *, now_ns: int, opens: Opens | None = None) -> Message:
    """Carry out one of protocol.MUTATIONS; the session has been checked.

    Args:
        now_ns: the service's clock.
        opens: who has what open; None: nobody has anything.

    Returns:
        The request's reply.

    Raises:
        StoreError: a refusal of the request; the caller rolls back to its savepoint (only before QuotaExceeded may
            something have been written).  Or a fault of the engine: the transaction is gone.
        NoRoom: the disk is nearly full, and this request would need more of it.
    """
    if txn.tight and type(request) in _GROWING and not _is_punch(request):
        raise NoRoom("the disk of the inode service is nearly full")
    operation = _MUTATIONS.get(type(request))
    if operation is None:
        return _MUTATIONS_OF_OPENS[type(request)](txn, request, Opens() if opens is None else opens, now_ns)
    return operation(txn, request, now_ns)


def remember_open(request: protocol.Mutation[Message], answer: bytes, opens: Opens) -> None:
    """What the request opened is open, though it was carried out before the service was started: so says its answer."""
    if isinstance(request, protocol.Create) and request.open:
        opens.add(request.session, msgspec.msgpack.decode(answer, type=protocol.LayoutReply).ino)


def open_inode(txn: WriteTxn, request: protocol.GetLayout, *, opens: Opens, now_ns: int) -> Message:
    """Answer a GetLayout whose session opens the inode.

    Raises: NoSuchEntry; ServerOverloaded (the session has too much open); nothing was changed.
    """
    reply = _layout(txn, request)
    held.register_open(txn, request.ino, session=request.session, opens=opens, now_ns=now_ns)
    return reply


def register_opens(txn: WriteTxn, request: protocol.RegisterOpens, *, opens: Opens, now_ns: int) -> Message:
    """Carry out a RegisterOpens.  Raises: ServerOverloaded; a part of it is done."""
    held.register_all(
        txn, session=request.session, inos=request.inos, complete=request.complete, opens=opens, now_ns=now_ns
    )
    return protocol.Done()


def answer(txn: ReadTxn, request: Request[Message]) -> Message:
    """Answer one of protocol.READS but StatFs, or GetUsage, or ListQuotas; the session has been checked.

    Raises:
        StoreError: a refusal, or a fault of the engine.
    """
    return _READS[type(request)](txn, request)


def _is_punch(request: Request[Message]) -> bool:
    return isinstance(request, protocol.ChangeRange) and request.operation is protocol.RangeOperation.PUNCH


def _lookup(txn: ReadTxn, r: protocol.Lookup) -> Message:
    return lookup.lookup(txn, parent=r.parent, name=r.name, caller=r.caller)


def _getattr(txn: ReadTxn, r: protocol.GetAttr) -> Message:
    return lookup.get_attributes(txn, ino=r.ino)


def _readlink(txn: ReadTxn, r: protocol.ReadLink) -> Message:
    return lookup.read_link(txn, ino=r.ino)


def _readdir(txn: ReadTxn, r: protocol.ReadDir) -> Message:
    return lookup.read_directory(txn, ino=r.ino, after=r.after, count=r.count, plus=r.plus, caller=r.caller)


def _getxattr(txn: ReadTxn, r: protocol.GetXattr) -> Message:
    return xattrs.get_xattr(txn, ino=r.ino, name=r.name, caller=r.caller)


def _listxattr(txn: ReadTxn, r: protocol.ListXattr) -> Message:
    return xattrs.list_xattrs(txn, ino=r.ino, caller=r.caller)


def _layout(txn: ReadTxn, r: protocol.GetLayout) -> Message:
    return data.get_layout(txn, ino=r.ino, offset=r.offset, length=r.length)


def _usage(txn: ReadTxn, r: protocol.GetUsage) -> Message:
    return lookup.get_usage(txn, ino=r.ino)


def _list_quotas(txn: ReadTxn, r: protocol.ListQuotas) -> Message:
    return quotas.list_quotas(txn, after=r.after, count=r.count)


def _setattr(txn: WriteTxn, r: protocol.SetAttr, now_ns: int) -> Message:
    return attributes.set_attributes(
        txn,
        ino=r.ino,
        mask=r.mask,
        mode=r.mode,
        uid=r.uid,
        gid=r.gid,
        size=r.size,
        atime_ns=r.atime_ns,
        mtime_ns=r.mtime_ns,
        ctime_ns=r.ctime_ns,
        caller=r.caller,
        now_ns=now_ns,
    )


def _create(txn: WriteTxn, r: protocol.Create, opens: Opens, now_ns: int) -> Message:
    reply = create.create(
        txn, parent=r.parent, name=r.name, mode=r.mode, exclusive=r.exclusive, caller=r.caller, now_ns=now_ns
    )
    if r.open:
        opens.add(r.session, reply.ino)
    return reply


def _mknod(txn: WriteTxn, r: protocol.MakeNode, now_ns: int) -> Message:
    return create.make_node(txn, parent=r.parent, name=r.name, mode=r.mode, rdev=r.rdev, caller=r.caller, now_ns=now_ns)


def _mkdir(txn: WriteTxn, r: protocol.MakeDirectory, now_ns: int) -> Message:
    return create.make_directory(txn, parent=r.parent, name=r.name, mode=r.mode, caller=r.caller, now_ns=now_ns)


def _symlink(txn: WriteTxn, r: protocol.MakeSymlink, now_ns: int) -> Message:
    return create.make_symlink(txn, parent=r.parent, name=r.name, target=r.target, caller=r.caller, now_ns=now_ns)


def _link(txn: WriteTxn, r: protocol.Link, opens: Opens, now_ns: int) -> Message:
    return create.link(txn, ino=r.ino, parent=r.parent, name=r.name, caller=r.caller, opens=opens, now_ns=now_ns)


def _unlink(txn: WriteTxn, r: protocol.Unlink, opens: Opens, now_ns: int) -> Message:
    return remove.unlink(
        txn,
        session=r.session,
        parent=r.parent,
        name=r.name,
        closed_ino=r.closed_ino,
        caller=r.caller,
        opens=opens,
        now_ns=now_ns,
    )


def _rmdir(txn: WriteTxn, r: protocol.RemoveDirectory, now_ns: int) -> Message:
    return remove.remove_directory(
        txn, parent=r.parent, name=r.name, expected_ino=r.expected_ino, caller=r.caller, now_ns=now_ns
    )


def _rename(txn: WriteTxn, r: protocol.Rename, opens: Opens, now_ns: int) -> Message:
    return rename.rename(
        txn,
        session=r.session,
        parent=r.parent,
        name=r.name,
        new_parent=r.new_parent,
        new_name=r.new_name,
        flags=r.flags,
        closed_ino=r.closed_ino,
        expected_ino=r.expected_ino,
        expected_target=r.expected_target,
        caller=r.caller,
        opens=opens,
        now_ns=now_ns,
    )


def _setxattr(txn: WriteTxn, r: protocol.SetXattr, now_ns: int) -> Message:
    return xattrs.set_xattr(
        txn,
        ino=r.ino,
        name=r.name,
        value=r.value,
        how=r.how,
        drop_sgid=r.drop_sgid,
        caller=r.caller,
        now_ns=now_ns,
    )


def _removexattr(txn: WriteTxn, r: protocol.RemoveXattr, now_ns: int) -> Message:
    return xattrs.remove_xattr(txn, ino=r.ino, name=r.name, caller=r.caller, now_ns=now_ns)


def _write_inline(txn: WriteTxn, r: protocol.WriteInline, now_ns: int) -> Message:
    return data.write_inline(
        txn,
        ino=r.ino,
        offset=r.offset,
        data=r.data,
        mtime_ns=r.mtime_ns,
        keep_privileges=r.keep_privileges,
        data_version=r.data_version,
        append=r.append,
        now_ns=now_ns,
    )


def _commit_extents(txn: WriteTxn, r: protocol.CommitExtents, now_ns: int) -> Message:
    return data.commit_extents(
        txn,
        ino=r.ino,
        extents=r.extents,
        slice_sizes=r.slice_sizes,
        size_min=r.size_min,
        mtime_ns=r.mtime_ns,
        inline_moved=r.inline_moved,
        degraded=r.degraded,
        keep_privileges=r.keep_privileges,
        data_version=r.data_version,
        append=r.append,
        now_ns=now_ns,
    )


def _change_range(txn: WriteTxn, r: protocol.ChangeRange, now_ns: int) -> Message:
    return ranges.change_range(
        txn,
        ino=r.ino,
        operation=r.operation,
        offset=r.offset,
        length=r.length,
        keep_size=r.keep_size,
        keep_privileges=r.keep_privileges,
        now_ns=now_ns,
    )


def _copy_range(txn: WriteTxn, r: protocol.CopyRange, now_ns: int) -> Message:
    return ranges.copy_range(
        txn,
        source=r.ino,
        source_offset=r.offset,
        target=r.target,
        target_offset=r.target_offset,
        length=r.length,
        keep_privileges=r.keep_privileges,
        now_ns=now_ns,
    )


def _allocate_slices(txn: WriteTxn, r: protocol.AllocateSlices, now_ns: int) -> Message:
    return allocate_slices(txn, session=r.session, slice_count=r.count)


def _make_temporary(txn: WriteTxn, r: protocol.MakeTemporary, now_ns: int) -> Message:
    return create.make_temporary(
        txn,
        session=r.session,
        parent=r.parent,
        mode=r.mode,
        linkable=r.linkable,
        caller=r.caller,
        now_ns=now_ns,
    )


def _set_flags(txn: WriteTxn, r: protocol.SetFlags, now_ns: int) -> Message:
    return attributes.set_flags(txn, ino=r.ino, flags=r.flags, caller=r.caller, now_ns=now_ns)


def _touch(txn: WriteTxn, r: protocol.TouchAtimes, now_ns: int) -> Message:
    attributes.touch(txn, touches=r.touches)
    return protocol.Done()


def _release(txn: WriteTxn, r: protocol.ReleaseInode, opens: Opens, now_ns: int) -> Message:
    held.release_inodes(txn, session=r.session, inos=r.inos, opens=opens, now_ns=now_ns)
    return protocol.Done()


_READS: dict[type[Request[Message]], Callable[[ReadTxn, Any], Message]] = {
    protocol.Lookup: _lookup,
    protocol.GetAttr: _getattr,
    protocol.ReadLink: _readlink,
    protocol.ReadDir: _readdir,
    protocol.GetXattr: _getxattr,
    protocol.ListXattr: _listxattr,
    protocol.GetLayout: _layout,
    protocol.GetUsage: _usage,
    protocol.ListQuotas: _list_quotas,
}
_MUTATIONS: dict[type[protocol.Mutation[Message]], Callable[[WriteTxn, Any, int], Message]] = {
    protocol.SetAttr: _setattr,
    protocol.MakeNode: _mknod,
    protocol.MakeDirectory: _mkdir,
    protocol.MakeSymlink: _symlink,
    protocol.RemoveDirectory: _rmdir,
    protocol.SetXattr: _setxattr,
    protocol.RemoveXattr: _removexattr,
    protocol.WriteInline: _write_inline,
    protocol.CommitExtents: _commit_extents,
    protocol.AllocateSlices: _allocate_slices,
    protocol.MakeTemporary: _make_temporary,
    protocol.SetFlags: _set_flags,
    protocol.TouchAtimes: _touch,
    protocol.ChangeRange: _change_range,
    protocol.CopyRange: _copy_range,
}
_MUTATIONS_OF_OPENS: dict[type[protocol.Mutation[Message]], Callable[[WriteTxn, Any, Opens, int], Message]] = {
    protocol.Create: _create,
    protocol.Unlink: _unlink,
    protocol.Link: _link,
    protocol.Rename: _rename,
    protocol.ReleaseInode: _release,
}
