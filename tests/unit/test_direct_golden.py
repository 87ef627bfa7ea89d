"""Each request of the kernel, and each reply to it, against bytes that a C program made from the system's linux/fuse.h.

A line of golden/fuse.txt is: request or reply, name, bytes.  tests/support/fuse_golden.c prints them all; a line that
was released is never edited.
"""

from __future__ import annotations

import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from fsd.frontend.direct import dispatch, replies
from fsd.frontend.direct.negotiation import Agreement, init_reply
from fsd.frontend.direct.protocol import Opcode
from fsd.frontend.direct.requests import ACCESS_IN, BMAP_IN, HEADER_SIZE, IN_HEADER, INIT_IN, INTERRUPT_IN, POLL_IN
from fsd.frontend.ports import Changes, Entry, FileLock, Opened, Operations
from metadata.core.locks import LAST_BYTE, LockKind
from metadata.core.schema import Inode
from metadata.protocol import Caller, StatFsDone
from tests.support.noting_operations import Call, NotingOperations

GOLDEN = Path(__file__).parent / "golden" / "fuse.txt"
PROGRAM = Path(__file__).parents[1] / "support" / "fuse_golden.c"
UNIQUE = 0x1122334455667788
CALLER = Caller(1000, 100)
MAKER = Caller(1000, 100, umask=0o22)
FAR = 1 << 40


def golden(kind: str) -> dict[str, bytes]:
    lines = (line.split(" ") for line in GOLDEN.read_text().splitlines())
    return {name: bytes.fromhex(data) for which, name, data in lines if which == kind}


REQUESTS, REPLIES = golden("request"), golden("reply")

CALLS: dict[str, Call] = {
    "LOOKUP": ("lookup", (9, b"name"), {}),
    "GETATTR": ("getattr", (9,), {}),
    "READLINK": ("readlink", (9,), {}),
    "SYMLINK": ("symlink", (9, b"name", b"target", CALLER), {}),
    "MKNOD": ("mknod", (9, b"name", 0o10644, 5, MAKER), {}),
    "MKDIR": ("mkdir", (9, b"name", 0o755, MAKER), {}),
    "MKDIR+GROUPS": ("mkdir", (9, b"name", 0o755, Caller(1000, 100, (8,), umask=0o22)), {}),
    "UNLINK": ("unlink", (9, b"name", CALLER), {}),
    "RMDIR": ("rmdir", (9, b"name", CALLER), {}),
    "RENAME": ("rename", (9, b"name", 8, b"new", 0, CALLER), {}),
    "RENAME2": ("rename", (9, b"name", 8, b"new", 2, CALLER), {}),
    "LINK": ("link", (8, 9, b"name", CALLER), {}),
    "OPEN": ("open", (9, 0o1002, CALLER), {"kill_privileges": True}),
    "READ": ("read", (5, FAR, 4096), {}),
    "WRITE": ("write", (5, FAR, b"text\0"), {"kill_privileges": True, "caller": CALLER, "from_pages": True}),
    "STATFS": ("statfs", (), {}),
    "RELEASE": ("release", (5,), {"lock_owner": 6, "flock": True}),
    "FSYNC": ("fsync", (5, True), {}),
    "SETXATTR": ("setxattr", (9, b"user.a", b"value\0", 1, CALLER), {"drop_sgid": False}),
    "SETXATTR_SHORT": ("setxattr", (9, b"user.a", b"value\0", 2, CALLER), {}),
    "GETXATTR": ("getxattr", (9, b"user.a", CALLER), {}),
    "LISTXATTR": ("listxattr", (9, CALLER), {}),
    "REMOVEXATTR": ("removexattr", (9, b"user.a", CALLER), {}),
    "FLUSH": ("flush", (5, 6), {}),
    "OPENDIR": ("opendir", (9, 65536), {}),
    "RELEASEDIR": ("releasedir", (5,), {}),
    "FSYNCDIR": ("fsyncdir", (5,), {}),
    "CREATE": ("create", (9, b"name", 0o100644, 2, MAKER), {}),
    "STATX": ("getattr", (9,), {}),
}
"""What each request asks of the operations; those with an answer of their own are told below."""


def carried_out(name: str) -> list[Call]:
    """The calls that a golden request leads to."""
    message = REQUESTS[name]
    request = IN_HEADER.unpack_from(message)
    noting = NotingOperations()
    row = dispatch.rows(extended_setxattr=name != "SETXATTR_SHORT")[request[1]]
    assert row is not None
    row.call(cast(Operations, noting), request, message[HEADER_SIZE:])
    return noting.calls


@pytest.mark.parametrize("name", REQUESTS)
def test_the_header_of_a_request_is_taken_apart(name: str) -> None:
    message = REQUESTS[name]
    opcode = Opcode[name.partition("+")[0].removesuffix("_SHORT")]
    extensions = 2 if "+" in name else 0
    assert IN_HEADER.unpack_from(message) == (len(message), opcode, UNIQUE, 9, 1000, 100, 77, extensions)


@pytest.mark.parametrize("name", CALLS)
def test_a_request_becomes_its_call(name: str) -> None:
    assert carried_out(name) == [CALLS[name]]


def test_setattr_asks_for_what_is_valid_and_nothing_else() -> None:
    ((name, (nodeid, changes, caller), _),) = carried_out("SETATTR")
    assert (name, nodeid, caller) == ("setattr", 9, CALLER)
    assert {slot: value for slot in Changes.__slots__ if (value := getattr(changes, slot)) not in (None, False)} == {
        "mode": 0o4755,
        "uid": 7,
        "gid": 8,
        "size": 70,
        "atime_ns": 1_000_000_004,
        "mtime_ns": -1_999_999_995,
        "ctime_ns": 3_000_000_006,
        "kill_privileges": True,
    }


