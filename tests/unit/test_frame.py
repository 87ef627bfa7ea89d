"""The frame reader against a simple oracle: the frames that were sent, however the bytes are cut or damaged."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wire import frame as wire_frame
from wire.checksum import by_table
from wire.errors import ProtocolViolation
from wire.frame import BODY_SIZE_MAX, HEADER, PAYLOAD_SIZE_MAX, RECEIVE_BUFFER_SIZE, FrameReader, Kind, encode_frame

GOLDEN = Path(__file__).parent / "golden" / "frames.txt"


@dataclass(frozen=True)
class Sent:
    """A frame by value."""

    kind: int
    method: int
    request_id: int
    timeout_ms: int
    body: bytes
    payload: bytes

    def encode(self) -> bytes:
        head = encode_frame(
            self.kind,
            method=self.method,
            request_id=self.request_id,
            body=self.body,
            timeout_ms=self.timeout_ms,
            payload_size=len(self.payload),
        )
        return head + self.payload


def sized_bytes(*sizes: int) -> st.SearchStrategy[bytes]:
    return st.one_of(st.binary(max_size=50), st.sampled_from([bytes(range(256)) * (size // 256 + 1) for size in sizes]))


frames = st.builds(
    Sent,
    st.sampled_from([int(kind) for kind in Kind]),
    st.integers(0, 2**16 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    sized_bytes(1000, RECEIVE_BUFFER_SIZE - 300, RECEIVE_BUFFER_SIZE + 1),
    sized_bytes(1000, RECEIVE_BUFFER_SIZE, 3 * RECEIVE_BUFFER_SIZE),
)


def read_all(stream: bytes, sizes: list[int], reader: FrameReader | None = None) -> tuple[list[Sent], str | None]:
    """Frames cut out of `stream`, received in pieces of at most `sizes`, and the violation that ended it, if any."""
    reader = reader or FrameReader()
    got, at, turn = [], 0, 0
    try:
        while at < len(stream):
            buffer = reader.buffer()
            assert len(buffer) > 0
            piece = stream[at : at + min(sizes[turn % len(sizes)], len(buffer))]
            buffer[: len(piece)] = piece
            at, turn = at + len(piece), turn + 1
            got += [
                Sent(f.kind, f.method, f.request_id, f.timeout_ms, bytes(f.body), bytes(f.payload))
                for f in reader.received(len(piece))
            ]
        reader.buffer()
    except ProtocolViolation as violation:
        return got, violation.detail
    assert reader.in_the_middle == (sum(len(frame.encode()) for frame in got) < len(stream))
    return got, None


chunk_sizes = st.lists(
    st.one_of(st.integers(1, 100), st.sampled_from([1000, RECEIVE_BUFFER_SIZE, 1 << 20])), min_size=1, max_size=6
)


@given(st.lists(frames, max_size=5), chunk_sizes)
def test_any_chunking_yields_the_frames_sent(sent: list[Sent], sizes: list[int]) -> None:
    stream = b"".join(frame.encode() for frame in sent)
    assert read_all(stream, sizes if len(stream) < 5000 else [*sizes, 50_000]) == (sent, None)


@given(st.binary(max_size=300), chunk_sizes)
@example(b"GET / HTTP/1.0\r\n\r\n", [100])
@example(b"FSDw\x02" + bytes(31), [100])
def test_garbage_is_refused_as_soon_as_it_can_be_told(garbage: bytes, sizes: list[int]) -> None:
    got, violation = read_all(garbage, sizes)
    assert got == []
    assert (violation is not None) == (
        (garbage[:4] != b"FSDw"[: len(garbage[:4])] and len(garbage) >= 4) or len(garbage) >= 36
    )


@given(frames, frames, st.data())
def test_a_flipped_bit_never_yields_another_message(first: Sent, second: Sent, draw: st.DataObject) -> None:
    """Only payloads, which bring their own checksums, may come out changed."""
    encoded = first.encode()
    covered = len(encoded) - len(first.payload)
    bit = draw.draw(st.integers(0, 8 * covered - 1))
    stream = bytearray(encoded + second.encode())
    stream[bit // 8] ^= 1 << bit % 8
    got, violation = read_all(bytes(stream), [1 << 20])
    assert got == []
    assert violation is not None


@given(st.lists(frames, min_size=1, max_size=3), chunk_sizes, chunk_sizes, st.data())
def test_frames_before_a_violation_come_out_in_any_chunking(
    sent: list[Sent], sizes: list[int], other_sizes: list[int], draw: st.DataObject
) -> None:
    stream = b"".join(frame.encode() for frame in sent) + draw.draw(st.binary(min_size=36, max_size=60))
    got = read_all(stream, [*sizes, 70_000])
    assert got == read_all(stream, [*other_sizes, 80_000])
    assert got[0] == sent
    assert got[1] is not None


def header_with(**changes: int | bytes) -> bytes:
    """A header that is well made but for the fields given."""
    fields: dict[str, int | bytes] = {
        "magic": b"FSDw",
        "version": 1,
        "kind": 2,
        "method": 1,
        "request_id": 1,
        "timeout_ms": 1,
        "body_size": 0,
        "payload_size": 0,
        "body_crc": 0,
        "header_crc": 0,
    }
    fields.update(changes)
    head = HEADER.pack(*fields.values())[:-4]
    return head + by_table()(head, 0).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        (header_with(magic=b"FSDx"), "does not speak this protocol"),
        (header_with(version=2), "frames of version 2, this program knows version 1: the older of the two"),
        (header_with(kind=9), "unknown kind 9"),
        (header_with(body_size=BODY_SIZE_MAX + 1), "too large"),
        (header_with(payload_size=PAYLOAD_SIZE_MAX + 1), "too large"),
        (header_with(body_size=2**32 - 1, payload_size=2**32 - 1), "too large"),
        (header_with(body_crc=1), "checksum of a message"),
        (header_with()[:-1] + b"\0", "checksum of a frame's header"),
    ],
)
def test_each_violation_is_told_in_a_sentence(header: bytes, sentence: str) -> None:
    for sizes in ([1], [100]):
        got, violation = read_all(header, sizes)
        assert got == []
        assert violation is not None
        assert sentence in violation


def test_no_memory_is_taken_for_a_payload_before_its_size_is_known_to_be_allowed() -> None:
    asked: list[int] = []

    def allocate(size: int) -> memoryview:
        asked.append(size)
        return memoryview(bytearray(size))

    too_large = header_with(payload_size=PAYLOAD_SIZE_MAX + 1)
    assert read_all(too_large, [36], FrameReader(allocate=allocate))[1] is not None
    assert asked == []
    reader = FrameReader(allocate=allocate)
    largest = header_with(payload_size=PAYLOAD_SIZE_MAX)
    reader.buffer()[:36] = largest
    assert reader.received(36) == []
    assert asked == []
    assert reader.payload_wanted == PAYLOAD_SIZE_MAX
    reader.buffer()
    assert asked == [PAYLOAD_SIZE_MAX]


def test_a_large_payload_is_received_into_its_own_memory() -> None:
    payload = os.urandom(1 << 20)
    stream = Sent(2, 1, 1, 1, b"body", payload).encode()
    reader = FrameReader()
    reader.buffer()[:100] = stream[:100]
    assert reader.received(100) == []
    rest = reader.buffer()
    assert len(rest) == len(stream) - 100
    rest[:] = stream[100:]
    (frame,) = reader.received(len(rest))
    assert frame.payload.obj is rest.obj
    assert frame.payload == payload


def golden_frames() -> dict[str, Sent]:
    return {
        "HELLO": Sent(1, 0, 0, 0, b"\x93\xa5block\x01\x01", b""),
        "REQUEST": Sent(2, 12, 7, 30_000, b"\x92\x01\x02", b""),
        "REPLY": Sent(3, 2, 2**40, 0, b"\x93\x00\x04\xa4sums", b"pay"),
        "ERROR": Sent(4, 10, 8, 0, b"\x92\x66\xa6no foo", b""),
        "NOTICE": Sent(5, 0, 0, 0, b"\x90", b""),
    }


def test_golden_frames_stay_as_they_were_released() -> None:
    """Frozen bytes: a change here is a new version of the protocol."""
    frozen = dict(line.split() for line in GOLDEN.read_text().splitlines() if not line.startswith("#"))
    assert set(frozen) == {kind.name for kind in Kind}
    for name, sent in golden_frames().items():
        assert sent.encode().hex() == frozen[name]
        assert read_all(bytes.fromhex(frozen[name]), [1000]) == ([sent], None)


def test_the_table_in_the_docstring_is_the_table_in_the_reference() -> None:
    reference = Path(__file__).parents[2] / "docs" / "reference" / "wire.md"
    assert wire_frame.__doc__ is not None
    table = re.findall(r"^\|.*\|$", wire_frame.__doc__, re.MULTILINE)
    assert table
    assert "\n".join(table) in reference.read_text()
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table[2:]]
    sizes = {"s": 4, "B": 1, "H": 2, "Q": 8, "I": 4}
    offset = 0
    for row, code in zip(rows, HEADER.format.replace("<4s", "s"), strict=False):
        assert row[:2] == [str(offset), str(sizes[code])]
        offset += sizes[code]
    assert offset == HEADER.size == int(rows[-2][0])
