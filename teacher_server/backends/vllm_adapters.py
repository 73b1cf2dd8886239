"""LoRA adapters as vLLM has them: what its engine must be started with, and what a request carries.

vLLM keys its prefix cache by an adapter's name and path, so that teachers never share keys and values; the check at
start looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from teacher_server.backends.adapters import Adapter

ARGUMENTS = ("enable_lora", "max_lora_rank", "lora_target_modules", "max_cpu_loras", "default_mm_loras")
"""Engine arguments that follow from the adapters."""
CPU_STEP_TOKENS = 1024
"""Of an engine step on a CPU, where vLLM copies A and B for every token of it: r · (I + O) values each."""


@dataclass(frozen=True)
class VllmAdapters:
    """The adapters that one engine serves, by name."""

    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    on_cpu: bool = False

    def arguments(self) -> dict[str, Any]:
        """Engine arguments that the adapters cannot do without. Raises ValueError for a rank that vLLM can't run."""
        if not self.adapters:
            return {}
        largest = max(self.adapters.values(), key=lambda adapter: adapter.rank)
        ranks = [rank for rank in _ranks() if rank >= largest.rank]
        if not ranks:
            raise ValueError(f"lora.{largest.name}: rank {largest.rank}; vLLM runs at most {max(_ranks())}")
        arguments = {
            "enable_lora": True,
            "max_lora_rank": min(ranks),
            # Without the output head, which vLLM would wrap in a layer that takes one row a sequence.
            "lora_target_modules": sorted(set().union(*(adapter.modules for adapter in self.adapters.values()))),
            "max_cpu_loras": len(self.adapters) + 1,
        }
        if self.on_cpu:
            # On CPUs vLLM gives tokens of the base slot −1, the last: it must stay empty, for it is applied to them.
            arguments["max_loras"] = len(self.adapters) + 1
        return arguments

    def defaults(self) -> dict[str, Any]:
        """Engine arguments that a user may set otherwise."""
        if not self.adapters:
            return {}
        return {"max_num_batched_tokens": CPU_STEP_TOKENS} if self.on_cpu else {"max_loras": len(self.adapters)}

    def request(self, teacher: str) -> Any:
        """vLLM's LoRARequest for `teacher`; None for the base."""
        if not teacher:
            return None
        from vllm.lora.request import LoRARequest

        number = 1 + list(self.adapters).index(teacher)
        return LoRARequest(teacher, number, str(self.adapters[teacher].directory.resolve()))


def _ranks() -> tuple[int, ...]:
    from vllm.config.lora import MaxLoRARanks

    ranks: tuple[int, ...] = get_args(MaxLoRARanks)
    return ranks
