"""The one error of this package."""

from __future__ import annotations


class DataError(ValueError):
    """The prompts can't be read or used as configured: one line that says where, what was found and what to do."""
