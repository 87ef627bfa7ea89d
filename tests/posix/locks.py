"""flock(2), fcntl(2) locks of both kinds: all cases of ranges, who owns what, and when a lock goes.

Rows are told as steps of two processes, A and B, each with the file x open for reading and writing:

    A w 10 5        a write lock of 5 bytes at 10, by fcntl(F_SETLK); r: read lock; u: unlock; length 0: to the end
    B w? 0 0        F_GETLK: what stands in the way of this lock, as "w 10 5" (or "r ..."), or "-"
    A ow 10 5       the same as lock of the open file description (F_OFD_SETLK); or, ou
    A fex           flock(LOCK_EX | LOCK_NB); fsh, fun
    A open, close   open x once more, and close that descriptor
    A exit          the process ends

Each step is followed by what it answers: "ok" if nothing is written, EAGAIN if "no" is.
"""

from __future__ import annotations

import fcntl
import os
import struct
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe

from tests.posix.files import told
from tests.posix.table import Row, Table

locks = Table("locks")

_FLOCK = struct.Struct("=hhxxxxqqixxxx")
F_OFD_SETLK = 37
TYPES = {"r": fcntl.F_RDLCK, "w": fcntl.F_WRLCK, "u": fcntl.F_UNLCK}


class Actor:
    """One of the processes, as it sees itself."""

    def __init__(self) -> None:
        self.opened = os.open("x", os.O_RDWR)
        self.more: list[int] = []

    def do(self, words: list[str]) -> object:
        """One step."""
        verb = words[0]
        if verb in ("fex", "fsh", "fun"):
            how = {"fex": fcntl.LOCK_EX, "fsh": fcntl.LOCK_SH, "fun": fcntl.LOCK_UN}[verb]
            return told(fcntl.flock, self.opened, how | fcntl.LOCK_NB)
        if verb == "open":
            self.more.append(os.open("x", os.O_RDONLY))
        elif verb == "close":
            os.close(self.more.pop())
        elif verb.endswith("?"):
            return self.in_the_way(verb[-2], int(words[1]), int(words[2]))
        else:
            command = F_OFD_SETLK if verb[0] == "o" else fcntl.F_SETLK
            return told(self.lock, command, TYPES[verb[-1]], int(words[1]), int(words[2]))
        return "ok"

    def lock(self, command: int, kind: int, start: int, length: int) -> None:
        """Set or remove a lock."""
        fcntl.fcntl(self.opened, command, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))

    def in_the_way(self, kind: str, start: int, length: int) -> str:
        """What F_GETLK tells."""
        answer = fcntl.fcntl(self.opened, fcntl.F_GETLK, _FLOCK.pack(TYPES[kind], os.SEEK_SET, start, length, 0))
        found, _whence, at, size, _pid = _FLOCK.unpack(answer)
        if found == fcntl.F_UNLCK:
            return "-"
        return f"{'r' if found == fcntl.F_RDLCK else 'w'} {at} {size}"


class Process:
    """An actor in a process of its own, or, as one of two in the same, in this one."""

    def __init__(self) -> None:
        ours, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            act(theirs)
        theirs.close()
        self.pipe = ours

    def do(self, words: list[str]) -> object:
        """One step; the process waits for the next."""
        if words == ["exit"]:
            self.end()
            return "ok"
        self.pipe.send(words)
        assert self.pipe.poll(30), f"no answer to {words}"
        return self.pipe.recv()

    def end(self) -> None:
        """Let it end, and wait until it has."""
        if self.pid:
            self.pipe.send(["exit"])
            os.waitpid(self.pid, 0)
            self.pipe.close()
            self.pid = 0


def act(pipe: Connection) -> None:
    """The life of a forked process."""
    try:
        actor = Actor()
        while (words := pipe.recv()) != ["exit"]:
            pipe.send(actor.do(words))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def play(script: str) -> Callable[[], object]:
    """A call that plays the script; "ok", or the first step that answered something else."""

    def call() -> object:
        os.close(os.open("x", os.O_CREAT | os.O_RDWR, 0o666))
        processes = {"A": Process(), "B": Process()}
        try:
            for step in script.split(";"):
                action, _, expected = step.partition("=")
                who, *words = action.split()
                found = processes[who].do(words)
                if found != {"": "ok", "no": "EAGAIN"}.get(expected.strip(), expected.strip()):
                    return f"{action.strip()} answered {found}"
        finally:
            for process in processes.values():
                process.end()
        return "ok"

    return call


