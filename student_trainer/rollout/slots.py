"""Sequences of different length side by side in one forward pass: a key-value cache with a slot for each, and the
attention that reads it. Tokens lie in one row, first one of each running sequence, then whole new prompts; nothing is
padded but the prompts' attention. Owns what is registered with transformers; knows no samples (continuous.py does).

Outside `SlotDecoder.attending` the model computes as before. For families whose layers all keep every key and whose
attention has no more to it than scores, a scale and causality; `decoding.choose` measures it.

Shape legend: S slots, C tokens that a slot holds, n running sequences (slots 0…n-1), m new prompts, P tokens of the
longest, T = n + all prompts' tokens, L cached tokens attended to, A query heads, K key heads, D head size, H hidden.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from teacher_api import causal_lm
from teacher_api.types import IntArray

PREFIX = "slots_"
"""Of the names under which transformers knows this attention. No mask function has such a name: none is made."""
_PLAIN = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
"""Attention that this one equals up to rounding, if it is given none of the terms below."""
_HARMLESS = frozenset({"dropout", "scaling", "is_causal", "position_ids", "cache_position", "use_cache", "return_dict"})
"""Keywords of an attention function that change nothing in evaluation. Any other that is set is a term of the scores
or the mask (soft caps, sinks, windows, biases)."""


class UnfitError(ValueError):
    """This family's attention or cache has more to it than this module knows."""


@dataclass(slots=True)
class _Plan:
    """Of one forward pass."""

    index_T: Tensor  # where each token's keys and values go: slot * C + position
    running: int  # n
    length_n: Tensor  # cached tokens of each running sequence, the one being computed included
    longest: int  # of them
    padded_mP: Tensor | None  # tokens of each prompt, counted from the first prompt token; None: one prompt, or none
    unpadded: Tensor | None  # where the prompts' tokens are among the m * P
    mask: Tensor | None = None  # [n, 1, 1, L], made by the first layer


