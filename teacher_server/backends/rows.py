"""Exact scores of chosen rows from their hidden states, a bounded chunk of logits at a time.

Owns the arithmetic of an answer: logprobs, top-k, candidates, tail, entropy, rank. Knows no model, batch or request.
Invariant: of the [N, W] logits at most `chunk_rows` rows exist at any time, and no value leaves here non-finite.

Shape legend: N rows, n rows of one chunk, H hidden size, W logit width, V tokenizer size (V <= W), K top-k,
M candidates over all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from teacher_api.types import LOGPROB_FLOOR, Candidates, FloatArray, IntArray, ScoreOptions

Head = Callable[[Tensor], Tensor]  # [n, H] -> logits [n, W]; float32, or taken to float32 here

CHUNK_BYTES = 32 << 20
"""Float32 logits of one chunk: large enough that the product is efficient, small enough to stay out of the way."""

BLOCK = 128
"""Columns of one block of the top-k search."""


@dataclass(slots=True)
class RowScores:
    """Scores of N rows; fields as in teacher_api.types.Scores."""

    token_logprob: FloatArray  # [N]
    log_tail: FloatArray  # [N]
    topk_ids: IntArray | None  # [N, K]
    topk_logprob: npt.NDArray[np.float32] | npt.NDArray[np.float16] | None  # [N, K], or [N, V] for "all"
    candidate_logprob: FloatArray | None  # [M]
    entropy: FloatArray | None  # [N]
    rank: npt.NDArray[np.uint32] | None  # [N]
    bad: npt.NDArray[np.bool_]  # [N]: the model gave NaN or +inf, or no finite logit; the row's values mean nothing


def auto_chunk_rows(logit_width: int) -> int:
    """Rows whose float32 logits fill CHUNK_BYTES; at least 1."""
    return max(1, CHUNK_BYTES // (4 * logit_width))


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
) -> RowScores:
    """Scores rows under one set of options.

    With z = head(h) / temperature, in float32, over all W columns: log p(i) = z_i − logsumexp(z). Top-k are the ids
    below `tokenizer_size` by descending log p, equal ones by ascending id. log_tail = logsumexp of z over the columns
    outside top-k ∪ candidates ∪ {target}, minus logsumexp(z): summed over the complement, since 1 − Σ of what is
    inside has no correct digit where the tail is small. Entropy −Σ p log p runs over all W columns. Rank is 1 + the
    number of columns, of all W, with a larger log p than the target's. Values under LOGPROB_FLOOR, an empty
    tail's −inf among them, become LOGPROB_FLOOR.

    Args:
        head: logits of a chunk of hidden rows.
        hidden_NH: [N, H], on the head's device.
        targets_N: int64 [N], the actual token of each row.
        options: `top_k` (0, k <= tokenizer_size, or "all"), `temperature`, `entropy`, `rank`, `value_type`.
        candidates: ids below `tokenizer_size` with N + 1 row offsets.
        chunk_rows: rows whose logits may exist at once.
    """
    num_rows = hidden_NH.shape[0]
    out = _allocate(num_rows, options, candidates, tokenizer_size)
    for start in range(0, num_rows, chunk_rows):
        stop = min(start + chunk_rows, num_rows)
        rows = slice(start, stop)
        logprob_nW, out.bad[rows] = _log_probabilities(head, hidden_NH[rows], options.temperature)
        chunk = None if candidates is None else _chunk_candidates(candidates, start, stop, hidden_NH.device)
        _score_chunk(out, rows, logprob_nW, targets_N[rows], chunk, options, tokenizer_size)
    return out


def top_k_by_id(logits_nV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, ids) [n, k] of the k largest entries per row, descending; equal values by ascending id.

    torch.topk leaves open which of several equal entries it returns; rows where that matters at the k-th place are
    sorted in full. Where k is small, only the k blocks of BLOCK columns with the largest maxima are searched: the k
    largest entries lie in them.
    """
    width = logits_nV.shape[-1]
    if k >= width:
        values, ids = torch.sort(logits_nV, dim=-1, descending=True, stable=True)
        return values[:, :k], ids[:, :k]
    if 2 * k * BLOCK > width:
        values, ids = torch.topk(logits_nV, k, dim=-1)
        ties_n = (logits_nV >= values[:, -1:]).sum(-1) > k
    else:
        values, ids, ties_n = _top_k_of_blocks(logits_nV, k)
    ids, order = torch.sort(ids, dim=-1)
    values, by_value = torch.sort(values.gather(1, order), dim=-1, descending=True, stable=True)
    ids = ids.gather(1, by_value)
    if bool(ties_n.any()):
        full_values, full_ids = torch.sort(logits_nV[ties_n], dim=-1, descending=True, stable=True)
        values[ties_n], ids[ties_n] = full_values[:, :k], full_ids[:, :k]
    return values, ids


