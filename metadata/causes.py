"""Nurseries raise groups; whoever has to tell a person or an errno wants the one cause in them."""

from __future__ import annotations


def single_cause(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The only exception in the group, however deep; the group itself if there are several."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
