"""A prompt that several sequences share, run once: which models allow it, when it pays, and the states it leaves.

Owns the prompt's key-value cache while its completions run. Knows no head, no options, no answers.

Shape legend: B sequences, P prompt tokens, T completion tokens, H hidden size; keys and values are [B, heads, P, size].
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from teacher_api import causal_lm
from teacher_server.backends.base import ScoreJob

logger = logging.getLogger(__name__)

MIN_SAVED_TOKENS = 64
"""Prompt tokens that sharing must save: a group costs one more forward, and the batch its company."""
CACHED_TOKEN_WEIGHT = 0.25
"""What a cached token counts in `batch_tokens`. For it a layer holds keys and values, about 2.5 hidden sizes with
grouped heads spread out; for one that is computed, the MLP's three intermediates as well, ten and more."""
PROBE_TOKENS = 8
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_KEPT = (DynamicLayer, DynamicSlidingWindowLayer)


def shared_tokens(job: ScoreJob) -> int:
    """Tokens of the job's prompt that must run: row t - 1 predicts position t, so none from its last position on."""
    return min(job.prompt_tokens, int(job.positions[-1]))


def groups_of(jobs: Sequence[ScoreJob], indices: Sequence[int]) -> list[list[int]]:
    """Of `indices`, those whose jobs share a prompt with another and save enough by it, longest need first."""
    by_prompt: dict[bytes, list[int]] = {}
    for index in indices:
        if jobs[index].prompt_key:
            by_prompt.setdefault(jobs[index].prompt_key, []).append(index)
    groups = []
    for members in by_prompt.values():
        needs = [shared_tokens(jobs[index]) for index in members]
        if sum(needs) - max(needs) >= MIN_SAVED_TOKENS:
            groups.append(sorted(members, key=lambda index: int(jobs[index].positions[-1]), reverse=True))
    return groups


def parts_of(jobs: Sequence[ScoreJob], *, batch_tokens: int, batch_sequences: int) -> Iterator[list[int]]:
    """Cuts one group, longest first, into forwards under the token budget; a sequence over it runs alone."""
    part: list[int] = []
    for index, job in enumerate(jobs):
        longest = jobs[part[0]] if part else job
        own = max(int(longest.positions[-1]) - longest.prompt_tokens, 0)
        weight = own + CACHED_TOKEN_WEIGHT * shared_tokens(longest)
        if part and (len(part) >= batch_sequences or (len(part) + 1) * weight > batch_tokens):
            yield part
            part = []
        part.append(index)
    if part:
        yield part


class _Held(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types here
    """A layer's keys and values of one prompt, given to any number of sequences and forwards: nothing is added, so the
    longer tensors live as long as their layer runs."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self._layer = layer
        self.keys, self.values, self.is_sliding, self.is_initialized = layer.keys, layer.values, layer.is_sliding, True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        num = len(key_states)
        return (
            torch.cat([self.keys.expand(num, -1, -1, -1), key_states], dim=-2),
            torch.cat([self.values.expand(num, -1, -1, -1), value_states], dim=-2),
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a held layer is made from one that is filled")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        sizes: tuple[int, int] = self._layer.get_mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> int:
        return int(self._layer.get_seq_length())

    def get_max_length(self) -> int:
        return int(self._layer.get_max_length())


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that went through the trunk: hidden states [P, H], and its cache."""

    hidden_PH: Tensor
    cache: Cache

    @classmethod
    def run(cls, parts: causal_lm.Parts, ids: np.ndarray, device: torch.device) -> Prompt:
        ids_1P = torch.from_numpy(ids.astype(np.int64)).to(device)[None]
        hidden_1PH, cache = parts.step(ids_1P, None, torch.arange(len(ids), device=device)[None])
        return cls(hidden_1PH[0], Cache(layers=[_Held(layer) for layer in cache.layers]))

    def then(self, parts: causal_lm.Parts, ids_BT: Tensor) -> Tensor:
        """Hidden states [B, T, H] of completions, right-padded. No mask is needed: they all begin where the prompt
        ends, and what pads one comes after all of it."""
        start = len(self.hidden_PH)
        position_T = torch.arange(start, start + ids_BT.shape[1], device=ids_BT.device)
        hidden_BTH, _ = parts.step(ids_BT, None, position_T.expand(ids_BT.shape), cache=self.cache)
        states: Tensor = hidden_BTH
        return states


def can_share(parts: causal_lm.Parts, config: Any, device: torch.device) -> bool:
    """Whether this model's prompt can run once for several sequences, with the same numbers up to rounding.

    It can where every layer keeps keys and values of its own, full or of a sliding window, and positions are given to
    the trunk. Not with recurrent states, layers that share another's cache, or rotary frequencies that depend on the
    sequence's length. A known answer confirms it: completions of a short prompt, next to whole sequences.
    """
    if parts.cache_name != "past_key_values" or "position_ids" not in parts.accepts:
        return False
    if not set(getattr(config, "layer_types", None) or ()) <= _LAYER_TYPES or causal_lm.rope_of_the_length(config):
        return False
    ids_2T = (torch.arange(2 * PROBE_TOKENS, device=device).view(2, -1) + 1) % parts.logit_width
    ids_2T[1, : PROBE_TOKENS // 2] = ids_2T[0, : PROBE_TOKENS // 2]
    _, cache = parts.step(ids_2T[:1])
    if type(cache) is not DynamicCache or any(type(layer) not in _KEPT for layer in cache.layers):
        return False
    if len(cache.layers) != getattr(config, "num_hidden_layers", None):
        return False
    prompt = Prompt.run(parts, ids_2T[0, : PROBE_TOKENS // 2].cpu().numpy(), device)
    got, expected = prompt.then(parts, ids_2T[:, PROBE_TOKENS // 2 :]), parts.trunk(ids_2T)[:, PROBE_TOKENS // 2 :]
    difference, size = float((got - expected).abs().max()), float(expected.abs().max())
    relative = 1e-4 if expected.dtype == torch.float32 else 5e-2
    if difference <= relative * max(1.0, size):
        return True
    logger.warning("states after a cached prompt differ by %.3g: prompts are computed for each sequence", difference)
    return False
