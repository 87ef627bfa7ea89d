"""Decide a history: cut into pieces that do not depend on each other, search each, tell what is wrong in few lines.

A history is linearizable if and only if that of each object is (Herlihy and Wing, 1990, theorem 1).  The objects are
the tree of names, the content of each file, each lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.history.linear import State, Undecided, search
from tests.history.models import NOTHING_WRITTEN, Content, Ends, FileContent, Link, Names, Step, lock_steps
from tests.history.record import Call, History

SEARCHES_MAX = 80
"""For each violation, to find which answers it takes to see it."""
STATES_SHOWN_MAX = 4
CALLS_SHOWN_MAX = 40
CHANGES_BEFORE = 3
"""Of those that were over before the first call that is told."""
BAR_WIDTH = 32


@dataclass
class Piece:
    """One object, with all that was done to it and seen of it."""

    title: str
    steps: list[Step]
    initial: State


@dataclass
class Violation:
    """Answers that no order of the calls explains."""

    title: str
    call: Call  # The last of them.
    text: str  # For people.

    def __str__(self) -> str:
        return self.text


@dataclass
class Verdict:
    """What is to be said of a history."""

    calls: int
    pieces: int
    violations: list[Violation] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Every piece was searched, and explained."""
        return not self.violations and not self.undecided

    def __str__(self) -> str:
        told = [f"{self.calls} calls in {self.pieces} pieces: {'linearizable' if self.good else 'NOT linearizable'}"]
        told += [f"\n{violation}" for violation in self.violations]
        told += [f"\nundecided: {one}" for one in self.undecided]
        return "\n".join(told)


def check(history: History) -> Verdict:
    """Decide it; one violation is told for each piece."""
    pieces = cut(history)
    verdict = Verdict(len(history.calls), len(pieces))
    for piece in pieces:
        try:
            failed = search(piece.steps, [piece.initial]).failed
            if failed is not None:
                verdict.violations.append(explain(piece, failed))
        except Undecided as error:
            verdict.undecided.append(f"{piece.title}: {error}")
    return verdict


# --- pieces -----------------------------------------------------------------------------------------------------------


def cut(history: History) -> list[Piece]:
    """The pieces of a history: names, then files, then locks."""
    ends: Ends = {}
    for lost in sorted(history.lost, key=lambda one: one.end):
        if not lost.tries_again:
            ends.setdefault(lost.mount, []).append(lost.end)
    names = names_of(history, ends)
    tree: frozenset[Link] = frozenset()
    pieces = [Piece("the tree of names", [step for call in history.calls for step in names.steps(call)], tree)]
    content = FileContent(history.stride, frozenset(lost.mount for lost in history.lost), ends)
    ends_of_sessions = [
        step
        for one in history.lost
        for step in content.lost(one.mount, Call(0, one.mount, one.mount, "lost", {}, one.start, one.end))
    ]
    for ino, calls in sorted(by_file(history).items()):
        steps = [step for call in calls for step in content.steps(call)]
        if steps:
            pieces.append(Piece(f"the content of inode {ino}", steps + ends_of_sessions, NOTHING_WRITTEN))
    locks: dict[str, list[Call]] = {}
    for call in history.calls:
        if call.call in ("lock", "unlock"):
            locks.setdefault(call.args["file"], []).append(call)
    for file, calls in sorted(locks.items()):
        pieces.append(Piece(f"the lock on {file}", [step for call in calls for step in lock_steps(call)], ""))
    return pieces


def names_of(history: History, ends: Ends) -> Names:
    """The model of names, with what the whole history tells about inodes."""
    made: set[int] = set()
    seen_by: dict[int, int] = {}
    tried: dict[int, set[str]] = {}
    for call in history.calls:
        args = call.args
        for parent, name in (("dir", "name"), ("to_dir", "to_name")):
            if name in args:
                tried.setdefault(args[parent], set()).add(args[name])
        if call.end is None or "ino" not in call.value:
            continue
        ino = call.value["ino"]
        if call.call in ("create", "excl"):
            made.add(ino)
        seen_by[ino] = min(seen_by.get(ino, call.end), call.end)
    return Names(
        frozenset(history.roots),
        frozenset(made),
        seen_by,
        {parent: frozenset(names) for parent, names in tried.items()},
        ends,
    )


def by_file(history: History) -> dict[int, list[Call]]:
    """The calls that concern the content of each inode."""
    found: dict[int, list[Call]] = {}
    for call in history.calls:
        if call.call == "stat" and call.value.get("kind") == "file":
            found.setdefault(call.value["ino"], []).append(call)
        elif "ino" in call.args and call.call != "link":
            found.setdefault(call.args["ino"], []).append(call)
    return found


