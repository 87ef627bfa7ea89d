"""What the data path needs of the two services: the part of MetadataClient and BlockClient that it calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from blockstore.protocol import BlockId
from metadata.protocol import Mutation
from wire.checksum import Buffer
from wire.message import Message, Request

R = TypeVar("R", bound=Message)


class PutResultLike(Protocol):
    """What became of a put."""

    @property
    def copies(self) -> int:
        """How many servers have the block, durably."""
        ...

    @property
    def degraded(self) -> bool:
        """Fewer copies than asked for, or not where placement wants them."""
        ...


class BlockPort(Protocol):
    """Blocks, by name; see blockstore.client.BlockClient."""

    async def put(
        self, block: BlockId, data: Buffer | Sequence[Buffer], *, replicas: int, timeout_s: float = 30.0
    ) -> PutResultLike:
        """Store a block; when it returns, the block is durable.  The data may be let go of then, not before."""
        ...

    async def get(
        self, block: BlockId, *, offset: int, size: int, replicas: int, timeout_s: float = 30.0
    ) -> memoryview:
        """Exactly those bytes of a block, verified.  Raises DataLost when no replica can give them."""
        ...

    async def delete(self, blocks: Sequence[BlockId], *, timeout_s: float = 30.0) -> bool:
        """Forget blocks that nothing names."""
        ...


class MetadataPort(Protocol):
    """The inode service; see metadata.client.MetadataClient."""

    async def ask(self, make: Callable[[int], Request[R]]) -> R:
        """Send the read that `make(session)` makes."""
        ...

    async def mutate(self, make: Callable[[int, int], Mutation[R]]) -> R:
        """Send the mutation that `make(session, sequence)` makes, once."""
        ...

    async def allocate_slice(self) -> int:
        """A slice id that nobody has ever used."""
        ...
