"""Every request has its operation."""

from __future__ import annotations

from metadata import protocol
from metadata.core import dispatch


def test_every_mutation_and_every_read_has_an_operation() -> None:
    assert dispatch._MUTATIONS.keys() | dispatch._MUTATIONS_OF_OPENS.keys() == set(protocol.MUTATIONS)
    assert not dispatch._MUTATIONS.keys() & dispatch._MUTATIONS_OF_OPENS.keys()
    assert set(dispatch._READS) == {*protocol.READS, protocol.GetUsage, protocol.ListQuotas} - {protocol.StatFs}
