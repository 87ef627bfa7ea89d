"""All tables, and how one is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.posix.attributes import modes, sizes, times
from tests.posix.directories import directories
from tests.posix.extended import acls, flags, xattrs
from tests.posix.features import Features
from tests.posix.files import allocation, bytes_, memory, opening
from tests.posix.locks import locks
from tests.posix.names import names, renames
from tests.posix.paths import paths
from tests.posix.table import Table, run

TABLES: tuple[Table, ...] = (
    paths,
    names,
    renames,
    modes,
    times,
    sizes,
    opening,
    bytes_,
    allocation,
    memory,
    directories,
    xattrs,
    acls,
    flags,
    locks,
)


@dataclass
class Outcome:
    """What became of a table's rows."""

    passed: int = 0
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def run_table(table: Table, directory: Path, features: Features, words: Sequence[str] = ()) -> Outcome:
    """Run the rows of a table below `directory`; rows that need a missing feature are skipped."""
    outcome = Outcome()
    for row in table:
        if words and not any(word in row.name or word == table.name for word in words):
            continue
        if features.missing.intersection(row.needs):
            outcome.skipped.append(row.name)
            continue
        try:
            run(row, directory)
        except Exception as error:
            outcome.failures.append(f"{row.name}: {type(error).__name__}: {error}")
        else:
            outcome.passed += 1
    return outcome
