"""Error numbers are part of the protocol: frozen in golden/errors.txt as code, class, errno."""

from __future__ import annotations

import errno
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from wire.errors import BY_CODE, DETAIL_SIZE_MAX, RETIRED_CODES, NoSuchEntry, StoreError, from_code
from wire.frame import FrameReader, Kind
from wire.rpc.handshake import decode_error, encode_error

GOLDEN = Path(__file__).parent / "golden" / "errors.txt"


def test_error_numbers_are_frozen() -> None:
    """A released line is never edited; a new error needs a new line."""
    now = {code: f"{code} {kind.__name__} {errno.errorcode[kind.errno]}" for code, kind in BY_CODE.items()}
    lines = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    released = {int(line.split()[0]): line for line in lines}
    missing = [line for code, line in now.items() if code not in released]
    assert not missing, f"add to {GOLDEN}:\n" + "\n".join(missing)
    assert {code: line for code, line in released.items() if code not in RETIRED_CODES} == now


@given(st.sampled_from(sorted(BY_CODE)), st.text(st.characters(), max_size=2000), st.integers(0, 2**64 - 1))
def test_an_error_travels_with_its_class_and_a_bounded_detail(code: int, detail: str, request_id: int) -> None:
    """Surrogates, as in file names that are not UTF-8, become "?"."""
    data = encode_error(from_code(code, detail), method=7, request_id=request_id)
    reader = FrameReader()
    reader.buffer()[: len(data)] = data
    (frame,) = reader.received(len(data))
    assert (frame.kind, frame.method, frame.request_id) == (Kind.ERROR, 7, request_id)
    error = decode_error(frame)
    assert type(error) is BY_CODE[code]
    assert len(error.detail.encode()) <= DETAIL_SIZE_MAX
    assert detail.encode("utf-8", "replace").decode().startswith(error.detail)
    if len(detail.encode("utf-8", "replace")) <= DETAIL_SIZE_MAX:
        assert error.detail == detail.encode("utf-8", "replace").decode()


def test_an_error_of_a_newer_peer_is_a_plain_one_that_says_so() -> None:
    error = from_code(65_000, "what happened")
    assert type(error) is StoreError
    assert "65000" in error.detail
    assert "what happened" in error.detail
    assert type(from_code(NoSuchEntry.code, "x")) is NoSuchEntry
