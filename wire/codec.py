"""Messages to bytes and back: msgspec's MessagePack, which checks every type and bound while it decodes."""

from __future__ import annotations

from functools import cache
from typing import TypeVar

import msgspec

from wire.checksum import Buffer
from wire.errors import ProtocolViolation
from wire.message import Message

M = TypeVar("M", bound=Message)

encode = msgspec.msgpack.Encoder().encode
"""encode(message) -> bytes."""


@cache
def decoder(kind: type[M]) -> msgspec.msgpack.Decoder[M]:
    """The one decoder of a message class."""
    return msgspec.msgpack.Decoder(kind)


DECODE_ERRORS = (ValueError, RecursionError)
"""What a Decoder raises for bytes that are not its message: damaged, of the wrong types, badly encoded, nested deep."""


def decode(kind: type[M], body: Buffer) -> M:
    """The message of class `kind` that `body` is.

    Raises:
        ProtocolViolation: it is not one, or a field is out of its bounds.
    """
    try:
        message: M = decoder(kind).decode(body)
    except DECODE_ERRORS as error:
        raise ProtocolViolation(f"not a {kind.__name__}: {error}") from error
    return message
