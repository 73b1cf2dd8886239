"""Words for the planner's numbers."""

from __future__ import annotations

from collections.abc import Mapping


def human(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def listed(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {human(size)}" for name, size in parts.items())