def _top_k_of_blocks(logits_nV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values, ids) [n, k] unordered among equals, and [n]: whether an entry left out equals the k-th."""
    num_blocks = logits_nV.shape[-1] // BLOCK
    covered = num_blocks * BLOCK
    blocks = logits_nV[:, :covered].reshape(-1, num_blocks, BLOCK)
    maxima = blocks.amax(-1)
    chosen_nk = maxima.topk(k, dim=-1).indices
    searched = blocks.gather(1, chosen_nk[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    searched = torch.cat([searched, logits_nV[:, covered:]], dim=-1)
    values, places = searched.topk(k, dim=-1)
    in_blocks = places < k * BLOCK
    block = chosen_nk.gather(1, torch.where(in_blocks, places // BLOCK, 0))
    ids = torch.where(in_blocks, block * BLOCK + places % BLOCK, places - k * BLOCK + covered)
    smallest = values[:, -1:]
    unsearched = maxima.scatter_(1, chosen_nk, -torch.inf).amax(-1, keepdim=True)
    ties_n = ((searched >= smallest).sum(-1) > k) | (unsearched >= smallest)[:, 0]
    return values, ids, ties_n


def _allocate(num_rows: int, options: ScoreOptions, candidates: Candidates | None, tokenizer_size: int) -> RowScores:
    k = options.top_k
    columns = tokenizer_size if k == "all" else k
    return RowScores(
        token_logprob=np.empty(num_rows, np.float32),
        log_tail=np.empty(num_rows, np.float32),
        topk_ids=None if k in ("all", 0) else np.empty((num_rows, columns), np.int32),
        topk_logprob=None if k == 0 else np.empty((num_rows, columns), np.dtype(options.value_type)),
        candidate_logprob=None if candidates is None else np.empty(len(candidates.ids), np.float32),
        entropy=np.empty(num_rows, np.float32) if options.entropy else None,
        rank=np.empty(num_rows, np.uint32) if options.rank else None,
        bad=np.empty(num_rows, np.bool_),
    )


@dataclass(frozen=True, slots=True)
class _ChunkCandidates:
    where: slice  # of Candidates.ids
    rows: Tensor  # int64 [m], counted within the chunk
    ids: Tensor  # int64 [m]


def _chunk_candidates(candidates: Candidates, start: int, stop: int, device: torch.device) -> _ChunkCandidates:
    offsets = candidates.row_offsets[start : stop + 1]
    where = slice(int(offsets[0]), int(offsets[-1]))
    rows = np.repeat(np.arange(stop - start, dtype=np.int64), np.diff(offsets))
    ids = candidates.ids[where].astype(np.int64)
    return _ChunkCandidates(where, torch.from_numpy(rows).to(device), torch.from_numpy(ids).to(device))


def _log_probabilities(head: Head, hidden_nH: Tensor, temperature: float) -> tuple[Tensor, npt.NDArray[np.bool_]]:
    """(log softmax(head(h) / temperature) [n, W] in float32, freshly allocated; which rows have none [n])."""
    logits_nW = head(hidden_nH).float()
    # With the largest entry at 0 the subtraction of the logsumexp loses as little as float32 can.
    logprob_nW = logits_nW - logits_nW.amax(-1, keepdim=True)
    del logits_nW
    if temperature != 1.0:
        logprob_nW.div_(temperature)
    lse_n1 = logprob_nW.logsumexp(-1, keepdim=True)
    return logprob_nW.sub_(lse_n1), (~lse_n1[:, 0].isfinite()).cpu().numpy()


def _score_chunk(
    out: RowScores,
    rows: slice,
    logprob_nW: Tensor,
    targets_n: Tensor,
    chunk: _ChunkCandidates | None,
    options: ScoreOptions,
    tokenizer_size: int,
) -> None:
    """Fills `rows` of `out`; overwrites `logprob_nW`."""
    known_nV = logprob_nW[:, :tokenizer_size]
    token_n1 = logprob_nW.gather(1, targets_n[:, None])
    out.token_logprob[rows] = _values(token_n1[:, 0])
    if out.entropy is not None:
        terms_nW = logprob_nW.exp().mul_(logprob_nW.clamp_min(LOGPROB_FLOOR))
        out.entropy[rows] = -terms_nW.sum(-1, dtype=torch.float64).float().cpu().numpy()
    if out.rank is not None:
        out.rank[rows] = ((logprob_nW > token_n1).sum(-1) + 1).cpu().numpy()
    if chunk is not None and out.candidate_logprob is not None:
        out.candidate_logprob[chunk.where] = _values(logprob_nW[chunk.rows, chunk.ids])

    if options.top_k == "all":
        assert out.topk_logprob is not None
        out.topk_logprob[rows] = _values(known_nV)
        # The target and the candidates are among the ids: only columns no id has are left outside.
        out.log_tail[rows] = _values(logprob_nW[:, tokenizer_size:].logsumexp(-1))
        return
    if options.top_k:
        assert out.topk_logprob is not None
        assert out.topk_ids is not None
        values_nK, ids_nK = top_k_by_id(known_nV, options.top_k)
        out.topk_logprob[rows] = _values(values_nK)
        out.topk_ids[rows] = ids_nK.cpu().numpy()
        logprob_nW.scatter_(1, ids_nK, -torch.inf)
    if chunk is not None:
        logprob_nW[chunk.rows, chunk.ids] = -torch.inf
    logprob_nW.scatter_(1, targets_n[:, None], -torch.inf)
    out.log_tail[rows] = _values(logprob_nW.logsumexp(-1))


def _values(logprob: Tensor) -> FloatArray:
    values: FloatArray = logprob.clamp_min(LOGPROB_FLOOR).cpu().numpy()
    return values
