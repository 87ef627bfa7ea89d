"""The history checker accepts what an order explains, refuses the rest, and says why."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.history.check import Verdict, check, cut
from tests.history.linear import FOREVER, State, Undecided, search
from tests.history.models import NOTHING_WRITTEN, FileContent, Step
from tests.history.record import Call, History, Lost, load, numbered
from tests.history.runner import Plan, new_views, run

ROOT, STRIDE, FILE = 1, 16, 7


class Book:
    """A history written by hand: times in microseconds."""

    def __init__(self) -> None:
        self.history = History([ROOT], STRIDE)

    def call(self, client: str, call: str, start: int, end: int | None, **told: Any) -> None:  # noqa: ANN401
        """`told`: args; `gives`, the value, and `error`."""
        value, error = told.pop("gives", {}), told.pop("error", None)
        number = len(self.history.calls) + 1
        self.history.calls.append(
            Call(number, client, client[0], call, told, start * 1000, end and end * 1000, value, error)
        )

    def name(self, client: str, call: str, start: int, end: int | None, name: str, ino: int = 0, **told: Any) -> None:  # noqa: ANN401
        gives = {"ino": ino} if ino else {}
        self.call(client, call, start, end, dir=ROOT, name=name, gives=gives, **told)

    def stat(self, client: str, start: int, end: int, name: str, ino: int, nlink: int = 1, size: int = 0) -> None:
        gives = {"ino": ino, "kind": "file", "nlink": nlink, "size": size}
        self.call(client, "stat", start, end, dir=ROOT, name=name, gives=gives)

    def names(self, client: str, start: int, end: int, **names: int) -> None:
        self.call(client, "list", start, end, dir=ROOT, gives={"names": [[*one] for one in names.items()]})

    def write(self, client: str, start: int, end: int | None, token: int, cell: int = 0, error: str = "") -> None:
        self.call(client, "write", start, end, ino=FILE, cell=cell, token=token, error=error or None)

    def read(self, client: str, start: int, end: int, token: int | None, cell: int = 0) -> None:
        self.call(client, "read", start, end, ino=FILE, cell=cell, gives={"token": token})

    def lost(self, mount: str, start: int, end: int) -> None:
        self.history.lost.append(Lost(mount, start * 1000, end * 1000))

    def verdict(self) -> Verdict:
        return check(self.history)


def complaint(book: Book) -> str:
    """What is told of the one violation."""
    verdict = book.verdict()
    assert len(verdict.violations) == 1, str(verdict)
    assert not verdict.good
    return str(verdict)


# --- contents -----------------------------------------------------------------------------------------------------


def test_a_read_that_overlaps_a_write_may_see_either_value() -> None:
    for seen in (1, 2):
        book = Book()
        book.write("a1", 0, 10, 1)
        book.write("a1", 20, 40, 2)
        book.read("b1", 25, 30, seen)
        assert book.verdict().good


def test_a_stale_read_is_refused_and_told_with_its_origin() -> None:
    book = Book()
    book.write("a1", 0, 10, 1)
    book.write("a1", 20, 40, 2)
    book.read("b1", 41, 50, 1)
    told = complaint(book)
    assert "cells 2" in told
    assert "Written 0.04 ms before by call 1" in told
    assert "b1" in told


def test_new_then_old_is_refused_although_the_write_is_still_under_way() -> None:
    book = Book()
    book.write("a1", 0, 10, 1)
    book.write("a1", 20, 90, 2)
    book.read("a2", 30, 40, 2)
    book.read("b1", 50, 60, 1)
    told = complaint(book)
    assert "call 4" in told
    assert "a2   read" in told  # The answer without which nothing would be wrong.


def test_only_the_answers_that_matter_are_told() -> None:
    book = Book()
    book.write("a1", 0, 10, 1)
    for turn in range(30):
        book.read("c1", 11 + turn, 12 + turn, 1)
    book.write("a1", 50, 90, 2)
    for turn in range(4):
        book.read("c1", 51 + turn, 52 + turn, 1)
    book.read("a2", 61, 70, 2)
    book.read("b1", 75, 80, 1)
    assert complaint(book).count(" read ") == 3  # The last call is told twice.


def test_a_lost_update_is_refused() -> None:
    book = Book()
    book.call("a1", "append", 0, 10, ino=FILE, token=1)
    book.call("b1", "append", 5, 15, ino=FILE, token=2)
    book.call("a1", "readall", 20, 30, ino=FILE, gives={"tokens": [2]})
    complaint(book)


def test_appends_interleave_in_any_order_but_in_one() -> None:
    for second, good in (([2, 1], True), ([1, 2], False)):
        book = Book()
        book.call("a1", "append", 0, 10, ino=FILE, token=1)
        book.call("b1", "append", 5, 15, ino=FILE, token=2)
        book.call("a1", "readall", 20, 30, ino=FILE, gives={"tokens": [2, 1]})
        book.call("b1", "readall", 20, 30, ino=FILE, gives={"tokens": second})
        assert book.verdict().good == good


def test_truncation_and_sizes_belong_to_the_content() -> None:
    for size, good in ((STRIDE, True), (2 * STRIDE, False)):
        book = Book()
        book.write("a1", 0, 10, 1, cell=1)
        book.call("b1", "truncate", 20, 30, ino=FILE, cells=1)
        book.read("a1", 40, 50, None, cell=1)
        book.read("a1", 51, 52, 0)
        book.call("a1", "fstat", 60, 70, ino=FILE, gives={"nlink": 0, "size": size})
        assert book.verdict().good == good


def test_a_call_that_never_returned_may_take_effect_late_or_never() -> None:
    for late in (1, 2):
        book = Book()
        book.write("a1", 0, 10, 1)
        book.write("a2", 20, None, 2)
        book.read("b1", 30, 40, 1)
        book.read("b1", 50, 60, late)
        book.read("b1", 70, 80, late)
        assert book.verdict().good
    book.read("b1", 90, 95, 1)  # But not be undone.
    assert not book.verdict().good


def test_a_refused_write_that_is_seen_may_have_happened_and_stays() -> None:
    book = Book()
    book.write("a1", 0, 10, 1, error="EIO")
    book.read("b1", 30, 40, 1)
    assert book.verdict().good
    book.read("b1", 50, 60, None)
    assert not book.verdict().good


def test_what_was_not_flushed_may_go_with_its_session_and_come_back_while_nobody_changes_the_file() -> None:
    for changed in (False, True):
        book = Book()
        book.write("a1", 0, 10, 1)
        book.call("a1", "fsync", 11, 12, ino=FILE)
        book.write("a1", 20, 30, 2)
        book.lost("a", 100, 200)
        book.read("b1", 210, 220, 1)
        assert book.verdict().good
        if changed:
            book.write("b1", 230, 240, 3)
            book.read("b1", 250, 260, 3)
        book.read("b1", 270, 280, 2)  # With a change in between: the late commit of a session that had ended.
        assert book.verdict().good == (not changed)
        book.read("b1", 290, 300, 1)
        assert not book.verdict().good


def test_what_was_flushed_or_seen_elsewhere_stays_when_the_session_ends() -> None:
    for flushed in (True, False):
        book = Book()
        book.write("a1", 0, 10, 1)
        if flushed:
            book.call("a1", "fsync", 11, 12, ino=FILE)
        else:
            book.read("b1", 11, 12, 1)
        book.lost("a", 100, 200)
        book.read("b1", 210, 220, None)
        assert not book.verdict().good


def test_a_failed_write_takes_effect_before_the_end_of_its_session_or_never() -> None:
    for from_us, good in ((150, True), (250, False)):
        book = Book()
        book.write("a1", 90, 300, 1, error="EIO")
        book.lost("a", 100, 200)
        book.read("b1", from_us, from_us + 10, None)
        book.read("b1", from_us + 11, from_us + 20, 1)
        assert book.verdict().good == good


# --- names --------------------------------------------------------------------------------------------------------


def test_an_entry_that_is_seen_after_its_unlink_returned_is_refused() -> None:
    for start, good in ((15, True), (21, False)):
        book = Book()
        book.name("a1", "excl", 0, 5, "n", 8)
        book.name("a1", "unlink", 10, 20, "n")
        book.stat("b1", start, 30, "n", 8, nlink=1)
        assert book.verdict().good == good
    assert "no names" in complaint(book)


def test_two_exclusive_creators_cannot_both_win() -> None:
    book = Book()
    book.name("a1", "excl", 0, 20, "n", 8)
    book.name("b1", "excl", 5, 25, "n", 9)
    assert not book.verdict().good
    book.name("b2", "unlink", 6, 9, "n")
    assert book.verdict().good  # Unless the name went in between.


def test_an_exclusive_create_that_lost_must_have_found_the_name() -> None:
    book = Book()
    book.name("a1", "excl", 0, 20, "n", error="EEXIST")
    assert not book.verdict().good
    book.name("b1", "excl", 19, 30, "n", 8)
    assert book.verdict().good


@pytest.mark.parametrize("seen", [{"old": 8}, {"new": 8}, {"old": 8, "new": 8}, {}])
def test_a_rename_that_returned_is_seen_whole(seen: dict[str, int]) -> None:
    book = Book()
    book.name("a1", "excl", 0, 5, "old", 8)
    book.call("a1", "rename", 10, 20, dir=ROOT, name="old", to_dir=ROOT, to_name="new")
    book.names("b1", 21, 30, **seen)
    assert book.verdict().good == (seen == {"new": 8})


def test_a_rename_over_a_name_leaves_no_moment_without_it() -> None:
    book = Book()
    book.name("a1", "excl", 0, 5, "old", 8)
    book.name("a1", "excl", 6, 8, "new", 9)
    book.call("a1", "rename", 10, 50, dir=ROOT, name="old", to_dir=ROOT, to_name="new")
    book.name("b1", "open", 20, 30, "new", error="ENOENT")
    assert not book.verdict().good


def test_links_are_counted() -> None:
    for nlink, good in ((2, True), (1, False)):
        book = Book()
        book.name("a1", "excl", 0, 5, "n", 8)
        book.call("b1", "link", 10, 20, ino=8, to_dir=ROOT, to_name="m")
        book.stat("a1", 21, 30, "n", 8, nlink=nlink)
        assert book.verdict().good == good


def test_a_name_that_shows_the_file_it_had_before_is_refused() -> None:
    book = Book()
    book.name("a1", "excl", 0, 5, "n", 8)
    book.name("a1", "unlink", 6, 8, "n")
    book.name("a1", "excl", 10, 15, "n", 9)
    book.name("b1", "open", 20, 25, "n", 9)
    assert book.verdict().good
    book.name("b1", "open", 26, 28, "n", 8)
    assert not book.verdict().good


def test_a_create_that_finds_a_removed_file_is_refused() -> None:
    book = Book()
    book.name("a1", "create", 0, 5, "n", 8)
    book.name("a1", "unlink", 6, 8, "n")
    book.name("b1", "create", 10, 15, "n", 8)
    assert not book.verdict().good


def test_directories_are_known_by_the_number_that_is_seen_first() -> None:
    book = Book()
    book.name("a1", "mkdir", 0, 5, "d")
    book.name("b1", "opendir", 6, 8, "d", 20)
    book.call("b1", "excl", 10, 12, dir=20, name="n", gives={"ino": 8})
    book.name("a1", "rmdir", 13, 14, "d", error="ENOTEMPTY")
    book.call("a1", "unlink", 15, 16, dir=20, name="n")
    book.name("a1", "rmdir", 17, 18, "d")
    book.call("b1", "excl", 20, 22, dir=20, name="n", error="ENOENT")
    assert book.verdict().good
    book.name("b1", "opendir", 30, 31, "d", 20)
    assert not book.verdict().good


def test_a_directory_that_becomes_its_own_parent_is_refused() -> None:
    book = Book()
    book.name("a1", "mkdir", 0, 5, "d")
    book.name("a1", "opendir", 6, 7, "d", 20)
    book.call("a1", "rename", 10, 20, dir=ROOT, name="d", to_dir=20, to_name="x", error="EINVAL")
    assert book.verdict().good
    book.call("a1", "rename", 30, 40, dir=ROOT, name="d", to_dir=20, to_name="x")
    assert not book.verdict().good


# --- locks --------------------------------------------------------------------------------------------------------


def test_a_lock_has_one_holder() -> None:
    book = Book()
    book.call("a1", "lock", 0, 5, file="l")
    book.call("b1", "lock", 6, 7, file="l", error="EAGAIN")
    book.call("b1", "lock", 8, 20, file="l")
    book.call("a1", "unlock", 10, 12, file="l")
    assert book.verdict().good
    book.call("c1", "lock", 30, 35, file="l")
    assert "held by b1" in complaint(book)


def test_a_free_lock_is_not_refused() -> None:
    book = Book()
    book.call("a1", "lock", 0, 5, file="l")
    book.call("a1", "unlock", 6, 7, file="l")
    book.call("b1", "lock", 8, 9, file="l", error="EAGAIN")
    assert not book.verdict().good


# --- random histories ---------------------------------------------------------------------------------------------

CLIENTS = ("a1", "a2", "b1", "b2")
NAMES = ("n", "m", "o")


class Truth:
    """A tree in one dictionary and files in another, changed by one call at a time."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.files: dict[int, list[int]] = {}
        self.next = 100

    def do(self, kind: str, name: str, other: str, number: int) -> tuple[dict[str, Any], dict[str, Any], str | None]:
        """What the call is given, gives, and refuses."""
        self.next += 1
        names, args = self.names, {"dir": ROOT, "name": name}
        if kind == "excl":
            if name in names:
                return args, {}, "EEXIST"
            names[name], self.files[self.next] = self.next, []
            return args, {"ino": self.next}, None
        if kind == "list":
            return {"dir": ROOT}, {"names": [list(one) for one in names.items()]}, None
        if name not in names:
            args |= {"to_dir": ROOT, "to_name": other} if kind == "rename" else {}
            return args, {}, "ENOENT"
        ino = names[name]
        return self.do_on_file(kind, name, other, number, ino)

    def do_on_file(
        self, kind: str, name: str, other: str, number: int, ino: int
    ) -> tuple[dict[str, Any], dict[str, Any], str | None]:
        names, args, cells = self.names, {"dir": ROOT, "name": name}, self.files[ino]
        if kind == "unlink":
            del names[name]
            return args, {}, None
        if kind == "rename":
            if ino != names.get(other):
                del names[name]
                names[other] = ino
            return {**args, "to_dir": ROOT, "to_name": other}, {}, None
        if kind == "stat":
            count = list(names.values()).count(ino)
            return args, {"ino": ino, "kind": "file", "nlink": count, "size": len(cells) * STRIDE}, None
        if kind == "link":
            if other in names:
                return {"ino": ino, "to_dir": ROOT, "to_name": other}, {}, "EEXIST"
            names[other] = ino
            return {"ino": ino, "to_dir": ROOT, "to_name": other}, {}, None
        return self.do_on_content(kind, number, ino, cells)

    def do_on_content(
        self, kind: str, number: int, ino: int, cells: list[int]
    ) -> tuple[dict[str, Any], dict[str, Any], str | None]:
        cell = number % 3
        if kind == "read":
            return {"ino": ino, "cell": cell}, {"token": cells[cell] if cell < len(cells) else None}, None
        if kind == "write":
            cells.extend([0] * (cell + 1 - len(cells)))
            cells[cell] = number
            return {"ino": ino, "cell": cell, "token": number}, {}, None
        if kind == "append":
            cells.append(number)
            return {"ino": ino, "token": number}, {}, None
        if kind == "truncate":
            cells[:] = (cells + [0] * cell)[:cell]
            return {"ino": ino, "cells": cell}, {}, None
        return {"ino": ino}, {"tokens": list(cells)}, None


