"""The block server: the store of one directory behind RPC.

Tasks: the store's own (store.py), the RPC server, the registration (registration.py), and one per request that has
to wait for a disk (a cold read, a list, a verification), at most WAITING_MAX of them.  Puts and deletes are queued
from the handler and answered from the store's callback; a read of cached bytes is answered in the handler.

Shared state: the newest map, in the registration; everything else is the store's.
Order: the store outlives the RPC server, so that an operation that was taken is finished before the directory is let
go of.  A directory that was never registered is not served before it is: until then nobody can know it, and it might
be refused.  A known one is served at once, with or without an inode service.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import trio

from blockstore.identity import load_identity, locked
from blockstore.protocol import (
    BLOCK_METHODS,
    BLOCK_SIZE_MAX,
    BlockInfo,
    BlockServerStatus,
    DeleteBlocks,
    DeleteBlocksDone,
    GetBlock,
    GetBlockDone,
    GetStatus,
    ListBlocks,
    ListBlocksDone,
    PutBlock,
    PutBlockDone,
    VerifyBlock,
    VerifyBlockDone,
    instance_name,
)
from blockstore.reader import Units
from blockstore.registration import Registration
from blockstore.store import BlockStore, open_store
from blockstore.writer import SEGMENT_SIZE_MAX, Delete, Put
from wire.errors import InvalidArgument, ServerOverloaded, StaleEpoch, StoreError, WrongCluster
from wire.log import get_logger
from wire.memory import keep_freed_memory
from wire.message import Message, Request
from wire.rpc.server import Call, RpcServer, open_listener

WAITING_MAX = 256
"""Requests that wait for a disk at a time: with 4 MiB each, a GiB of memory at worst."""

log = get_logger("blockstore.server")
PUT_DONE = PutBlockDone()


@dataclass(frozen=True)
class BlockServerConfig:
    """Where a block server is and whom it belongs to."""

    directory: Path  # Made if it is not there; nothing else is needed to start again.
    host: str  # Address to listen on.
    port: int  # 0: any free one.
    advertise_host: str  # Address under which clients find it.
    metadata_host: str
    metadata_port: int
    rack: str = ""
    weight: int | None = None  # None: the capacity of its file system in GiB.
    segment_size_max: int = SEGMENT_SIZE_MAX


class BlockServer:
    """The answers to the requests of blockstore.protocol."""

    def __init__(self, store: BlockStore, registration: Registration, nursery: trio.Nursery) -> None:
        self._store = store
        self._registration = registration
        self._nursery = nursery
        self._waiting = 0
        self._handlers: dict[type[Request[Message]], Callable[[Call], None]] = {
            PutBlock: self._put,
            GetBlock: self._get,
            DeleteBlocks: self._delete,
            ListBlocks: lambda call: self._later(call, self._list),
            GetStatus: lambda call: call.reply(server_status(self._store, self._registration)),
            VerifyBlock: lambda call: self._later(call, self._verify),
        }

    def handle(self, call: Call) -> None:
        """Answer the call now, or see to it that it is answered."""
        self._handlers[type(call.request)](call)

    def drained(self) -> None:
        """All requests that had arrived are queued: start the disk on them."""
        self._store.kick()

    def _put(self, call: Call) -> None:
        request = cast("PutBlock", call.request)
        registration = self._registration
        if request.epoch < registration.epoch:
            raise StaleEpoch(f"this server knows epoch {registration.epoch}, the request came with {request.epoch}")
        if request.epoch > registration.epoch:
            registration.refresh_soon()
        if not 1 <= len(call.payload) <= BLOCK_SIZE_MAX:
            raise InvalidArgument(f"a block has 1 to {BLOCK_SIZE_MAX} bytes, not {len(call.payload)}")

        def done(put: Put) -> None:
            if put.outcome is None:
                call.reply(PUT_DONE)
            else:
                call.fail(put.outcome)

        self._store.put_nowait(request.block, request.checksums, call.payload, done)

    def _delete(self, call: Call) -> None:
        request = cast("DeleteBlocks", call.request)

        def done(delete: Delete) -> None:
            if delete.outcome is None:
                call.reply(DeleteBlocksDone(delete.deleted_count))
            else:
                call.fail(delete.outcome)

        self._store.delete_nowait(request.blocks, done)

    def _get(self, call: Call) -> None:
        request = cast("GetBlock", call.request)
        units = self._store.get_nowait(request.block, offset=request.offset, size=request.size)
        if units is not None:
            _reply_units(call, units)
        else:
            self._later(call, self._get_cold)

    async def _get_cold(self, call: Call) -> None:
        request = cast("GetBlock", call.request)
        _reply_units(call, await self._store.get(request.block, offset=request.offset, size=request.size))

    async def _list(self, call: Call) -> None:
        request = cast("ListBlocks", call.request)
        rows = await self._store.list_page(request.after, request.count)
        call.reply(ListBlocksDone(tuple(BlockInfo(block, size) for block, size in rows)))

    async def _verify(self, call: Call) -> None:
        request = cast("VerifyBlock", call.request)
        call.reply(VerifyBlockDone(await self._store.verify(request.block)))

    def _later(self, call: Call, answer: Callable[[Call], Awaitable[None]]) -> None:
        """Answer in a task of its own."""
        if self._waiting >= WAITING_MAX:
            raise ServerOverloaded(f"{self._waiting} requests wait for the disk")
        self._waiting += 1
        self._nursery.start_soon(self._answer, call, answer)

    async def _answer(self, call: Call, answer: Callable[[Call], Awaitable[None]]) -> None:
        try:
            await answer(call)
        except StoreError as error:
            call.fail(error)
        finally:
            self._waiting -= 1


def _reply_units(call: Call, units: Units) -> None:
    call.reply(GetBlockDone(units.offset, units.block_size, units.checksums), units.data)


def server_status(store: BlockStore, registration: Registration) -> BlockServerStatus:
    """The figures of this moment."""
    figures = store.figures()
    return BlockServerStatus(
        server_id=registration.identity.server_id,
        space_total=figures.space_total,
        space_free=figures.space_free,
        block_count=figures.block_count,
        block_bytes=figures.block_bytes,
        corrupt_count=figures.corrupt_count,
        epoch=registration.epoch,
        device=store.device,
    )


async def run_block_server(
    config: BlockServerConfig, *, task_status: trio.TaskStatus[tuple[str, int]] = trio.TASK_STATUS_IGNORED
) -> None:
    """Serve until cancelled, which writes everything out; `task_status.started((host, port))` once it serves.

    Raises:
        StoreError: another server has the directory; the port is taken; or the identity file is damaged.
        WrongCluster: the directory belongs to another cluster than the inode service.
        WrongVersion: the directory was written by a newer version of fsd.
        OSError: the disk does not read or write.
    """
    keep_freed_memory()
    directory = config.directory
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    refused: WrongCluster | None = None
    with locked(directory):
        identity = load_identity(directory)
        listener = await open_listener(config.host, config.port)
        with listener:
            store = await open_store(directory, segment_size_max=config.segment_size_max)
            port: int = listener.getsockname()[1]
            registration = Registration(
                directory,
                identity,
                address=(config.advertise_host, port),
                rack=config.rack,
                weight=config.weight or max(1, store.figures().space_total >> 30),
                metadata=(config.metadata_host, config.metadata_port),
                status=lambda: server_status(store, registration),
            )
            async with trio.open_nursery() as outer:
                await outer.start(store.run)
                refused = await _serve(store, registration, listener, task_status)
                outer.cancel_scope.cancel()
    if refused is not None:
        raise refused


async def _serve(
    store: BlockStore,
    registration: Registration,
    listener: trio.socket.SocketType,
    task_status: trio.TaskStatus[tuple[str, int]],
) -> WrongCluster | None:
    """Serve until cancelled, or until the inode service refuses the directory: then why."""
    refused: WrongCluster | None = None

    async def keep_registered() -> None:
        nonlocal refused
        try:
            await registration.run()
        except WrongCluster as error:
            log.error("refused", error=error)
            refused = error
            inner.cancel_scope.cancel()

    async with trio.open_nursery() as inner:
        inner.start_soon(keep_registered)
        if not registration.identity.cluster_id:
            await registration.registered.wait()
        server = BlockServer(store, registration, inner)
        identity = registration.identity
        rpc = RpcServer(
            service="block",
            methods=BLOCK_METHODS,
            handler=server.handle,
            drained=server.drained,
            instance=instance_name(identity.cluster_id, identity.server_id),
        )
        await inner.start(rpc.serve, [listener])
        log.info("serving", port=listener.getsockname()[1], blocks=store.figures().block_count)
        task_status.started(listener.getsockname()[:2])
        await trio.sleep_forever()
    return refused
