"""`python -m tests.posix DIR [--like NAME] [WORD ...]`: run the tables on a directory, as root.

WORD: only rows whose table or name contains one of the words.  --like: what the directory is to be measured by, one of
tests.posix.features.SYSTEMS; without it features are only probed for, and rows of those that are missing are skipped.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.posix.features import SYSTEMS, Features
from tests.posix.tables import TABLES, run_table


def main() -> int:
    """Run; 0 when nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.posix", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--like", choices=SYSTEMS, help="the feature table's column that must hold")
    parser.add_argument("words", nargs="*", metavar="WORD")
    arguments = parser.parse_intermixed_args()
    passed = failed = skipped = 0
    with tempfile.TemporaryDirectory(prefix="posix-", dir=arguments.directory) as top:
        directory = Path(top)
        directory.chmod(0o755)
        features = Features(directory, arguments.like)
        for complaint in features.complaints:
            print(f"FAIL features: {complaint}", flush=True)
            failed += 1
        for table in TABLES:
            began = time.monotonic()
            outcome = run_table(table, directory, features, arguments.words)
            passed += outcome.passed
            failed += len(outcome.failures)
            skipped += len(outcome.skipped)
            for line in outcome.failures:
                print(f"FAIL {table.name}: {line}", flush=True)
            if outcome.passed or outcome.failures:
                print(f"{table.name}: {outcome.passed} rows in {time.monotonic() - began:.1f} s", flush=True)
    if features.missing:
        print(f"skipped for want of: {', '.join(sorted(features.missing))}")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
