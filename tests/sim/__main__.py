"""Run seeds by hand: `scripts/sim --seed N` tells all of one, `scripts/sim --seeds COUNT --from N` what is wrong with
many.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time

from tests.sim.scenario import Result, Shape, run_seed


def main() -> int:
    """0: nothing is wrong."""
    parser = argparse.ArgumentParser(prog="scripts/sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one, and tell everything that happens")
    parser.add_argument("--seeds", type=int, default=0, metavar="COUNT", help="run so many")
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="N", help="the first of them (0)")
    parser.add_argument("--seconds", type=float, help="run seeds for so long")
    parser.add_argument("--mounts", type=int, default=Shape.mounts)
    parser.add_argument("--programs", type=int, default=Shape.programs, help="on each mount")
    parser.add_argument("--calls", type=int, default=Shape.calls, help="things that each program does")
    parser.add_argument("--faults", type=int, default=Shape.faults, help="at most")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first seed that fails")
    parser.add_argument("--log", default="warning", help="with --seed: from which level (debug, info, warning)")
    arguments = parser.parse_args()
    shape = Shape(arguments.mounts, arguments.programs, arguments.calls, arguments.faults)
    if arguments.seed is not None:
        result = run_seed(arguments.seed, shape, told=logging.getLevelNamesMapping()[arguments.log.upper()])
        print(*result.lines, sep="\n")
        print(f"digest {result.digest}")
        return tell(result, shape)
    return run_many(arguments, shape)


def run_many(arguments: argparse.Namespace, shape: Shape) -> int:
    """Seeds one after another, until they or the seconds are over."""
    began_s, cpu_s = time.monotonic(), time.process_time()
    seed, failed = arguments.first, 0
    while (
        seed - arguments.first < arguments.seeds
        if arguments.seconds is None
        else time.monotonic() - began_s < arguments.seconds
    ):
        failed += tell(run_seed(seed, shape), shape)
        seed += 1
        if seed % 20 == 0:
            gc.collect()
        if failed and not arguments.keep_going:
            break
    count = seed - arguments.first
    cpu_ms = (time.process_time() - cpu_s) / max(count, 1) * 1000
    print(f"{count} seeds from {arguments.first}, {failed} failed; {cpu_ms:.0f} ms of CPU each")
    return min(failed, 1)


def tell(result: Result, shape: Shape) -> int:
    """Print what is wrong with a seed; 1 if something is."""
    if not result.wrong:
        return 0
    print(f"seed {result.seed}: {'; '.join(result.faults) or 'no faults'}")
    for line in result.wrong:
        print("   ", line.replace("\n", "\n    "))
    print(f"again: {command(result.seed, shape)}")
    return 1


def command(seed: int, shape: Shape) -> str:
    """What replays the seed."""
    options = [
        f" --{name} {getattr(shape, name)}"
        for name in ("mounts", "programs", "calls", "faults")
        if getattr(shape, name) != getattr(Shape, name)
    ]
    return f"scripts/sim --seed {seed}{''.join(options)}"


if __name__ == "__main__":
    sys.exit(main())