SCRIPTS = {
    "a free range is free": "A w? 0 0 = -; B r? 5 5 = -",
    "a write lock keeps all others out": "A w 0 10; B w 5 1 = no; B r 5 1 = no; B w 10 5; B w? 0 5 = w 0 10",
    "read locks are shared": "A r 0 10; B r 5 10; B w 0 1 = no; A w 12 1 = no; A w? 12 1 = r 5 10",
    "a lock to the end of all": "A w 5 0; B w 1000000000000 1 = no; B w 0 5; B r? 7 1 = w 5 0",
    "the whole file": "A w 0 0; B r 0 1 = no; A u 0 0; B w 0 0",
    "one's own locks do not stand in the way": "A w 0 10; A w? 0 10 = -; A r 0 10; A w 5 10; A u 0 20",
    "unlocking what is not locked": "A u 0 10; A u 5 0",
    "a hole in a lock": "A w 0 30; A u 10 10; B w 10 10; B w 9 1 = no; B w 20 1 = no; B r? 0 0 = w 0 10",
    "the front is unlocked": "A w 0 30; A u 0 10; B w 0 10; B w 10 1 = no",
    "the end is unlocked": "A w 0 30; A u 20 10; B w 20 10; B w 19 1 = no",
    "more than a lock is unlocked": "A w 10 10; A u 0 100; B w 10 10",
    "a lock in the middle is turned into a read lock": "A w 0 30; A r 10 10; B r 10 10; B r 9 1 = no; B r 20 1 = no",
    "a read lock is turned into a write lock": "A r 0 10; A w 0 10; B r 0 1 = no",
    "not while another reads": "A r 0 10; B r 0 10; A w 0 10 = no; B u 0 10; A w 0 10; B r 0 1 = no",
    "a write lock is turned into a read lock": "A w 0 10; A r 0 10; B r 0 10; B w 0 1 = no",
    "locks that touch become one": "A w 0 10; A w 10 10; B r? 0 0 = w 0 20; B r? 15 1 = w 0 20",
    "locks that overlap become one": "A w 0 15; A w 10 10; B w? 12 1 = w 0 20",
    "locks of two kinds that touch stay two": "A r 0 10; A w 10 10; B w? 0 0 = r 0 10; B r? 0 0 = w 10 10",
    "a gap between two locks is free": "A w 0 10; A w 20 10; B w 10 10; B w 9 2 = no",
    "a new lock over several of one's own": "A w 0 5; A r 10 5; A w 20 5; A w 0 30; B r? 0 0 = w 0 30",
    "the last byte there is": "A w 9223372036854775806 1; B w 9223372036854775806 1 = no; B w 0 9223372036854775806",
    "an end before the start": "A w 100 -50; B w 50 1 = no; B w 99 1 = no; B w 100 1; B w 49 1; B r? 60 1 = w 50 50",
    "a negative start": "A w 10 -20 = EINVAL; A w -1 5 = EINVAL",
    "locks go with the process": "A w 0 10; B w 0 10 = no; A exit; B w 0 10",
    "closing any descriptor of the file lets all go": "A open; A w 0 10; A close; B w 0 10",
    "of flock only the last": "A open; A fex; A close; B fex = no",
    "locks of a description outlive the close of another": "A open; A ow 0 10; A close; B w 0 10 = no; B ow 0 10 = no",
    "locks of descriptions and of processes exclude one": "A ow 0 10; B r 5 1 = no; A w 5 1 = no; A ou 0 10; A w 5 1",
    "flock excludes": "A fex; B fex = no; B fsh = no; A fun; B fex; A fsh = no",
    "flock is shared": "A fsh; B fsh; A fex = no; B fun; A fex; B fsh = no",
    "flock down": "A fex; A fsh; B fsh; A fex = no",
    "flock goes with the process": "A fex; A exit; B fex",
    "flock and fcntl do not know each other": "A fex; B w 0 0; A w 0 0 = no; B fun",
    "a refused lock leaves what one has": "A r 0 10; B r 5 10; A w 0 12 = no; B w 2 1 = no; A u 0 10; B w 2 1",
    "many small locks": ";".join(
        [f"A w {2 * index} 1" for index in range(60)] + ["B w 5 1", "B w 6 1 = no", "B w? 6 9 = w 6 1"]
    ),
}


@locks.rows
def scripts() -> Iterator[Row]:
    for name, script in SCRIPTS.items():
        yield Row(name, call=play(script))


