"""The embedded engine: any transformers causal language model, without vLLM, on the CPU or one GPU.

Owns batching and the one thread that touches the model. Sequences are sorted by length and right-padded to batches of
a token budget; a prompt that several share runs once; only the rows that were asked for go through the head. In
reference mode each sequence runs alone and whole, so that its answer is the same bits whatever else is asked, and after
any restart.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from teacher_api.errors import BackendFailed, InvalidBackendOutput, InvalidRequest, TeacherError, TooLarge
from teacher_api.types import Candidates, FloatArray, ScoreOptions, Scores
from teacher_server.backends.base import FEATURES, BatchPolicy, ModelFacts, OutputHead, ScoreJob, ScoringBackend
from teacher_server.backends.generation import Generator
from teacher_server.backends.model_thread import ModelThread
from teacher_server.backends.rows import RowScores, auto_chunk_rows, score_rows
from teacher_server.backends.shared_prompt import Prompt, groups_of, parts_of, shared_tokens
from teacher_server.backends.torch_loading import Loaded, load, output_head

logger = logging.getLogger(__name__)

_Answer = Scores | TeacherError
_FAILURES = (RuntimeError, IndexError)  # out of memory is a RuntimeError


class TorchBackend(ScoringBackend):
    """Scores with a transformers model in this process.

    Args:
        model: checkpoint directory or hub id.
        revision: branch, tag or commit of a hub id; empty: the default branch.
        dtype: of the weights and the trunk; "auto" is what the checkpoint is stored in, float32 on a CPU. Logits are
            float32 whatever it is.
        device: "cpu", "cuda", "cuda:1"…; "auto" is a GPU where there is one.
        threads: of the CPU for one operation; 0: torch's default, in reference mode 1 (more is as reproducible, on
            machines that have them).
        reference: one sequence per forward.
        batch_tokens: padded tokens of one forward: its number of sequences times its longest. Where their prompt has
            run before, its tokens count a quarter.
        batch_sequences: sequences of one forward.
        head_chunk_rows: rows whose logits exist at once; 0: as many as fill 32 MiB.
        max_sequence_tokens: longest sequence; 0: the model's positions, or 32,768 where it has no limit.
        generated_texts: written at a time; 0: this teacher writes none.
    """

    name = "torch"
    features = frozenset({*FEATURES, "exact_tail"})

    def __init__(
        self,
        model: str,
        *,
        revision: str = "",
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        device: str = "auto",
        threads: int = 0,
        reference: bool = False,
        batch_tokens: int = 8192,
        batch_sequences: int = 64,
        head_chunk_rows: int = 0,
        max_sequence_tokens: int = 0,
        generated_texts: int = 0,
    ) -> None:
        self._model = model
        self._revision = revision
        self._dtype = dtype
        self._device_name = device
        self._threads = threads or (1 if reference else 0)
        self._reference = reference
        self._batch_tokens = batch_tokens
        self._batch_sequences = batch_sequences
        self._head_chunk_rows = head_chunk_rows
        self._max_sequence_tokens = max_sequence_tokens
        self._generated_texts = generated_texts
        self._loaded: Loaded | None = None
        self._thread = ModelThread("torch-backend")

    @property
    def policy(self) -> BatchPolicy:
        return BatchPolicy(self._batch_tokens, self._batch_sequences, shares_prompts=self._shares_prompts)

    @property
    def _shares_prompts(self) -> bool:
        return not self._reference and self._loaded is not None and self._loaded.shares_prompts

    def load(self) -> ModelFacts:
        """Loads the model, in the thread that will run it. Raises ValueError of one line."""
        loaded = self._thread.submit(self._load).result()
        at_once = 0 if self._reference else self._batch_tokens  # reference mode: a sequence, of whatever length
        self._loaded = replace(loaded, facts=replace(loaded.facts, batch_tokens=at_once))
        if self._generated_texts:
            self.generator = self._generator(self._loaded)
        return self._loaded.facts

    async def score(self, jobs: Sequence[ScoreJob]) -> list[_Answer]:
        abandoned = threading.Event()
        try:
            return await asyncio.wrap_future(self._thread.submit(lambda: self._score(jobs, abandoned)))
        finally:
            abandoned.set()  # a cancelled caller: the batch under way is the last one run for it

    def output_head(self) -> OutputHead:
        assert self._loaded is not None, "head before load"
        return output_head(self._loaded.parts)

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.close)
        if self._loaded is not None:
            self._loaded = self.generator = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _load(self) -> Loaded:
        if self._threads:
            torch.set_num_threads(self._threads)
        device = _device(self._device_name)
        if self._reference and device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
            torch.use_deterministic_algorithms(True)
        mode = f"reference, {self._threads} threads" if self._reference else "batched"
        if self._reference and self._head_chunk_rows:
            mode += f", head in chunks of {self._head_chunk_rows} rows"  # a product's last bits depend on its size
        return load(
            self._model,
            revision=self._revision,
            dtype="float32" if self._dtype == "auto" and device.type == "cpu" else self._dtype,
            device=device,
            max_sequence_tokens=self._max_sequence_tokens,
            scoring_path=f"{device.type}, {mode}",
        )

    def _generator(self, loaded: Loaded) -> Generator:
        from teacher_server.backends.torch_generation import TorchGenerator

        return TorchGenerator(
            loaded.network,
            self._thread,
            tokenizer_size=loaded.facts.tokenizer_size,
            batch_tokens=self._batch_tokens,
            # Under LongRoPE one long text would turn the others' positions, too.
            batch_texts=1 if loaded.long_rope_after is not None else self._generated_texts,
        )

    def _score(self, jobs: Sequence[ScoreJob], abandoned: threading.Event) -> list[_Answer]:
        assert self._loaded is not None, "score before load"
        answers: dict[int, _Answer] = {}
        for index, job in enumerate(jobs):
            refusal = _refusal(job, self._loaded.facts)
            if refusal is not None:
                answers[index] = refusal
        accepted = [index for index in range(len(jobs)) if index not in answers]
        groups = groups_of(jobs, accepted) if self._shares_prompts else []
        for group in groups:
            answers |= zip(group, self._run_group([jobs[index] for index in group], abandoned), strict=True)
        for batch in self._batches(jobs, [index for index in accepted if index not in answers]):
            _stop_if(abandoned)
            answers |= zip(batch, self._run_isolated([jobs[index] for index in batch]), strict=True)
        return [answers[index] for index in range(len(jobs))]

    def _run_group(self, jobs: Sequence[ScoreJob], abandoned: threading.Event) -> list[_Answer]:
        """Jobs that share a prompt, longest need first: it runs once, then they do, a forward at a time. Where one
        fails, each of its jobs runs alone."""
        _stop_if(abandoned)
        try:
            prompt = self._run_prompt(jobs[0])
        except _FAILURES as error:
            logger.warning("prompt of %d sequences failed: %s", len(jobs), error)
            return [answer for job in jobs for answer in self._run_isolated([job])]
        answers: list[_Answer] = []
        parts = parts_of(jobs, batch_tokens=self._batch_tokens, batch_sequences=self._batch_sequences)
        for part in parts:
            _stop_if(abandoned)
            members = [jobs[index] for index in part]
            try:
                answers += self._run_after(prompt, members, first=not answers)
            except _FAILURES as error:
                logger.warning("batch of %d sequences failed: %s", len(members), error)
                answers += [answer for job in members for answer in self._run_isolated([job])]
        return answers

    def _batches(self, jobs: Sequence[ScoreJob], indices: Sequence[int]) -> list[list[int]]:
        """Groups jobs of like length under the token budget; a sequence over the budget runs alone."""
        assert self._loaded is not None
        limit = 1 if self._reference else self._batch_sequences
        threshold = self._loaded.long_rope_after
        batches: list[list[int]] = []
        for index in sorted(indices, key=lambda i: jobs[i].num_tokens, reverse=True):
            batch = batches[-1] if batches else []
            longest = jobs[batch[0]].num_tokens if batch else 0
            fits = 0 < len(batch) < limit and (len(batch) + 1) * longest <= self._batch_tokens
            alike = threshold is None or (longest > threshold) == (jobs[index].num_tokens > threshold)
            if fits and alike:
                batch.append(index)
            else:
                batches.append([index])
        return batches

    def _run_isolated(self, jobs: Sequence[ScoreJob]) -> list[_Answer]:
        """Runs a batch; where that fails, each of its jobs alone, so that only the ones at fault get an error."""
        try:
            return self._run(jobs)
        except _FAILURES as error:
            logger.warning("batch of %d sequences failed: %s", len(jobs), error)
            if len(jobs) == 1:
                message = " ".join(str(error).split())
                return [BackendFailed(f"sequence {jobs[0].id!r} of {jobs[0].num_tokens} tokens: {message}")]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return [answer for job in jobs for answer in self._run_isolated([job])]

    @torch.inference_mode()
    def _run(self, jobs: Sequence[ScoreJob]) -> list[_Answer]:
        """One forward of whole sequences."""
        assert self._loaded is not None
        # Row t - 1 predicts position t: what follows the last scored position changes nothing. Under LongRoPE the
        # sequence's length does, so it runs whole.
        whole = self._loaded.long_rope_after is not None
        fed = [job.num_tokens if whole else int(job.positions[-1]) for job in jobs]
        ids_BT = self._right_padded([job.token_ids[:n] for job, n in zip(jobs, fed, strict=True)])
        hidden_BTH = self._loaded.parts.trunk(ids_BT)
        first_rows = range(0, ids_BT.numel(), ids_BT.shape[1])
        rows = [job.positions - 1 + first for job, first in zip(jobs, first_rows, strict=True)]
        return self._answers(jobs, hidden_BTH.flatten(0, 1), rows, [(n, 0) for n in fed])

    @torch.inference_mode()
    def _run_prompt(self, longest: ScoreJob) -> Prompt:
        assert self._loaded is not None
        parts = self._loaded.parts
        return Prompt.run(parts, longest.token_ids[: shared_tokens(longest)], parts.project.weight.device)

    @torch.inference_mode()
    def _run_after(self, prompt: Prompt, jobs: Sequence[ScoreJob], *, first: bool) -> list[_Answer]:
        """One forward of what follows `prompt`; the first job of the first one is who it was computed for."""
        assert self._loaded is not None
        tails = [job.token_ids[job.prompt_tokens : int(job.positions[-1])] for job in jobs]
        num_shared, longest = len(prompt.hidden_PH), max(map(len, tails))
        hidden_RH = prompt.hidden_PH
        if longest:  # else all their rows are within the prompt
            hidden_BTH = prompt.then(self._loaded.parts, self._right_padded(tails))
            hidden_RH = torch.cat([hidden_RH, hidden_BTH.flatten(0, 1)])
        rows, counts = [], []
        for place, (job, tail) in enumerate(zip(jobs, tails, strict=True)):
            row_N = job.positions.astype(np.int64) - 1
            rows.append(np.where(row_N < num_shared, row_N, row_N + place * longest))
            computed_here = first and place == 0
            counts.append((len(tail) + num_shared, 0) if computed_here else (len(tail), shared_tokens(job)))
        return self._answers(jobs, hidden_RH, rows, counts)

    def _right_padded(self, sequences: Sequence[np.ndarray]) -> Tensor:
        assert self._loaded is not None
        return _right_padded(sequences, self._loaded.parts.project.weight.device)

    def _answers(
        self,
        jobs: Sequence[ScoreJob],
        hidden_RH: Tensor,
        rows: Sequence[np.ndarray],
        counts: Sequence[tuple[int, int]],
    ) -> list[_Answer]:
        """The head on each job's own `rows` of the hidden states, grouped by options; `counts` are its computed and
        cached tokens."""
        assert self._loaded is not None
        loaded, device = self._loaded, hidden_RH.device
        groups: dict[tuple[ScoreOptions, bool], list[int]] = {}
        for index, job in enumerate(jobs):
            groups.setdefault((job.options, job.candidates is not None), []).append(index)
        answers: dict[int, _Answer] = {}
        for (options, _), members in groups.items():
            group = [jobs[index] for index in members]
            hidden_NH = hidden_RH[_on(np.concatenate([rows[index] for index in members]), device)]
            scores = score_rows(
                loaded.head,
                hidden_NH,
                _on(np.concatenate([job.token_ids[job.positions] for job in group]), device),
                options,
                _joined([job.candidates for job in group if job.candidates is not None]),
                tokenizer_size=loaded.facts.tokenizer_size,
                chunk_rows=self._head_chunk_rows or auto_chunk_rows(loaded.facts.logit_width),
            )
            states = hidden_NH.float().cpu().numpy() if options.hidden else None
            own_counts = [counts[index] for index in members]
            answers |= zip(members, _cut(group, scores, states, own_counts), strict=True)
        return [answers[index] for index in range(len(jobs))]


def _stop_if(abandoned: threading.Event) -> None:
    if abandoned.is_set():
        raise BackendFailed("the caller gave up before the batch ran")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} can't be used: {' '.join(str(error).split())[:200]}") from error
    return device


def _refusal(job: ScoreJob, facts: ModelFacts) -> TeacherError | None:
    """What would crash the engine, and on a GPU take the whole process with it, is refused before it gets there."""
    size, limit, k = facts.tokenizer_size, facts.max_sequence_tokens, job.options.top_k
    if job.num_tokens > limit:
        return TooLarge(f"sequence {job.id!r} has {job.num_tokens} tokens; the model takes {limit}")
    if k != "all" and not 0 <= k <= size:
        return InvalidRequest(f"top_k is {k}; expected 0 … {size}", field="options.top_k")
    asked = [("token_ids", job.token_ids), ("candidates.ids", job.candidates.ids if job.candidates else ())]
    for field, ids in asked:
        if len(ids) and (int(np.min(ids)) < 0 or int(np.max(ids)) >= size):
            return InvalidRequest(f"sequence {job.id!r} has an id outside 0 … {size - 1}", field=field)
    positions = job.positions
    if not (len(positions) and int(positions[0]) >= 1 and int(positions[-1]) < job.num_tokens):
        return InvalidRequest(f"sequence {job.id!r}: positions outside 1 … {job.num_tokens - 1}", field="ranges")
    return None


def _right_padded(sequences: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Ids [B, longest]. What pads them is never seen: every later position is masked or comes later."""
    ids_BT = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, sequence in zip(ids_BT, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(ids_BT).to(device)


def _on(ids: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64)).to(device)


