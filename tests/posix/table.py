"""Rows of the POSIX tables, and how one is run.

A row is told in words (tests/posix/verbs.py): what is there, the call, what it must answer, and what must have become
of names and times afterwards.  A call that words do not tell is a function.  Each row runs in an empty directory of its
own, which is the working directory, as one of USERS, with umask 0.

`after` is a list, separated by semicolons: a name and what must be true of it.

    d/x dir mode=0755 uid=1001 nlink=2      type and attributes (also size=, target=, blocks=)
    d/x same=d/y                            the same inode
    d/x absent                              no such name
    d +mc -a                                mtime and ctime are later than before the call, atime is as it was
    d/x fresh                               made now: its three times are equal, and not before the call
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.posix import calls
from tests.posix.verbs import NAMES, encoded, number, perform

USERS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "root": (0, 0, ()),
    "alice": (1001, 1001, ()),
    "bob": (1002, 1002, ()),
    "carol": (1003, 1003, (1001,)),  # By a supplementary group in that of alice.
    "dave": (1004, 1004, (2001, 2002, 1001, 2003)),
}
"""Name -> user, group, supplementary groups."""

COARSE = 5
"""CLOCK_REALTIME_COARSE, which stamps inodes: it stands still for a tick of the kernel, 1 to 10 ms."""

Call = str | Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One promise."""

    name: str
    setup: str = ""
    call: Call = ""
    expect: object = "ok"  # "ok", the name of an errno, one of several (a frozenset), or the value returned.
    after: str = ""
    user: str = "root"
    needs: tuple[str, ...] = ()  # Names of tests.posix.features.


Maker = Callable[[], Iterable[Row]]


@dataclass
class Table:
    """Rows of one subject; functions marked with `rows` add to it."""

    name: str
    _makers: list[Maker] = field(default_factory=list)

    def rows(self, maker: Maker) -> Maker:
        """Decorator: the function's rows belong to the table."""
        self._makers.append(maker)
        return maker

    def case(
        self, name: str, *, setup: str = "", expect: object = "ok", user: str = "root", needs: tuple[str, ...] = ()
    ) -> Callable[[Callable[[], object]], Callable[[], object]]:
        """Decorator: the function is a call, and makes one row."""

        def decorate(call: Callable[[], object]) -> Callable[[], object]:
            row = Row(name, setup, call, expect, user=user, needs=needs)
            self._makers.append(lambda: (row,))
            return call

        return decorate

    def __iter__(self) -> Iterator[Row]:
        for maker in self._makers:
            yield from maker()


class Wrong(AssertionError):
    """A row's promise was not kept."""


@contextmanager
def acting_as(user: str) -> Iterator[None]:
    """Have the effective ids and the groups of a user; for root nothing changes."""
    uid, gid, groups = USERS[user]
    if uid == 0:
        yield
        return
    before = os.getgroups()
    os.setgroups(groups)
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


@contextmanager
def own_directory(top: Path) -> Iterator[None]:
    """An empty directory as working directory, with umask 0; removed afterwards, with whatever is in it."""
    here, made = os.open(".", os.O_PATH), top / "row"
    made.mkdir(mode=0o755)
    umask = os.umask(0)
    try:
        os.chdir(made)
        yield
    finally:
        os.fchdir(here)
        os.close(here)
        os.umask(umask)
        remove(made)


def remove(directory: Path) -> None:
    """Remove a tree, inode flags notwithstanding."""
    try:
        shutil.rmtree(directory)
    except PermissionError:
        for folder, folders, files in os.walk(directory):
            for name in (".", *folders, *files):
                path = os.path.join(folder, name)
                if not os.path.islink(path) and (os.path.isdir(path) or os.path.isfile(path)):
                    with suppress(OSError), calls.descriptor(path, os.O_RDONLY) as opened:
                        calls.set_inode_flags(opened, 0)
        shutil.rmtree(directory)


def run(row: Row, top: Path) -> None:
    """Run a row below `top`; raises Wrong when the answer or the effect is another than the row says."""
    with own_directory(top):
        perform(row.setup)
        checks = [check.split() for check in row.after.split(";") if check.strip()]
        before = {words[0]: look(words[0]) for words in checks}
        if any(word[0] in "+-" or word == "fresh" for words in checks for word in words[1:]):
            wait_for_a_tick()
        began_ns = time.clock_gettime_ns(COARSE)
        found = answer(row)
        expected = row.expect if isinstance(row.expect, frozenset) else frozenset([row.expect]) if hashable(row) else ()
        if found not in expected and found != row.expect:
            raise Wrong(f"answered {found!r}, not {row.expect!r}")
        for name, *words in checks:
            check_name(name, words, before[name], began_ns)


