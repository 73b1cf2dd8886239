"""From the logits of one position to a token and its logprobs under the two policies that must not be confused. Pure
functions, vectorised over the batch, no random state.

Shape legend: B sequences, W the model's logit width, V the tokenizer's size (W >= V), K ids kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BLOCK = 256
"""Ids whose masses are summed in float32."""
SMALL_BLOCK = 64
"""Ids that are looked at together in the search for the most likely ones."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One token for each sequence. Ids at or above V are never drawn: the behaviour policy masks them, while q stays
    normalised over all W columns, as the loss and the teacher have it."""

    token_B: Tensor  # int64
    behaviour_logprob_B: Tensor  # float32: log b(y)
    full_logprob_B: Tensor  # float32: log q(y), T = 1, untruncated, over all W columns


def uniforms(seed: int, uids: Sequence[int], count: int) -> npt.NDArray[np.float64]:
    """`count` numbers in [0, 1) for each uid, [B, count]: a pure function of (seed, uid), the first ones independent of
    `count`."""
    out = np.empty((len(uids), count))
    for row, uid in enumerate(uids):
        key = np.array([seed, uid], dtype=np.uint64)
        np.random.Generator(np.random.Philox(key=key)).random(out=out[row])
    return out


def behaviour_logits(logits_BV: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Unnormalised log b: z / T, then top-k, then top-p of what top-k left; -inf where b is 0.

    Top-k keeps every id that ties with the k-th. Top-p keeps the shortest prefix, most likely first, whose mass
    reaches p; at least one id, and of equal ones the lower first.
    """
    z = logits_BV if temperature == 1.0 else logits_BV / temperature
    if 0 < top_k < z.shape[-1]:
        kth = torch.topk(z, top_k, dim=-1).values[:, -1:]
        z = z.masked_fill(z < kth, -torch.inf)
    if top_p < 1.0:
        ordered, ids = torch.sort(z, dim=-1, descending=True, stable=True)
        mass = torch.softmax(ordered.double(), dim=-1)
        before = mass.cumsum(-1) - mass
        dropped = torch.zeros_like(z, dtype=torch.bool).scatter(-1, ids, before >= top_p)
        z = z.masked_fill(dropped, -torch.inf)
    return z


