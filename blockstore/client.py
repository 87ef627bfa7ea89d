"""Blocks written to, read from and deleted on the servers where placement puts them.

Tasks: `run` owns a nursery in which each channel to a server runs, opened when first used and closed when the server
leaves the map or moves, and `_watch_map`, which ends requests to servers of which a newer map says that they are down;
`put` and `delete` run one task per copy or server.

Shared state: `_links`, one per server of the map, touched only between awaits.

Writing: the first `replicas` servers that are up get the block at the same time; for each that fails the next one in
the block's order is tried (hand-off).  Reading: one server after the other, in the block's order, those that failed a
moment ago and those that are down last.  Every request may be repeated, because blocks are immutable.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import trio

from blockstore.core.cluster_map import ClusterMap, Server, ServerState
from blockstore.core.placement import PlacementCache, wanted
from blockstore.protocol import (
    BLOCK_SIZE_MAX,
    BLOCKS_PER_REQUEST_MAX,
    CHECKSUM_UNIT,
    BlockId,
    DeleteBlocks,
    GetBlock,
    GetBlockDone,
    PutBlock,
    instance_name,
)
from wire.checksum import Buffer, first_bad_unit, unit_checksums, unit_checksums_of_pieces
from wire.errors import (
    BlockCorrupt,
    BlockExists,
    DataLost,
    InvalidArgument,
    NoSpace,
    NoSuchBlock,
    OutcomeUnknown,
    Retry,
    ServerOverloaded,
    StoreError,
    TooFewReplicas,
    Unreachable,
)
from wire.log import get_logger
from wire.rpc.client import Channel

log = get_logger("blockstore.client")

T = TypeVar("T")

SERVICE = "block"
SUSPECT_S = 2.0
"""A server that failed is tried last for this long: about what a restart takes, and little enough to be harmless."""
FULL_S = 10.0
"""A server without space gets no new blocks for this long, unless there is no other."""
GET_FIRST_ATTEMPT_S_MAX = 2.0
"""As the next, the first time that a server is asked for a block: another one most likely has it at once."""
GET_ATTEMPT_S_MAX = 5.0
"""Before another replica is asked; a healthy disk answers in 0.1 s, one that resets its drive in several."""
PUT_ATTEMPT_S_MAX = 10.0
"""Before a copy is handed off; a flush behind other flushes may take seconds on a slow disk."""
ATTEMPT_PART = 3
"""One attempt takes at most this part of the time that is left, so that there is some left for another replica."""
ROUND_PAUSE_FIRST_S = 0.05
ROUND_PAUSE_MAX_S = 1.0
"""Between rounds over all servers while some cannot be reached."""
DELETE_ATTEMPT_S_MAX = 10.0
DELETES_AT_ONCE_MAX = 16
"""Servers to which one delete talks at a time."""
_SERVING = (ServerState.UP, ServerState.DRAINING)


@dataclass(frozen=True)
class PutResult:
    """What became of a put."""

    copies: int  # Servers on which the block is durable.
    degraded: bool  # Fewer than asked for, or not where placement wants them: it waits for repair.


@dataclass
class BlockClientStatistics:
    """Counters since the start, and how many channels there are."""

    puts: int = 0
    gets: int = 0
    handed_off: int = 0  # Copies that went to another server than the first choice.
    degraded_puts: int = 0
    failed_attempts: int = 0  # Requests to one server that failed and were tried elsewhere or again.
    bad_copies: int = 0
    channels: int = 0


@dataclass
class _Link:
    """What is known of one server, and the channel to it."""

    server: Server
    channel: Channel
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    suspect_until: float = 0.0
    full_until: float = 0.0
    attempts: set[trio.CancelScope] = field(default_factory=set)  # Requests under way.

    async def run(self) -> None:
        with self.scope:
            await self.channel.run()


@dataclass
class _Put:
    """One put under way."""

    block: BlockId
    pieces: Sequence[Buffer]
    checksums: bytes
    deadline: float
    holders: set[int] = field(default_factory=set)
    failures: dict[int, StoreError] = field(default_factory=dict)
    fatal: StoreError | None = None


class BlockClient:
    """The one way to the block servers; one per process."""

    def __init__(
        self,
        *,
        current_map: Callable[[], ClusterMap],
        refresh_map: Callable[[], Awaitable[ClusterMap]],
        report_bad_copy: Callable[[BlockId, int, bool], None],
        wait_map_changed: Callable[[], Awaitable[None]] = trio.sleep_forever,
    ) -> None:
        """Take the sources of the map, and whom to tell of a copy that is corrupt (True) or missing (False)."""
        self._wait_map_changed = wait_map_changed
        self._current_map = current_map
        self._refresh_map = refresh_map
        self._report_bad_copy = report_bad_copy
        self._placement = PlacementCache()
        self._links: dict[int, _Link] = {}
        self._links_of: ClusterMap | None = None
        self._nursery: trio.Nursery | None = None
        self._statistics = BlockClientStatistics()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the channels; started at once, closes them when cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                await self._watch_map()
        finally:
            self._nursery = None
            self._links.clear()

    async def _watch_map(self) -> None:
        """Whoever waits for a server that hangs is sent to the next one as soon as the service calls it down."""
        while True:
            await self._wait_map_changed()
            serving = {server.server_id for server in self._current_map().servers if server.state in _SERVING}
            for server_id, link in self._links.items():
                if server_id not in serving:
                    for attempt in link.attempts:
                        attempt.cancel()

    def statistics(self) -> BlockClientStatistics:
        """Figures for people."""
        self._statistics.channels = len(self._links)
        return self._statistics

    # --- writing -----------------------------------------------------------------------------------------------------

    async def put(
        self, block: BlockId, data: Buffer | Sequence[Buffer], *, replicas: int, timeout_s: float = 30.0
    ) -> PutResult:
        """Make `data` durable as `block` on `replicas` servers, or at least on max(1, replicas - 1).

        Args:
            data: 1 to BLOCK_SIZE_MAX bytes, in one piece or several; not copied, so it must not change meanwhile.
            timeout_s: after this long with too few copies it fails.

        Raises:
            NoSpace: the servers that would take it are full.
            TooFewReplicas: too few servers took it.
            BlockExists: the id was used for other content.
            After an error some servers may hold the block; it is garbage, or completed by the same put again.
        """
        self._statistics.puts += 1
        pieces = [data] if isinstance(data, bytes | bytearray | memoryview) else data
        one = len(pieces) == 1
        sums = unit_checksums(pieces[0], CHECKSUM_UNIT) if one else unit_checksums_of_pieces(pieces, CHECKSUM_UNIT)
        size = sum(map(len, pieces))
        assert 1 <= size <= BLOCK_SIZE_MAX, f"a block of {size} bytes"
        put = _Put(block, pieces, sums, trio.current_time() + timeout_s)
        needed = max(1, replicas - 1)
        pause_s = ROUND_PAUSE_FIRST_S
        while True:
            await self._put_round(put, replicas)
            if put.fatal is not None:
                raise put.fatal
            if len(put.holders) >= needed:
                return self._put_result(put, replicas)
            if self._put_is_hopeless(put) or trio.current_time() + pause_s >= put.deadline:
                raise self._put_error(put, replicas)
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, ROUND_PAUSE_MAX_S)
            await self._refresh_quietly(put.deadline)

    def _put_result(self, put: _Put, replicas: int) -> PutResult:
        order = self._order(put.block)
        aim = {server.server_id for server in wanted(order, replicas)}
        degraded = len(put.holders) < replicas or not aim <= put.holders
        self._statistics.degraded_puts += degraded
        if put.failures:
            log.info("put_handed_off", block=put.block, copies=len(put.holders), failures=_told(put.failures))
        return PutResult(len(put.holders), degraded)

    async def _put_round(self, put: _Put, replicas: int) -> None:
        """One copy per task; a task whose server fails goes on with the next server that nobody has tried."""
        put.failures.clear()
        candidates = self._put_candidates(put)
        tasks = replicas - len(put.holders)
        if tasks == 1:
            await self._put_one_copy(put, candidates)
            return
        async with trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(self._put_one_copy, put, candidates)

    def _put_candidates(self, put: _Put) -> Iterator[_Link]:
        """Servers that take new blocks, best first."""
        now = trio.current_time()

        def rank(server: Server) -> tuple[bool, bool]:
            link = self._links.get(server.server_id)
            return link is not None and link.full_until > now, link is not None and link.suspect_until > now

        order = self._order(put.block)
        up = (server for server in order if server.state == ServerState.UP and server.server_id not in put.holders)
        return self._best_first(up, rank)

    def _best_first(self, servers: Iterable[Server], rank: Callable[[Server], tuple[bool, bool]]) -> Iterator[_Link]:
        """Links in the order of the servers, but those that rank lower later; none is made before its turn."""
        later: list[tuple[tuple[bool, bool], Server]] = []
        for server in servers:
            if (place := rank(server)) == (False, False):
                yield self._link(server)
            else:
                later.append((place, server))
        for _, server in sorted(later, key=lambda ranked: ranked[0]):
            yield self._link(server)

    async def _put_one_copy(self, put: _Put, candidates: Iterator[_Link]) -> None:
        for link in candidates:
            if put.fatal is not None or trio.current_time() >= put.deadline:
                return
            try:
                await self._put_to(link, put)
            except BlockExists as error:
                put.fatal = error
                log.error("block_id_used_twice", block=put.block, server=link.server.server_id, error=error)
                return
            except StoreError as error:
                put.failures[link.server.server_id] = error
                self._statistics.handed_off += 1
                self._attempt_failed(link, error)
                continue
            put.holders.add(link.server.server_id)
            return

    async def _put_to(self, link: _Link, put: _Put) -> None:
        async def ask(timeout_s: float) -> None:
            request = PutBlock(put.block, self._current_map().epoch, put.checksums)
            await link.channel.call(request, payload=put.pieces, timeout_s=timeout_s, retry=False)

        await self._attempt(link, ask, deadline=put.deadline, attempt_s_max=PUT_ATTEMPT_S_MAX)

    @staticmethod
    def _put_is_hopeless(put: _Put) -> bool:
        """Every server that could take it is full: waiting does not help."""
        return bool(put.failures) and all(isinstance(error, NoSpace) for error in put.failures.values())

    def _put_error(self, put: _Put, replicas: int) -> StoreError:
        if self._put_is_hopeless(put):
            return NoSpace(f"{_named(put.block)}: {_told(put.failures)}")
        up = sum(server.state == ServerState.UP for server in self._current_map().servers)
        return TooFewReplicas(
            f"{_named(put.block)}: {len(put.holders)} of {replicas} copies written, {up} servers are up"
            + (f"; {_told(put.failures)}" if put.failures else "")
        )

    # --- reading -----------------------------------------------------------------------------------------------------

    async def get(
        self, block: BlockId, *, offset: int, size: int, replicas: int, timeout_s: float = 30.0
    ) -> memoryview:
        """Exactly the `size` bytes of `block` from `offset` on, verified against the writer's checksums.

        Args:
            size: 1 to BLOCK_SIZE_MAX.
            replicas: how many copies the block was written with, to tell a missing copy from one that never was.

        Raises:
            DataLost: every server has answered, and none has bytes that match their checksums.
            Unreachable: the servers that may have it could not be asked within `timeout_s`.
        """
        assert 1 <= size <= BLOCK_SIZE_MAX, f"a read of {size} bytes"
        self._statistics.gets += 1
        deadline = trio.current_time() + timeout_s
        pause_s, attempt_s_max = ROUND_PAUSE_FIRST_S, GET_FIRST_ATTEMPT_S_MAX
        while True:
            failures: dict[int, StoreError] = {}
            found = await self._get_round(block, offset, size, deadline, failures, attempt_s_max)
            attempt_s_max = GET_ATTEMPT_S_MAX
            if found is not None:
                if failures:
                    self._report(block, replicas, failures, found_elsewhere=True)
                return found
            definitive = all(_is_definitive(error) for error in failures.values())
            epoch = self._current_map().epoch
            await self._refresh_quietly(deadline)
            if definitive and failures and self._current_map().epoch == epoch:
                self._report(block, replicas, failures, found_elsewhere=False)
                log.error("block_lost", block=block, failures=_told(failures))
                raise DataLost(f"{_named(block)}: no good copy; {_told(failures)}")
            if trio.current_time() + pause_s >= deadline:
                tried = _told(failures) if failures else "there are no servers"
                raise Unreachable(f"{_named(block)}: no copy could be read in time; {tried}")
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, ROUND_PAUSE_MAX_S)

    async def _get_round(
        self,
        block: BlockId,
        offset: int,
        size: int,
        deadline: float,
        failures: dict[int, StoreError],
        attempt_s_max: float,
    ) -> memoryview | None:
        """Ask one server after the other; None when none had it."""
        for link in self._get_candidates(block):
            if trio.current_time() >= deadline:
                return None
            try:
                return await self._get_from(link, block, offset, size, deadline, attempt_s_max)
            except StoreError as error:
                failures[link.server.server_id] = error
                self._attempt_failed(link, error)
        return None

    def _get_candidates(self, block: BlockId) -> Iterator[_Link]:
        """All servers that may have it, best first."""
        now = trio.current_time()

        def rank(server: Server) -> tuple[bool, bool]:
            link = self._links.get(server.server_id)
            return server.state not in _SERVING, link is not None and link.suspect_until > now

        return self._best_first(self._order(block), rank)

    async def _get_from(
        self, link: _Link, block: BlockId, offset: int, size: int, deadline: float, attempt_s_max: float
    ) -> memoryview:
        async def ask(timeout_s: float) -> memoryview:
            request = GetBlock(block, offset, size)
            reply, payload = await link.channel.call_for_payload(request, timeout_s=timeout_s, retry=False)
            return verified(reply, payload, offset=offset, size=size)

        return await self._attempt(link, ask, deadline=deadline, attempt_s_max=attempt_s_max)

    def _report(self, block: BlockId, replicas: int, failures: dict[int, StoreError], *, found_elsewhere: bool) -> None:
        """Tell of damaged copies, and of missing ones if the block exists at all (else it may have been deleted)."""
        aim = {server.server_id for server in wanted(self._order(block), replicas)}
        for server_id, error in failures.items():
            corrupt = isinstance(error, BlockCorrupt)
            missing = isinstance(error, NoSuchBlock) and server_id in aim and found_elsewhere
            if corrupt or missing:
                self._statistics.bad_copies += 1
                log.info("bad_copy", block=block, server=server_id, error=error)
                self._report_bad_copy(block, server_id, corrupt)

    # --- deleting ----------------------------------------------------------------------------------------------------

    async def delete(self, blocks: Sequence[BlockId], *, timeout_s: float = 30.0) -> bool:
        """Delete `blocks` on every server that may hold them, which after hand-offs is any that is not dead.

        Returns:
            True: all of them have confirmed.  False: some could not be asked; ask again later.
        """
        deadline = trio.current_time() + timeout_s
        limiter = trio.CapacityLimiter(DELETES_AT_ONCE_MAX)
        failed: dict[int, StoreError] = {}

        async def delete_on(link: _Link) -> None:
            async with limiter:
                try:
                    for start in range(0, len(blocks), BLOCKS_PER_REQUEST_MAX):
                        await self._delete_on(link, tuple(blocks[start : start + BLOCKS_PER_REQUEST_MAX]), deadline)
                except StoreError as error:
                    failed[link.server.server_id] = error
                    self._attempt_failed(link, error)

        async with trio.open_nursery() as nursery:
            for server in self._current_map().servers:
                if server.state != ServerState.DEAD:
                    nursery.start_soon(delete_on, self._link(server))
        if failed:
            log.info("delete_incomplete", blocks=len(blocks), failures=_told(failed))
        return not failed

    async def _delete_on(self, link: _Link, blocks: tuple[BlockId, ...], deadline: float) -> None:
        async def ask(timeout_s: float) -> None:
            # There is no other server to turn to: wait for one that restarts, but not for one that is down.
            retry = link.server.state in _SERVING
            await link.channel.call(DeleteBlocks(blocks), timeout_s=timeout_s, retry=retry)

        await self._attempt(link, ask, deadline=deadline, attempt_s_max=DELETE_ATTEMPT_S_MAX)

    # --- one server --------------------------------------------------------------------------------------------------

    async def _attempt(
        self, link: _Link, ask: Callable[[float], Awaitable[T]], *, deadline: float, attempt_s_max: float
    ) -> T:
        """Ask one server, with what may be put right there.

        That is an old map, a connection that had died, bytes damaged on the way, and an overload.
        """
        now = trio.current_time()
        end = now + min(attempt_s_max, (deadline - now) / ATTEMPT_PART)
        refreshed = repeated = False
        pause_s = ROUND_PAUSE_FIRST_S
        while True:
            try:
                answer = await self._ask_unless_down(link, ask, max(end - trio.current_time(), 0.001))
            except StoreError as error:
                if error.retry is Retry.REFRESH and not refreshed:
                    refreshed = True
                    await self._refresh_quietly(end)
                elif isinstance(error, OutcomeUnknown | BlockCorrupt) and not repeated:
                    repeated = True
                elif isinstance(error, ServerOverloaded) and trio.current_time() + pause_s < end:
                    await trio.sleep(pause_s)
                    pause_s = min(2 * pause_s, ROUND_PAUSE_MAX_S)
                else:
                    raise
                continue
            link.suspect_until = 0.0
            return answer

    @staticmethod
    async def _ask_unless_down(link: _Link, ask: Callable[[float], Awaitable[T]], timeout_s: float) -> T:
        with trio.CancelScope() as scope:
            link.attempts.add(scope)
            try:
                return await ask(timeout_s)
            finally:
                link.attempts.remove(scope)
        raise Unreachable(f"{link.channel.peer}: it went down while it was asked")

    def _attempt_failed(self, link: _Link, error: StoreError) -> None:
        """Remember for a while that this server is not to be asked first."""
        self._statistics.failed_attempts += 1
        now = trio.current_time()
        if isinstance(error, NoSpace):
            link.full_until = now + FULL_S
        elif not _is_definitive(error):
            link.suspect_until = now + SUSPECT_S
        log.debug("attempt_failed", server=link.server.server_id, peer=link.channel.peer, error=error)

    async def _refresh_quietly(self, deadline: float) -> None:
        """Fetch the newest map; when that fails the one at hand has to do."""
        with trio.move_on_at(deadline):
            try:
                await self._refresh_map()
            except StoreError as error:
                log.debug("map_not_refreshed", error=error)

    def _order(self, block: BlockId) -> tuple[Server, ...]:
        return self._placement.order(self._current_map(), block)

    def _link(self, server: Server) -> _Link:
        """The link to a server of the current map."""
        current = self._current_map()
        if current is not self._links_of:
            self._close_links_not_in(current)
        link = self._links.get(server.server_id)
        if link is None:
            if self._nursery is None:
                raise Unreachable("the block client is closed")
            instance = instance_name(current.cluster_id, server.server_id)
            link = _Link(server, Channel(server.host, server.port, service=SERVICE, instance=instance))
            self._links[server.server_id] = link
            self._nursery.start_soon(link.run)
        return link

    def _close_links_not_in(self, current: ClusterMap) -> None:
        """Drop channels to servers that left or moved; keep what is known of the others."""
        self._links_of = current
        servers = {server.server_id: server for server in current.servers if server.state != ServerState.DEAD}
        for server_id, link in list(self._links.items()):
            server = servers.get(server_id)
            if server is None or (server.host, server.port) != (link.server.host, link.server.port):
                link.scope.cancel()
                del self._links[server_id]
            else:
                link.server = server


def verified(reply: GetBlockDone, payload: memoryview, *, offset: int, size: int) -> memoryview:
    """The bytes asked for out of a GetBlock's answer.

    Raises:
        BlockCorrupt: they do not match their checksums, or are others than were asked for.
        InvalidArgument: the block ends before offset + size.
    """
    start = offset - offset % CHECKSUM_UNIT
    bad = first_bad_unit(payload, reply.checksums, CHECKSUM_UNIT)
    if bad is not None:
        raise BlockCorrupt(f"the checksum of the bytes from {reply.offset + bad * CHECKSUM_UNIT} on is wrong")
    if reply.offset != start:
        raise BlockCorrupt(f"the server sent bytes from {reply.offset} on instead of from {start}")
    if offset + size > start + len(payload):
        if offset + size > reply.block_size:
            raise InvalidArgument(f"the block has {reply.block_size} bytes, not {offset + size}")
        raise BlockCorrupt(f"the server sent {len(payload)} bytes from {start} on, too few for {size} from {offset} on")
    return payload[offset - start : offset - start + size]


def _is_definitive(error: StoreError) -> bool:
    """The server has looked and does not have the bytes that were asked for."""
    return isinstance(error, NoSuchBlock | BlockCorrupt | InvalidArgument)


def _named(block: BlockId) -> str:
    return f"block {block.slice_id}.{block.index}"


def _told(failures: dict[int, StoreError]) -> str:
    """Every server tried and what it said, for a message."""
    return ", ".join(f"server {server_id}: {type(e).__name__} {e.detail}" for server_id, e in failures.items())
