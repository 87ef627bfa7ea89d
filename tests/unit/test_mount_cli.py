"""How `fsd` ends when something happens to it that has nothing to do with the command."""

from __future__ import annotations

import signal
import subprocess
import sys

TALKS = """
import sys, types
from mount.cli import Command, run_guarded
talk = types.ModuleType("talk")
talk.run = lambda flags: print("x" * 200_000) or 0
sys.modules["talk"] = talk
sys.exit(run_guarded("fsd talk", Command("talk", "talk", "", "run", ""), None))
"""


def test_whoever_reads_the_output_may_stop_before_its_end() -> None:
    """As `fsd status --json | head -c 300` does; the exit code is that of `cat` in its place, as a shell tells it."""
    with subprocess.Popen([sys.executable, "-c", TALKS], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(300)
        process.stdout.close()
        told = process.stderr.read()
    assert (process.returncode, told) == (128 + signal.SIGPIPE, b"")
