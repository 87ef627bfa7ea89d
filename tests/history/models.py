"""What may be answered: a tree of names, the content of one file, a lock.  Each call becomes steps of `linear.search`.

Only what one request decides is one step.  A stat finds the inode of a name, then its attributes: two steps, each at a
moment of its own.  A listing says of each name whether it was there at some time during the call, as POSIX has it.  A
rename that fails because of what its two names are was refused by the kernel, which had looked them up one after the
other: it says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from tests.history.linear import FOREVER, State
from tests.history.record import TELLS_NOTHING, Call


@dataclass
class Step:
    """See linear.Step."""

    call: Call
    start: int
    end: int
    certain: bool
    reads: bool
    apply: Callable[[Any], Iterable[State]]

    def after(self, state: State) -> Iterable[State]:
        """See linear.Step."""
        return self.apply(state)


Condition = Callable[[Any], bool]


def observation(call: Call, holds: Condition) -> Step:
    """The answer needs a state in which `holds`."""

    def apply(state: State) -> Iterable[State]:
        return (state,) if holds(state) else ()

    assert call.end is not None
    return Step(call, call.start, call.end, certain=True, reads=True, apply=apply)


Ends = dict[str, list[int]]
"""For each mount, when its sessions had ended, ascending."""


def change(call: Call, apply: Callable[[Any], Iterable[State]], ends: Ends) -> Step:
    """It changes the state; if it is not known whether it did, then at any time before its session ended."""
    if call.known:
        assert call.end is not None
        return Step(call, call.start, call.end, certain=True, reads=False, apply=apply)
    session_end = next((end for end in ends.get(call.mount, ()) if end >= call.start), FOREVER)
    return Step(call, call.start, session_end, certain=False, reads=False, apply=apply)


# --- names --------------------------------------------------------------------------------------------------------


class Link(NamedTuple):
    """A directory's entry.  `ino` is negative while nobody has seen the number: the call that made it, negated."""

    parent: int
    name: str
    ino: int
    is_directory: bool


Tree = frozenset[Link]


