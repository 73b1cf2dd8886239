"""The output head of a checkpoint that vLLM serves, read from its files: the engine's own is packed, divided among
processes and out of reach. Knows which tensors make a head; whether the engine computes with them is checked before it
is shared (head_share.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from teacher_api import causal_lm
from teacher_server.backends.base import ModelFacts, OutputHead
from teacher_server.backends.torch_loading import HEAD_DTYPES

_HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
_EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


def read_output_head(directory: Path, config: Any, architecture: str, facts: ModelFacts) -> OutputHead:
    """The head in the engine's arithmetic.

    Args:
        config: of the language model (transformers).
        architecture: its name, for messages.

    Raises:
        ValueError: the checkpoint has no safetensors files, or not exactly one tensor that can be the head.
    """
    files = {name: path for path in sorted(directory.glob("*.safetensors")) for name in _names(path)}
    tied = bool(getattr(config, "tie_word_embeddings", False))
    endings = _EMBEDDING_NAMES if tied else _HEAD_NAMES
    found = [name for name in files if any(name == end or name.endswith(f".{end}") for end in endings)]
    if len(found) != 1:
        raise ValueError(
            f"the output head of {architecture} is not understood: expected one tensor called {' or '.join(endings)} "
            f"in {directory}, found {', '.join(found) or 'none'}"
        )
    (name,) = found
    weight, bias_name = _tensor(files[name], name), name.removesuffix("weight") + "bias"
    if weight.dtype not in HEAD_DTYPES or weight.ndim != 2 or len(weight) < facts.logit_width:
        raise ValueError(
            f"the output head of {architecture}, {name}, is {weight.dtype}{list(weight.shape)}; expected "
            f"[{facts.logit_width}, {facts.hidden_size}] in float"
        )
    dtype = getattr(torch, facts.dtype)
    bias = None if tied or bias_name not in files else _tensor(files[bias_name], bias_name)
    scale, soft_cap = causal_lm.scale_and_soft_cap(config)
    width = facts.logit_width
    return OutputHead(
        weight[:width].to(dtype), None if bias is None else bias[:width].to(dtype), float(scale), soft_cap
    )


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor
