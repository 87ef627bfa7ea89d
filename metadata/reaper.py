"""The reaper: works the deletion queue, so that what nobody can reach any more gives back its space.

Tasks: `_take_apart` deletes the keys of dead inodes and truncated extents, step by step through the group commit;
`_delete_slices` asks the block servers to delete the blocks of slices that no extent refers to, then forgets them;
the block client's own.

It is level-triggered: it looks at the queue, never at what was asked of the service, so a restart loses nothing.  A
slice is forgotten only when every server that is not given up has confirmed; while one is away, the others give back
their space, page by page, and the queue keeps the slices.  A page that cannot be forgotten is tried slice by slice.

Invariant: no block of a slice is deleted while an extent refers to it.  A slice enters the queue in the transaction
that takes its last reference, is refused by every later commit, and leaves the queue after its blocks are gone.

Not here: blocks that were put and never committed, because their writer died.  They are found by comparing the
servers' inventories (ListBlocks) with slices and reservations (schema: "s", "r"); garbage collection of issue 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from blockstore.client import BlockClient
from blockstore.core.cluster_map import ClusterMap
from blockstore.protocol import BLOCK_SIZE_MAX, BlockId
from metadata.core import reclaim
from metadata.core.exactly_once import ENGINE_ERRORS
from metadata.core.reclaim import DeadSlice
from metadata.engine.ports import WriteTxn
from metadata.group_commit import Batch, GroupCommit
from metadata.snapshot import Snapshot
from wire.errors import ServerOverloaded, StoreError
from wire.log import get_logger

log = get_logger("metadata.reaper")

POLL_S = 0.5
"""Between looks at an empty queue."""
RETRY_FIRST_S = 0.5
RETRY_MAX_S = 30.0
"""After a page that some server did not confirm, or a full disk: doubled each time, until one succeeds."""
PAGE_SIZE = 256
"""Slices in one request to the servers: their blocks are at most BLOCKS_PER_REQUEST_MAX."""
DELETE_TIMEOUT_S = 30.0


@dataclass
class ReaperStatistics:
    """Since the start."""

    steps: int = 0  # Transactions that took something apart.
    slices_deleted: int = 0
    pages_incomplete: int = 0  # Some server did not confirm.
    failures: int = 0


class Reaper:
    """Works the deletion queue; see the module."""

    def __init__(
        self,
        *,
        commits: GroupCommit,
        snapshot: Snapshot,
        current_map: Callable[[], ClusterMap],
        clock_ns: Callable[[], int],
        delete_after_s: float,
    ) -> None:
        self._commits = commits
        self._snapshot = snapshot
        self._current_map = current_map
        self._clock_ns = clock_ns
        self._delete_after_ns = round(delete_after_s * 1e9)
        self._blocks = BlockClient(
            current_map=current_map, refresh_map=self._refresh_map, report_bad_copy=lambda block, server, corrupt: None
        )
        self._bad: set[bytes] = set()  # Items that cannot be taken apart: left for a look by a person.
        self.statistics = ReaperStatistics()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._blocks.run)
            nursery.start_soon(self._take_apart)
            nursery.start_soon(self._delete_slices)
            task_status.started()

    async def _refresh_map(self) -> ClusterMap:
        return self._current_map()

    # --- inodes and truncations ---------------------------------------------------------------------------------------

    async def _take_apart(self) -> None:
        retry_s = RETRY_FIRST_S
        while True:
            with self._snapshot.fresh() as txn:
                item = reclaim.next_item(txn, skip=self._bad)
            if item is None:
                await trio.sleep(POLL_S)
                continue
            began_s = trio.current_time()
            try:
                await self._commits.change(self._step)
            except (*ENGINE_ERRORS, ServerOverloaded) as error:
                self.statistics.failures += 1
                log.warning("step-delayed", error=error)
                await trio.sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_MAX_S)
                continue
            except StoreError as error:  # A bug, told by the writer's log: the others must not wait for this one.
                self.statistics.failures += 1
                log.error("step-failed", item=item.hex(), error=error)
                self._bad.add(item)
                continue
            retry_s = RETRY_FIRST_S
            self.statistics.steps += 1
            await trio.sleep(trio.current_time() - began_s)  # Half of the writer's time is everybody else's.

    def _step(self, txn: WriteTxn, batch: Batch) -> bool:
        return reclaim.next_step(txn, now_ns=batch.now_ns, skip=self._bad)

    # --- slices -------------------------------------------------------------------------------------------------------

    async def _delete_slices(self) -> None:
        after, retry_s = 0, RETRY_FIRST_S
        while True:
            page = self._page(after)
            if not page:
                after = 0
                await trio.sleep(POLL_S)
                continue
            after = page[-1].slice_id
            ripe = [dead for dead in page if self._is_ripe(dead)]
            if not ripe:
                await trio.sleep(POLL_S)
            elif await self._delete_page(ripe):
                retry_s = RETRY_FIRST_S
            else:
                await trio.sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_MAX_S)

    def _page(self, after: int) -> list[DeadSlice]:
        if not self._current_map().servers:
            return []  # Nobody has any block; nobody could confirm that either.
        with self._snapshot.fresh() as txn:
            return reclaim.slices_to_delete(txn, after=after, count=PAGE_SIZE)

    def _is_ripe(self, dead: DeadSlice) -> bool:
        """Dead for long enough that no reader is under way with an old layout (or the clock was set back)."""
        return abs(self._clock_ns() - dead.since_ns) >= self._delete_after_ns

    async def _delete_page(self, page: Sequence[DeadSlice]) -> bool:
        """Delete the blocks and forget the slices; False: not all, and not for ever."""
        blocks = [BlockId(dead.slice_id, index) for dead in page for index in range(-(-dead.size // BLOCK_SIZE_MAX))]
        if not await self._blocks.delete(blocks, timeout_s=DELETE_TIMEOUT_S):
            self.statistics.pages_incomplete += 1
            return False
        if await self._forget([dead.slice_id for dead in page]):
            return True
        forgotten = [await self._forget([dead.slice_id]) for dead in page]
        return any(forgotten)

    async def _forget(self, slice_ids: Sequence[int]) -> bool:
        def forget(txn: WriteTxn, batch: Batch) -> None:
            reclaim.slices_deleted(txn, slice_ids)

        try:
            await self._commits.change(forget)
        except (*ENGINE_ERRORS, ServerOverloaded) as error:
            log.warning("forgetting-delayed", slices=len(slice_ids), error=error)
        except StoreError as error:  # One of these slices is not as it should be; the log of the writer says how.
            log.error("forgetting-failed", slices=slice_ids[:16], error=error)
        else:
            self.statistics.slices_deleted += len(slice_ids)
            return True
        self.statistics.failures += 1
        return False