class _Slots(Cache):  # type: ignore[misc]
    """Keys and values [S, C, K, D] of each layer."""

    is_sliding = (False,)  # asked by the function that makes masks, before it finds that none is to be made

    def __init__(self, num_slots: int, capacity: int) -> None:
        self.shape = (num_slots, capacity)
        self.buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self.plan: _Plan | None = None
        self.written: tuple[Tensor, Tensor] | None = None  # buffers of the layer that is being computed
        self.attended = 0  # layers since the pass began

    @property
    def layers(self) -> Any:
        raise UnfitError("its layers look into the cache")

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if args or any(value is not None for value in kwargs.values()) or self.plan is None:
            raise UnfitError("its cache takes more than keys and values")
        # What attention will cast to anyway: kept so, the cache is read without a copy of it.
        states = [_as_computed(x) for x in (key_states, value_states)]
        if layer_idx not in self.buffers:
            # Zeros: what no token has written yet is masked, but 0 * NaN would be seen.
            made = [x.new_zeros(*self.shape, x.shape[1], x.shape[3]) for x in states]
            self.buffers[layer_idx] = (made[0], made[1])
        self.written = self.buffers[layer_idx]
        for buffer, state in zip(self.written, states, strict=True):
            buffer.flatten(0, 1).index_copy_(0, self.plan.index_T, state[0].transpose(0, 1))
        return states[0], states[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        raise UnfitError("it makes a mask of its own")


_computing: ContextVar[_Slots] = ContextVar("the cache of the forward pass being computed")


class SlotDecoder:
    """The trunk of `model` over `num_slots` sequences of at most `capacity` tokens.

    Raises:
        UnfitError: the model can't be computed like this; also from `forward`.
    """

    def __init__(self, model: Any, num_slots: int, capacity: int) -> None:
        try:
            self._parts = causal_lm.split(model)
        except (ValueError, AttributeError) as error:
            raise UnfitError(str(error)) from error
        text = causal_lm.text_config(model.config)
        if not keeps_every_key(text):
            raise UnfitError("not every layer keeps every key")
        if self._parts.cache_name != "past_key_values" or "position_ids" not in self._parts.accepts:
            raise UnfitError("its trunk takes no positions, or no keys and values")
        if causal_lm.rope_of_the_length(text):
            raise UnfitError("its rotary positions depend on the longest sequence")
        configs = {id(m.config): m.config for m in model.modules() if getattr(m, "config", None) is not None}
        self._configs = [c for c in configs.values() if getattr(c, "_attn_implementation", None)]
        self._cache = _Slots(num_slots, capacity)
        self.device = self._parts.project.weight.device
        self._base = torch.arange(num_slots, device=self.device) * capacity
        self._capacity = capacity

    @contextlib.contextmanager
    def attending(self) -> Iterator[None]:
        """The model's layers attend to the slots inside; call `forward` there only."""
        before = [config._attn_implementation for config in self._configs]
        token = _computing.set(self._cache)
        try:
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = _registered(name)
            yield
        finally:
            _computing.reset(token)
            for config, name in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = name

    def forward(
        self,
        token_n: Tensor,
        position_n: Tensor,
        longest: int,
        prompts: Sequence[IntArray] = (),
        slots: Sequence[int] = (),
    ) -> Tensor:
        """Hidden rows [n + m, H]: after one more token of each running sequence (int64, at `position_n`, the slots
        0…n-1), and after the last token of each new prompt, whose keys and values go to its slot of `slots`.

        Args:
            longest: cached tokens of the longest running sequence, the new one included.
        """
        running = len(token_n)
        index, plan_of = self._base[:running] + position_n, functools.partial(_Plan, running=running)
        if not prompts:
            plan = plan_of(index, length_n=position_n + 1, longest=longest, padded_mP=None, unpadded=None)
            return self._trunk(token_n, position_n, plan)
        lengths = [len(p) for p in prompts]
        ids = torch.cat([torch.from_numpy(p).long() for p in prompts])
        places = torch.cat([torch.arange(length) for length in lengths])
        starts = torch.cat(
            [torch.full((length,), slot * self._capacity) for slot, length in zip(slots, lengths, strict=True)]
        )
        ids, places, starts = (x.to(self.device, non_blocking=True) for x in (ids, places, starts))
        padded, unpadded = _padding(lengths, self.device) if len(prompts) > 1 else (None, None)
        plan = plan_of(
            torch.cat([index, starts + places]),
            length_n=position_n + 1,
            longest=longest,
            padded_mP=padded,
            unpadded=unpadded,
        )
        hidden_TH = self._trunk(torch.cat([token_n, ids]), torch.cat([position_n, places]), plan)
        last = torch.tensor(lengths, device=self.device).cumsum(0) + (running - 1)
        return torch.cat([hidden_TH[:running], hidden_TH[last]])

    def logits(self, hidden_nH: Tensor) -> Tensor:
        """[n, W]."""
        return self._parts.head(hidden_nH)  # type: ignore[no-any-return]

    def copy(self, targets: Sequence[int], sources: Sequence[int], length: int) -> None:
        """The first `length` tokens of slots `sources` to slots `targets`, all read before any is written; one source
        does for all."""
        into, of = (torch.tensor(x, device=self.device) for x in (targets, sources))
        for pair in self._cache.buffers.values():
            for buffer in pair:
                buffer[into, :length] = buffer[of, :length]

    def taken(self, slot: int, length: int) -> list[Tensor]:
        """A copy of the first `length` tokens of a slot, to be `put` later."""
        return [buffer[slot, :length].clone() for pair in self._cache.buffers.values() for buffer in pair]

    def put(self, taken: Sequence[Tensor], slots: Sequence[int]) -> None:
        buffers = [buffer for pair in self._cache.buffers.values() for buffer in pair]
        for buffer, states in zip(buffers, taken, strict=True):
            for slot in slots:
                buffer[slot, : len(states)] = states

    def _trunk(self, ids_T: Tensor, position_T: Tensor, plan: _Plan) -> Tensor:
        cache = self._cache
        cache.plan, cache.attended = plan, 0
        hidden_1TH, _ = self._parts.step(ids_T[None], None, position_T[None], cache=cache)
        if cache.attended != len(cache.buffers) or not cache.buffers:
            raise UnfitError("it attends by code of its own")
        return hidden_1TH[0]  # type: ignore[no-any-return]


def keeps_every_key(config: Any) -> bool:
    """Of a language model's configuration: whether transformers gives each layer a cache that drops nothing."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _as_computed(states: Tensor) -> Tensor:
    kind = states.device.type
    return states.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else states


def _padding(lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of prompts one after the other: their tokens [m, P] (past the end, the last one again), and back."""
    length_m = torch.tensor(lengths)
    columns = torch.arange(int(length_m.max()))
    starts = length_m.cumsum(0) - length_m
    padded = starts[:, None] + torch.minimum(columns, length_m[:, None] - 1)
    unpadded = (columns < length_m[:, None]).flatten().nonzero().squeeze(-1)
    return padded.to(device, non_blocking=True), unpadded.to(device, non_blocking=True)


def _registered(name: str) -> str:
    ours = PREFIX + name
    if ours not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(ours, functools.partial(_attention, name.removeprefix("segmented_")))
    return ours


def _attention(
    base: str, module: Any, query_1ATD: Tensor, key_1KTD: Tensor, value_1KTD: Tensor, mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention interface of transformers: output [1, T, A, D]."""
    terms = [
        k for k, v in kwargs.items() if k not in _HARMLESS and not k.startswith("output_") and v not in (None, False)
    ]
    if base not in _PLAIN or terms or mask is not None or not getattr(module, "is_causal", True):
        raise UnfitError(f"its attention {base!r} has more to it: {', '.join(terms)}")
    cache, scale = _computing.get(), kwargs.get("scaling")
    plan, buffers = cache.plan, cache.written
    assert plan is not None
    assert buffers is not None
    cache.attended += 1
    n, parts = plan.running, []
    if n:
        parts.append(_running(plan, query_1ATD[0, :, :n], *buffers, scale))
    if query_1ATD.shape[2] > n:
        new = [x[0, :, n:].transpose(0, 1) for x in (query_1ATD, key_1KTD, value_1KTD)]
        parts.append(_prompts(plan, new, scale))
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _running(plan: _Plan, query_AnD: Tensor, keys_SCKD: Tensor, values_SCKD: Tensor, scale: float | None) -> Tensor:
    """[n, A, D]. The query heads of one key head stand where queries of several tokens would, so that no key is
    repeated."""
    n, reach = plan.running, plan.longest
    if plan.mask is None:
        seen = torch.arange(reach, device=query_AnD.device) < plan.length_n[:, None]
        mask = torch.zeros(n, reach, dtype=keys_SCKD.dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        plan.mask = mask[:, None, None]
    heads = keys_SCKD.shape[2]
    query = query_AnD.transpose(0, 1).reshape(n, heads, -1, query_AnD.shape[-1])
    key, value = (x[:n, :reach].transpose(1, 2) for x in (keys_SCKD, values_SCKD))
    out = scaled_dot_product_attention(query, key, value, attn_mask=plan.mask, scale=scale)
    return out.reshape(n, -1, out.shape[-1])


def _prompts(plan: _Plan, states: Sequence[Tensor], scale: float | None) -> Tensor:
    """[all prompts' tokens, A, D] of their queries, keys and values [all prompts' tokens, A or K, D]. Padding is on the
    right: what is computed there is thrown away, and no token before it sees it."""
    states = [x[None] if plan.padded_mP is None else x[plan.padded_mP] for x in states]
    query, key, value = (x.transpose(1, 2) for x in states)
    grouped = query.shape[1] != key.shape[1]
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    out = out.transpose(1, 2).flatten(0, 1)
    return out if plan.unpadded is None else out[plan.unpadded]
