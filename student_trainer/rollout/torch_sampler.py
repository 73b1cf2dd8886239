"""Samples completions from the training weights themselves, in this process: batches, random numbers, stop tokens.
Owns no distribution (sampling.py) and no cache (decoding.py); leaves the model's mode and the random state as found.

Shape legend: B sequences, N new tokens (at most max_new_tokens), K ids kept, W logit width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from student_trainer.rollout import sampling
from student_trainer.rollout.base import RolloutError
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.decoding import CachedDecoder, Decoder, RecomputeDecoder, Strategy, choose
from student_trainer.types import Prompt, Rollout
from teacher_api.types import FloatArray, IntArray

DROP_FINISHED_BELOW = 0.75  # share of unfinished rows under which copying the cache costs less than dragging them on
DEVICE_CHECK_EVERY = 8  # steps between looks at who has finished; each makes the host wait for the accelerator


class TorchSampler:
    """See RolloutEngine.

    Args:
        model: a transformers causal LM (not a data-parallel wrapper of one); its weights are read at each call.
        eos_token_ids: ids that end a completion, besides `config.stop_token_ids`; may be empty.
        pad_token_id: fills the left of shorter prompts, where nothing attends to it; may equal an end token.
        vocabulary_size: the tokenizer's size V; ids from V up are never sampled.
        seed: with a sample's uid, determines its random numbers.
    """

    def __init__(
        self,
        model: Any,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int | None,
        vocabulary_size: int,
        config: RolloutConfig,
        seed: int,
    ) -> None:
        self.config = config
        self.vocabulary_size = vocabulary_size
        self.stop_ids = tuple(sorted({*eos_token_ids, *config.stop_token_ids}))
        outside = [i for i in self.stop_ids if not 0 <= i < vocabulary_size]
        if outside:
            raise ValueError(f"stop token id {outside[0]} is outside the vocabulary of {vocabulary_size}")
        if seed < 0:
            raise ValueError(f"seed is {seed}; expected >= 0")
        self._model = model
        self._pad_token_id = 0 if pad_token_id is None else pad_token_id
        self._seed = seed
        self._version = 0
        with evaluating(model):
            self.strategy: Strategy = choose(model, vocabulary_size)

    def sample(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> list[Rollout]:
        """See RolloutEngine.sample."""
        jobs = self._jobs(prompts, uids)
        rollouts: list[Rollout | None] = [None] * len(jobs)
        for job, rollout in self._finished(jobs, keep_top_k):
            rollouts[job.place] = rollout
        return [r for r in rollouts if r is not None]

    def stream(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> Iterator[Rollout]:
        """See RolloutEngine.stream."""
        for _, rollout in self._finished(self._jobs(prompts, uids), keep_top_k):
            yield rollout

    def update(self, version: int) -> None:
        """See RolloutEngine.update: the weights are the trainer's own, so only their number is new."""
        self._version = version

    def close(self) -> None:
        """See RolloutEngine.close: nothing belongs to it alone."""

    def _jobs(self, prompts: Sequence[Prompt], uids: Sequence[int]) -> list[_Job]:
        jobs = [_Job(place, prompt, uid) for place, (prompt, uid) in enumerate(zip(prompts, uids, strict=True))]
        self._check(jobs)
        return jobs

    def _finished(self, jobs: Sequence[_Job], keep_top_k: int) -> Iterator[tuple[_Job, Rollout]]:
        for batch in self._batches(jobs):
            with evaluating(self._model):
                rollouts = list(self._sample_batch(batch, keep_top_k))
            yield from zip(batch, rollouts, strict=True)

    def _check(self, jobs: Sequence[_Job]) -> None:
        limit = getattr(self._model.config, "max_position_embeddings", None)
        for job in jobs:
            ids = job.prompt.token_ids
            if not len(ids):
                raise ValueError(f"prompt {job.prompt.index} is empty; a completion must follow something")
            if ids.min() < 0 or ids.max() >= self.vocabulary_size:
                raise ValueError(
                    f"prompt {job.prompt.index} has an id outside the vocabulary of {self.vocabulary_size}"
                )
            if limit and len(ids) + self.config.max_new_tokens > limit:
                raise ValueError(
                    f"prompt {job.prompt.index} has {len(ids)} tokens; with rollout.max_new_tokens "
                    f"{self.config.max_new_tokens} it exceeds the student's context of {limit}"
                )

    def _batches(self, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
        """At most `batch_sequences` jobs at a time, of like length; of one length where padding isn't exact."""
        ordered = sorted(jobs, key=lambda job: len(job.prompt.token_ids))
        groups: Iterator[Sequence[_Job]]
        if self.strategy == "padded":
            groups = iter([ordered])
        else:
            groups = (list(g) for _, g in itertools.groupby(ordered, key=lambda job: len(job.prompt.token_ids)))
        for group in groups:
            for start in range(0, len(group), self.config.batch_sequences):
                yield list(group[start : start + self.config.batch_sequences])

    def _sample_batch(self, jobs: Sequence[_Job], keep_top_k: int) -> Iterator[Rollout]:
        decoder: Decoder
        if self.strategy == "recompute":
            decoder = RecomputeDecoder(self._model)
        else:
            decoder = CachedDecoder(self._model, self.config.max_new_tokens, self._pad_token_id)
        logits = decoder.start([job.prompt.token_ids for job in jobs])
        uniform = sampling.uniforms(self._seed, [job.uid for job in jobs], self.config.max_new_tokens)
        record = self._decode(decoder, logits, torch.from_numpy(uniform).to(logits.device), keep_top_k)
        for row, job in enumerate(jobs):
            yield self._rollout(job, record, row)

    def _decode(self, decoder: Decoder, logits: Tensor, uniform_BN: Tensor, keep_top_k: int) -> _Record:
        """Decodes until every row has a stop token or `max_new_tokens`. What a row gets after its stop token, before
        the row is dropped, is cut off by `_rollout`."""
        num_rows, device = len(logits), logits.device
        record = _DeviceRecord.empty(
            num_rows, self.config.max_new_tokens, min(keep_top_k, self.vocabulary_size), device
        )
        stop_ids = torch.tensor(self.stop_ids, dtype=torch.int64, device=device)
        check_every = 1 if device.type == "cpu" else DEVICE_CHECK_EVERY
        rows = torch.arange(num_rows, device=device)  # of the record; those still decoded
        done = torch.zeros(num_rows, dtype=torch.bool, device=device)
        for step in range(self.config.max_new_tokens):
            drawn = self._draw(logits, uniform_BN[rows, step])
            record.put(rows, step, drawn)
            if keep_top_k:
                kept = sampling.most_likely(logits, keep_top_k, vocabulary_size=self.vocabulary_size)
                record.topk_BNK[rows, step] = kept
            if step + 1 == self.config.max_new_tokens:
                break
            token = drawn.token_B
            done = done | torch.isin(token, stop_ids)
            if step % check_every == check_every - 1:
                going = int((~done).sum())
                if going == 0:
                    break
                if going <= DROP_FINISHED_BELOW * len(rows):
                    alive = (~done).nonzero().squeeze(-1)
                    decoder.keep(alive)
                    rows, done, token = rows[alive], done[alive], token[alive]
            logits = decoder.step(token)
        return record.to_host()

    def _draw(self, logits: Tensor, uniform_B: Tensor) -> sampling.Draw:
        if self.config.greedy:
            return sampling.draw_greedy(logits, vocabulary_size=self.vocabulary_size)
        return sampling.draw(
            logits,
            uniform_B,
            vocabulary_size=self.vocabulary_size,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
            top_p=self.config.top_p,
        )

    def _rollout(self, job: _Job, record: _Record, row: int) -> Rollout:
        stops = np.flatnonzero(np.isin(record.tokens_BN[row], self.stop_ids))
        count = int(stops[0]) + 1 if len(stops) else self.config.max_new_tokens
        finish: Literal["eos", "length"] = "eos" if len(stops) else "length"
        full = record.full_BN[row, :count].copy()
        if not np.isfinite(full).all():
            position = len(job.prompt.token_ids) + int(np.flatnonzero(~np.isfinite(full))[0])
            raise RolloutError(f"the student's logits are not finite: sample {job.uid}, position {position}")
        return Rollout(
            uid=job.uid,
            prompt=job.prompt,
            token_ids=record.tokens_BN[row, :count].copy(),
            finish=finish,
            behaviour_logprob=record.behaviour_BN[row, :count].copy(),
            full_logprob=full,
            student_topk_ids=record.topk_BNK[row, :count].copy() if record.topk_BNK.shape[-1] else None,
            versions=np.full(count, self._version, dtype=np.int32),
        )


@dataclass(frozen=True, slots=True)
class _Job:
    place: int  # in the caller's list
    prompt: Prompt
    uid: int


@dataclass(frozen=True, slots=True)
class _Record:
    tokens_BN: IntArray  # unused places hold -1, which is no token
    behaviour_BN: FloatArray
    full_BN: FloatArray
    topk_BNK: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class _DeviceRecord:
    tokens_BN: Tensor
    behaviour_BN: Tensor
    full_BN: Tensor
    topk_BNK: Tensor

    @classmethod
    def empty(cls, num_rows: int, max_new_tokens: int, keep: int, device: torch.device) -> _DeviceRecord:
        shape = (num_rows, max_new_tokens)
        return cls(
            torch.full(shape, -1, dtype=torch.int32, device=device),
            torch.zeros(shape, device=device),
            torch.zeros(shape, device=device),
            torch.zeros((*shape, keep), dtype=torch.int32, device=device),
        )

    def put(self, rows: Tensor, step: int, drawn: sampling.Draw) -> None:
        self.tokens_BN[rows, step] = drawn.token_B.int()
        self.behaviour_BN[rows, step] = drawn.behaviour_logprob_B
        self.full_BN[rows, step] = drawn.full_logprob_B

    def to_host(self) -> _Record:
        return _Record(*(t.cpu().numpy() for t in (self.tokens_BN, self.behaviour_BN, self.full_BN, self.topk_BNK)))


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Evaluation mode, no gradients; every module gets its own mode back, so that a partly frozen model stays so."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not inference_mode: buffers that a model makes on the way (rotary tables) must stay usable in training.
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
