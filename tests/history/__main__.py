"""Make histories on mounts, and check them.

    python -m tests.history run DIR DIR ... [--seed N] [--seconds S] [--clients N] [--stride BYTES] [--keep FILE]
    python -m tests.history check FILE

The DIRs are views of one directory, each by another mount (or, to try it, one directory of a tmpfs twice; ext4 gives a
new file the inode number of a removed one, and a history must not).  Exit code 0: linearizable; 1: not, and the history
is kept.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

from tests.history.check import check
from tests.history.record import History, load
from tests.history.runner import Plan, new_views, run


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.history", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("directories", type=Path, nargs="+", metavar="DIR")
    running.add_argument("--seed", type=int, default=random.randrange(1 << 30))
    running.add_argument("--seconds", type=float, default=5.0)
    running.add_argument("--clients", type=int, default=2, help="programs on each mount")
    running.add_argument("--stride", type=int, default=16, help="bytes from cell to cell: 16, or pages")
    running.add_argument("--keep", type=Path, help="where to keep the history, good or bad")
    checking = commands.add_parser("check")
    checking.add_argument("file", type=Path)
    flags = parser.parse_args()
    if flags.command == "check":
        return tell(load(flags.file), None)
    print(f"seed {flags.seed}", flush=True)
    plan = Plan(seed=flags.seed, seconds=flags.seconds, clients=flags.clients, stride=flags.stride)
    history = run(new_views(flags.directories), plan)
    bad = Path(f"history-{flags.seed}.jsonl")
    if flags.keep is not None:
        history.save(flags.keep)
    return tell(history, flags.keep or bad)


def tell(history: History, keep: Path | None) -> int:
    """Print the verdict; a bad history is kept."""
    began = time.monotonic()
    verdict = check(history)
    print(verdict)
    longest = max((call for call in history.calls if call.end), key=lambda call: (call.end or 0) - call.start)
    print(f"longest call: {((longest.end or 0) - longest.start) / 1e6:.1f} ms: {longest}")
    print(f"checked in {time.monotonic() - began:.1f} s")
    if not verdict.good and keep is not None:
        history.save(keep)
        print(f"the history is in {keep}: python -m tests.history check {keep}")
    return 0 if verdict.good else 1


if __name__ == "__main__":
    sys.exit(main())
