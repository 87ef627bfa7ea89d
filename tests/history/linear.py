"""Is there an order of these calls, each between its start and its end, in which every answer is right?

"Just-in-time linearization" (Gavin Lowe, Testing for linearizability, 2017), a form of the search of Wing and Gong: go
through starts and ends in the order of time and keep all *configurations* that explain what has been seen so far: a
state, with those of the calls under way that have taken effect in it.  When a call ends it must have taken effect: in
each configuration others that are under way are let take effect before it, in every order, until it could.  When no
configuration is left there is no such order, and the call that ended last shows it.

A call that changes nothing is entered as soon as the state permits its answer: that forecloses nothing.  So only
changes that are under way at the same time multiply the configurations, and the search ends in bounded time; a bound on
their number says so loudly if it does not.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

CONFIGURATIONS_MAX = 200_000
"""Some seconds of search at one moment of a history; real ones have below a hundred."""
FOREVER = 1 << 62

State = Hashable


class Undecided(Exception):
    """There are too many possibilities to look at."""


class Step(Protocol):
    """One call, as far as it concerns one piece."""

    @property
    def start(self) -> int:
        """When it began."""
        ...

    @property
    def end(self) -> int:
        """By when it had taken effect, if it did."""
        ...

    @property
    def certain(self) -> bool:
        """It did take effect; else it may never have."""
        ...

    @property
    def reads(self) -> bool:
        """It leaves the state as it is: `after` gives the state itself or nothing."""
        ...

    def after(self, state: State) -> Iterable[State]:
        """The states that may follow when it takes effect in `state` with the answer it had; none: it could not."""
        ...


Configuration = tuple[State, frozenset[int]]
"""A state, and the steps under way that have taken effect."""


@dataclass
class Outcome:
    """What a search has found."""

    failed: int | None = None  # The step whose answer cannot be explained; None: all can.
    before: set[Configuration] = field(default_factory=set)  # What was possible when step `watched` began.


def search(
    steps: Sequence[Step],
    initial: Iterable[State],
    *,
    watched: int | None = None,
    configurations_max: int = CONFIGURATIONS_MAX,
) -> Outcome:
    """Look for an order.

    Raises:
        Undecided: more than `configurations_max` configurations at one moment.
    """
    return _Search(steps, configurations_max).run(initial, watched)


class _Search:
    def __init__(self, steps: Sequence[Step], configurations_max: int) -> None:
        self.steps = steps
        self.configurations_max = configurations_max
        self.reads: set[int] = set()  # Under way.
        self.changes: set[int] = set()

    def run(self, initial: Iterable[State], watched: int | None) -> Outcome:
        configurations: set[Configuration] = {(state, frozenset()) for state in initial}
        before: set[Configuration] = set()
        for _, is_end, index in sorted_events(self.steps):
            step = self.steps[index]
            if not is_end:
                if index == watched:
                    before = configurations
                (self.reads if step.reads else self.changes).add(index)
                if step.reads:
                    configurations = {(state, self.with_reads(state, done, (index,))) for state, done in configurations}
                continue
            configurations = self.ended(index, configurations)
            if not configurations:
                return Outcome(index, before)
            self.reads.discard(index)
            self.changes.discard(index)
        return Outcome(None, before)

    def with_reads(self, state: State, done: frozenset[int], reads: Iterable[int]) -> frozenset[int]:
        more = [read for read in reads if read not in done and any(True for _ in self.steps[read].after(state))]
        return done.union(more) if more else done

    def ended(self, index: int, configurations: set[Configuration]) -> set[Configuration]:
        """Those in which step `index` has taken effect (or, if that is not certain, may never do so)."""
        if not self.steps[index].certain:
            return {(state, done - {index}) for state, done in configurations}
        kept: set[Configuration] = set()
        seen = set(configurations)
        to_do = list(configurations)
        while to_do:
            state, done = to_do.pop()
            if index in done:
                kept.add((state, done - {index}))
                continue
            for change in self.changes:
                if change in done:
                    continue
                for following in self.steps[change].after(state):
                    now_done = self.with_reads(following, done | {change}, self.reads)
                    if (following, now_done) not in seen:
                        seen.add((following, now_done))
                        to_do.append((following, now_done))
            if len(seen) > self.configurations_max:
                raise Undecided(f"more than {self.configurations_max} configurations at step {index}")
        return self.without_lesser(kept)

    def without_lesser(self, configurations: set[Configuration]) -> set[Configuration]:
        """Without those for which another, of the same state and the same changes to come, has explained more."""
        alike: dict[tuple[State, frozenset[int]], list[frozenset[int]]] = {}
        for state, done in configurations:
            alike.setdefault((state, done & self.changes), []).append(done)
        return {
            (state, done)
            for (state, _), all_done in alike.items()
            for done in all_done
            if len(all_done) == 1 or not any(done < other for other in all_done)
        }


def sorted_events(steps: Sequence[Step]) -> list[tuple[int, bool, int]]:
    """(time, is it an end, step); of the same moment starts come first, which permits more."""
    events = [(step.start, False, index) for index, step in enumerate(steps)]
    events += [(step.end, True, index) for index, step in enumerate(steps) if step.end < FOREVER]
    return sorted(events)
