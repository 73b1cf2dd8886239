"""What of its answers the server keeps, where, and for whom: the section `cache` of its configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from teacher_api.settings import Section

MIB = 1 << 20


class CacheConfig(Section):
    """Answers that are given again instead of being computed again."""

    enabled: bool = True
    """Answer what was scored before from memory or disk, and compute what several callers ask at a time once."""
    memory_bytes: int = Field(default=256 * MIB, ge=0)
    """Most memory for kept answers; 0: none are kept there."""
    dir: str = ""
    """Directory of answers that survive a restart, of one server and on a disk of its machine; empty: none do."""
    disk_bytes: int = Field(default=10240 * MIB, ge=MIB)
    """Most bytes of answers in `dir`."""
    share: Literal["tenant", "server"] = "tenant"
    """Who gets an answer that was computed for another: callers of the same tenant, or of the whole server. A shared
    cache tells by its speed what others have scored."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> CacheConfig:
        given = self.model_fields_set - {"enabled"}
        if given and not self.enabled:
            raise ValueError(f"{min(given)}: given with enabled false; expected none, for nothing is kept")
        if "disk_bytes" in given and not self.dir:
            raise ValueError(f"disk_bytes: got {self.disk_bytes} without dir; expected the directory to keep them in")
        return self