@pytest.mark.parametrize(("name", "plus"), [("READDIR", False), ("READDIRPLUS", True)])
def test_a_listing_is_asked_for(name: str, plus: bool) -> None:
    ((operation, arguments, _),) = carried_out(name)
    assert (operation, arguments[:3]) == ("readdir", (5, FAR, plus))


@pytest.mark.parametrize(
    ("name", "operation", "expected", "how"),
    [
        ("GETLK", "get_lock", (LockKind.WRITE, 10, LAST_BYTE, 77), {}),
        ("SETLK", "set_lock", (LockKind.READ, 10, 20, 77), {"flock": False, "wait": False}),
        ("SETLKW", "set_lock", (LockKind.WRITE, 0, LAST_BYTE, 77), {"flock": True, "wait": True}),
    ],
)
def test_a_lock_is_asked_for(name: str, operation: str, expected: tuple[int, ...], how: dict[str, object]) -> None:
    ((called, (fh, owner, lock), more),) = carried_out(name)
    assert isinstance(lock, FileLock)
    assert (called, fh, owner, more) == (operation, 5, 6, how)
    assert (lock.kind, lock.start, lock.end, lock.pid) == expected


@pytest.mark.parametrize(("name", "given"), [("FORGET", (9, 3)), ("BATCH_FORGET", (5, 1))])
def test_look_ups_are_given_back(name: str, given: tuple[int, int]) -> None:
    message = REQUESTS[name]
    noting = NotingOperations()
    dispatch.forget(cast(Operations, noting), IN_HEADER.unpack_from(message), message[HEADER_SIZE:])
    ((operation, (forgotten,), _),) = noting.calls
    assert operation == "forget"
    assert next(iter(cast(list[tuple[int, int]], forgotten))) == given


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("INTERRUPT", INTERRUPT_IN.unpack_from),
        ("ACCESS", ACCESS_IN.unpack_from),
        ("BMAP", BMAP_IN.unpack_from),
        ("POLL", POLL_IN.unpack_from),
        ("INIT", INIT_IN.unpack_from),
    ],
)
def test_requests_of_the_loop_and_those_refused_are_known_too(
    name: str, fields: Callable[[bytes, int], tuple[int, ...]]
) -> None:
    expected = {
        "INTERRUPT": (12,),
        "ACCESS": (4,),
        "BMAP": (1, 4096),
        "POLL": (5, 1, 0, 1),
        "INIT": (7, 45, 131072, 0x73FFFFFB, 0x17F),
    }
    assert fields(REQUESTS[name], HEADER_SIZE) == expected[name]


# --- replies ------------------------------------------------------------------------------------------------------

INODE = Inode(
    mode=stat.S_IFREG | 0o640,
    nlink=3,
    uid=1,
    gid=2,
    size=12345,
    atime_ns=-1_500_000_000,
    mtime_ns=2_000_000_001,
    ctime_ns=3_000_000_002,
    btime_ns=9_000_000_008,
    rdev=0x12345,
    allocated=12800,
)
ENTRY = Entry(10, INODE, 3600.0, 1.5)


def listed(filled: replies.Listing) -> bytes:
    assert filled.add(b"names", ENTRY, 77)
    return b"".join(replies.listing(UNIQUE, filled))


MADE: dict[str, bytes] = {
    "error": replies.error(UNIQUE, 2),
    "done": replies.done(UNIQUE),
    "data": b"".join(replies.data(UNIQUE, b"bytes\0")),
    "entry": replies.entry(UNIQUE, ENTRY),
    "attributes": replies.attributes(UNIQUE, ENTRY),
    "statx": replies.statx(UNIQUE, ENTRY),
    "opened_file": replies.opened_file(UNIQUE, Opened(5, True)),
    "opened_direct": replies.opened_file(UNIQUE, Opened(5, False, direct_io=True)),
    "opened_directory": replies.opened_directory(UNIQUE, Opened(5, True)),
    "created": replies.created(UNIQUE, (Opened(5, False), ENTRY)),
    "written": replies.written(UNIQUE, 4096),
    "number": replies.number(UNIQUE, 1 << 40),
    "copied": replies.number(UNIQUE, 1 << 40),
    "statfs": replies.statfs(UNIQUE, StatFsDone(100 * 4096 + 1, 60 * 4096, 2, 7, 5)),
    "lock": replies.lock(UNIQUE, FileLock(LockKind.WRITE, 10, 20, 77)),
    "ioctl": replies.ioctl(UNIQUE, (16).to_bytes(4, "little")),
    "init": init_reply(UNIQUE, Agreement(38, 0x14_7000000F, 131072)),
    "listing": listed(replies.Listing(4096)),
    "listing_plus": listed(replies.ListingPlus(4096)),
    "forget_attributes": replies.forget_attributes(10),
    "forget_pages": replies.forget_pages(10, 4096, 100),
    "forget_entry": replies.forget_entry(9, b"name"),
    "entry_deleted": replies.entry_deleted(9, 10, b"name"),
    "doubt_entry": replies.doubt_entry(9, b"name"),
    "forget_all_names": replies.forget_all_names(),
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_has_its_golden_bytes(name: str) -> None:
    assert MADE[name].hex() == REPLIES[name].hex()


def test_every_opcode_has_golden_bytes() -> None:
    assert {name.partition("+")[0].removesuffix("_SHORT") for name in REQUESTS} == {opcode.name for opcode in Opcode}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_the_golden_bytes_are_what_the_systems_header_says(tmp_path: Path) -> None:
    program = tmp_path / "golden"
    subprocess.run(["gcc", "-o", program, PROGRAM], check=True)
    assert subprocess.run([program], check=True, capture_output=True, text=True).stdout == GOLDEN.read_text()
