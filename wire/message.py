"""Base classes of all messages: typed and immutable in memory, MessagePack arrays on the wire.

A message is an array of its fields in the order of their declaration.  Fields are only ever appended, with a default,
so that an older reader skips what it does not know and a newer one fills in what is not there.  A method number is
never used twice.  Sizes of names, lists and byte strings are bounded by the types (`Annotated` with `msgspec.Meta`),
so that a decoded message has been checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Generic, TypeVar

import msgspec


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=False):
    """Base of everything that is encoded into the body of a frame."""


R_co = TypeVar("R_co", bound=Message, covariant=True)


class Request(Message, Generic[R_co], frozen=True, array_like=True):
    """A question; `Request[X]` is answered by the message X, or by an error of wire.errors.

    METHOD is the number in the frame's header, unique in the table of its service.  REPLY is X again, for the decoder.
    """

    METHOD: ClassVar[int]
    REPLY: ClassVar[type[Message]]


class Notice(Message, frozen=True, array_like=True):
    """What a server tells a client unasked.

    NOTICE is the number in the frame's header, unique among the notices of its service.
    """

    NOTICE: ClassVar[int]


def notice_table(notices: Iterable[type[Notice]]) -> dict[int, type[Notice]]:
    """The table from number to class that a client hands to its channel.

    A number used twice is a bug and stops the process.
    """
    table: dict[int, type[Notice]] = {}
    for notice in notices:
        assert notice.NOTICE not in table, f"{notice.__name__}: notice number taken"
        table[notice.NOTICE] = notice
    return table


def method_table(requests: Iterable[type[Request[Message]]]) -> dict[int, type[Request[Message]]]:
    """The table from method number to request class that a service hands to its RPC server.

    A number used twice is a bug and stops the process.
    """
    table: dict[int, type[Request[Message]]] = {}
    for request in requests:
        assert request.METHOD not in table, f"{request.__name__}: method number taken"
        table[request.METHOD] = request
    return table
