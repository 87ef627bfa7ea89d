"""Frames: how messages are cut out of a byte stream.  Sans I/O: bytes in, frames out.

All integers little-endian.  One frame is a header of 36 bytes, a body (one MessagePack message, wire.message) and a
payload (bytes that are never copied or looked at on the way, such as a block's):

| offset | size | field        | meaning                                                                            |
|--------|------|--------------|------------------------------------------------------------------------------------|
| 0      | 4    | magic        | b"FSDw"                                                                            |
| 4      | 1    | version      | 1; magic and version keep their places in every version                            |
| 5      | 1    | kind         | 1 HELLO, 2 REQUEST, 3 REPLY, 4 ERROR, 5 NOTICE (server to client, unasked)         |
| 6      | 2    | method       | number of the request's, or notice's, class in its service's tables; 0 in HELLO    |
| 8      | 8    | request_id   | chosen by the client, unique on a connection; its reply or error repeats it        |
| 16     | 4    | timeout_ms   | of a REQUEST: how long its caller still waits; else 0                              |
| 20     | 4    | body_size    | 0 to BODY_SIZE_MAX                                                                 |
| 24     | 4    | payload_size | 0 to PAYLOAD_SIZE_MAX                                                              |
| 28     | 4    | body_crc     | crc32c of the body                                                                 |
| 32     | 4    | header_crc   | crc32c of bytes 0 to 31                                                            |
| 36     |      | body         |                                                                                    |
|        |      | payload      |                                                                                    |

Frames do not checksum payloads: a message that comes with one carries the payload's checksums in its body, made once
by the writer and verified end to end.  A second checksum per hop would cost a pass over every block and catch nothing
that those do not.  So: whoever adds a message with a payload adds its checksums.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable

import msgspec

from wire.checksum import crc32c
from wire.errors import ProtocolViolation

MAGIC = b"FSDw"
VERSION = 1
HEADER_SIZE = 36
BODY_SIZE_MAX = 2 << 20
"""Bytes; the largest message is a page of 4,096 directory entries with attributes and names of 255: 1.6 MiB."""
PAYLOAD_SIZE_MAX = (4 << 20) + (64 << 10)
"""Bytes: one block of 4 MiB and some slack for what may come to travel with it."""
TIMEOUT_MS_MAX = 24 * 3600 * 1000
"""A day: no call waits longer."""
RECEIVE_BUFFER_SIZE = 64 << 10
"""Bytes received at once where no large payload is awaited: some hundred small requests.  It is also what has to be
copied out of the way of a large payload that begins in it: 1.5 % of a block."""

HEADER = struct.Struct("<4sBBHQIIIII")
_HEADER_WITHOUT_CRC = struct.Struct("<4sBBHQIIII")
_CRC_SIZE = 4
assert HEADER.size == HEADER_SIZE
_EMPTY = memoryview(b"")


class Kind(enum.IntEnum):
    """What a frame is for."""

    HELLO = 1
    REQUEST = 2
    REPLY = 3
    ERROR = 4
    NOTICE = 5


class Frame(msgspec.Struct, frozen=True):
    """One frame as received.

    `body` may lie in the reader's buffer: decode it before the next FrameReader.buffer().  `payload` is the frame's
    own memory and may be kept.
    """

    kind: int
    method: int
    request_id: int
    timeout_ms: int
    body: memoryview
    payload: memoryview


_pack = _HEADER_WITHOUT_CRC.pack
_pack_crc = struct.Struct("<I").pack
_unpack_from = HEADER.unpack_from
_KINDS = frozenset(int(kind) for kind in Kind)


def encode_frame(
    kind: int, *, method: int, request_id: int, body: bytes, timeout_ms: int = 0, payload_size: int = 0
) -> bytes:
    """Header and body of a frame; the sender lets `payload_size` bytes follow.

    A body or payload above its bound is a bug of the service that made it, told by an AssertionError.
    """
    body_size = len(body)
    assert body_size <= BODY_SIZE_MAX, f"a message of {body_size} bytes (method {method}) does not fit into a frame"
    assert payload_size <= PAYLOAD_SIZE_MAX, f"a payload of {payload_size} bytes does not fit into a frame"
    head = _pack(MAGIC, VERSION, kind, method, request_id, timeout_ms, body_size, payload_size, crc32c(body))
    return head + _pack_crc(crc32c(head)) + body


class FrameReader:
    """Cuts a stream into frames.

    Use: `size = socket.recv_into(reader.buffer())`, then `for frame in reader.received(size)`, again and again.  The
    bytes of a large payload are received straight into the memory that the frame hands on.

    Invariant: the frames depend on the bytes alone, not on how they were cut; nothing but ProtocolViolation is raised,
    whatever the bytes are; no memory is taken for a size that was not checked against its bound and its checksum.
    """

    def __init__(
        self,
        *,
        allocate: Callable[[int], memoryview] = lambda size: memoryview(bytearray(size)),
        payload_size_max: int = PAYLOAD_SIZE_MAX,
    ) -> None:
        self._allocate = allocate
        self._payload_size_max = payload_size_max
        self._view = memoryview(bytearray(RECEIVE_BUFFER_SIZE))
        self._start = 0  # What lies in _view from _start to _end has been received and not yet been cut.
        self._end = 0
        # A frame that is received piece by piece: what is complete of it, and what its header says of the rest.
        self._partial: Frame | None = None
        self._payload_size = 0
        self._body_crc = 0
        self._target: memoryview | None = None  # Its body or payload, being received into memory of its own.
        self._filled = 0
        self._target_is_body = False
        self.payload_wanted = 0  # Above 0: buffer() is going to take this many bytes of memory for a payload.
        self._failure: ProtocolViolation | None = None

    @property
    def in_the_middle(self) -> bool:
        """A frame has begun and is not yet complete."""
        return self._end > self._start or self._partial is not None

    def buffer(self) -> memoryview:
        """Where to receive next, at least one byte; ends the life of the bodies handed out before.

        Raises:
            ProtocolViolation: the stream is not one of frames; the connection has to be ended.
        """
        if self._failure is not None:
            raise self._failure
        if self.payload_wanted:
            size, self.payload_wanted = self.payload_wanted, 0
            self._begin_target(self._allocate(size))
        if self._target is not None:
            return self._target[self._filled :]
        if self._start:
            rest = self._end - self._start
            if rest:
                self._view[:rest] = self._view[self._start : self._end]
            self._start, self._end = 0, rest
        return self._view[self._end :] if self._end else self._view

    def received(self, size: int) -> list[Frame]:
        """Cut the `size` bytes (at least 1) that were put into buffer(); the frames that are complete now.

        After a violation the frames before it are returned, and the next buffer() raises.
        """
        frames: list[Frame] = []
        try:
            if self._target is None:
                self._end += size
                self._cut(frames)
            else:
                self._filled += size
                if self._filled == len(self._target):
                    self._finish_target(frames)
        except ProtocolViolation as violation:
            self._failure = violation
        return frames

    def _cut(self, frames: list[Frame]) -> None:
        """Append the frames that lie complete in _view; begin to receive one that does not fit there."""
        view, start, end = self._view, self._start, self._end
        while end - start >= HEADER_SIZE:
            magic, version, kind, method, request_id, timeout_ms, body_size, payload_size, body_crc, header_crc = (
                _unpack_from(view, start)
            )
            body_start = start + HEADER_SIZE
            if (
                crc32c(view[start : body_start - _CRC_SIZE]) != header_crc
                or magic != MAGIC
                or version != VERSION
                or kind not in _KINDS
                or body_size > BODY_SIZE_MAX
                or payload_size > self._payload_size_max
            ):
                raise self._header_violation(start)
            body_end = body_start + body_size
            payload_end = body_end + payload_size
            if payload_end > end:
                frame = Frame(kind, method, request_id, timeout_ms, _EMPTY, _EMPTY)
                self._begin_partial(frame, body_size, payload_size, body_crc)
                return
            body = view[body_start:body_end]
            _check_body(body, body_crc)
            payload = _EMPTY
            if payload_size:
                payload = self._allocate(payload_size)
                payload[:] = view[body_end:payload_end]
            frames.append(Frame(kind, method, request_id, timeout_ms, body, payload))
            start = self._start = payload_end
        if end - start >= len(MAGIC) and view[start : start + len(MAGIC)] != MAGIC:
            raise self._header_violation(start)  # Now: a peer that speaks something else may be waiting for an answer.

    def _begin_partial(self, frame: Frame, body_size: int, payload_size: int, body_crc: int) -> None:
        """The frame at _start is not complete: wait for more, in _view if it is small, else in memory of its own."""
        body_start = self._start + HEADER_SIZE
        body_end = body_start + body_size
        if body_end <= self._end:  # Only of the payload is something missing.
            body = memoryview(bytes(self._view[body_start:body_end]))
            _check_body(body, body_crc)
            self._partial = msgspec.structs.replace(frame, body=body)
            self._start = body_end
            self.payload_wanted = payload_size
        elif HEADER_SIZE + body_size > RECEIVE_BUFFER_SIZE:
            self._partial = frame
            self._start = body_start
            self._payload_size, self._body_crc, self._target_is_body = payload_size, body_crc, True
            self._begin_target(memoryview(bytearray(body_size)))

    def _begin_target(self, target: memoryview) -> None:
        """Receive into `target` from now on; what has come of it already, all that is left in _view, moves there."""
        self._filled = self._end - self._start
        target[: self._filled] = self._view[self._start : self._end]
        self._start = self._end = 0
        self._target = target

    def _finish_target(self, frames: list[Frame]) -> None:
        """The body or the payload of the partial frame is complete."""
        assert self._partial is not None
        assert self._target is not None
        target, self._target = self._target, None
        if self._target_is_body:
            self._target_is_body = False
            _check_body(target, self._body_crc)
            self._partial = msgspec.structs.replace(self._partial, body=target)
            if self._payload_size:
                self.payload_wanted = self._payload_size
                return
            frames.append(self._partial)
        else:
            frames.append(msgspec.structs.replace(self._partial, payload=target))
        self._partial = None

    def _header_violation(self, start: int) -> ProtocolViolation:
        """Why the header at `start` is refused, in a sentence."""
        head = bytes(self._view[start : min(start + HEADER_SIZE, self._end)])
        if head[:4] != MAGIC:
            return ProtocolViolation(f"the peer does not speak this protocol: a frame begins with {head[:4]!r}")
        if head[4] != VERSION:
            return ProtocolViolation(
                f"the peer sends frames of version {head[4]}, this program knows version {VERSION}: "
                "the older of the two has to be upgraded"
            )
        _, _, kind, _, _, _, body_size, payload_size, _, header_crc = HEADER.unpack(head)
        if crc32c(head[:-_CRC_SIZE]) != header_crc:
            return ProtocolViolation("the checksum of a frame's header is wrong")
        if kind not in _KINDS:
            return ProtocolViolation(f"a frame is of unknown kind {kind}")
        return ProtocolViolation(f"a frame is too large: message {body_size} bytes, payload {payload_size} bytes")


def _check_body(body: memoryview, body_crc: int) -> None:
    if crc32c(body) != body_crc:
        raise ProtocolViolation("the checksum of a message is wrong")
