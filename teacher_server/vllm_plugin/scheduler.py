"""vLLM's scheduler, but prefixes that are already computed are used only up to the first row to be scored: from a
cache come keys and values, not the hidden states that scoring needs."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler


class _Shortened:
    """A request that seems to end at `num_tokens`."""

    def __init__(self, request: Any, num_tokens: int) -> None:
        self._request = request
        self.num_tokens = num_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


class _Capped:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        manager: Any = self.kv_cache_manager  # type: ignore[attr-defined]
        find = manager.get_computed_blocks

        def get_computed_blocks(request: Any) -> Any:
            parameters = request.pooling_params
            extra = None if parameters is None else parameters.extra_kwargs
            if not extra:
                return find(request)
            # vLLM's own cap is num_tokens - 1, so that one token is left to compute.
            return find(_Shortened(request, min(request.num_tokens, extra["first"] + 1)))

        manager.get_computed_blocks = get_computed_blocks


class TeacherScheduler(_Capped, Scheduler):  # type: ignore[misc]
    """For an engine that schedules a step after the one before has ended."""


class TeacherAsyncScheduler(_Capped, AsyncScheduler):  # type: ignore[misc]
    """For an engine that schedules a step while the one before runs."""
