"""Agents on several views of one directory, and the history that they make together."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.history import agent
from tests.history.record import Call, History, Lost, numbered, read_log

END_GRACE_S = 30.0
"""After the agreed end, for the last call of each agent."""
READY_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Plan:
    """What agents do."""

    seed: int = 0
    seconds: float = 3.0
    stride: int = agent.CELL  # Bytes from cell to cell; agent.CELL, or a multiple of a page.
    names: int = 4
    clients: int = 2  # On each mount.
    weights: dict[str, int] = field(default_factory=dict)  # Other ones than agent.WEIGHTS.


class Agents:
    """The agents of one run."""

    def __init__(self, views: Sequence[Path], plan: Plan, logs: Path) -> None:
        """`views`: an existing, empty directory, as each of the mounts shows it."""
        self.plan = plan
        self.views = list(views)
        self.logs = logs
        self.lost: list[Lost] = []
        self._names: list[tuple[str, str]] = []
        self._running: list[subprocess.Popen[str]] = []
        self._until_ns = 0
        for name in ("d0", "d1"):
            (views[0] / name).mkdir()
        for name in ("flock", "plock"):
            (views[0] / name).touch()
        self.roots = [(views[0] / name).stat().st_ino for name in ("d0", "d1")]

    def start(self) -> None:
        """Start all of them; when this returns they work, until `seconds` are over."""
        for number in range(self.plan.clients * len(self.views)):
            mount = "abcdefgh"[number % len(self.views)]
            client = f"{mount}{number // len(self.views) + 1}"
            config = {
                "top": str(self.views[number % len(self.views)]),
                "client": number,
                "seed": self.plan.seed * 1000 + number,
                "stride": self.plan.stride,
                "names": self.plan.names,
                "weights": self.plan.weights,
                "log": str(self.logs / client),
            }
            argv = [sys.executable, "-S", agent.__file__, json.dumps(config)]
            self._running.append(
                subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
            self._names.append((client, mount))
        for one in self._running:
            assert one.stdout is not None
            assert one.stdout.readline() == "ready\n", self._complaint(one)
        self._until_ns = time.monotonic_ns() + round(self.plan.seconds * 1e9)
        for one in self._running:
            assert one.stdin is not None
            one.stdin.write(f"{self._until_ns}\n")
            one.stdin.flush()

    def of_mount(self, mount: str) -> list[subprocess.Popen[str]]:
        """The programs on one mount ("a" is that of the first view)."""
        return [one for one, (_, where) in zip(self._running, self._names, strict=True) if where == mount]

    def finish(self, grace_s: float = END_GRACE_S) -> History:
        """Wait for all of them, kill who does not end in time; what they recorded.

        Raises: AssertionError: an agent has failed.
        """
        end = self._until_ns / 1e9 + grace_s
        for one in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.wait(max(end - time.monotonic(), 0.1))
        self.kill()
        failed = [one for one in self._running if one.returncode > 0]
        assert not failed, self._complaint(failed[0])
        return History(self.roots, self.plan.stride, numbered(self._calls()), self.lost, self.plan.seed)

    def kill(self) -> None:
        """End all that still run."""
        for one in self._running:
            one.kill()
        for one in self._running:
            one.wait()

    def close(self) -> None:
        """Kill them, and let go of their pipes."""
        self.kill()
        for one in self._running:
            for stream in (one.stdin, one.stdout, one.stderr):
                assert stream is not None
                with contextlib.suppress(BrokenPipeError):  # What was not yet flushed to it was for nobody.
                    stream.close()

    def _calls(self) -> Iterator[Call]:
        for client, mount in self._names:
            yield from read_log(self.logs / client, client, mount)

    def _complaint(self, one: subprocess.Popen[str]) -> str:
        one.kill()
        assert one.stderr is not None
        return one.stderr.read()


@contextlib.contextmanager
def agents(views: Sequence[Path], plan: Plan, before: Callable[[], object] = lambda: None) -> Iterator[Agents]:
    """Agents that work; at the end none is left.

    `before` is called when the first view has all that the agents need, and none of them has been started.
    """
    with tempfile.TemporaryDirectory(prefix="fsd-history-") as logs:
        made = Agents(views, plan, Path(logs))
        try:
            before()
            made.start()
            yield made
        finally:
            made.close()


def run(views: Sequence[Path], plan: Plan) -> History:
    """The history of one undisturbed run in `views`."""
    with agents(views, plan) as working:
        return working.finish()


def new_views(mounts: Sequence[Path]) -> list[Path]:
    """A new directory, as each of the mounts shows it."""
    made = Path(tempfile.mkdtemp(prefix="history-", dir=mounts[0]))
    os.chmod(made, 0o755)
    return [mount / made.name for mount in mounts]