@dataclass(frozen=True)
class Names:
    """The whole tree below `roots`, which stay where they are, as one object."""

    roots: frozenset[int]
    made: frozenset[int]  # Inodes of which it is known which call made them.
    seen_by: dict[int, int]  # Inode -> when the first call that told of it ended.
    tried: dict[int, frozenset[str]]  # Directory -> all names that anybody used in it.
    ends: Ends = field(default_factory=dict)

    # --- what holds in a state ---

    def find(self, tree: Tree, parent: int, name: str) -> Link | None:
        return next((link for link in tree if link.parent == parent and link.name == name), None)

    def is_there(self, tree: Tree, directory: int) -> bool:
        return directory in self.roots or any(link.ino == directory for link in tree)

    def has_entries(self, tree: Tree, directory: int) -> bool:
        return any(link.parent == directory for link in tree)

    def bindings(self, tree: Tree, link: Link, ino: int) -> Iterator[Tree]:
        """The tree in which `link` is inode `ino`, if that can be."""
        if link.ino == ino:
            yield tree
        elif link.ino < 0 and ino not in self.made and not any(other.ino == ino for other in tree):
            yield frozenset(
                other._replace(
                    ino=ino if other.ino == link.ino else other.ino,
                    parent=ino if other.parent == link.ino else other.parent,
                )
                for other in tree
            )

    # --- calls ---

    def steps(self, call: Call) -> list[Step]:
        """What the call says of the tree."""
        if call.error is not None and call.known:
            condition = self.refusal(call)
            return [] if condition is None else [observation(call, condition)]
        made: list[Step] = getattr(self, f"_{call.call}", _nothing)(call)
        return made if call.known else [step for step in made if not step.reads]

    def refusal(self, call: Call) -> Condition | None:
        """What must hold for the error that the call was refused with; None: it says nothing."""
        args, kind, error = call.args, call.call, call.error
        if error in TELLS_NOTHING or kind not in OF_NAMES:
            return None
        if kind == "rename":
            return self._rename_refusal(call)
        parent, name = (args["to_dir"], args["to_name"]) if kind == "link" else (args["dir"], args["name"])
        if error == "ENOENT":
            if kind in ("create", "excl", "mkdir"):
                return lambda tree: not self.is_there(tree, parent)
            if kind == "link":
                return lambda tree: not self.is_there(tree, parent) or not any(one.ino == args["ino"] for one in tree)
            return lambda tree: self.find(tree, parent, name) is None
        wanted = REFUSALS.get((kind, error), _never)

        def holds(tree: Tree) -> bool:
            link = self.find(tree, parent, name)
            return link is not None and wanted(tree, link)

        return holds

    def _rename_refusal(self, call: Call) -> Condition | None:
        args = call.args
        if call.error == "ENOENT":
            return lambda tree: (
                self.find(tree, args["dir"], args["name"]) is None or not self.is_there(tree, args["to_dir"])
            )
        if call.error in ("ENOTEMPTY", "EEXIST"):

            def target_has_entries(tree: Tree) -> bool:
                link = self.find(tree, args["to_dir"], args["to_name"])
                return link is not None and self.has_entries(tree, link.ino)

            return target_has_entries
        if call.error in ("EISDIR", "ENOTDIR", "EINVAL", "ELOOP"):
            return None
        return lambda tree: False

    def _make(self, call: Call, ino: int, *, is_directory: bool, or_open: bool = False) -> list[Step]:
        parent, name = call.args["dir"], call.args["name"]
        existed = self.seen_by.get(ino, FOREVER) < call.start

        def apply(tree: Tree) -> Iterator[Tree]:
            link = self.find(tree, parent, name)
            if link is None and self.is_there(tree, parent) and not existed and not any(one.ino == ino for one in tree):
                yield tree | {Link(parent, name, ino, is_directory)}
            elif link is not None and or_open and not link.is_directory:
                yield from self.bindings(tree, link, ino)

        return [change(call, apply, self.ends)]

    def _create(self, call: Call) -> list[Step]:
        return self._make(call, call.value.get("ino", -call.n), is_directory=False, or_open=True)

    def _excl(self, call: Call) -> list[Step]:
        return self._make(call, call.value.get("ino", -call.n), is_directory=False)

    def _mkdir(self, call: Call) -> list[Step]:
        return self._make(call, -call.n, is_directory=True)

    def _see(self, call: Call, parent: int, name: str, ino: int, *, is_directory: bool | None) -> Step:
        """The name was this inode.  It is a change as long as that may teach the number of something made."""

        def apply(tree: Tree) -> Iterator[Tree]:
            link = self.find(tree, parent, name)
            if link is not None and is_directory in (None, link.is_directory):
                yield from self.bindings(tree, link, ino)

        if ino in self.made:
            return observation(call, lambda tree: any(True for _ in apply(tree)))
        return change(call, apply, self.ends)

    def _open(self, call: Call) -> list[Step]:
        if not call.known:
            return []
        args = call.args
        return [self._see(call, args["dir"], args["name"], call.value["ino"], is_directory=None)]

    def _opendir(self, call: Call) -> list[Step]:
        if not call.known:
            return []
        args = call.args
        return [self._see(call, args["dir"], args["name"], call.value["ino"], is_directory=True)]

    def _stat(self, call: Call) -> list[Step]:
        if not call.known:
            return []
        args, value = call.args, call.value
        is_directory = value["kind"] == "directory"
        seen = self._see(call, args["dir"], args["name"], value["ino"], is_directory=is_directory)
        return [seen] if is_directory else [seen, *self._fstat(call)]

    def _fstat(self, call: Call) -> list[Step]:
        if not call.known:
            return []
        ino, nlink = call.value.get("ino", call.args.get("ino")), call.value["nlink"]
        return [observation(call, lambda tree: sum(link.ino == ino for link in tree) == nlink)]

    def _list(self, call: Call) -> list[Step]:
        if not call.known:
            return []
        parent = call.args["dir"]
        listed = dict(call.value["names"])
        steps = [self._see(call, parent, name, ino, is_directory=None) for name, ino in listed.items()]
        steps += [self._absent(call, parent, name) for name in sorted(self.tried.get(parent, frozenset()) - {*listed})]
        return steps

    def _absent(self, call: Call, parent: int, name: str) -> Step:
        return observation(call, lambda tree: self.find(tree, parent, name) is None)

    def _unlink(self, call: Call) -> list[Step]:
        parent, name = call.args["dir"], call.args["name"]

        def apply(tree: Tree) -> Iterator[Tree]:
            link = self.find(tree, parent, name)
            if link is not None and not link.is_directory:
                yield tree - {link}

        return [change(call, apply, self.ends)]

    def _rmdir(self, call: Call) -> list[Step]:
        parent, name = call.args["dir"], call.args["name"]

        def apply(tree: Tree) -> Iterator[Tree]:
            link = self.find(tree, parent, name)
            if link is not None and link.is_directory and not self.has_entries(tree, link.ino):
                yield tree - {link}

        return [change(call, apply, self.ends)]

    def _link(self, call: Call) -> list[Step]:
        parent, name, ino = call.args["to_dir"], call.args["to_name"], call.args["ino"]

        def apply(tree: Tree) -> Iterator[Tree]:
            has_a_name = any(link.ino == ino for link in tree)
            if has_a_name and self.find(tree, parent, name) is None and self.is_there(tree, parent):
                yield tree | {Link(parent, name, ino, False)}

        return [change(call, apply, self.ends)]

    def _rename(self, call: Call) -> list[Step]:
        args = call.args

        def apply(tree: Tree) -> Iterator[Tree]:
            old = self.find(tree, args["dir"], args["name"])
            new = self.find(tree, args["to_dir"], args["to_name"])
            if new is not None and (old is None or old.ino == new.ino):
                yield tree  # The kernel found two names of one inode when it looked them up, one after the other.
            if old is None or not self.is_there(tree, args["to_dir"]) or (new is not None and old.ino == new.ino):
                return
            if new is not None and (
                new.is_directory != old.is_directory or (new.is_directory and self.has_entries(tree, new.ino))
            ):
                return
            if old.is_directory and self._is_below(tree, args["to_dir"], old.ino):
                return
            kept = tree - {old} - ({new} if new is not None else set())
            yield kept | {Link(args["to_dir"], args["to_name"], old.ino, old.is_directory)}

        return [change(call, apply, self.ends)]

    def _is_below(self, tree: Tree, directory: int, top: int) -> bool:
        """Whether `directory` is `top` or lies somewhere below."""
        parents = {link.ino: link.parent for link in tree if link.is_directory}
        at: int | None = directory
        while at is not None:
            if at == top:
                return True
            at = parents.get(at)
        return False