def hashable(row: Row) -> bool:
    """Whether what is expected can be an element of a set."""
    return isinstance(row.expect, str | bytes | int | tuple)


def answer(row: Row) -> object:
    """What the call returned ("ok" for nothing), or the name of its errno."""
    try:
        with acting_as(row.user):
            result = perform(row.call) if isinstance(row.call, str) else row.call()
    except OSError as error:
        if error.errno is None:
            raise
        return error_name(error.errno)
    return "ok" if result is None else result


def error_name(number: int) -> str:
    """The name of an errno; of those that Linux has twice, the one that its manuals use."""
    name = errno.errorcode[number]
    return {"ENOTSUP": "EOPNOTSUPP", "EWOULDBLOCK": "EAGAIN", "EDEADLOCK": "EDEADLK"}.get(name, name)


def wait_for_a_tick() -> None:
    """Until a change made from now on gets other times than those there are."""
    now_ns = time.clock_gettime_ns(time.CLOCK_REALTIME)
    while time.clock_gettime_ns(COARSE) <= now_ns:
        time.sleep(0.0005)


def look(name: str) -> os.stat_result | None:
    """lstat, or None when there is nothing."""
    try:
        return os.lstat(encoded(name.format_map(NAMES)))
    except OSError:
        return None


TYPES = {
    "file": stat.S_IFREG,
    "dir": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "fifo": stat.S_IFIFO,
    "char": stat.S_IFCHR,
    "block": stat.S_IFBLK,
    "socket": stat.S_IFSOCK,
}


def check_name(name: str, words: list[str], before: os.stat_result | None, began_ns: int) -> None:
    """One entry of `after`."""
    now = look(name)
    if words == ["absent"]:
        if now is not None:
            raise Wrong(f"{name} is there")
        return
    if now is None:
        raise Wrong(f"{name} is not there")
    for word in words:
        check_word(name, word, before, now, began_ns)


def check_word(name: str, word: str, before: os.stat_result | None, now: os.stat_result, began_ns: int) -> None:
    """One word of an entry of `after`."""
    key, equals, value = word.partition("=")
    if equals:
        check_attribute(name, key, value, now)
    elif word == "fresh":
        if not began_ns <= now.st_atime_ns == now.st_mtime_ns == now.st_ctime_ns:
            raise Wrong(f"{name} is not new: {now.st_atime_ns} {now.st_mtime_ns} {now.st_ctime_ns}, began {began_ns}")
    elif word[0] in "+-":
        assert before is not None, f"{name} was not there before"
        for letter in word[1:]:
            old, new = (getattr(status, f"st_{letter}time_ns") for status in (before, now))
            if (new > old) if word[0] == "-" else (new <= old):
                raise Wrong(f"{letter}time of {name} {'did not move' if word[0] == '+' else 'moved'}: {old} {new}")
    elif stat.S_IFMT(now.st_mode) != TYPES[word]:
        raise Wrong(f"{name} is {stat.filemode(now.st_mode)}, not a {word}")


def check_attribute(name: str, key: str, value: str, now: os.stat_result) -> None:
    """One key=value of an entry of `after`."""
    if key == "same":
        other = look(value)
        if other is None or other.st_ino != now.st_ino:
            raise Wrong(f"{name} and {value} are not the same inode")
    elif key == "target":
        if os.readlink(encoded(name)) != encoded(value.format_map(NAMES)):
            raise Wrong(f"{name} leads to {os.readlink(encoded(name))!r}")
    elif key == "mode":
        if stat.S_IMODE(now.st_mode) != number(value):
            raise Wrong(f"mode of {name} is {stat.S_IMODE(now.st_mode):#o}, not {value}")
    elif key in ("atime", "mtime", "ctime"):
        check_time(name, key, value, getattr(now, f"st_{key}_ns"))
    elif getattr(now, f"st_{key}") != number(value):
        raise Wrong(f"{key} of {name} is {getattr(now, f'st_{key}')}, not {value}")


def check_time(name: str, key: str, value: str, now_ns: int) -> None:
    """A time as SECONDS.NANOSECONDS."""
    seconds, _, fraction = value.partition(".")
    if now_ns != int(seconds) * 10**9 + int(fraction or 0):
        raise Wrong(f"{key} of {name} is {now_ns} ns, not {value}")
