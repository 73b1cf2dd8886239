"""Which parameters stay as they are. A frozen one requires no gradient, so the optimizer keeps no state for it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from student_trainer.forms.config import MLP, REPLACED_LAYERS

FEED_FORWARD = frozenset({"mlp", "feed_forward", "ffn", "mlp_block", "block_sparse_moe", "moe", "shared_mlp"})
"""What families call the part of a layer that mixes no positions: a module of one of these names, experts included."""


def freeze(model: torch.nn.Module, words: Sequence[str], replaced: Sequence[str]) -> None:
    """Freezes what `words` name: mlp, replaced_layers, or a regular expression that is searched for in the parameters'
    names. A parameter shared by two modules (tied) has both names, and is frozen under either.

    Args:
        replaced: names of the modules that replaced_layers means.
    Raises:
        ValueError: a word that matches no parameter, or nothing is left to train.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    for word in words:
        found = [parameter for name, parameter in named if _matches(word, name, replaced)]
        if not found:
            raise ValueError(
                f"student.freeze: {word!r} matches no parameter of {type(model).__name__}; expected mlp, "
                f"replaced_layers, or a pattern found in a name such as {named[0][0]} or {named[-1][0]}"
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if words and not any(parameter.requires_grad for _, parameter in named):
        raise ValueError(f"student.freeze: {list(words)} name all parameters, expected some that are left to train")


def _matches(word: str, name: str, replaced: Sequence[str]) -> bool:
    if word == MLP:
        return not FEED_FORWARD.isdisjoint(name.split("."))
    if word == REPLACED_LAYERS:
        return any(name.startswith(f"{layer}.") for layer in replaced)
    return re.search(word, name) is not None