KINDS = ("excl", "list", "unlink", "rename", "stat", "link", "read", "write", "append", "truncate", "readall")
ORDERS = st.tuples(
    st.sampled_from(CLIENTS),
    st.sampled_from(KINDS),
    st.sampled_from(NAMES),
    st.sampled_from(NAMES),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
)


@st.composite
def true_histories(draw: st.DrawFn) -> History:
    """Calls that took effect one after the other, each at a moment between its start and its end."""
    truth, free_at = Truth(), dict.fromkeys(CLIENTS, 0)
    calls: list[Call] = []
    moment = 50
    for number, (client, kind, name, other, before, after, killed) in enumerate(draw(st.lists(ORDERS, max_size=40)), 1):
        moment += 10
        if free_at[client] >= moment:
            continue  # Still busy.
        if name not in truth.names and kind not in ("excl", "list", "rename", "unlink"):
            kind = "stat"  # The others are done to a file that is open.
        start = max(moment - before, free_at[client] + 1)
        args, value, error = truth.do(kind, name, other, number)
        call = Call(0, client, client[0], kind, args, start, moment + after, value, error)
        free_at[client] = moment + after + 1
        if killed and number % 9 == 0 and kind in ("write", "append", "truncate", "unlink"):
            call.end, free_at[client], call.value = None, FOREVER, {}
            call.error = None
        calls.append(call)
    return History([ROOT], STRIDE, numbered(calls))


@given(true_histories())
def test_what_has_happened_is_always_accepted(history: History) -> None:
    verdict = check(history)
    assert verdict.good, str(verdict)


@given(true_histories(), st.data())
def test_an_answer_that_nothing_explains_is_always_refused(history: History, data: st.DataObject) -> None:
    candidates = [call for call in history.calls if call.call in ("stat", "read", "readall", "list") and not call.error]
    if not candidates:
        return
    call = data.draw(st.sampled_from(candidates))
    if call.call == "stat":
        wrong = {"ino": 5, "nlink": 9, "size": 160 * STRIDE}
        what = data.draw(st.sampled_from(sorted(wrong)))
        call.value[what] = wrong[what]
    elif call.call == "read":
        call.value["token"] = 9999
    elif call.call == "readall":
        call.value["tokens"] = [*call.value["tokens"], 9999]
    else:
        call.value["names"] = [*call.value["names"], ["never", 9999]]
    verdict = check(history)
    assert verdict.violations, str(verdict)
    assert str(verdict)


def brute_force(steps: list[Step]) -> bool:
    """Whether any order of all the steps, or of all but uncertain ones, is right."""
    for order in permutations(steps):
        if any(later.end < earlier.start for at, earlier in enumerate(order) for later in order[at + 1 :]):
            continue
        states: set[State] = {NOTHING_WRITTEN}
        for step in order:
            following = {after for state in states for after in step.after(state)}
            states = following if step.certain else states | following
        if states:
            return True
    return False


