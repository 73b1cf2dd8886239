"""Configuration of the forms: what is checked here needs no model. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import Field, model_validator

from teacher_api.settings import Section

MLP, REPLACED_LAYERS = "mlp", "replaced_layers"
"""Words of student.freeze that are no patterns."""
ALL_LINEAR = "all-linear"


class LoraConfig(Section):
    """Low-rank adapters through peft: W + (alpha / r) · B A, where A and B learn and W does not (arXiv 2106.09685)."""

    r: int = Field(0, ge=0, le=8192)
    """Rank of the adapters; 0: none, all weights are trained."""
    alpha: int = Field(32, ge=1)
    """The adapters' product is scaled by alpha / r (alpha / √r with rslora)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of what goes into the adapters, while training. Above 0, q_now is not quite the distribution sampled from."""
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    """Layers that get one, by the end of their names (q_proj, self_attn.o_proj); all-linear: every linear layer but the
    output head."""
    exclude_modules: tuple[str, ...] = ()
    """Layers of these that get none after all, by the end of their names."""
    rslora: bool = False
    """Scale by alpha / √r (arXiv 2312.03732)."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> LoraConfig:
        set_anyway = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if not self.r and set_anyway:
            name = set_anyway[0]
            raise ValueError(f"{name}: got {getattr(self, name)!r} with r 0, expected none: there are no adapters")
        if not self.target_modules:
            raise ValueError(f"target_modules: got none, expected names of layers, or {ALL_LINEAR}")
        if ALL_LINEAR in self.target_modules and len(self.target_modules) > 1:
            raise ValueError(f"target_modules: got {ALL_LINEAR} among others, expected it alone")
        return self


def check_layers(layers: Sequence[int], graft_from: str) -> None:
    """Raises ValueError where student.layers_from_teacher and student.graft_from don't go together."""
    if layers and not graft_from:
        raise ValueError(
            f"layers_from_teacher: got {list(layers)} without graft_from, expected the model that they come from"
        )
    if graft_from and not layers:
        raise ValueError(f"graft_from: got {graft_from!r} without layers_from_teacher, expected the layers to replace")
    if len(set(layers)) < len(layers) or any(layer < 0 for layer in layers):
        raise ValueError(f"layers_from_teacher: got {list(layers)}, expected each layer once, counted from 0")


def check_freeze(freeze: Sequence[str], layers: Sequence[int]) -> None:
    """Raises ValueError for a word of student.freeze that can't mean anything."""
    for word in freeze:
        if word == REPLACED_LAYERS and not layers:
            raise ValueError(f"freeze: got {word} without layers_from_teacher, expected none: no layer is replaced")
        try:
            re.compile(word)
        except re.error as error:
            raise ValueError(f"freeze: {word!r} is no regular expression: {error}") from error
        if not word:
            raise ValueError("freeze: got an empty pattern, which all names match; expected one that says something")
