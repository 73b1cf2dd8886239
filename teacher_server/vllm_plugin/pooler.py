"""Scores inside vLLM's model runner: hidden states of a step in, one array of bytes per finished sequence out.

Owns what is kept of a sequence between the steps of its prefill. The arithmetic is backends/rows.py's, the layout
request.py's. Rows are written at their own places, so a sequence that was preempted and is computed again, in other
pieces, overwrites them with themselves.

Shape legend: S tokens of a step, N rows of a sequence, H hidden size, W logit width.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.layers.pooler import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.abstract import Pooler

from teacher_api.types import Candidates, ScoreOptions
from teacher_server.backends.rows import RowScores, auto_chunk_rows, score_rows
from teacher_server.vllm_plugin.head import LocalHead
from teacher_server.vllm_plugin.request import TASK, Asked, Field, fields_of

CUDA_CHUNK_BYTES = 256 << 20
"""Float32 logits of one chunk on an accelerator."""
WARM_UP = ScoreOptions(top_k=64)
"""What the engine's own trial runs ask for, so that the memory it measures includes the head's."""


@dataclass(slots=True)
class _Sequence:
    """One sequence in the engine."""

    asked: Asked
    fields: list[Field]
    arrays: dict[str, Tensor]  # by field name, whole

    @classmethod
    def of(cls, asked: Asked, tokenizer_size: int, hidden_size: int, dtype: torch.dtype, device: Any) -> _Sequence:
        layout = fields_of(asked, tokenizer_size, hidden_size, str(dtype).removeprefix("torch."))
        arrays = {f.name: torch.empty(f.shape, dtype=getattr(torch, f.dtype), device=device) for f in layout}
        return cls(asked, layout, arrays)

    def packed(self) -> Tensor:
        return torch.cat([self.arrays[field.name].reshape(-1).view(torch.uint8) for field in self.fields])


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a sequence whose hidden states this step has."""

    sequence: _Sequence
    rows: slice
    candidates: slice
    at_n: np.ndarray  # where in the step
    targets_n: Tensor  # int64, on the host


class TeacherPooler(Pooler):  # type: ignore[misc]
    """See the module. `extra_kwargs` of a request are Asked.to_extra's; a request without them is the engine's own
    trial run."""

    def __init__(self, model: Any, vllm_config: Any) -> None:
        super().__init__()
        self._model = [model]  # in a list: it must not become this module's child
        self._head: LocalHead | None = None
        extra = vllm_config.additional_config or {}
        self._tokenizer_size = int(extra["tokenizer_size"])
        self._chunk_rows = int(extra.get("head_chunk_rows", 0))

    def get_supported_tasks(self) -> set[str]:
        return {TASK}

    def get_pooling_updates(self, task: str) -> Any:
        return PoolingParamsUpdate(requires_token_ids=True)

    @torch.inference_mode()
    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor | None]:
        if self._head is None:
            self._head = LocalHead(self._model[0])
        cursor = pooling_metadata.get_pooling_cursor()
        scheduled = cursor.num_scheduled_tokens_cpu.tolist()
        ends = cursor.seq_lens_cpu.tolist()
        tokens = pooling_metadata.prompt_token_ids_cpu
        sequences: list[_Sequence] = []
        groups: dict[tuple[ScoreOptions, bool], list[_Piece]] = defaultdict(list)
        offset = 0
        for i, (count, end) in enumerate(zip(scheduled, ends, strict=True)):
            sequence = self._sequence(pooling_metadata, i, count, hidden_states)
            sequences.append(sequence)
            start = end - count
            rows, candidates = sequence.asked.between(start, end)
            if rows.start < rows.stop:
                chosen = sequence.asked.rows[rows]
                targets = tokens[i][torch.from_numpy(chosen + 1)].long()
                piece = _Piece(sequence, rows, candidates, chosen - start + offset, targets)
                groups[sequence.asked.group].append(piece)
            offset += count
        for (options, _), pieces in groups.items():
            self._score(hidden_states, options, pieces)
        return [
            self._finish(sequence, state) if done else None
            for sequence, state, done in zip(
                sequences, pooling_metadata.pooling_states, cursor.get_finished_mask(), strict=True
            )
        ]

    def _sequence(self, metadata: Any, i: int, count: int, hidden_SH: Tensor) -> _Sequence:
        """That of request i, kept where vLLM keeps what belongs to a request between steps."""
        kept: list[Any] = metadata.pooling_states[i].hidden_states_cache
        if not kept:
            extra = metadata.pooling_params[i].extra_kwargs
            trial = Asked(np.arange(max(count - 1, 0)), WARM_UP, None)
            asked = Asked.from_extra(extra) if extra else trial
            width = hidden_SH.shape[-1]
            kept.append(_Sequence.of(asked, self._tokenizer_size, width, hidden_SH.dtype, hidden_SH.device))
        sequence: _Sequence = kept[0]
        return sequence

    def _finish(self, sequence: _Sequence, state: Any) -> Tensor:
        state.clean()
        return sequence.packed()

    def _score(self, hidden_SH: Tensor, options: ScoreOptions, pieces: list[_Piece]) -> None:
        """Rows of several sequences through the head together."""
        assert self._head is not None
        at_n = np.concatenate([piece.at_n for piece in pieces])
        if at_n[-1] - at_n[0] == len(at_n) - 1:
            hidden_nH = hidden_SH[at_n[0] : at_n[-1] + 1]
        else:
            hidden_nH = hidden_SH[torch.from_numpy(at_n).to(hidden_SH.device)]
        head = self._head.all_columns if options.top_k == "all" else self._head.local
        budget = {} if hidden_SH.device.type == "cpu" else {"chunk_bytes": CUDA_CHUNK_BYTES}
        scores = score_rows(
            head,
            hidden_nH,
            torch.cat([piece.targets_n for piece in pieces]).to(hidden_SH.device),
            options,
            _joined(pieces),
            tokenizer_size=self._tokenizer_size,
            chunk_rows=self._chunk_rows or auto_chunk_rows(self._head.width, **budget),
            shard=None if options.top_k == "all" else self._head.shard,
        )
        row = candidate = 0
        for piece in pieces:
            num_rows = piece.rows.stop - piece.rows.start
            num_candidates = piece.candidates.stop - piece.candidates.start
            _write(scores, slice(row, row + num_rows), slice(candidate, candidate + num_candidates), piece)
            if options.hidden:
                piece.sequence.arrays["hidden"][piece.rows] = hidden_nH[row : row + num_rows]
            row, candidate = row + num_rows, candidate + num_candidates


def _write(scores: RowScores, rows: slice, candidates: slice, piece: _Piece) -> None:
    for field in fields(scores):
        values = getattr(scores, field.name)
        if values is None:
            continue
        if field.name == "candidate_logprob":
            piece.sequence.arrays[field.name][piece.candidates] = values[candidates]
        else:
            piece.sequence.arrays[field.name][piece.rows] = values[rows]


def _joined(pieces: list[_Piece]) -> Candidates | None:
    """The candidates of all pieces' rows as those of one block of rows."""
    if pieces[0].sequence.asked.candidates is None:
        return None
    ids, counts = [], []
    for piece in pieces:
        own = piece.sequence.asked.candidates
        assert own is not None, "pieces of one group all have candidates or none has"
        ids.append(own.ids[piece.candidates])
        counts.append(np.diff(own.row_offsets[piece.rows.start : piece.rows.stop + 1]))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int32)
    return Candidates(np.concatenate(ids), offsets)