REGISTER_CALLS = st.tuples(
    st.sampled_from(["write", "read", "append", "readall"]), st.integers(1, 3), st.integers(0, 12), st.integers(1, 8)
)


@given(st.lists(REGISTER_CALLS, min_size=1, max_size=5), st.sets(st.integers(0, 4), max_size=1))
def test_the_search_finds_what_trying_all_orders_finds(made: list[tuple[str, int, int, int]], lost: set[int]) -> None:
    steps = []
    for number, (kind, token, start, length) in enumerate(made):
        end = None if number in lost and kind in ("write", "append") else start * 2 + length * 2 + 1
        value = {"token": token} if kind == "read" else {"tokens": [token]}
        call = Call(number, f"c{number}", "m", kind, {"ino": 1, "cell": 0, "token": token}, start * 2, end, value)
        steps += FileContent(STRIDE).steps(call)
    assert (search(steps, [NOTHING_WRITTEN]).failed is None) == brute_force(steps)


# --- around it ----------------------------------------------------------------------------------------------------


def test_too_many_possibilities_are_said_to_be_undecided() -> None:
    book = Book()
    for number in range(12):
        book.call(f"c{number}", "append", 0, 10, ino=FILE, token=number + 1)
    book.call("c0", "readall", 20, 30, ino=FILE, gives={"tokens": list(range(12, 0, -1))})
    (_, content) = cut(book.history)
    with pytest.raises(Undecided):
        search(content.steps, [content.initial], configurations_max=1000)


def test_a_history_is_kept_in_a_file(tmp_path: Path) -> None:
    book = Book()
    book.name("a1", "excl", 0, 5, "n", 8)
    book.write("a1", 20, None, 2)
    book.lost("a", 100, 200)
    book.history.save(tmp_path / "history")
    assert load(tmp_path / "history") == book.history


def test_agents_that_share_one_local_directory_leave_a_history(tmp_path: Path) -> None:
    views = new_views([tmp_path, tmp_path])
    history = run(views, Plan(seed=1, seconds=0.3, clients=1))
    assert {call.mount for call in history.calls} == {"a", "b"}
    assert all(call.end is not None for call in history.calls)
    kinds = {call.call for call in history.calls}
    assert kinds >= {"excl", "open", "read", "write", "stat", "lock", "unlock"}, kinds
    history.save(tmp_path / "kept")
    assert str(check(load(tmp_path / "kept"))) == str(check(history))
