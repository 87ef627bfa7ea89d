"""What the inode service answers: one table from request type to handler, all of them synchronous.

Tasks: none of its own; the handlers run in the RPC server's connection tasks, and answers to mutations are given by
the group commit, on the same loop.  Reads are answered in place from the batch's snapshot; mutations are queued, and
the group commit is kicked when the batch is over.

Fencing: a mutation is queued only while its session is live, and the queue is first in, first out; so whatever a
session did commits before anything that was admitted after its end.  A session speaks over one connection at a time,
and repeats over a new one what it still wants; what is left in an older one, which may be read later if this process
stood still, was given up by its client, who may have made other changes since: it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import trio

from blockstore.protocol import REPORT_METHODS, Heartbeat, RegisterServer
from metadata.cluster_keeper import ClusterKeeper
from metadata.core import bad_blocks, schema
from metadata.core.dispatch import answer, open_inode, register_opens
from metadata.core.exactly_once import ENGINE_ERRORS, apply_once
from metadata.core.namespace.inodes import zeros_allocated
from metadata.core.namespace.ranges import bytes_missing
from metadata.engine.ports import Engine, EngineBroken, WriteTxn
from metadata.group_commit import Batch, GroupCommit
from metadata.protocol import (
    METADATA_METHODS,
    MUTATIONS,
    READS,
    ChangeRange,
    CloseSession,
    Done,
    EvictSession,
    GetClusterStatus,
    GetLayout,
    GetMap,
    GetMapDone,
    GetUsage,
    ListQuotas,
    ListSessions,
    Mutation,
    OpenSession,
    RangeOperation,
    RegisterOpens,
    RenewSession,
    ReportBadCopy,
    StatFs,
)
from metadata.session_keeper import SessionKeeper
from metadata.snapshot import Snapshot
from metadata.status import cluster_status, file_system_status, session_list
from wire.errors import InvalidArgument, NoRoom, SessionExpired, StoreError
from wire.message import Message, Request
from wire.rpc.server import Call

SERVICE_METHODS: dict[int, type[Request[Message]]] = {**METADATA_METHODS, **REPORT_METHODS}
"""Everything the inode service answers."""
DEFAULT_REPLICAS = 2
"""Copies that StatFs reckons with."""

Handler = Callable[[Call, Any], None]


class InodeService:
    """The handlers, with what they need."""

    def __init__(
        self,
        *,
        engine: Engine,
        commits: GroupCommit,
        snapshot: Snapshot,
        sessions: SessionKeeper,
        cluster: ClusterKeeper,
        version: str,
    ) -> None:
        self._engine = engine
        self._commits = commits
        self._snapshot = snapshot
        self._sessions = sessions
        self._live = sessions.table.live
        self._cluster = cluster
        self._version = version
        self._started_s = trio.current_time()
        self._handlers: dict[type[Message], Handler] = {
            **dict.fromkeys(READS, self._read),
            **dict.fromkeys(MUTATIONS, self._mutate),
            ChangeRange: self._change_range,
            GetLayout: self._layout,
            RegisterOpens: self._register,
            StatFs: self._statfs,
            GetUsage: self._read_without_session,
            ListQuotas: self._read_without_session,
            OpenSession: sessions.open,
            RenewSession: sessions.renew,
            CloseSession: sessions.close,
            **sessions.locks.handlers(),
            ReportBadCopy: self._report_bad_copy,
            GetClusterStatus: self._status,
            ListSessions: self._list_sessions,
            EvictSession: sessions.evict,
            GetMap: self._map,
            RegisterServer: cluster.register,
            Heartbeat: cluster.heartbeat,
        }

    def handle(self, call: Call) -> None:
        """Answer the call now, or see to it that it is answered later.  Errors are raised for the RPC server."""
        request = call.request
        self._handlers[type(request)](call, request)

    def drained(self) -> None:
        """A batch of frames is over: let go of the snapshot, start the commit of what it brought."""
        self._snapshot.drop()
        self._commits.kick()

    # --- the two that matter ------------------------------------------------------------------------------------------

    def _read(self, call: Call, request: Any) -> None:  # noqa: ANN401  (one of READS)
        if request.session not in self._live:
            raise SessionExpired(f"session {request.session}")
        call.reply(answer(self._snapshot.txn(), request))

    def _mutate(self, call: Call, request: Mutation[Message]) -> None:
        self._sessions.table.speaking(request.session, call.connection_number)
        self._commits.submit(_Mutate(call, request))

    def _layout(self, call: Call, request: GetLayout) -> None:
        """An open waits for its turn among the unlinks; a plain question is answered at once."""
        if request.open:
            self._sessions.table.reporting(request.session, call.connection_number)
            self._commits.submit(_OfOpens(call, partial(open_inode, request=request)))
        else:
            self._read(call, request)

    def _register(self, call: Call, request: RegisterOpens) -> None:
        self._sessions.table.reporting(request.session, call.connection_number)
        told = self._sessions.opens_told
        self._commits.submit(_OfOpens(call, partial(register_opens, request=request), told))

    def _change_range(self, call: Call, request: ChangeRange) -> None:
        """A mutation; but space that is not there cannot be allocated.

        A retry is looked at again: what it asks for is allocated by then, so that it finds its answer.
        """
        if request.operation is not RangeOperation.PUNCH and request.session in self._live:
            missing = bytes_missing(self._snapshot.txn(), ino=request.ino, offset=request.offset, length=request.length)
            _, free = self._space()
            if missing > free:
                raise NoRoom(f"{missing} bytes are to be allocated, {free} are free")
        self._mutate(call, request)

    # --- the others ---------------------------------------------------------------------------------------------------

    def _read_without_session(self, call: Call, request: Request[Message]) -> None:
        call.reply(answer(self._snapshot.txn(), request))

    def _statfs(self, call: Call, request: StatFs) -> None:
        self._sessions.table.find(request.session)
        total, free = self._space()
        call.reply(file_system_status(self._snapshot.txn(), request.ino, space_total=total, space_free=free))

    def _space(self) -> tuple[int, int]:
        """(total, free) bytes of new files; what is allocated and not yet written is not free any more."""
        total, free = self._cluster.heartbeats.space(self._cluster.map)
        free = free // DEFAULT_REPLICAS - zeros_allocated(self._snapshot.txn())
        return total // DEFAULT_REPLICAS, max(free, 0)

    def _map(self, call: Call, request: GetMap) -> None:
        call.reply(GetMapDone(self._cluster.map))

    def _report_bad_copy(self, call: Call, request: ReportBadCopy) -> None:
        if all(server.server_id != request.server_id for server in self._cluster.map.servers):
            raise InvalidArgument(f"no block server {request.server_id}")
        self._commits.submit(_ReportBadCopy(call, request))

    def _status(self, call: Call, request: GetClusterStatus) -> None:
        call.reply(
            cluster_status(
                self._snapshot.txn(),
                engine=self._engine.statistics(),
                cluster=self._cluster,
                sessions=self._sessions,
                version=self._version,
                now_s=trio.current_time(),
                started_s=self._started_s,
            )
        )

    def _list_sessions(self, call: Call, request: ListSessions) -> None:
        call.reply(
            session_list(
                self._snapshot.txn(),
                sessions=self._sessions,
                open_count=self._commits.open_count,
                now_s=trio.current_time(),
            )
        )


class _Mutate:
    """One mutation on its way through the group commit."""

    __slots__ = ("_call", "_request")

    def __init__(self, call: Call, request: Mutation[Message]) -> None:
        self._call = call
        self._request = request

    def run(self, txn: WriteTxn, batch: Batch) -> object:
        return apply_once(txn, self._request, newest=batch.newest, now_ns=batch.now_ns, opens=batch.opens)

    def finish(self, result: object) -> None:
        _answer(self._call, result)


class _OfOpens:
    """A question or report about opens, which takes its turn among the mutations; not kept for retries."""

    __slots__ = ("_call", "_done", "_operation")

    def __init__(self, call: Call, operation: Callable[..., Message], done: Callable[[], None] = lambda: None) -> None:
        self._call = call
        self._operation = operation
        self._done = done

    def run(self, txn: WriteTxn, batch: Batch) -> object:
        savepoint = txn.savepoint()
        try:
            reply = self._operation(txn, opens=batch.opens, now_ns=batch.now_ns)
        except ENGINE_ERRORS:
            raise  # The transaction is gone.
        except BaseException:
            txn.rollback_to(savepoint)
            raise
        txn.release(savepoint)
        return schema.encode_record(reply)

    def finish(self, result: object) -> None:
        _answer(self._call, result)
        self._done()


def _answer(call: Call, result: object) -> None:
    if isinstance(result, EngineBroken):
        return  # Nobody knows; the connection is about to break, which tells the caller just that.
    if isinstance(result, StoreError):
        call.fail(result)
    else:
        assert isinstance(result, bytes)
        call.reply_encoded(result)


class _ReportBadCopy:
    """Keeps a report and answers it."""

    __slots__ = ("_call", "_request")

    def __init__(self, call: Call, request: ReportBadCopy) -> None:
        self._call = call
        self._request = request

    def run(self, txn: WriteTxn, batch: Batch) -> object:
        request = self._request
        reason = "corrupt" if request.corrupt else "missing"
        bad_blocks.record(txn, request.block, server_id=request.server_id, reason=reason, now_ns=batch.now_ns)
        return Done()

    def finish(self, result: object) -> None:
        if isinstance(result, StoreError):
            self._call.fail(result)
        else:
            self._call.reply(Done())
