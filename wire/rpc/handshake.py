"""What the two ends of a connection say before the first request, and the body of an error frame.

The client's first frame is HELLO; the server answers with its own HELLO, or with an ERROR of request id 0 and ends the
connection.  An ERROR of request id 0 later on tells why the server ends the connection.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from wire.codec import decode, encode
from wire.errors import DETAIL_SIZE_MAX, StoreError, WrongCluster, WrongVersion, from_code
from wire.frame import Frame, Kind, encode_frame
from wire.message import Message

VERSION_MIN = 1
VERSION_MAX = 1
"""Versions of the protocol (frames and messages) that this program speaks; two peers use the highest in common."""

CONNECTION_ID = 0
"""The request id of what concerns the whole connection; requests count from 1."""


INSTANCE_SIZE_MAX = 256
"""Characters; a cluster's UUID and a server's number fit easily."""


class Hello(Message, frozen=True, array_like=True):
    """Who I am and what I speak."""

    service: Annotated[str, msgspec.Meta(max_length=64)]  # Which service the client wants, or the server is.
    version_min: int
    version_max: int
    instance: Annotated[str, msgspec.Meta(max_length=INSTANCE_SIZE_MAX)] = ""  # Which one of that kind; "": any.


class ErrorBody(Message, frozen=True, array_like=True):
    """A StoreError on the wire; the detail is cut at the sender, the bound here only guards the reader."""

    code: int
    detail: Annotated[str, msgspec.Meta(max_length=4 * DETAIL_SIZE_MAX)] = ""


def encode_hello(service: str, instance: str = "") -> bytes:
    """The HELLO frame of this program."""
    body = encode(Hello(service, VERSION_MIN, VERSION_MAX, instance))
    return encode_frame(Kind.HELLO, method=0, request_id=CONNECTION_ID, body=body)


def check_hello(frame: Frame, service: str, instance: str = "") -> None:
    """Accept the peer's HELLO.

    Addresses are used again: what listens at one may by now belong to another cluster.

    Raises:
        WrongCluster: it is, or wants, another kind of service, or another one of that kind.
        WrongVersion: no version in common.
        ProtocolViolation: the body is not a Hello.
    """
    hello = decode(Hello, frame.body)
    if hello.service != service:
        raise WrongCluster(f"this is the {service!r} service; the peer speaks of the {hello.service!r} service")
    if instance and hello.instance and hello.instance != instance:
        raise WrongCluster(f"this is about {instance!r} of the {service!r} service; the peer's is {hello.instance!r}")
    if hello.version_min > VERSION_MAX or hello.version_max < VERSION_MIN:
        raise WrongVersion(
            f"the peer speaks protocol versions {hello.version_min} to {hello.version_max}, "
            f"this program {VERSION_MIN} to {VERSION_MAX}: the older of the two has to be upgraded"
        )


def encode_error(error: StoreError, *, method: int, request_id: int) -> bytes:
    """The ERROR frame that tells `error`; its detail is cut to DETAIL_SIZE_MAX bytes."""
    detail = error.detail
    if len(detail) > DETAIL_SIZE_MAX // 4:
        detail = detail.encode("utf-8", "replace")[:DETAIL_SIZE_MAX].decode("utf-8", "ignore")
    try:
        body = encode(ErrorBody(error.code, detail))
    except UnicodeEncodeError:  # A path with surrogates in it.
        body = encode(ErrorBody(error.code, detail.encode("utf-8", "replace").decode()))
    return encode_frame(Kind.ERROR, method=method, request_id=request_id, body=body)


def decode_error(frame: Frame) -> StoreError:
    """The error that an ERROR frame tells."""
    body = decode(ErrorBody, frame.body)
    return from_code(body.code, body.detail)
