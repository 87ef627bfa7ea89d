"""Messages between a block server and its clients, and those with which it reports to the inode service.

Method numbers 1 to 99 are served by block servers, 100 to 199 (the reports) by the inode service, which is the floor
above and therefore imports them from here.

A block is named by (slice_id, index).  It is immutable, at most BLOCK_SIZE_MAX bytes, and carries one CRC32C per
CHECKSUM_UNIT bytes, made once by the writer, packed little-endian into `checksums`, kept with the block, and verified
by every server before it acknowledges, by every client on every read, and by scrub.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from blockstore.core.cluster_map import ClusterMap, HostName, RackName
from wire.message import Message, Request, method_table

BLOCK_SIZE_MAX = 4 << 20
"""Largest block, bytes (decision: shared design; one round trip of 4 MiB hides its latency at 10 Gbit/s)."""

CHECKSUM_UNIT = 16 << 10
"""Bytes under one checksum: what a 4 KiB read must fetch and verify; 1,024 bytes of sums for a block of 4 MiB."""

CHECKSUMS_SIZE_MAX = BLOCK_SIZE_MAX // CHECKSUM_UNIT * 4
BLOCKS_PER_REQUEST_MAX = 4096
"""Block ids in one list or delete request; about 80 KiB encoded."""

Checksums = Annotated[bytes, msgspec.Meta(max_length=CHECKSUMS_SIZE_MAX)]
BlockSize = Annotated[int, msgspec.Meta(ge=1, le=BLOCK_SIZE_MAX)]
Unsigned = Annotated[int, msgspec.Meta(ge=0)]


def instance_name(cluster_id: str, server_id: int) -> str:
    """Which block server a connection is meant for: an address may by now be that of another one."""
    return f"{cluster_id}/{server_id}"


class BlockId(Message, frozen=True, array_like=True, order=True):
    """Name of a block: the slice it belongs to and its index there, from 0."""

    slice_id: Unsigned
    index: Unsigned


class PutBlockDone(Message, frozen=True, array_like=True):
    """The block is durable here: fdatasync has returned."""


class PutBlock(Request[PutBlockDone], frozen=True, array_like=True):
    """Store one whole immutable block.  Payload: its bytes.

    Idempotent: the same id with the same size and checksums answers success again; other content: BlockExists.
    Errors: BlockCorrupt (the payload does not match `checksums`), NoSpace, StaleEpoch, ServerOverloaded.
    """

    METHOD: ClassVar[int] = 1
    REPLY: ClassVar[type[Message]] = PutBlockDone

    block: BlockId
    epoch: Unsigned  # The sender's cluster-map version.
    checksums: Checksums


class GetBlockDone(Message, frozen=True, array_like=True):
    """Payload: the bytes from `offset`, whole checksum units (the block's last one may be short)."""

    offset: int  # The request's offset, rounded down to a multiple of CHECKSUM_UNIT.
    block_size: int
    checksums: Checksums  # Of exactly the units in the payload.


class GetBlock(Request[GetBlockDone], frozen=True, array_like=True):
    """Read the checksum units that cover [offset, offset + size) of a block.

    The server does not verify what it sends (the reader must); a size past the block's end is cut there.
    Errors: NoSuchBlock, InvalidArgument (offset at or past the block's end), BlockCorrupt (the record itself is
    damaged, or the disk fails the read).
    """

    METHOD: ClassVar[int] = 2
    REPLY: ClassVar[type[Message]] = GetBlockDone

    block: BlockId
    offset: Unsigned
    size: BlockSize


class DeleteBlocksDone(Message, frozen=True, array_like=True):
    """They are gone, durably."""

    deleted_count: int  # How many of them were here.


class DeleteBlocks(Request[DeleteBlocksDone], frozen=True, array_like=True):
    """Forget these blocks and give back their space; those that are not here count as deleted (idempotent)."""

    METHOD: ClassVar[int] = 3
    REPLY: ClassVar[type[Message]] = DeleteBlocksDone

    blocks: Annotated[tuple[BlockId, ...], msgspec.Meta(max_length=BLOCKS_PER_REQUEST_MAX)]


class BlockInfo(Message, frozen=True, array_like=True):
    """One row of an inventory."""

    block: BlockId
    size: int


class ListBlocksDone(Message, frozen=True, array_like=True):
    """In ascending order of id; fewer than asked for means that there are no more."""

    blocks: tuple[BlockInfo, ...]


class ListBlocks(Request[ListBlocksDone], frozen=True, array_like=True):
    """A page of the inventory: at most `count` blocks whose id is above `after` (None: from the beginning)."""

    METHOD: ClassVar[int] = 4
    REPLY: ClassVar[type[Message]] = ListBlocksDone

    after: BlockId | None
    count: Annotated[int, msgspec.Meta(ge=1, le=BLOCKS_PER_REQUEST_MAX)] = BLOCKS_PER_REQUEST_MAX


class BlockServerStatus(Message, frozen=True, array_like=True):
    """Figures of one block server, sizes in bytes."""

    server_id: int
    space_total: int  # Of the file system under its directory.
    space_free: int
    block_count: int
    block_bytes: int  # Sum of the blocks' sizes.
    corrupt_count: int = 0  # Blocks it has found to be damaged since its start.
    epoch: int = 0  # Of the map it holds.
    device: Annotated[str, msgspec.Meta(max_length=128)] = ""
    """Host boot id and st_dev of the file system under its directory: equal ones share their space, "": unknown."""


class GetStatus(Request[BlockServerStatus], frozen=True, array_like=True):
    """Figures for `fsd status`."""

    METHOD: ClassVar[int] = 5
    REPLY: ClassVar[type[Message]] = BlockServerStatus


class VerifyBlockDone(Message, frozen=True, array_like=True):
    """The block was read from disk and matches its checksums."""

    size: int


class VerifyBlock(Request[VerifyBlockDone], frozen=True, array_like=True):
    """Re-read a block and verify it (a client saw a bad copy).  Errors: NoSuchBlock, BlockCorrupt."""

    METHOD: ClassVar[int] = 6
    REPLY: ClassVar[type[Message]] = VerifyBlockDone

    block: BlockId


BLOCK_METHODS = method_table([PutBlock, GetBlock, DeleteBlocks, ListBlocks, GetStatus, VerifyBlock])


# --- reports of a block server to the inode service ------------------------------------------------------------------


class RegisterServerDone(Message, frozen=True, array_like=True):
    """The server is in the map."""

    server_id: int  # Given out once per uuid and never reused.
    heartbeat_interval_ms: int
    map: ClusterMap


class RegisterServer(Request[RegisterServerDone], frozen=True, array_like=True):
    """Join the cluster, or return to it with another address.

    Errors: WrongCluster (the server's directory belongs to another cluster).
    """

    METHOD: ClassVar[int] = 100
    REPLY: ClassVar[type[Message]] = RegisterServerDone

    uuid: Annotated[str, msgspec.Meta(max_length=64)]
    cluster_id: Annotated[str, msgspec.Meta(max_length=64)]  # "" when its directory is new.
    host: HostName
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    rack: RackName
    weight: Annotated[int, msgspec.Meta(ge=1)]


class HeartbeatDone(Message, frozen=True, array_like=True):
    """The map if it is newer than the server's, else None."""

    map: ClusterMap | None


class Heartbeat(Request[HeartbeatDone], frozen=True, array_like=True):
    """I am alive; here are my figures.  Errors: NoSuchEntry (register first)."""

    METHOD: ClassVar[int] = 101
    REPLY: ClassVar[type[Message]] = HeartbeatDone

    status: BlockServerStatus


REPORT_METHODS = method_table([RegisterServer, Heartbeat])
