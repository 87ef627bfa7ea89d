"""One question to an inode service, from a command: connect, ask, give up in time with a sentence."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import trio

from metadata.protocol import ClusterStatus, GetClusterStatus
from mount.outcome import CommandError
from mount.target import Address
from wire.errors import DeadlineExceeded, StoreError, Unreachable
from wire.message import Message, Request
from wire.rpc.client import Channel

R = TypeVar("R", bound=Message)
SERVICE = "metadata"


async def ask(address: Address, request: Request[R], *, timeout_s: float) -> R:
    """Ask an inode service that needs no session for it.

    Raises:
        CommandError: nobody answers there, or not an inode service of our version.
    """
    answer: R | None = None
    failure: StoreError | OSError | None = None
    async with trio.open_nursery() as nursery:
        channel = Channel(address.host, address.port, service=SERVICE)
        await nursery.start(channel.run)
        try:
            answer = await channel.call(request, timeout_s=timeout_s)
        except (StoreError, OSError) as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise refusal(address, failure) from failure
    assert answer is not None
    return answer


def refusal(address: Address, error: BaseException) -> CommandError:
    """Why the service at an address did not answer, and what to do."""
    detail = error.detail if isinstance(error, StoreError) else str(error)
    if isinstance(error, Unreachable | DeadlineExceeded | OSError):
        reason = f" ({detail})" if detail else ""
        return CommandError(f"no inode service answers at {address}{reason}; is it running, and is this its address?")
    return CommandError(f"the service at {address} refused: {detail or type(error).__name__}")


def cluster_status(address: Address, *, timeout_s: float) -> ClusterStatus:
    """Everything an inode service tells about its cluster.

    Raises:
        CommandError: as `ask`.
    """
    return trio.run(partial(ask, address, GetClusterStatus(), timeout_s=timeout_s))
