"""Exact scores of chosen rows from their hidden states, a bounded chunk of logits at a time.

Owns the arithmetic of an answer: logprobs, top-k, candidates, tail, entropy, rank. Knows no model, batch or request.
Invariant: of the [N, W] logits at most `chunk_rows` rows exist at any time.

Shape legend: N rows, n rows of one chunk or slice, H hidden size, W logit width, V tokenizer size (V <= W), K top-k,
M candidates over all rows, m those of a chunk or slice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from teacher_api.types import LOGPROB_FLOOR, Candidates, ScoreOptions
from teacher_server.backends.topk import BLOCK, blocks_of, top_k_by_id

Head = Callable[[Tensor], Tensor]  # [n, H] -> logits [n, W], or this shard's columns of them

CHUNK_BYTES = 32 << 20
"""Float32 logits of one chunk: large enough that the product is efficient, small enough to stay out of the way."""
SLICE_BYTES = 1 << 20
"""Of a chunk, what a CPU takes through all passes at a time, so that the later ones find it in its cache."""
SMALLEST_SUM = 1e-30
"""A float32 sum of exponentials under this has lost digits to underflow and is taken again from its own maximum."""


@dataclass(slots=True)
class RowScores:
    """Scores of N rows on the head's device; fields as in teacher_api.types.Scores. Values are at least
    LOGPROB_FLOOR. Where `token_logprob` is NaN the model gave no distribution, and the row's other values mean nothing.
    """

    token_logprob: Tensor  # [N]
    log_tail: Tensor  # [N]
    topk_ids: Tensor | None  # int32 [N, K]
    topk_logprob: Tensor | None  # [N, K], or [N, V] for "all"; float32 or float16
    candidate_logprob: Tensor | None  # [M]
    entropy: Tensor | None  # [N]
    rank: Tensor | None  # int32 [N]


@dataclass(slots=True)
class Pieces:
    """What one shard of the columns knows of n rows. All values but `top` are relative to it: z − top."""

    top: Tensor  # [n]: largest z of the shard
    lse: Tensor  # [n]
    token: Tensor  # [n]; −inf where another shard has it, as for `candidates`
    tail: Tensor  # [n]: logsumexp outside the shard's own top-k, the candidates and the actual token
    topk: Tensor  # [n, K]
    topk_ids: Tensor  # int64 [n, K], over all shards' columns
    candidates: Tensor  # [m]
    mean: Tensor | None = None  # [n]: Σ p z over the shard's share of the distribution
    larger: Tensor | None = None  # int64 [n]: columns with a larger z than the actual token's


class Shard(Protocol):
    """The part of the logits' columns that this process has; the others are other processes'."""

    first: int
    """Id of its first column."""

    def token(self, token_n: Tensor) -> Tensor:
        """Of each shard's z of the actual token (−inf where it has none), the largest."""
        ...

    def merge(self, pieces: Pieces, rows_m: Tensor, ids_m: Tensor, targets_n: Tensor) -> Pieces:
        """The pieces of all shards as one."""
        ...


def auto_chunk_rows(logit_width: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows whose float32 logits fill `chunk_bytes`; at least 1."""
    return max(1, chunk_bytes // (4 * logit_width))


@torch.inference_mode()
def score_rows(
    head: Head,
    hidden_NH: Tensor,
    targets_N: Tensor,
    options: ScoreOptions,
    candidates: Candidates | None = None,
    *,
    tokenizer_size: int,
    chunk_rows: int,
    shard: Shard | None = None,
) -> RowScores:
    """Scores rows under one set of options.

    With z = head(h) / temperature, in float32, over all W columns: log p(i) = z_i − logsumexp(z). Top-k are the ids
    below `tokenizer_size` by descending log p, equal ones by ascending id. log_tail = logsumexp of z over the columns
    outside top-k ∪ candidates ∪ {target}, minus logsumexp(z): summed over the complement, since 1 − Σ of what is
    inside has no correct digit where the tail is small. Entropy −Σ p log p runs over all W columns. Rank is 1 + the
    number of columns, of all W, with a larger log p than the target's. Values under LOGPROB_FLOOR, an empty
    tail's −inf among them, become LOGPROB_FLOOR.

    Args:
        head: logits of a chunk of hidden rows. They are not changed.
        hidden_NH: [N, H], on the head's device.
        targets_N: int64 [N], the actual token of each row.
        options: `top_k` (0, k <= tokenizer_size, or "all"), `temperature`, `entropy`, `rank`, `value_type`.
        candidates: ids below `tokenizer_size` with N + 1 row offsets.
        chunk_rows: rows whose logits may exist at once.
        shard: where `head` gives only some of the columns; "all" then needs them all.
    """
    num_rows, device = hidden_NH.shape[0], hidden_NH.device
    out = _allocate(num_rows, options, candidates, tokenizer_size, device)
    asked = _Asked.of(candidates, num_rows, device)
    for start in range(0, num_rows, chunk_rows):
        stop = min(start + chunk_rows, num_rows)
        logits_nW = head(hidden_NH[start:stop])
        step = max(1, SLICE_BYTES // (4 * logits_nW.shape[-1])) if device.type == "cpu" else stop - start
        for first in range(start, stop, step):
            rows = slice(first, min(first + step, stop))
            part = asked.slice(rows)
            z_nW = logits_nW[first - start : rows.stop - start].float()
            if options.temperature != 1.0:
                z_nW = z_nW / options.temperature
            pieces = _pieces(z_nW, targets_N[rows], part, options, tokenizer_size, shard)
            if shard is not None:
                pieces = shard.merge(pieces, part.rows, part.ids, targets_N[rows])
            _write(out, rows, part.where, part.rows, pieces)
            if options.top_k == "all":
                assert out.topk_logprob is not None
                from_top_nV = z_nW[:, :tokenizer_size] - pieces.top[:, None]
                out.topk_logprob[rows] = _values(from_top_nV - pieces.lse[:, None])
                del from_top_nV
        del logits_nW, z_nW  # before the next chunk's are made
    return out


def _allocate(
    num_rows: int, options: ScoreOptions, candidates: Candidates | None, tokenizer_size: int, device: torch.device
) -> RowScores:
    k = options.top_k
    columns = tokenizer_size if k == "all" else k

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    return RowScores(
        token_logprob=empty(num_rows),
        log_tail=empty(num_rows),
        topk_ids=None if k in ("all", 0) else empty(num_rows, columns, dtype=torch.int32),
        topk_logprob=None if k == 0 else empty(num_rows, columns, dtype=getattr(torch, options.value_type)),
        candidate_logprob=None if candidates is None else empty(len(candidates.ids)),
        entropy=empty(num_rows) if options.entropy else None,
        rank=empty(num_rows, dtype=torch.int32) if options.rank else None,
    )


@dataclass(frozen=True, slots=True)
class _Asked:
    """Candidates of some rows, flat."""

    where: slice  # of Candidates.ids
    rows: Tensor  # int64 [m], counted within those rows
    ids: Tensor  # int64 [m]
    offsets: np.ndarray

    @classmethod
    def of(cls, candidates: Candidates | None, num_rows: int, device: torch.device) -> _Asked:
        if candidates is None:
            nothing = torch.empty(0, dtype=torch.int64, device=device)
            return cls(slice(0, 0), nothing, nothing, np.zeros(num_rows + 1, np.int64))
        offsets = candidates.row_offsets.astype(np.int64)
        rows = torch.from_numpy(np.repeat(np.arange(num_rows), np.diff(offsets))).to(device)
        ids = torch.from_numpy(candidates.ids.astype(np.int64)).to(device)
        return cls(slice(0, len(ids)), rows, ids, offsets)

    def slice(self, rows: slice) -> _Asked:
        offsets = self.offsets[rows.start : rows.stop + 1]
        where = slice(int(offsets[0]), int(offsets[-1]))
        return _Asked(where, self.rows[where] - rows.start, self.ids[where], offsets)


def _pieces(
    z_nW: Tensor, targets_n: Tensor, asked: _Asked, options: ScoreOptions, tokenizer_size: int, shard: Shard | None
) -> Pieces:
    """Takes `z_nW` as it is; the one other tensor of its size holds exp(z − top)."""
    width, first = z_nW.shape[-1], 0 if shard is None else shard.first
    num_blocks, known = width // BLOCK, min(max(tokenizer_size - first, 0), width)
    block_max_nB = blocks_of(z_nW, num_blocks).amax(-1)
    top_n = torch.cat([block_max_nB, z_nW[:, num_blocks * BLOCK :]], dim=-1).amax(-1)
    exp_nW = (z_nW - top_n[:, None]).exp_()
    sum_n = exp_nW.sum(-1)
    token_n = _at(z_nW, torch.arange(len(z_nW), device=z_nW.device), targets_n - first)
    mean_n = larger_n = None
    if options.entropy:
        from_top_nW = (z_nW - top_n[:, None]).clamp_min_(LOGPROB_FLOOR)  # 0 · −inf is no number
        mean_n = from_top_nW.mul_(exp_nW).sum(-1, dtype=torch.float64).float() / sum_n
    if options.rank:
        everyones_n = token_n if shard is None else shard.token(token_n)
        larger_n = (z_nW > everyones_n[:, None]).sum(-1)

    topk_nK, ids_nK = z_nW[:, :0], targets_n[:, None][:, :0]
    if options.top_k not in (0, "all") and known:
        usable = block_max_nB[:, : known // BLOCK]
        topk_nK, ids_nK = top_k_by_id(z_nW[:, :known], min(int(options.top_k), known), usable)
    few = 0 if options.top_k == "all" else int(options.top_k) - topk_nK.shape[1]  # a narrow shard's
    inside = _Inside(
        known if options.top_k == "all" else 0,
        ids_nK,
        torch.cat([asked.rows, torch.arange(len(z_nW), device=z_nW.device)]),
        torch.cat([asked.ids, targets_n]) - first,
    )
    return Pieces(
        top=top_n,
        lse=sum_n.log(),
        token=token_n - top_n,
        tail=_tail(z_nW, exp_nW, top_n, inside),
        topk=pad(topk_nK - top_n[:, None], (0, few), value=-torch.inf),
        topk_ids=pad(ids_nK + first, (0, few), value=-1),
        candidates=_at(z_nW, asked.rows, asked.ids - first) - top_n[asked.rows],
        mean=mean_n,
        larger=larger_n,
    )


def _at(z_nW: Tensor, rows_m: Tensor, columns_m: Tensor) -> Tensor:
    """z[rows, columns]; −inf for columns that are not here."""
    width = z_nW.shape[-1]
    values = z_nW[rows_m, columns_m.clamp(0, width - 1)]
    return torch.where((columns_m >= 0) & (columns_m < width), values, -torch.inf)


@dataclass(frozen=True, slots=True)
class _Inside:
    """Columns that the answer names, and the tail leaves out; those of other shards among them."""

    whole: int  # the first so many columns of every row
    topk_nK: Tensor
    rows_m: Tensor
    columns_m: Tensor

    def fill_(self, values_nW: Tensor, value: float) -> Tensor:
        here_m = (self.columns_m >= 0) & (self.columns_m < values_nW.shape[-1])
        values_nW[:, : self.whole] = value
        values_nW.scatter_(1, self.topk_nK, value)
        values_nW[self.rows_m[here_m], self.columns_m[here_m]] = value
        return values_nW


def _tail(z_nW: Tensor, exp_nW: Tensor, top_n: Tensor, inside: _Inside) -> Tensor:
    """logsumexp(z) − top over the columns outside; overwrites `exp_nW`."""
    tail_n = inside.fill_(exp_nW, 0.0).sum(-1)
    small_n = tail_n < SMALLEST_SUM
    log_tail_n = tail_n.log()
    if bool(small_n.any()):
        rest_nW = inside.fill_(torch.sub(z_nW, top_n[:, None], out=exp_nW), -torch.inf)
        log_tail_n[small_n] = rest_nW[small_n].logsumexp(-1)
    return log_tail_n


def _write(out: RowScores, rows: slice, asked: slice, asked_rows_m: Tensor, pieces: Pieces) -> None:
    """log p = z − logsumexp(z), both from the row's largest z, where float32 is finest."""
    lse_n, lse_n1 = pieces.lse, pieces.lse[:, None]
    none_n = ~(pieces.top.isfinite() & lse_n.isfinite())
    out.token_logprob[rows] = _values(pieces.token - lse_n).masked_fill_(none_n, torch.nan)
    out.log_tail[rows] = _values(pieces.tail - lse_n)
    if out.topk_ids is not None and out.topk_logprob is not None:
        out.topk_ids[rows] = pieces.topk_ids.int()
        out.topk_logprob[rows] = _values(pieces.topk - lse_n1)
    if out.candidate_logprob is not None:
        out.candidate_logprob[asked] = _values(pieces.candidates - lse_n[asked_rows_m])
    if out.entropy is not None and pieces.mean is not None:
        out.entropy[rows] = lse_n - pieces.mean
    if out.rank is not None and pieces.larger is not None:
        out.rank[rows] = pieces.larger.int() + 1


def _values(logprob: Tensor) -> Tensor:
    return logprob.clamp_min(LOGPROB_FLOOR)
