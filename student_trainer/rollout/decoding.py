"""How next-token logits are had one position after another, exactly, from any transformers causal LM: sequences that
come and go (slots.py) where that is exact, left-padded batches with a cache where only those are, batches of equal
length with a cache where padding is not, the whole sequence again where the model has no usable cache. Which of them a
model allows is measured, not looked up.

Shape legend: B sequences, P prompt tokens (padded), W logit width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from student_trainer.rollout.base import RolloutError
from student_trainer.rollout.slots import SlotDecoder, UnfitError
from teacher_api.types import IntArray

Strategy = Literal["continuous", "padded", "grouped", "recompute"]

_PROBE_LENGTHS = (3, 29)  # a padding of 26 crosses small sliding windows and state-space chunks
_PROBE_STEPS = 2
# Largest |logit error| over largest |logit|. A padding leak is far above, rounding far below.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
_LOW_PRECISION_TOLERANCE = 5e-2


class Decoder(Protocol):
    """One batch on its way: `start` once, then `step` with the tokens just chosen."""

    def start(self, prompts: Sequence[IntArray]) -> Tensor:
        """Logits [B, W] of the first token after each prompt."""
        ...

    def step(self, token_B: Tensor) -> Tensor:
        """Logits [B, W] after one more token (int64) for each sequence."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows (int64 indices) only."""
        ...


class CachedDecoder:
    """Prompts padded on the left, attention mask and explicit positions, key-value (or state) cache."""

    def __init__(self, model: Any, max_new_tokens: int, pad_token_id: int = 0) -> None:
        self._forward = _Forward(model)
        self._model = model
        self._max_new_tokens = max_new_tokens
        self._pad_token_id = pad_token_id
        self._cache: Any = None
        self._mask: Tensor | None = None  # int64 [B, P + max_new_tokens]; None: nothing is padded

    def start(self, prompts: Sequence[IntArray]) -> Tensor:
        width = max(len(p) for p in prompts)
        device = self._forward.device
        ids = torch.full((len(prompts), width), self._pad_token_id, dtype=torch.int64)
        lengths = torch.tensor([len(p) for p in prompts])
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
        columns = torch.arange(width + self._max_new_tokens)
        padding = width - lengths
        self._position = lengths.to(device)
        self._end = width
        positions = (columns[:width] - padding[:, None]).clamp_min(0).to(device)
        if int(padding.max()) > 0:
            self._mask = (columns >= padding[:, None]).long().to(device)
        self._cache = _growing_cache(self._model, width + self._max_new_tokens)
        return self._run(ids.to(device), positions)

    def step(self, token_B: Tensor) -> Tensor:
        positions = self._position.unsqueeze(-1)
        self._position = self._position + 1
        self._end += 1
        return self._run(token_B.unsqueeze(-1), positions)

    def keep(self, rows: Tensor) -> None:
        self._cache.reorder_cache(rows)
        self._position = self._position[rows]
        self._mask = None if self._mask is None else self._mask[rows]

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        mask = None if self._mask is None else self._mask[:, : self._end]
        logits, self._cache = self._forward(ids, mask=mask, positions=positions, cache=self._cache, use_cache=True)
        return logits


class RecomputeDecoder:
    """The whole sequence again for every token; prompts of one length."""

    def __init__(self, model: Any) -> None:
        self._forward = _Forward(model)

    def start(self, prompts: Sequence[IntArray]) -> Tensor:
        self._ids = torch.stack([torch.from_numpy(p).long() for p in prompts]).to(self._forward.device)
        return self._forward(self._ids)[0]

    def step(self, token_B: Tensor) -> Tensor:
        self._ids = torch.cat([self._ids, token_B.unsqueeze(-1)], dim=-1)
        return self._forward(self._ids)[0]

    def keep(self, rows: Tensor) -> None:
        self._ids = self._ids[rows]


class _Forward:
    """Calls a model with those of our arguments that it knows; gives the last position's logits and the cache."""

    def __init__(self, model: Any) -> None:
        self._model = model
        # Of the class: wrappers put on the instance (mixed precision, profiling) hide the names.
        self.accepts = set(inspect.signature(type(model).forward).parameters)
        self.cache_name = next((n for n in ("past_key_values", "cache_params") if n in self.accepts), None)
        self.device = next(model.parameters()).device

    def __call__(
        self,
        ids: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Any]:
        arguments: dict[str, Any] = {"input_ids": ids, "use_cache": use_cache, "logits_to_keep": 1}
        if mask is not None:
            arguments["attention_mask"] = mask
        if positions is not None:
            arguments["position_ids"] = positions
        arguments = {name: value for name, value in arguments.items() if name in self.accepts}
        if cache is not None and self.cache_name:
            arguments[self.cache_name] = cache
        output = self._model(**arguments)
        new_cache = getattr(output, self.cache_name, None) if use_cache and self.cache_name else None
        return output.logits[:, -1], new_cache


