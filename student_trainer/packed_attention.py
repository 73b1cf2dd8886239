"""Attention within the segments of a packed row: every segment goes through the model's own attention alone, so nothing
is masked that need not be computed, and nothing is seen that must not be. Owns what is registered with transformers;
knows no samples (packing.py does). Outside `segmented` a model that was prepared here computes as it did before.

Shape legend: T tokens of the row (batch 1), A attention heads, D head size.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "segmented_"
"""Of the names under which transformers knows our attention: segmented_sdpa is sdpa by segments."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive tokens of a row that attend to each other causally, and all of them to the tokens of another segment
    that is theirs to continue (a prompt); none where `prefix_start == prefix_stop`."""

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def num_prefix(self) -> int:
        return self.prefix_stop - self.prefix_start


@dataclass(frozen=True, slots=True)
class SegmentMasks:
    """What stands for the attention mask in the layers: one mask per segment, in the form that the model's own
    attention takes (None where that needs none)."""

    segments: Sequence[Segment]
    masks: Sequence[Any]


_segments: ContextVar[Sequence[Segment] | None] = ContextVar("segments of the row being computed", default=None)


@contextlib.contextmanager
def segmented(segments: Sequence[Segment]) -> Iterator[None]:
    """Forwards begun inside are of one row that `segments` cover without gaps. Their backward may come later: what a
    layer needs (when it is recomputed) it was given."""
    token = _segments.set(segments)
    try:
        yield
    finally:
        _segments.reset(token)


def install(model: Any) -> Callable[[], None]:
    """Puts attention by segments before the attention of every layer of `model`; returns what takes it away again."""
    configs = {id(m.config): m.config for m in model.modules() if getattr(m, "config", None) is not None}
    before = {}
    for key, config in configs.items():
        name = getattr(config, "_attn_implementation", None)
        if name and not name.startswith(PREFIX):
            before[key] = name
            ALL_ATTENTION_FUNCTIONS.register(PREFIX + name, functools.partial(_attention, name))
            ALL_MASK_ATTENTION_FUNCTIONS.register(PREFIX + name, functools.partial(_masks, name))
    for key, name in before.items():
        configs[key]._attn_implementation_internal = PREFIX + name

    def uninstall() -> None:
        for key, name in before.items():
            configs[key]._attn_implementation_internal = name

    return uninstall


def _masks(base: str, *, q_length: int, attention_mask: Tensor | None = None, **arguments: Any) -> Any:
    """The masks of the current row's segments, made by the model's own mask function as if each were a sequence of its
    own: a sliding window or chunks are counted from its beginning."""
    make = ALL_MASK_ATTENTION_FUNCTIONS[base]
    segments = _segments.get()
    if segments is None:
        return make(q_length=q_length, attention_mask=attention_mask, **arguments)
    if q_length != segments[-1].stop:
        raise ValueError(f"a row of {q_length} tokens, but its segments end at {segments[-1].stop}")
    made: dict[tuple[int, int], Any] = {}
    for segment in segments:
        shape = (segment.num_tokens, segment.num_prefix)
        if shape not in made:
            num, past = shape
            where = {"batch_size": 1, "q_length": num, "kv_length": past + num, "q_offset": past, "kv_offset": 0}
            made[shape] = make(**{**arguments, **where, "attention_mask": None})
    return SegmentMasks(segments, [made[s.num_tokens, s.num_prefix] for s in segments])


def _attention(
    base: str, module: Any, query_1ATD: Tensor, key_1ATD: Tensor, value_1ATD: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The attention interface of transformers: output [1, T, A, D]."""
    attend = ALL_ATTENTION_FUNCTIONS.get(base) or sys.modules[type(module).__module__].eager_attention_forward
    if not isinstance(attention_mask, SegmentMasks):
        return attend(module, query_1ATD, key_1ATD, value_1ATD, attention_mask, **kwargs)  # type: ignore[no-any-return]
    kwargs.pop("position_ids", None)  # of the whole row; flash attention would look for packed sequences in them
    outputs = []
    for segment, mask in zip(attention_mask.segments, attention_mask.masks, strict=True):
        query = query_1ATD[:, :, segment.start : segment.stop]
        key, value = _seen(key_1ATD, segment), _seen(value_1ATD, segment)
        outputs.append(attend(module, query, key, value, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


def _seen(states_1ATD: Tensor, segment: Segment) -> Tensor:
    own = states_1ATD[:, :, segment.start : segment.stop]
    if not segment.num_prefix:
        return own
    return torch.cat([states_1ATD[:, :, segment.prefix_start : segment.prefix_stop], own], dim=2)