OF_NAMES = frozenset({"create", "excl", "open", "opendir", "mkdir", "unlink", "rmdir", "rename", "link", "stat"})


def _any(tree: Tree, link: Link) -> bool:
    return True


def _never(tree: Tree, link: Link) -> bool:
    return False


def _is_file(tree: Tree, link: Link) -> bool:
    return not link.is_directory


def _is_directory(tree: Tree, link: Link) -> bool:
    return link.is_directory


def _is_full(tree: Tree, link: Link) -> bool:
    return any(other.parent == link.ino for other in tree)


REFUSALS: dict[tuple[str, str | None], Callable[[Tree, Link], bool]] = {
    ("excl", "EEXIST"): _any,
    ("mkdir", "EEXIST"): _any,
    ("link", "EEXIST"): _any,
    ("create", "EISDIR"): _is_directory,
    ("open", "EISDIR"): _is_directory,
    ("unlink", "EISDIR"): _is_directory,
    ("opendir", "ENOTDIR"): _is_file,
    ("rmdir", "ENOTDIR"): _is_file,
    ("rmdir", "ENOTEMPTY"): _is_full,
}
"""(call, error) -> what the name must be."""


def _nothing(call: Call) -> list[Step]:
    return []


# --- the content of one file ------------------------------------------------------------------------------------------

Cells = tuple[int, ...]


class Content(NamedTuple):
    """What a file holds, and what it held before each write that its writer has not flushed yet, oldest first."""

    cells: Cells
    writer: str = ""
    unflushed: tuple[Cells, ...] = ()
    kept: Cells | None = None  # What a mount that lost its session has kept, to commit it if nobody changes the file.


NOTHING_WRITTEN = Content(())