# --- telling ----------------------------------------------------------------------------------------------------------


def explain(piece: Piece, failed: int) -> Violation:
    """A minimal, readable part of the piece: what was possible before, and the calls that nothing explains."""
    bad = piece.steps[failed]
    steps = [step for step in piece.steps if step.start <= bad.end]
    needed = needed_reads(steps, bad, piece.initial)
    kept = [step for step in steps if not step.reads or step is bad or any(step is one for one in needed)]
    first = min([*needed, bad], key=lambda step: step.start)
    watched = next(index for index, step in enumerate(kept) if step is first)
    before = search(kept, [piece.initial], watched=watched).before
    states = sorted({describe(state) for state, _ in before})
    earlier = sorted((step for step in kept if not step.reads and step.end < first.start), key=lambda step: step.end)
    shown = distinct_calls(earlier[-CHANGES_BEFORE:] + [step for step in kept if step.end >= first.start])
    lines = [f"VIOLATION in {piece.title}: no order of these calls explains call {bad.call.n}:", f"  {bad.call}"]
    lines.append(f"When call {first.call.n} began, it could only be:")
    lines += [f"  {state}" for state in states[:STATES_SHOWN_MAX]]
    if len(states) > STATES_SHOWN_MAX:
        lines.append(f"  ... ({len(states)} possibilities)")
    lines += origin(piece, bad.call)
    lines += timeline(shown, first.start, bad.end)
    return Violation(piece.title, bad.call, "\n".join(lines))


def needed_reads(steps: Sequence[Step], bad: Step, initial: State) -> list[Step]:
    """Answers without which nothing would be wrong: as few as a bounded search finds.

    Leaving out what changes nothing never makes a good history bad; so what is left is still a violation.
    """
    changes = [step for step in steps if not step.reads or step is bad]
    needed = [step for step in steps if step.reads and step is not bad]

    def still_bad(reads: list[Step]) -> bool:
        return search([*changes, *reads], [initial]).failed is not None

    searches, size = 0, max(len(needed), 1)
    while size and searches < SEARCHES_MAX:
        at = 0
        while at < len(needed) and searches < SEARCHES_MAX:
            fewer = needed[:at] + needed[at + size :]
            searches += 1
            if still_bad(fewer):
                needed = fewer
            else:
                at += size
        size //= 2
    return needed


def distinct_calls(steps: Iterable[Step]) -> list[Call]:
    """The calls of these steps in the order of their starts."""
    calls = {call.n: call for call in (step.call for step in steps)}
    return sorted(calls.values(), key=lambda call: (call.start, call.n))


def origin(piece: Piece, bad: Call) -> list[str]:
    """Who wrote what the last call saw."""
    seen = {bad.value.get("token"), *bad.value.get("tokens", ())} - {None, 0}
    writers = [call for call in distinct_calls(piece.steps) if call.args.get("token") in seen and call is not bad]
    ago = [(bad.start - call.start) / 1e6 for call in writers]
    return [f"Written {ms:.2f} ms before by call {call.n}: {call}" for call, ms in zip(writers, ago, strict=True)]


def timeline(calls: list[Call], start: int, end: int) -> list[str]:
    """One line for each call: when it was under way, in ms from `start`, and what it was."""
    lines = [f"{'call':>6} {'from':>9} {'to ms':>9}  {'':{BAR_WIDTH}}  client, call, answer"]
    for call in calls[-CALLS_SHOWN_MAX:]:
        from_ms, to_ms = (call.start - start) / 1e6, ((call.end or end) - start) / 1e6
        left = _column(call.start, start, end)
        right = max(_column(call.end or end, start, end), left + 1)
        bar = " " * left + "=" * (right - left) + " " * (BAR_WIDTH - right)
        told = f"{to_ms:9.3f}" if call.end is not None else "    never"
        lines.append(f"{call.n:6} {from_ms:9.3f} {told}  {bar}  {call}")
    return lines


def _column(time: int, start: int, end: int) -> int:
    return min(max(round((time - start) * (BAR_WIDTH - 1) / max(end - start, 1)), 0), BAR_WIDTH - 1)


def describe(state: State) -> str:
    """A state as a person would write it."""
    if isinstance(state, Content):
        text = "cells " + " ".join(map(str, state.cells))
        if state.kept is not None:
            text += f", while a mount without a session keeps {' '.join(map(str, state.kept))}"
        return f"{text}, unflushed by {state.writer}" if state.unflushed else text
    if isinstance(state, frozenset):
        links = sorted(state, key=lambda link: (link.parent, link.name))
        return (
            " ".join(f"{link.parent}/{link.name}={link.ino}{'/' if link.is_directory else ''}" for link in links)
            or "no names"
        )
    return f"held by {state}" if state else "free"
