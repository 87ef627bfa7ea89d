"""Operations that carry nothing out and take notes: which was called, with what."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Call: TypeAlias = tuple[str, tuple[object, ...], dict[str, object]]
"""Operation, arguments, arguments by name."""
ANSWERS: dict[str, object] = {"getxattr": b"value", "listxattr": (b"user.a", b"user.b")}
"""Where the front end looks at an answer before it replies."""


class NotingOperations:
    """Stands in for fsd.frontend.ports.Operations where only the calls are of interest."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def woken(self) -> None:
        """Nothing is believed here."""

    def __getattr__(self, name: str) -> Callable[..., object]:
        def operation(*arguments: object, **more: object) -> object:
            self.calls.append((name, arguments, more))
            return ANSWERS.get(name)

        return operation