@dataclass(frozen=True)
class FileContent:
    """The cells of one inode.

    With `volatile` mounts (whose sessions end during the history) bytes that have been written and not flushed may be
    lost at that end: not after an fsync, and not after somebody on another mount has read or changed the file.  They
    may come back once, while nobody has changed the file since (decision 0014).
    """

    stride: int
    volatile: frozenset[str] = frozenset()
    ends: Ends = field(default_factory=dict)

    def steps(self, call: Call) -> list[Step]:
        """What the call says of the content."""
        if call.error is not None and call.known:
            return []
        made: Callable[[Call], list[Step]] = getattr(self, f"_{call.call}", _nothing)
        if not call.known and call.call not in ("write", "append", "truncate"):
            return []
        return made(call)

    def lost(self, mount: str, call: Call) -> list[Step]:
        """The mount's session ends: what it has not flushed may be gone, from any write on, and may come back."""

        def apply(content: Content) -> Iterator[State]:
            yield content
            if content.writer == mount:
                yield from (Content(cells, kept=content.cells) for cells in content.unflushed)

        def come_back(content: Content) -> Iterator[State]:
            if content.kept is not None:
                yield Content(content.kept)

        assert call.end is not None
        return [
            Step(call, call.start, call.end, certain=True, reads=False, apply=apply),
            Step(call, call.start, FOREVER, certain=False, reads=False, apply=come_back),
        ]

    def _see(self, call: Call, holds: Callable[[Cells], bool]) -> list[Step]:
        if not self.volatile:
            return [observation(call, lambda content: holds(content.cells))]

        def apply(content: Content) -> Iterator[State]:
            if holds(content.cells):
                yield content if content.writer == call.mount else Content(content.cells, kept=content.kept)

        return [change(call, apply, self.ends)]

    def _set(self, call: Call, new: Callable[[Cells], Cells]) -> list[Step]:
        def apply(content: Content) -> Iterator[State]:
            cells = new(content.cells)
            if call.mount not in self.volatile:
                yield Content(cells)
                return
            before = content.unflushed if content.writer == call.mount else ()
            yield Content(cells, call.mount, (*before, content.cells))

        return [change(call, apply, self.ends)]

    def _read(self, call: Call) -> list[Step]:
        cell, token = call.args["cell"], call.value["token"]

        def holds(cells: Cells) -> bool:
            found = cells[cell] if cell < len(cells) else None
            return found is token if token is None else found == token

        return self._see(call, holds)

    def _readall(self, call: Call) -> list[Step]:
        tokens = tuple(call.value["tokens"])
        return self._see(call, lambda cells: cells == tokens)

    def _fstat(self, call: Call) -> list[Step]:
        size = call.value["size"]
        return self._see(call, lambda cells: len(cells) * self.stride == size)

    _stat = _fstat

    def _write(self, call: Call) -> list[Step]:
        cell, token = call.args["cell"], call.args["token"]

        def new(cells: Cells) -> Cells:
            longer = cells + (0,) * (cell + 1 - len(cells))
            return (*longer[:cell], token, *longer[cell + 1 :])

        return self._set(call, new)

    def _append(self, call: Call) -> list[Step]:
        return self._set(call, lambda cells: (*cells, call.args["token"]))

    def _truncate(self, call: Call) -> list[Step]:
        count = call.args["cells"]
        return self._set(call, lambda cells: (cells + (0,) * count)[:count])

    def _fsync(self, call: Call) -> list[Step]:
        if not self.volatile:
            return []

        def apply(content: Content) -> Iterator[State]:
            yield content if content.writer != call.mount else Content(content.cells, kept=content.kept)

        return [change(call, apply, self.ends)]


# --- a lock ---------------------------------------------------------------------------------------------------------


def lock_steps(call: Call) -> list[Step]:
    """An exclusive lock; the state is who has it, or ""."""

    def taken(holder: str) -> Iterator[State]:
        if not holder:
            yield call.client

    def freed(holder: str) -> Iterator[State]:
        if holder == call.client:
            yield ""

    if call.call == "unlock":
        return [change(call, freed, {})]
    if call.error is None:
        return [change(call, taken, {})]
    if call.error == "EAGAIN":
        return [observation(call, lambda holder: cast(str, holder) not in ("", call.client))]
    return []