def opened_child(work: Callable[[int], object]) -> object:
    """What `work` returns in a forked process that inherited a descriptor of x with a lock on it."""
    opened = os.open("x", os.O_RDWR | os.O_CREAT)
    ours, theirs = Pipe()
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        pid = os.fork()
        if pid == 0:
            theirs.send(told(work, opened))
            os._exit(0)
        os.waitpid(pid, 0)
        return ours.recv()
    finally:
        os.close(opened)
        ours.close()
        theirs.close()


@locks.case("a child does not inherit the locks of its parent", expect="EAGAIN")
def _() -> object:
    return opened_child(lambda opened: fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB))


@locks.case("but does inherit flock, being of the description", expect="ok")
def _() -> object:
    return opened_child(lambda opened: fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB))


@locks.case("a lock for writing needs a descriptor for writing", setup="file x", expect=["EBADF", "EBADF", "ok"])
def _() -> object:
    reading, writing = os.open("x", os.O_RDONLY), os.open("x", os.O_WRONLY)
    try:
        return [
            told(fcntl.lockf, reading, fcntl.LOCK_EX | fcntl.LOCK_NB),
            told(fcntl.lockf, writing, fcntl.LOCK_SH | fcntl.LOCK_NB),
            told(fcntl.flock, reading, fcntl.LOCK_EX | fcntl.LOCK_NB),
        ]
    finally:
        os.close(reading)
        os.close(writing)


def run_pair(first: Callable[[Connection], None], second: Callable[[Connection], object]) -> object:
    """`first` in a forked process, `second` in this one, with a pipe between them; what `second` returns."""
    ours, theirs = Pipe()
    pid = os.fork()
    if pid == 0:
        ours.close()
        try:
            first(theirs)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    theirs.close()
    try:
        return second(ours)
    finally:
        ours.close()
        os.waitpid(pid, 0)


@locks.case("whoever waits gets the lock when it is let go", setup="file x", expect=["waits", "got it"])
def _() -> object:
    opened = os.open("x", os.O_RDWR)
    fcntl.lockf(opened, fcntl.LOCK_EX)

    def waiter(pipe: Connection) -> None:
        mine = os.open("x", os.O_RDWR)
        pipe.send("waits")
        fcntl.lockf(mine, fcntl.LOCK_EX)
        pipe.send("got it")

    def holder(pipe: Connection) -> object:
        found = [pipe.recv()]
        assert not pipe.poll(0.1)  # It has no lock while this process holds it.
        fcntl.lockf(opened, fcntl.LOCK_UN)
        assert pipe.poll(30)
        return [*found, pipe.recv()]

    try:
        return run_pair(waiter, holder)
    finally:
        os.close(opened)


@locks.case("a signal ends the wait", setup="file x", expect="EINTR")
def _() -> object:
    import signal

    class Woken(Exception):
        """Leaves the system call, which Python would otherwise begin anew."""

    def wake(_number: int, _frame: object) -> None:
        raise Woken

    def holder(pipe: Connection) -> None:
        opened = os.open("x", os.O_RDWR)
        fcntl.lockf(opened, fcntl.LOCK_EX)
        pipe.send("held")
        pipe.poll(30)

    def waiter(pipe: Connection) -> object:
        opened = os.open("x", os.O_RDWR)
        before = signal.signal(signal.SIGALRM, wake)
        try:
            pipe.recv()
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            fcntl.lockf(opened, fcntl.LOCK_EX)
        except Woken:
            return "EINTR"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            os.close(opened)
        return "got the lock"

    return run_pair(holder, waiter)


@locks.case(
    "two that would wait for each other: EDEADLK",
    setup="file x",
    expect=frozenset([("EDEADLK", "ok"), ("ok", "EDEADLK")]),
)
def _() -> object:
    def locked(first: int, second: int, pipe: Connection) -> object:
        opened = os.open("x", os.O_RDWR)
        try:
            fcntl.lockf(opened, fcntl.LOCK_EX, 1, first)
            pipe.send("ready")
            pipe.recv()
            return told(fcntl.lockf, opened, fcntl.LOCK_EX, 1, second)
        finally:
            os.close(opened)

    def other(pipe: Connection) -> None:
        pipe.send(locked(0, 1, pipe))

    def this(pipe: Connection) -> object:
        mine = locked(1, 0, pipe)
        assert pipe.poll(30)
        return mine, pipe.recv()

    return run_pair(other, this)
