"""Every request has its operation."""

from __future__ import annotations

from metadata import protocol
from metadata.core import dispatch


def test_every_mutation_and_every_read_has_an_operation() -> None:
    assert set(dispatch._MUTATIONS) == set(protocol.MUTATIONS)
    assert set(dispatch._READS) == {*protocol.READS, protocol.GetUsage, protocol.ListQuotas} - {protocol.StatFs}
