"""Exact scores of chosen rows from their hidden states, a bounded chunk of logits at a time.

Owns the arithmetic of an answer: logprobs, top-k, candidates, tail, entropy, rank. Knows no model, batch or request.
Invariant: of the [N, W] logits at most `chunk_rows` rows exist at any time.

Shape legend: N rows, n rows of one chunk or slice, H hidden size, W logit width, V tokenizer size (V <= W), K top-k,
M candidates over all rows, m those of a chunk or slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from teacher_api.types import LOGPROB_FLOOR, Candidates, ScoreOptions
from teacher_server.backends import row_scan
from teacher_server.backends.row_scan import FAR
from teacher_server.backends.topk import Blocks, top_k_by_id

Head = Callable[[Tensor], Tensor]  # [n, H] -> logits [n, W], or this shard's columns of them

CHUNK_BYTES = 32 << 20
"""Float32 logits of one chunk: large enough that the product is efficient, small enough to stay out of the way."""
SLICE_BYTES = 1 << 20
"""Of a chunk, what a CPU takes through all passes at a time, so that the later ones find it in its cache."""
EFFICIENT_ROWS = 128
"""A product of fewer rows is bound by reading the head's weights."""
ROW_MULTIPLE = 64
"""Products are computed in tiles; a few rows more than whole tiles cost as much as a tile."""
SMALLEST_SLICE = 4  # rows: with fewer, what it costs to call each pass shows
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
    """Rows whose float32 logits fill `chunk_bytes`, whole multiples of ROW_MULTIPLE; where those are fewer than
    EFFICIENT_ROWS, that many, in up to four times the bytes; at least 1."""
    row_bytes = 4 * logit_width
    fitting = chunk_bytes // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE
    return max(1, fitting, min(EFFICIENT_ROWS, 4 * chunk_bytes // row_bytes))


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
        rows = slice(start, min(start + chunk_rows, num_rows))
        part = asked.slice(rows)
        whole_nV = out.topk_logprob[rows] if options.top_k == "all" and out.topk_logprob is not None else None
        pieces = _Chunk(head(hidden_NH[rows]), targets_N[rows], part, options, tokenizer_size, shard).pieces(whole_nV)
        if shard is not None:
            pieces = shard.merge(pieces, part.rows, part.ids, targets_N[rows])
        _write(out, rows, part.where, part.rows, pieces)
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

    where: slice  # of the ids of all rows that these rows were taken from
    rows: Tensor  # int64 [m], counted within those rows
    ids: Tensor  # int64 [m]
    offsets: np.ndarray  # from 0

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
        return _Asked(where, self.rows[where] - rows.start, self.ids[where], offsets - offsets[0])


_Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
"""Of a slice of rows: see _Chunk._pass."""


class _Chunk:
    """The logits of a chunk of rows, taken through all passes some rows at a time: what is as wide as the logits exists
    for those rows only, and what is narrow is worked on for all rows together.

    Args:
        logits_nW: of any float type, before the temperature; not changed.
    """

    def __init__(
        self,
        logits_nW: Tensor,
        targets_n: Tensor,
        asked: _Asked,
        options: ScoreOptions,
        tokenizer_size: int,
        shard: Shard | None,
    ) -> None:
        self._logits_nW = logits_nW
        self._asked = asked
        self._options = options
        self._shard = shard
        self._num_rows, self._width = logits_nW.shape
        first = 0 if shard is None else shard.first
        self._first = first
        self._known = min(max(tokenizer_size - first, 0), self._width)
        self._columns_n, self._columns_m = targets_n - first, asked.ids - first
        self._k = 0 if options.top_k == "all" else min(int(options.top_k), self._known)
        self._blocks = Blocks.for_search(self._known, self._k) if self._k else None
        self._stride = self._width + (shard is not None)  # of the exponentials: see _here
        sums_alone = not (options.entropy or options.rank or options.top_k == "all")
        on_host = logits_nW.device.type == "cpu"
        self._scans = sums_alone and on_host and shard is None and row_scan.available()

    def pieces(self, whole_nV: Tensor | None) -> Pieces:
        """Args: whole_nV: gets log p of the columns below the tokenizer's size, where they are asked for."""
        if self._scans:
            found, token_n, asked_m = self._scanned()
        else:
            all_n = torch.arange(self._num_rows, device=self._logits_nW.device)
            token_n, asked_m = self._at(all_n, self._columns_n), self._at(self._asked.rows, self._columns_m)
            everyones_n = None
            if self._options.rank:
                everyones_n = token_n if self._shard is None else self._shard.token(token_n)
            found = self._passed(everyones_n, whole_nV)
        top_n, base_n, sum_n, rest_n, topk_nK, ids_nK, mean_n, larger_n = found
        few = 0 if self._options.top_k == "all" else int(self._options.top_k) - self._k  # a narrow shard's
        return Pieces(
            top=top_n,
            lse=_log_from_top(sum_n, top_n, base_n),
            token=token_n - top_n,
            tail=self._log_tail(rest_n, top_n, base_n, ids_nK),
            topk=pad(topk_nK - top_n[:, None], (0, few), value=-torch.inf),
            topk_ids=pad(ids_nK + self._first, (0, few), value=-1),
            candidates=asked_m - top_n[self._asked.rows],
            mean=mean_n,
            larger=larger_n,
        )

    def _scanned(self) -> tuple[_Found, Tensor, Tensor]:
        """As `_passed`, in one compiled pass over each row; and z of the actual tokens and of the candidates."""
        step = self._num_rows
        as_they_are = self._logits_nW.dtype == torch.float32 and self._options.temperature == 1.0
        if not (as_they_are and self._logits_nW.is_contiguous()):  # they are made anew
            step = max(SMALLEST_SLICE, SLICE_BYTES // (4 * self._width))
        parts, tokens, asked = [], [], []
        for start in range(0, self._num_rows, step):
            rows = slice(start, min(start + step, self._num_rows))
            offsets = self._asked.offsets[start : rows.stop + 1]
            ids_m = self._columns_m[int(offsets[0]) : int(offsets[-1])]
            found = row_scan.scan(
                self._z(rows).contiguous(), self._known, self._k, self._columns_n[rows], ids_m, offsets - offsets[0]
            )
            parts.append((found.top, found.base, found.sum, found.rest, found.topk, found.topk_ids, None, None))
            tokens.append(found.token)
            asked.append(found.asked)
        return _joined(parts), torch.cat(tokens), torch.cat(asked)

    def _passed(self, everyones_n: Tensor | None, whole_nV: Tensor | None) -> _Found:
        """What `_pass` gives, of all rows."""
        named_n = self._here(self._columns_n)
        named_m = self._asked.rows * self._stride + self._here(self._columns_m)
        step = self._num_rows
        if self._logits_nW.device.type == "cpu":
            step = max(SMALLEST_SLICE, SLICE_BYTES // (4 * self._width))
        scratch_nW = self._logits_nW.new_empty((min(step, self._num_rows), self._stride), dtype=torch.float32)
        parts = []
        for start in range(0, self._num_rows, step):
            rows = slice(start, min(start + step, self._num_rows))
            first_m, stop_m = int(self._asked.offsets[start]), int(self._asked.offsets[rows.stop])
            flat_m = named_m[first_m:stop_m] - start * self._stride if first_m < stop_m else None
            parts.append(
                self._pass(
                    rows,
                    scratch_nW[: rows.stop - start],
                    named_n[rows],
                    flat_m,
                    None if everyones_n is None else everyones_n[rows],
                    None if whole_nV is None else whole_nV[rows],
                )
            )
        return _joined(parts)

    def _pass(
        self,
        rows: slice,
        scratch_nW: Tensor,
        named_n: Tensor,
        named_m: Tensor | None,
        everyones_n: Tensor | None,
        whole_nV: Tensor | None,
    ) -> _Found:
        """Of a slice of rows: top, base, Σ exp(z − base) over all columns and over those that the answer does not name,
        the top-k and their ids, Σ p z, and how many columns are larger than the actual token's.

        Args:
            scratch_nW: [n, W], for the exponentials; with a shard [n, W + 1].
            named_n, named_m: where in it the actual tokens (their columns) and the candidates (flat) are.
        """
        z_nW = self._z(rows)
        known, options = self._known, self._options
        topk_nK, ids_nK = z_nW[:, :0], named_n[:, None][:, :0]
        if self._blocks is not None:
            maxima_nB = self._blocks.maxima(z_nW[:, :known])
            top_n = maxima_nB.amax(-1)
            if self._blocks.covered < self._width:
                top_n = torch.maximum(top_n, z_nW[:, self._blocks.covered :].amax(-1))
            topk_nK, ids_nK = top_k_by_id(z_nW[:, :known], self._k, self._blocks, maxima_nB)
        else:
            top_n = z_nW.amax(-1)
            if self._k:
                topk_nK, ids_nK = top_k_by_id(z_nW[:, :known], self._k)
        exp_nW = scratch_nW[:, : self._width]
        base_n = self._base(top_n)
        if base_n is top_n:
            torch.sub(z_nW, top_n[:, None], out=exp_nW).exp_()
        else:
            torch.exp(z_nW, out=exp_nW)
        sum_n = exp_nW.sum(-1)
        mean_n = larger_n = None
        if options.entropy:
            from_top_nW = (z_nW - top_n[:, None]).clamp_min_(LOGPROB_FLOOR)  # 0 · −inf is no number
            mean_n = from_top_nW.mul_(exp_nW).sum(-1, dtype=torch.float64).float() / sum_n
        if everyones_n is not None:
            larger_n = (z_nW > everyones_n[:, None]).sum(-1)
        if whole_nV is not None:
            lse_n = _log_from_top(sum_n, top_n, base_n)
            whole_nV.copy_(_values((z_nW[:, :known] - top_n[:, None]).sub_(lse_n[:, None])))
            exp_nW[:, :known] = 0.0
        exp_nW.scatter_(1, ids_nK, 0.0)
        scratch_nW.scatter_(1, named_n[:, None], 0.0)
        if named_m is not None:
            scratch_nW.view(-1).index_fill_(0, named_m, 0.0)
        return top_n, base_n, sum_n, exp_nW.sum(-1), topk_nK, ids_nK, mean_n, larger_n

    def _base(self, top_n: Tensor) -> Tensor:
        """What is taken from z before its exponential: each row's largest z; nothing on a CPU, where it would be one
        more pass, if neither end of float32 is near."""
        if top_n.device.type == "cpu" and all(abs(top) < FAR for top in top_n.tolist()):
            return torch.zeros_like(top_n)
        return top_n

    def _log_tail(self, rest_n: Tensor, top_n: Tensor, base_n: Tensor, ids_nK: Tensor) -> Tensor:
        """log of `rest_n`, from each row's largest z; taken from the rest's own maximum where the sum has lost its
        digits."""
        tail_n = _log_from_top(rest_n, top_n, base_n)
        small = (rest_n < SMALLEST_SUM).nonzero()[:, 0]
        step = max(SMALLEST_SLICE, SLICE_BYTES // (4 * self._width))
        for start in range(0, len(small), step):
            rows = small[start : start + step]
            place_n = rows.new_full((self._num_rows,), -1)
            place_n[rows] = torch.arange(len(rows), device=rows.device)
            mine = (place_n[self._asked.rows] >= 0).nonzero()[:, 0]
            rest_nW = pad(self._z(rows) - top_n[rows, None], (0, self._stride - self._width))
            if self._options.top_k == "all":
                rest_nW[:, : self._known] = -torch.inf
            rest_nW.scatter_(1, ids_nK[rows], -torch.inf)
            rest_nW.scatter_(1, self._here(self._columns_n[rows])[:, None], -torch.inf)
            rest_nW[place_n[self._asked.rows[mine]], self._here(self._columns_m[mine])] = -torch.inf
            tail_n[rows] = rest_nW[:, : self._width].logsumexp(-1)
        return tail_n

    def _z(self, rows: slice | Tensor) -> Tensor:
        z_nW = self._logits_nW[rows].float()
        return z_nW if self._options.temperature == 1.0 else z_nW / self._options.temperature

    def _here(self, columns: Tensor) -> Tensor:
        """Columns of other shards as one behind the last."""
        if self._shard is None:
            return columns
        return torch.where((columns >= 0) & (columns < self._width), columns, self._width)

    def _at(self, rows_m: Tensor, columns_m: Tensor) -> Tensor:
        """z[rows, columns]; −inf for columns that are not here."""
        z_m = self._logits_nW[rows_m, columns_m.clamp(0, self._width - 1)].float()
        if self._options.temperature != 1.0:
            z_m = z_m / self._options.temperature
        return torch.where((columns_m >= 0) & (columns_m < self._width), z_m, -torch.inf)


def _joined(parts: Sequence[_Found]) -> _Found:
    """Of consecutive slices of rows, as one."""
    if len(parts) == 1:
        return parts[0]
    top, base, total, rest, topk, ids, means, larger = zip(*parts, strict=True)
    narrow = [torch.cat(x) for x in (top, base, total, rest, topk, ids)]
    asked = [None if x[0] is None else torch.cat(x) for x in (means, larger)]
    return (*narrow, *asked)  # type: ignore[return-value]


def _log_from_top(sum_n: Tensor, top_n: Tensor, base_n: Tensor) -> Tensor:
    """log Σ exp(z − base) as log Σ exp(z − top). float64: the two parts may be far larger than what is left."""
    return (sum_n.double().log() - (top_n.double() - base_n)).float()


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
