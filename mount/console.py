"""What the user sees on the way: a line on stderr about anything that takes longer than a second."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE_S = 1.0


def say(sentence: str) -> None:
    """One line for the user, on stderr: stdout is for results."""
    print(sentence, file=sys.stderr, flush=True)


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Tell what is being waited for when the block takes longer than a second."""
    timer = threading.Timer(PATIENCE_S, say, args=(f"{what} ...",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
