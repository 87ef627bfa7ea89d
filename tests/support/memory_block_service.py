"""A block service in memory that speaks the real protocol over real RPC: what BlockClient is tried against.

tests/contract/test_block_client.py runs against it and against real servers; it does what those cannot be made to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from blockstore.protocol import (
    BLOCK_METHODS,
    CHECKSUM_UNIT,
    BlockId,
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
from wire.checksum import first_bad_unit
from wire.errors import (
    BlockCorrupt,
    BlockExists,
    InvalidArgument,
    NoSpace,
    NoSuchBlock,
    ServerOverloaded,
    StaleEpoch,
)
from wire.message import Message
from wire.rpc.server import Call, RpcServer, open_listener


@dataclass
class MemoryBlockService:
    """One server's blocks, and its faults."""

    server_id: int = 0
    blocks: dict[BlockId, tuple[bytearray, bytes]] = field(default_factory=dict)
    epoch: int = 0
    space_bytes: int = 1 << 40
    used_bytes: int = 0
    silent: bool = False  # Takes requests and answers none.
    overloads_left: int = 0
    requests: list[Message] = field(default_factory=list)
    port: int = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop` or cancelled; on the same port as before, if there was one."""
        instance = instance_name("c", self.server_id)
        rpc = RpcServer(service="block", methods=BLOCK_METHODS, handler=self.handle, instance=instance)
        self._stopped = trio.Event()
        with trio.CancelScope() as self._scope:
            listener = await open_listener("127.0.0.1", self.port)
            self.port = listener.getsockname()[1]
            await rpc.serve([listener], task_status=task_status)
        self._stopped.set()

    async def stop(self) -> None:
        """Close the listener and all connections."""
        self._scope.cancel()
        await self._stopped.wait()

    def handle(self, call: Call) -> None:
        request: Any = call.request
        self.requests.append(request)
        if self.silent:
            return
        if self.overloads_left:
            self.overloads_left -= 1
            raise ServerOverloaded("busy")
        answers: dict[Any, Callable[[Call, Any], None]] = {
            PutBlock: self._put,
            GetBlock: self._get,
            DeleteBlocks: self._delete,
            ListBlocks: self._list,
            GetStatus: self._status,
            VerifyBlock: self._verify,
        }
        answers[type(request)](call, request)

    def _put(self, call: Call, request: PutBlock) -> None:
        if request.epoch < self.epoch:
            raise StaleEpoch(f"epoch {request.epoch} is older than {self.epoch}")
        bad = first_bad_unit(call.payload, request.checksums, CHECKSUM_UNIT)
        if bad is not None or not call.payload:
            raise BlockCorrupt(f"unit {bad} was damaged on the way")
        known = self.blocks.get(request.block)
        if known is not None and (known[1] != request.checksums or len(known[0]) != len(call.payload)):
            raise BlockExists(f"{request.block} has other content")
        if known is None:
            if self.used_bytes + len(call.payload) > self.space_bytes:
                raise NoSpace("full")
            self.used_bytes += len(call.payload)
            self.blocks[request.block] = (bytearray(call.payload), request.checksums)
        call.reply(PutBlockDone())

    def _get(self, call: Call, request: GetBlock) -> None:
        data, sums = self._block(request.block)
        if request.offset >= len(data):
            raise InvalidArgument(f"the block has {len(data)} bytes")
        first = request.offset // CHECKSUM_UNIT
        end = -(-(request.offset + request.size) // CHECKSUM_UNIT)
        payload = bytes(data[first * CHECKSUM_UNIT : end * CHECKSUM_UNIT])
        call.reply(GetBlockDone(first * CHECKSUM_UNIT, len(data), sums[4 * first : 4 * end]), payload)

    def _delete(self, call: Call, request: DeleteBlocks) -> None:
        gone = [self.blocks.pop(block) for block in set(request.blocks) if block in self.blocks]
        self.used_bytes -= sum(len(data) for data, _ in gone)
        call.reply(DeleteBlocksDone(len(gone)))

    def _list(self, call: Call, request: ListBlocks) -> None:
        after = request.after
        ids = sorted(block for block in self.blocks if after is None or block > after)
        rows = tuple(BlockInfo(block, len(self.blocks[block][0])) for block in ids[: request.count])
        call.reply(ListBlocksDone(rows))

    def _status(self, call: Call, request: GetStatus) -> None:
        used = self.used_bytes
        status = BlockServerStatus(
            self.server_id, self.space_bytes, self.space_bytes - used, len(self.blocks), used, epoch=self.epoch
        )
        call.reply(status)

    def _verify(self, call: Call, request: VerifyBlock) -> None:
        data, sums = self._block(request.block)
        if first_bad_unit(data, sums, CHECKSUM_UNIT) is not None:
            raise BlockCorrupt("damaged")
        call.reply(VerifyBlockDone(len(data)))

    def _block(self, block: BlockId) -> tuple[bytearray, bytes]:
        found = self.blocks.get(block)
        if found is None:
            raise NoSuchBlock(f"{block}")
        return found
