"""docs/reference/posix.md and the list that mounts are probed by say the same."""

from __future__ import annotations

import re
from pathlib import Path

from tests.posix.features import FEATURES
from tests.posix.tables import TABLES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "posix.md").read_text()
ROW = re.compile(
    r"^\| `(?P<name>[a-z-]+)` \| [^|]+ \| (?P<direct>yes|no) \| (?P<pyfuse3>yes|no) \|(?P<why>.*)\|$", re.MULTILINE
)


def test_the_page_tells_of_each_feature_what_is_probed_for() -> None:
    told = {row["name"]: (row["direct"] == "yes", row["pyfuse3"] == "yes") for row in ROW.finditer(PAGE)}
    assert told == {name: (feature.direct, feature.pyfuse3) for name, feature in FEATURES.items()}


def test_the_page_tells_why_a_feature_is_missing() -> None:
    for row in ROW.finditer(PAGE):
        if "no" in (row["direct"], row["pyfuse3"]):
            assert row["why"].strip(), row["name"]


def test_the_page_names_every_table() -> None:
    rows = PAGE[PAGE.index("| table | what its rows ask |") :]
    named = {name for line in re.findall(r"^\| ([a-z, -]+) \|", rows, re.MULTILINE) for name in line.split(", ")}
    assert {table.name for table in TABLES} <= named