def _joined(parts: Sequence[Candidates]) -> Candidates | None:
    """The candidates of several jobs as those of their concatenated rows."""
    if not parts:
        return None
    ids = np.concatenate([part.ids for part in parts])
    counts = np.concatenate([np.diff(part.row_offsets) for part in parts])
    return Candidates(ids, np.concatenate([np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)]))


@dataclass(slots=True)
class _Cursor:
    """How far the joined rows have been handed out."""

    row: int = 0
    candidate: int = 0


def _cut(
    jobs: Sequence[ScoreJob], scores: RowScores, states_NH: FloatArray | None, counts: Sequence[tuple[int, int]]
) -> list[_Answer]:
    """Splits the scores of joined rows back into the jobs they came from, withholding those that are not numbers."""
    answers: list[_Answer] = []
    at = _Cursor()
    arrays = {
        field.name: None if value is None else value.cpu().numpy()
        for field in fields(scores)
        for value in [getattr(scores, field.name)]
    }
    bad_N = scores.token_logprob.isnan().cpu().numpy()
    for job, (num_computed, num_cached) in zip(jobs, counts, strict=True):
        rows = slice(at.row, at.row + len(job.positions))
        asked = slice(at.candidate, at.candidate + (len(job.candidates.ids) if job.candidates is not None else 0))
        at.row, at.candidate = rows.stop, asked.stop
        bad = np.flatnonzero(bad_N[rows])
        if len(bad):
            answers.append(
                InvalidBackendOutput(
                    f"sequence {job.id!r}: the model's output is not finite at position {job.positions[bad[0]]} "
                    f"({len(bad)} of {len(job.positions)} rows); withheld"
                )
            )
            continue
        own: dict[str, Any] = {
            name: None if array is None else array[asked if name == "candidate_logprob" else rows]
            for name, array in arrays.items()
        }
        if own["rank"] is not None:
            own["rank"] = own["rank"].astype(np.uint32)
        answers.append(
            Scores(
                id=job.id,
                positions=job.positions,
                hidden=None if states_NH is None else states_NH[rows],
                computed_tokens=num_computed,
                cached_tokens=num_cached,
                **own,
            )
        )
    return answers
