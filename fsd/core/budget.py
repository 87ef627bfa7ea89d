"""The bytes of memory one mount may use for data, and who has them.

Three uses: *dirty* (written and not yet durable, uploads included), *fetching* (asked of block servers), *clean*
(cached, given up at any time).  Dirty and fetching have shares of their own that together are the whole, so that
neither can lock the other out: whoever stays within its share gets its bytes, by taking clean ones away.

Invariant F9: dirty + fetching + clean <= limit, at any time.
"""

from __future__ import annotations

from collections.abc import Callable

LIMIT_MIN = 16 << 20
"""Smallest budget, bytes: two uploads and two fetches of a block each."""
PREFETCH_SHARE = 0.5
"""Of the fetching share: what read-ahead may use, so that reads somebody waits for find room."""


class Budget:
    """Counts bytes.  `evict(size)` must free that many clean bytes, if there are as many, and return how many."""

    def __init__(self, limit: int, evict: Callable[[int], int]) -> None:
        assert limit >= LIMIT_MIN, f"a budget of {limit} bytes is below {LIMIT_MIN}"
        self.limit = limit
        self.dirty_max = limit // 2
        self.fetching_max = limit - self.dirty_max
        self.dirty = 0
        self.fetching = 0
        self.clean = 0
        self.peak = 0
        self._evict = evict

    @property
    def used(self) -> int:
        """All bytes in use."""
        return self.dirty + self.fetching + self.clean

    def try_dirty(self, size: int) -> bool:
        """Take `size` bytes for dirty data if the share has them."""
        assert size <= self.dirty_max
        if self.dirty + size > self.dirty_max:
            return False
        self._make_room(size)
        self.dirty += size
        self._note_peak()
        return True

    def release_dirty(self, size: int) -> None:
        """Give back dirty bytes."""
        self.dirty -= size
        assert self.dirty >= 0

    def try_fetch(self, size: int, *, ahead: bool) -> bool:
        """Take `size` bytes for a fetch if the share has them; `ahead`: nobody waits for it yet."""
        share = int(self.fetching_max * PREFETCH_SHARE) if ahead else self.fetching_max
        if self.fetching + size > share:
            return False
        self._make_room(size)
        self.fetching += size
        self._note_peak()
        return True

    def fetched(self, size: int) -> None:
        """The fetch is done: its bytes are clean ones now."""
        self.fetching -= size
        self.clean += size
        assert self.fetching >= 0

    def release_fetch(self, size: int) -> None:
        """The fetch failed, or its bytes are not kept."""
        self.fetching -= size
        assert self.fetching >= 0

    def release_clean(self, size: int) -> None:
        """Let go of at least `size` clean bytes that were cached, if there are as many."""
        self.clean -= self._evict(size)

    def _make_room(self, size: int) -> None:
        excess = self.used + size - self.limit
        if excess > 0:
            self.release_clean(excess)
        assert self.used + size <= self.limit, "F9"

    def _note_peak(self) -> None:
        self.peak = max(self.peak, self.used)