def inverse_cdf(mass_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """The id at which the cumulative mass, in id order, first exceeds `uniform_B` in [0, 1) of its total (int64 [B]);
    and the total (float64 [B]). Ids of zero mass are never returned.

    In two steps, so that no sum runs over the whole vocabulary in float64: the block of ids by the sums of the blocks,
    then the id by the masses within it. Sums of blocks are float32 (of `BLOCK` values each), all that is added up
    further is float64, so that an id's probability is its mass to within rounding of float32, whatever V.
    """
    sums_Bn = _of_blocks(mass_BV, BLOCK, lambda block: block.sum(-1)).double()
    cumulative = sums_Bn.cumsum(-1)
    total = cumulative[:, -1:]
    target = _below(uniform_B.unsqueeze(-1) * total, total)
    block = _first_above(cumulative, target)
    own = sums_Bn.gather(-1, block)
    inside = target - (cumulative.gather(-1, block) - own)
    ids = block * BLOCK + torch.arange(BLOCK, device=mass_BV.device)
    beyond = ids >= mass_BV.shape[-1]
    masses = mass_BV.gather(-1, ids.clamp_max(mass_BV.shape[-1] - 1)).double().masked_fill_(beyond, 0.0)
    within = masses.cumsum(-1)
    end = within[:, -1:]
    # The block's sum in float32 and in float64 differ by rounding: the place within it is kept in proportion.
    place = _first_above(within, _below((inside / own).clamp_min(0.0) * end, end))
    return (block * BLOCK + place).clamp_max(mass_BV.shape[-1] - 1).squeeze(-1), total.squeeze(-1)


def _below(value: Tensor, end: Tensor) -> Tensor:
    """At most the number before `end`: rounding may lift u * total to the total itself, beyond the last id."""
    return torch.minimum(value, torch.nextafter(end, torch.zeros_like(end)))


def _first_above(cumulative_Bn: Tensor, target_B1: Tensor) -> Tensor:
    # NaN is above nothing; what comes of it is refused by its logprob.
    return torch.searchsorted(cumulative_Bn, target_B1, right=True).clamp_max(cumulative_Bn.shape[-1] - 1)


def draw(
    logits_BW: Tensor, uniform_B: Tensor, *, vocabulary_size: int, temperature: float, top_k: int, top_p: float
) -> Draw:
    """Samples y ~ b by inverting its distribution function at `uniform_B` (float64); log b(y) and log q(y)."""
    logits = logits_BW.float()
    valid = logits[:, :vocabulary_size]
    plain = temperature == 1.0 and top_k == 0 and top_p == 1.0
    z = valid if plain else behaviour_logits(valid, temperature=temperature, top_k=top_k, top_p=top_p)
    mass = torch.softmax(z, dim=-1)
    token, total = inverse_cdf(mass, uniform_B)
    # Over the total: the softmax's own sum, over a whole vocabulary in float32, is less exact than that of the blocks.
    behaviour = (_at(mass, token).double() / total).log()
    if not plain:
        return Draw(token, _logprob(behaviour), _untempered(logits, token))
    if logits.shape[-1] == vocabulary_size:
        return Draw(token, _logprob(behaviour), _logprob(behaviour))
    # q differs from b by the columns beyond V alone; they may outweigh all others.
    own = _at(logits, token).double()
    beyond = torch.logsumexp(logits[:, vocabulary_size:], dim=-1).double()
    return Draw(token, _logprob(behaviour), _logprob(own - torch.logaddexp(own - behaviour, beyond)))


def draw_greedy(logits_BW: Tensor, *, vocabulary_size: int) -> Draw:
    """The most likely id below V, the lowest of equal ones. b puts all its mass there: log b(y) = 0."""
    logits = logits_BW.float()
    token = first_of_largest(logits[:, :vocabulary_size])
    return Draw(token, torch.zeros_like(logits[:, 0]), _untempered(logits, token))


def first_of_largest(values_BV: Tensor) -> Tensor:
    """As argmax: int64 [B]. By blocks: a maximum is found several times as fast as its place."""
    maxima = _of_blocks(values_BV, BLOCK, lambda block: block.amax(-1))
    block = maxima.argmax(-1, keepdim=True)
    ids = block * BLOCK + torch.arange(BLOCK, device=values_BV.device)
    inside = values_BV.gather(-1, ids.clamp_max(values_BV.shape[-1] - 1))
    # Past the end the last value stands again, which comes first where it is a maximum.
    return block.squeeze(-1) * BLOCK + inside.argmax(-1)


def most_likely(logits_BW: Tensor, k: int, *, vocabulary_size: int) -> Tensor:
    """The min(k, V) most likely ids below V, best first: int32 [B, K].

    Where K is small, among the ids of the K blocks with the largest maxima, which hold them: any other block's ids are
    all no larger than K maxima.
    """
    valid = logits_BW[:, :vocabulary_size]
    k = min(k, valid.shape[-1])
    if k * SMALL_BLOCK > valid.shape[-1] // 4:
        return torch.topk(valid, k, dim=-1).indices.int()
    maxima = _of_blocks(valid, SMALL_BLOCK, lambda block: block.amax(-1))
    blocks_BK = torch.topk(maxima, k, dim=-1, sorted=False).indices
    ids = (blocks_BK[..., None] * SMALL_BLOCK + torch.arange(SMALL_BLOCK, device=valid.device)).flatten(1)
    beyond = ids >= valid.shape[-1]
    values = valid.gather(-1, ids.clamp_max(valid.shape[-1] - 1)).clamp_min_(torch.finfo(valid.dtype).min)
    values.masked_fill_(beyond, -torch.inf)  # below any that is valid, -inf among them
    return ids.gather(-1, torch.topk(values, k, dim=-1).indices).int()


def _of_blocks(values_BV: Tensor, size: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """[B, ceil(V / size)]: `reduce` over each `size` values in turn, the last block as long as what is left."""
    whole = values_BV.shape[-1] // size * size
    reduced = [reduce(values_BV[:, :whole].view(len(values_BV), -1, size))] if whole else []
    if whole < values_BV.shape[-1]:
        reduced.append(reduce(values_BV[:, None, whole:]))
    return reduced[0] if len(reduced) == 1 else torch.cat(reduced, dim=-1)


def _untempered(logits_BW: Tensor, token_B: Tensor) -> Tensor:
    """log q(y)."""
    return _logprob(_at(logits_BW, token_B) - torch.logsumexp(logits_BW, dim=-1))


def _at(values_BW: Tensor, token_B: Tensor) -> Tensor:
    return values_BW.gather(-1, token_B.unsqueeze(-1)).squeeze(-1)


def _logprob(value_B: Tensor) -> Tensor:
    return value_B.float().clamp_max(0.0)
