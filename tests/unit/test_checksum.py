from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wire.checksum import by_table, crc32c, first_bad_unit, unit_checksums, unit_checksums_of_pieces

oracle = by_table()


def test_the_checksum_is_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, and the check value of CRC catalogues.
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720 B.4.


@given(st.binary(max_size=500), st.binary(max_size=500))
def test_hardware_and_table_agree_and_continue(first: bytes, second: bytes) -> None:
    assert crc32c(first) == oracle(first, 0)
    assert crc32c(second, crc32c(first)) == oracle(first + second, 0)
    assert crc32c(memoryview(bytearray(first))) == crc32c(first)


@given(st.binary(max_size=300), st.integers(1, 70))
def test_unit_checksums_are_one_per_unit_little_endian(data: bytes, unit: int) -> None:
    expected = b"".join(oracle(data[at : at + unit], 0).to_bytes(4, "little") for at in range(0, len(data), unit))
    assert unit_checksums(data, unit) == expected
    assert first_bad_unit(data, expected, unit) is None


@given(st.lists(st.binary(max_size=100), max_size=8), st.integers(1, 70))
def test_checksums_do_not_depend_on_the_pieces(pieces: list[bytes], unit: int) -> None:
    assert unit_checksums_of_pieces(pieces, unit) == unit_checksums(b"".join(pieces), unit)


@given(st.binary(min_size=1, max_size=300), st.integers(1, 70), st.data())
def test_any_flipped_bit_is_found_in_its_unit(data: bytes, unit: int, draw: st.DataObject) -> None:
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    assert first_bad_unit(flipped, unit_checksums(data, unit), unit) == bit // 8 // unit


@given(st.binary(max_size=300), st.integers(1, 70), st.integers(1, 300))
def test_a_count_that_does_not_fit_is_a_mismatch(data: bytes, unit: int, cut: int) -> None:
    sums = unit_checksums(data, unit)
    shorter = data[: max(0, len(data) - cut)]
    if shorter != data:
        assert first_bad_unit(shorter, sums, unit) is not None
        assert first_bad_unit(data, unit_checksums(shorter, unit), unit) is not None
