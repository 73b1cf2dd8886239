"""A layer of one model at work inside another: it gets its own mask, its own rotary embeddings and its own kind of
cache, whatever its host uses, and answers as the layer did whose place it has.

Shape legend: B sequences, T tokens of this forward, H hidden size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)
from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING

CACHE_NAMES = ("past_key_values", "cache_params", "layer_past", "past_key_value")
"""Keywords under which families hand a cache to their layers."""
GIVEN = frozenset({"attention_mask", "position_ids", "use_cache", "position_embeddings", *CACHE_NAMES})
"""Keywords of a layer's forward, besides the hidden states, that a grafted layer can be given."""


class TrunkInputs:
    """What the host's trunk was called with. A forward pre-hook of the trunk: hosts hand on masks of their own making
    only, and not all hand on positions."""

    def __init__(self, trunk: torch.nn.Module) -> None:
        self._names = list(inspect.signature(trunk.forward).parameters)
        self.attention_mask: Tensor | None = None  # [B, cached tokens + T], 0 where padded
        self.position_ids: Tensor | None = None  # [B or 1, T]
        trunk.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, _trunk: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"a student with grafted layers got an attention mask {shape}, expected [B, T] or none")
        self.attention_mask = mask
        self.position_ids = given.get("position_ids")


class GraftedLayer(torch.nn.Module):
    """Layer `index` of another model, in the place of the host's.

    Args:
        layer: the decoder layer.
        rotary: the module that makes its rotary embeddings, or None where its family has none.
        config: the language model's configuration that `layer` was made with.
        replaced: the host's layer, of which the order of its arguments is kept.
        returns: 0 where the host's layer gives a tensor, else the length of its tuple.
    """

    def __init__(
        self, layer: Any, rotary: Any, config: Any, index: int, replaced: Any, returns: int, inputs: TrunkInputs
    ) -> None:
        super().__init__()
        self.layer = layer
        self.rotary = rotary
        self.donor_config = config
        self.index = index
        self.kind = layer_kind(config, index)
        self.returns = returns
        self._inputs = inputs
        self._host_order = _parameters(replaced)[1:]
        self._accepts = frozenset(_parameters(layer))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self._host_order, args, strict=False)), **kwargs}
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        own_cache = None if cache is None else self._own_cache(cache)
        positions = self._positions(hidden_states, own_cache)
        offered = {
            "attention_mask": self._mask(hidden_states, own_cache, positions),
            "position_ids": positions,
            "use_cache": cache is not None,
            **dict.fromkeys(CACHE_NAMES, cache),
        }
        if self.rotary is not None:
            offered["position_embeddings"] = self._rotary(hidden_states, positions)
        output = self.layer(hidden_states, **{n: value for n, value in offered.items() if n in self._accepts})
        hidden_BTH = output[0] if isinstance(output, tuple) else output
        return (hidden_BTH, *[None] * (self.returns - 1)) if self.returns else hidden_BTH

    def _own_cache(self, cache: Any) -> Any:
        """This layer's part of the host's cache, made to be of the kind that it needs."""
        while len(cache.layers) <= self.index:
            cache.layers.append(cache.layer_class_to_replicate())
        held = cache.layers[self.index]
        recurrent = self.kind == "linear_attention"
        fits = isinstance(held, LinearAttentionCacheLayerMixin if recurrent else CacheLayerMixin)
        if not fits or (getattr(held, "is_sliding", False) and self.kind == "full_attention"):
            cache.layers[self.index] = DynamicCache(config=self.donor_config).layers[self.index]
        return cache.layers[self.index]

    def _positions(self, hidden_BTH: Tensor, own_cache: Any) -> Tensor:
        length = hidden_BTH.shape[1]
        if self._inputs.position_ids is not None:
            return self._inputs.position_ids
        if self._inputs.attention_mask is not None:
            return (self._inputs.attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
        past = own_cache.get_seq_length() if isinstance(own_cache, CacheLayerMixin) else 0
        return torch.arange(past, past + length, device=hidden_BTH.device)[None]

    def _mask(self, hidden_BTH: Tensor, own_cache: Any, positions: Tensor) -> Any:
        make = LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING[self.kind]
        return make(
            config=self.donor_config,
            inputs_embeds=hidden_BTH,
            attention_mask=self._inputs.attention_mask,
            past_key_values=None if own_cache is None else Cache(layers=[own_cache]),
            position_ids=positions,
        )

    def _rotary(self, hidden_BTH: Tensor, positions: Tensor) -> Any:
        by_kind = "layer_type" in inspect.signature(type(self.rotary).forward).parameters
        return self.rotary(hidden_BTH, positions, **({"layer_type": self.kind} if by_kind else {}))


def layer_kind(config: Any, index: int) -> str:
    """transformers' word for what layer `index` of such a model does: full_attention, linear_attention, …"""
    return str(get_layer_types_and_kwargs(config)[0][index])


def lacking(layer: Any, rotary: Any) -> list[str]:
    """Arguments that `layer` needs and a graft can't give it."""
    known = GIVEN if rotary is not None else GIVEN - {"position_embeddings"}
    needed = [
        name
        for name, parameter in inspect.signature(type(layer).forward).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return [name for name in needed[2:] if name not in known]


def _parameters(layer: Any) -> list[str]:
    """Names of a layer's arguments in order, after self."""
    return list(inspect.signature(type(layer).forward).parameters)[1:]
