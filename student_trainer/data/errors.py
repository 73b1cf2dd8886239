"""The one error of this package."""

from __future__ import annotations


class DataError(ValueError):
    """The prompts can't be read or used as configured: one line that says where, what was found and what to do."""


def first_line(error: Exception) -> str:
    """Of a library's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