def choose(model: Any, vocabulary_size: int) -> Strategy:
    """The fastest strategy whose logits equal those of plain, unpadded, uncached forward passes on two short sequences
    of different length. The model must be in evaluation mode.

    Raises:
        RolloutError: the plain forward's logits are not finite.
    """
    forward = _Forward(model)
    reach = min(_PROBE_LENGTHS[1], _max_positions(model) - _PROBE_STEPS)
    total = reach + _PROBE_STEPS
    sequences = [(torch.arange(n) * 7 + 11 * n) % vocabulary_size for n in (_PROBE_LENGTHS[0] + _PROBE_STEPS, total)]
    expected = []  # per sequence: logits [1 + steps, W] after the prompt and after each further token
    for sequence in sequences:
        stops = range(len(sequence) - _PROBE_STEPS, len(sequence) + 1)
        expected.append(torch.cat([forward(sequence[None, :stop].to(forward.device))[0] for stop in stops]))
    reference = torch.stack(expected, dim=1).float()  # [1 + steps, 2, W]
    scale = float(reference.abs().max())
    if not bool(torch.isfinite(reference).all()):
        raise RolloutError("the student's logits are not finite on a test sequence; its weights are broken")
    # Of the weights: some models hand out float32 logits whatever they computed in.
    tolerance = max(_TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE) for dtype in _dtypes(model)) * scale

    def error(rows: list[int]) -> float:
        got = _decode(CachedDecoder(model, _PROBE_STEPS), [sequences[r] for r in rows], forward.device)
        return float((got - reference[:, rows]).abs().nan_to_num(nan=torch.inf).max())

    if forward.cache_name is None:
        return "recompute"
    if _slots_error(model, sequences, reference) <= tolerance:
        return "continuous"
    if "attention_mask" in forward.accepts and error([0, 1]) <= tolerance:
        return "padded"
    return "grouped" if max(error([0]), error([1])) <= tolerance else "recompute"


def _slots_error(model: Any, sequences: list[Tensor], reference: Tensor) -> float:
    """Of two sequences in slots, the second of which enters while the first is on its way and leaves after it."""
    (short, long), device = sequences, next(model.parameters()).device
    start = len(short) - _PROBE_STEPS
    prompts = [s[: len(s) - _PROBE_STEPS].to(torch.int32).numpy() for s in sequences]
    got = torch.full_like(reference, torch.inf)
    try:
        decoder = SlotDecoder(model, 2, len(long))

        def run(tokens: list[tuple[Tensor, int]], *entering: int) -> Tensor:
            token = torch.tensor([int(s[place]) for s, place in tokens], dtype=torch.int64, device=device)
            position = torch.tensor([place for _, place in tokens], dtype=torch.int64, device=device)
            longest = max([place + 1 for _, place in tokens], default=0)
            hidden = decoder.forward(token, position, longest, [prompts[e] for e in entering], list(entering))
            return decoder.logits(hidden).float()

        with decoder.attending():
            got[0, 0] = run([], 0)[0]
            got[1, 0], got[0, 1] = run([(short, start)], 1)
            got[2, 0], got[1, 1] = run([(short, start + 1), (long, len(prompts[1]))])
            decoder.copy([0], [1], len(long))
            got[2, 1] = run([(long, len(prompts[1]) + 1)])[0]
    except UnfitError:
        return float("inf")
    return float((got - reference).abs().nan_to_num(nan=torch.inf).max())


def _decode(decoder: Decoder, sequences: list[Tensor], device: torch.device) -> Tensor:
    prompts = [s[: len(s) - _PROBE_STEPS].to(torch.int32).numpy() for s in sequences]
    logits = [decoder.start(prompts)]
    for step in range(_PROBE_STEPS, 0, -1):
        logits.append(decoder.step(torch.stack([s[len(s) - step] for s in sequences]).to(device)))
    return torch.stack(logits).float()


def _dtypes(model: Any) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}


def _max_positions(model: Any) -> int:
    return int(getattr(getattr(model, "config", None), "max_position_embeddings", None) or 2**31)


def _growing_cache(model: Any, capacity: int) -> DynamicCache | None:
    """A cache whose layers are allocated once, for models whose layers all keep every key; None lets the model make
    its own (sliding windows, states)."""
    if "past_key_values" not in inspect.signature(type(model).forward).parameters:
        return None
    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [_PreallocatedLayer(capacity) for _ in cache.layers]
    return cache


class _PreallocatedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values are views of one buffer: transformers' own layer copies all of them for every token."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._length = 0
        self._buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [x.new_empty(*x.shape[:2], self._capacity, x.shape[3]) for x in (key_states, value_states)]
        stop = self._length + key_states.shape[2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, self._length : stop] = states
        self._length = stop
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self._buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._buffers = [buffer.index_select(0, beam_idx) for buffer in self._buffers]
        self.keys, self.values = (buffer[:, :, : self._length] for buffer in self._buffers)
