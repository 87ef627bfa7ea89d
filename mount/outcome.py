"""How a command ends: exit codes, and the one exception that carries a sentence to the user."""

from __future__ import annotations

import enum


class Exit(enum.IntEnum):
    """Exit codes of `fsd` (docs/reference/cli.md lists them)."""

    OK = 0
    FAILURE = 1  # It was not done; the sentence on stderr says why and what to do.
    USAGE = 2  # The command line or the configuration file is wrong; nothing was tried.
    PARTIAL = 3  # Done in part: `down` left something, `status` sees something degraded.


class CommandError(Exception):
    """An expected failure: `sentence` is for the user, without a traceback."""

    def __init__(self, sentence: str, code: Exit = Exit.FAILURE) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.code = code


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions inside nested exception groups, in order; the error itself when it is not a group."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]
