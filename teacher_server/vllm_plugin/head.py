"""The output head of a model inside vLLM: all of its columns, or under tensor parallelism the ones this process has,
and how the processes put their parts together.

Shape legend: n rows, H hidden size, W logit width, K top-k, m candidates, R processes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from teacher_server.backends.rows import Pieces
from teacher_server.backends.topk import order_keys


class LocalHead:
    """Logits of a vLLM model as the model itself computes them: scaling, soft capping and bias included.

    Raises:
        ValueError: the model's columns are divided among processes in a way that is not understood here.
    """

    def __init__(self, model: Any) -> None:
        from vllm.distributed import get_tensor_model_parallel_world_size
        from vllm.model_executor.layers.logits_processor import LogitsProcessor
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        self._model = model
        self._processor: Any = next((m for m in model.modules() if isinstance(m, LogitsProcessor)), None)
        self.shard: TensorShard | None = None
        ranks = get_tensor_model_parallel_world_size()
        if ranks == 1:
            self.width = int(getattr(self._processor, "org_vocab_size", 1 << 17))
            return
        parts = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
        if self._processor is None or not parts:
            raise ValueError(f"{type(model).__name__} has no vocabulary that is divided among processes as usual")
        indices = parts[-1].shard_indices
        self.shard = TensorShard(indices.org_vocab_start_index, indices.org_vocab_end_index, ranks)
        self.width = self.shard.width

    def all_columns(self, hidden_nH: Tensor) -> Tensor:
        """[n, W] in every process."""
        from vllm.distributed import tensor_model_parallel_all_gather

        # vLLM's own gathering leaves all but the first process without logits.
        return self._logits(hidden_nH, tensor_model_parallel_all_gather)

    def local(self, hidden_nH: Tensor) -> Tensor:
        """[n, this process's columns]."""
        if self.shard is None:
            return self._logits(hidden_nH, None)
        return self._logits(hidden_nH, lambda logits: logits)[:, : self.shard.width]

    def _logits(self, hidden_nH: Tensor, gather: Callable[[Tensor], Tensor] | None) -> Tensor:
        if self.shard is None or gather is None:
            logits: Tensor = self._model.compute_logits(hidden_nH)
            return logits
        self._processor._gather_logits = gather
        try:
            logits = self._model.compute_logits(hidden_nH)
        finally:
            del self._processor._gather_logits  # the class's own is seen again
        return logits


class TensorShard:
    """Columns [first, stop) of the logits; see rows.Shard. What crosses between processes is a few values a row."""

    def __init__(self, first: int, stop: int, ranks: int) -> None:
        self.first = first
        self.width = stop - first
        self._ranks = ranks

    def token(self, token_n: Tensor) -> Tensor:
        return self._gathered(token_n[:, None]).amax(0)[:, 0]

    def merge(self, pieces: Pieces, rows_m: Tensor, ids_m: Tensor, targets_n: Tensor) -> Pieces:
        num_top = pieces.topk.shape[1]
        scalars = [pieces.top, pieces.lse, pieces.token, pieces.tail]
        scalars += [x.float() for x in (pieces.mean, pieces.larger) if x is not None]
        ids = pieces.topk_ids.int().view(torch.float32)  # bits: nothing computes with them on the way
        parts = self._gathered(torch.cat([torch.stack(scalars, dim=1), pieces.topk, ids], dim=1))
        top_Rn, lse_Rn, token_Rn, tail_Rn, *others = parts[:, :, : len(scalars)].unbind(-1)
        values_RnK = parts[:, :, len(scalars) : len(scalars) + num_top]
        ids_RnK = parts[:, :, len(scalars) + num_top :]
        top_n = top_Rn.amax(0)
        shift_Rn = top_Rn - top_n  # from a shard's largest z to the largest of all
        lse_n = (lse_Rn + shift_Rn).logsumexp(0)
        mean = larger = None
        if pieces.mean is not None:
            share_Rn = (lse_Rn + shift_Rn - lse_n).exp()
            mean = torch.where(share_Rn > 0, share_Rn * (others.pop(0) + shift_Rn), 0.0).sum(0)
        if pieces.larger is not None:
            larger = others.pop(0).sum(0).long()  # exact below 2**24
        offered = _Offered.of(values_RnK + shift_Rn[:, :, None], ids_RnK.contiguous().view(torch.int32).long())
        topk_nK, ids_nK, losers_n = offered.choose(num_top, rows_m, ids_m, targets_n)
        candidates_Rm = self._gathered(pieces.candidates[:, None])[:, :, 0] + shift_Rn[:, rows_m]
        return Pieces(
            top=top_n,
            lse=lse_n,
            token=(token_Rn + shift_Rn).amax(0),
            tail=torch.cat([tail_Rn + shift_Rn, losers_n[None]]).logsumexp(0),
            topk=topk_nK,
            topk_ids=ids_nK,
            candidates=candidates_Rm.amax(0),
            mean=mean,
            larger=larger,
        )

    def _gathered(self, local_nc: Tensor) -> Tensor:
        """[R, n, c] of [n, c]."""
        from vllm.distributed import tensor_model_parallel_all_gather

        if local_nc.numel() == 0:
            return local_nc.expand(self._ranks, *local_nc.shape)
        gathered: Tensor = tensor_model_parallel_all_gather(local_nc.contiguous(), dim=0)
        return gathered.view(self._ranks, *local_nc.shape)


@dataclass(frozen=True, slots=True)
class _Offered:
    """The top-k of every shard, side by side."""

    values: Tensor  # [n, RK]
    ids: Tensor  # int64 [n, RK]; −1 where a shard has fewer columns than K

    @classmethod
    def of(cls, values_RnK: Tensor, ids_RnK: Tensor) -> _Offered:
        return cls(*(x.transpose(0, 1).flatten(1) for x in (values_RnK, ids_RnK)))

    def choose(self, k: int, rows_m: Tensor, ids_m: Tensor, targets_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The k first by (value, id), and logsumexp [n] of those left over that the answer names nowhere."""
        if k == 0:
            none = torch.full_like(targets_n, -torch.inf, dtype=torch.float32)
            return self.values, self.ids, none
        places = order_keys(self.values, self.ids).topk(k, dim=-1).indices
        named = (self.ids < 0) | (self.ids == targets_n[:, None])
        named.scatter_(1, places, True)
        hit = (self.ids[rows_m] == ids_m[:, None]).nonzero()
        named[rows_m[hit[:, 0]], hit[:, 1]] = True
        left_n = self.values.masked_fill(named, -torch.inf).logsumexp(-1)
        return self.values.gather(1, places), self.ids.gather(1, places), left_n
