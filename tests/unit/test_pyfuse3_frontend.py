"""The pyfuse3 front end: what becomes of a handler's exceptions, and of answers that come at once or later."""

from __future__ import annotations

import errno
import logging
import stat
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pyfuse3
import pytest
import trio

from fsd.frontend.ports import Entry, Operations
from fsd.frontend.pyfuse3_frontend import Pyfuse3Operations, attributes_of
from metadata.core.schema import Inode
from metadata.protocol import Caller
from wire.errors import NotEmpty

INODE = Inode(
    mode=stat.S_IFREG | 0o640,
    nlink=3,
    uid=1,
    gid=2,
    size=12345,
    atime_ns=-1_500_000_000,
    mtime_ns=2_000_000_001,
    ctime_ns=3_000_000_002,
    btime_ns=0,
    rdev=77,
    allocated=513,
)
CONTEXT = cast(pyfuse3.RequestContext, SimpleNamespace(uid=0, gid=0, pid=1, umask=0))


def front_end(**operations: object) -> Pyfuse3Operations:
    made = Pyfuse3Operations()
    made.operations = cast(Operations, SimpleNamespace(woken=lambda: None, **operations))
    return made


def raises(error: BaseException) -> Callable[..., None]:
    def operation(*arguments: object) -> None:
        raise error

    return operation


async def test_an_answer_that_is_there_and_one_that_comes_are_replied_alike() -> None:
    entry = Entry(9, INODE, 5.0, 6.0)

    async def later(nodeid: int) -> Entry:
        await trio.lowlevel.checkpoint()
        return entry

    for getattr_ in (lambda nodeid: entry, later):
        reply = await front_end(getattr=getattr_).getattr(9, CONTEXT)
        assert (reply.st_ino, reply.st_size, reply.st_nlink, reply.attr_timeout) == (9, 12345, 3, 6.0)


def test_attributes_are_carried_whole() -> None:
    reply = attributes_of(Entry(9, INODE, 5.0, 6.0))
    assert reply.entry_timeout == 5.0
    assert (reply.st_atime_ns, reply.st_mtime_ns, reply.st_ctime_ns) == (-1_500_000_000, 2_000_000_001, 3_000_000_002)
    assert (reply.st_mode, reply.st_uid, reply.st_gid, reply.st_rdev, reply.st_blocks) == (INODE.mode, 1, 2, 77, 2)


async def test_a_store_error_becomes_its_errno() -> None:
    with pytest.raises(pyfuse3.FUSEError) as raised:
        await front_end(rmdir=raises(NotEmpty("d"))).rmdir(1, b"d", CONTEXT)
    assert raised.value.errno == errno.ENOTEMPTY


async def test_a_bug_in_a_handler_becomes_eio_and_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(pyfuse3.FUSEError) as raised:
        await front_end(rmdir=raises(ZeroDivisionError("oops"))).rmdir(1, b"d", CONTEXT)
    assert raised.value.errno == errno.EIO
    assert [record.getMessage() for record in caplog.records] == ["handler_failed operation=rmdir"]


async def test_a_bug_in_forget_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        await front_end(forget=raises(ZeroDivisionError("oops"))).forget([(1, 1)])
    assert len(caplog.records) == 1


async def test_cancellation_passes_through_a_handler() -> None:
    async def for_ever(nodeid: int) -> Entry:
        await trio.sleep_forever()
        raise AssertionError

    with trio.move_on_after(0.01) as scope:
        await front_end(getattr=for_ever).getattr(1, CONTEXT)
    assert scope.cancelled_caught


async def test_access_control_lists_are_hidden_from_a_kernel_that_would_not_check_them() -> None:
    async def names(nodeid: int, caller: Caller) -> tuple[bytes, ...]:
        await trio.lowlevel.checkpoint()
        return b"system.posix_acl_access", b"user.a"

    handlers = front_end(listxattr=names)
    assert list(await handlers.listxattr(9, CONTEXT)) == [b"user.a"]
    for call in (
        lambda: handlers.getxattr(9, b"system.posix_acl_default", CONTEXT),
        lambda: handlers.setxattr(9, b"system.posix_acl_access", b"", CONTEXT),
        lambda: handlers.removexattr(9, b"system.posix_acl_access", CONTEXT),
    ):
        with pytest.raises(pyfuse3.FUSEError) as caught:
            await call()
        assert caught.value.errno == errno.EOPNOTSUPP
