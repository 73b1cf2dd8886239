"""LoRA adapters on disk: what a directory says of itself, held against the base before an engine starts. Engines skip
in silence what does not fit, and an adapter that is half applied is another teacher than the one that was trained.

Owns no engine; what an engine needs of them is vllm_adapters.py's. Shape legend: r rank, I inputs, O outputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacher_server.backends.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_digest

PREFIX = "base_model.model."  # of every tensor that PEFT saves
A, B = ".lora_A.weight", ".lora_B.weight"
OUTPUT_HEAD = "lm_head"
Shapes = dict[str, tuple[int, ...]]  # tensor name -> shape


@dataclass(frozen=True, slots=True)
class Adapter:
    """W' = W + scale · B·A in each of its modules, A [r, I], B [O, r]."""

    name: str
    directory: Path
    digest: str
    rank: int  # the largest of its modules
    modules: frozenset[str]  # last parts of their names, such as q_proj
    config: Mapping[str, Any]

    @property
    def scale(self) -> float | None:
        """The same for all modules, or None where the configuration sets them apart."""
        if self.config.get("rank_pattern") or self.config.get("alpha_pattern"):
            return None
        rank = float(self.config["r"])
        return float(self.config["lora_alpha"]) / (rank**0.5 if self.config.get("use_rslora") else rank)

    def pairs(self) -> dict[str, tuple[Any, Any]]:
        """Module name in the base -> its A and B, as float32 tensors."""
        from safetensors.torch import load_file

        tensors = load_file(self.directory / ADAPTER_WEIGHTS)
        names = {name.removeprefix(PREFIX).removesuffix(A) for name in tensors if name.endswith(A)}
        return {name: (tensors[PREFIX + name + A].float(), tensors[PREFIX + name + B].float()) for name in names}


def read_adapters(places: Mapping[str, str], base: Path) -> dict[str, Adapter]:
    """The adapters in the directories `places`, by name.

    Args:
        base: directory of the checkpoint that they are to change.

    Raises:
        ValueError: one line that names the adapter: it can't be read, is no LoRA, or does not fit the base.
    """
    if not places:
        return {}
    shapes = _shapes_of(base)
    return {name: _read(name, Path(place).expanduser(), shapes) for name, place in places.items()}


def _read(name: str, directory: Path, base: Shapes) -> Adapter:
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (directory / file).is_file():
            raise ValueError(f"lora.{name}: {str(directory)!r} has no {file}; expected the directory of a PEFT adapter")
    try:
        config = json.loads((directory / ADAPTER_CONFIG).read_text("utf-8"))
        tensors = _shapes_in(directory / ADAPTER_WEIGHTS)
    except (ValueError, OSError) as error:
        raise ValueError(f"lora.{name}: {str(directory)!r} can't be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or config.get("peft_type", "LORA") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"lora.{name}: {ADAPTER_CONFIG} is of {kind!r}; expected peft_type LORA")
    for key, kinds in (("r", (int,)), ("lora_alpha", (int, float))):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
            raise ValueError(f"lora.{name}: {ADAPTER_CONFIG} has {key} {value!r}; expected a number above 0")
    if config.get("use_dora"):
        raise ValueError(f"lora.{name}: is a DoRA adapter, which vLLM can't run; expected plain LoRA")
    try:
        modules, rank = _fitted(tensors, base)
    except ValueError as error:
        raise ValueError(f"lora.{name}: {error}") from None
    return Adapter(name, directory, adapter_digest(directory), rank, modules, config)


def _fitted(tensors: Shapes, base: Shapes) -> tuple[frozenset[str], int]:
    """Last parts of the modules' names, and the largest rank. Raises ValueError for the first that does not fit."""
    modules, largest = set(), 0
    for tensor in sorted(tensors):
        if not (tensor.startswith(PREFIX) and tensor.endswith((A, B))):
            raise ValueError(f"holds {tensor!r}; expected {PREFIX}…{A} and …{B} alone")
        module = tensor.removeprefix(PREFIX).removesuffix(A).removesuffix(B)
        a, b = (tensors.get(PREFIX + module + part) for part in (A, B))
        if a is None or b is None:
            raise ValueError(f"{module} has {tensor.rsplit('.', 2)[1]} alone; expected lora_A and lora_B")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise ValueError(f"{module} has A {list(a)} and B {list(b)}; expected [r, I] and [O, r]")
        last = module.rsplit(".", 1)[-1]
        if last == OUTPUT_HEAD:
            raise ValueError(
                f"changes the output head {module}, which all teachers on a base share; expected it left out"
            )
        _check_module(module, (b[0], a[1]), base)
        modules.add(last)
        largest = max(largest, a[0])
    if not modules:
        raise ValueError("holds no tensors; expected a trained adapter")
    return frozenset(modules), largest


def _check_module(module: str, shape: tuple[int, int], base: Shapes) -> None:
    if not base:
        return
    weight = base.get(f"{module}.weight")
    if weight is None:
        if not any(name.startswith(f"{module}.") for name in base):  # quantised weights have other names
            raise ValueError(f"changes {module}, which the base lacks; expected an adapter trained on this base")
    elif len(weight) == 2 and weight not in (shape, shape[::-1]):  # some architectures store [I, O]
        raise ValueError(f"{module} is made for a weight of {list(shape)}, the base has {list(weight)}")


def _shapes_of(base: Path) -> Shapes:
    """Of all tensors of a checkpoint; empty where it is not stored as safetensors."""
    return {name: shape for path in sorted(base.glob("*.safetensors")) for name, shape in _shapes_in(path).items()}


def _shapes_in(path: Path) -> Shapes:
    """From the file's header alone. Raises ValueError where it is no safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no dict
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from error
