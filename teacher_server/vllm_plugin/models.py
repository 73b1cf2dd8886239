"""A generative model of vLLM's as one that scores: the same class and weights, with our pooler behind the last layer.
`TeacherX`, for any architecture X that vLLM generates with, is made when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

PREFIX = "Teacher"
_made: dict[str, type] = {}


def register_all() -> None:
    """Adds TeacherX to vLLM's registry for every X in it that generates text, without importing any of them."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS

    known = ModelRegistry.get_supported_archs()
    for architecture in known & _TEXT_GENERATION_MODELS.keys():
        name = PREFIX + architecture
        if name not in known:
            ModelRegistry.register_model(name, f"{__name__}:{name}")


def __getattr__(name: str) -> type:
    """vLLM imports a lazily registered class by its name from this module."""
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _made:
        _made[name] = _make(name)
    return _made[name]


def _make(name: str) -> type:
    from vllm import ModelRegistry
    from vllm.model_executor.models.interfaces_base import VllmModelForPooling

    from teacher_server.vllm_plugin.pooler import TeacherPooler

    entry: Any = ModelRegistry.models[name.removeprefix(PREFIX)]
    base: Any = getattr(importlib.import_module(entry.module_name), entry.class_name)

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        self.pooler = TeacherPooler(self, vllm_config)

    namespace = {"__init__": __init__, "__module__": __name__, "__qualname__": name, "is_pooling_model": True}
    return type(name, (base, VllmModelForPooling), namespace)
