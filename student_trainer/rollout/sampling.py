"""From the logits of one position to a token and its logprobs under the two policies that must not be confused. Pure
functions, vectorised over the batch, no random state.

Shape legend: B sequences, W the model's logit width, V the tokenizer's size (W >= V), K ids kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


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


def inverse_cdf(z_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The id at which the cumulative mass of softmax(z), in id order, first exceeds `uniform_B` in [0, 1): int64 [B].
    Ids of zero mass are never returned."""
    # float64: over 150,000 ids, float32 sums would shift probability by more than many ids have.
    cumulative = torch.softmax(z_BV.double(), dim=-1).cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding may lift u * total to total itself, beyond the last id.
    target = torch.minimum(uniform_B.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_max(z_BV.shape[-1] - 1)


def draw(
    logits_BW: Tensor, uniform_B: Tensor, *, vocabulary_size: int, temperature: float, top_k: int, top_p: float
) -> Draw:
    """Samples y ~ b by inverting its distribution function at `uniform_B` (float64); log b(y) and log q(y) by
    logsumexp in float32."""
    logits = logits_BW.float()
    z = behaviour_logits(logits[:, :vocabulary_size], temperature=temperature, top_k=top_k, top_p=top_p)
    token = inverse_cdf(z, uniform_B)
    return Draw(token, _logprob(z, token), _logprob(logits, token))


def draw_greedy(logits_BW: Tensor, *, vocabulary_size: int) -> Draw:
    """The most likely id below V, the lowest of equal ones. b puts all its mass there: log b(y) = 0."""
    logits = logits_BW.float()
    token = logits[:, :vocabulary_size].argmax(-1)
    return Draw(token, torch.zeros_like(logits[:, 0]), _logprob(logits, token))


def most_likely(logits_BW: Tensor, k: int, *, vocabulary_size: int) -> Tensor:
    """The min(k, V) most likely ids below V, best first: int32 [B, K]."""
    valid = logits_BW[:, :vocabulary_size]
    return torch.topk(valid, min(k, valid.shape[-1]), dim=-1).indices.int()


def _logprob(z: Tensor, token_B: Tensor) -> Tensor:
    value = z.gather(-1, token_B.unsqueeze(-1)).squeeze(-1) - torch.logsumexp(z, dim=-1)
    return value.clamp_max(0.0)
