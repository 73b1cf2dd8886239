"""Samples completions from the training weights themselves, in this process. Owns what the engine is asked and gives;
how sequences come and go is in continuous.py and batches.py, distributions in sampling.py, caches in slots.py and
decoding.py. Leaves the model's mode and the random state as found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch

from student_trainer.rollout.base import ByPlace, RolloutError
from student_trainer.rollout.batches import Batch, batches
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.continuous import Continuous
from student_trainer.rollout.decoding import CachedDecoder, RecomputeDecoder, Strategy, choose
from student_trainer.rollout.jobs import Job, Work, require_continuable
from student_trainer.rollout.ledger import Record, Rules
from student_trainer.rollout.slots import SlotDecoder
from student_trainer.types import Metrics, Prompt, Rollout


class TorchSampler(ByPlace):
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

    def update(self, version: int) -> None:
        """See RolloutEngine.update: the weights are the trainer's own, so only their number is new."""
        self._version = version

    def figures(self) -> Metrics:
        """See RolloutEngine.figures: nothing of its own."""
        return {}

    def close(self) -> None:
        """See RolloutEngine.close: nothing belongs to it alone."""

    def _jobs(self, prompts: Sequence[Prompt], uids: Sequence[int]) -> list[Job]:
        jobs = [Job(place, prompt, uid) for place, (prompt, uid) in enumerate(zip(prompts, uids, strict=True))]
        limit = getattr(self._model.config, "max_position_embeddings", None)
        require_continuable(prompts, self.vocabulary_size, self.config.max_new_tokens, limit, "student")
        return jobs

    def _finished(
        self, prompts: Sequence[Prompt], uids: Sequence[int], keep_top_k: int
    ) -> Iterator[tuple[int, Rollout]]:
        jobs = self._jobs(prompts, uids)
        rules = Rules(self.config, self.vocabulary_size, self.stop_ids, self._seed, keep_top_k)
        for work, computing in self._works(jobs, rules):
            while not work.is_done:
                with evaluating(self._model), computing():
                    finished = work.advance()
                for job, record in finished:
                    yield job.place, self._rollout(job, record)

    def _works(
        self, jobs: Sequence[Job], rules: Rules
    ) -> Iterator[tuple[Work, Callable[[], AbstractContextManager[None]]]]:
        """One after the other, each with what it is advanced in."""
        most, new_tokens = self.config.batch_sequences, self.config.max_new_tokens
        if not jobs:
            return
        if self.strategy == "continuous":
            slots = min(most, len(jobs))
            longest = max(len(job.prompt.token_ids) for job in jobs)
            slotted = SlotDecoder(self._model, slots, longest + new_tokens)
            yield Continuous(slotted, jobs, rules, slots), slotted.attending
            return
        device = next(self._model.parameters()).device
        for batch in batches(jobs, self.strategy, most):
            decoder: CachedDecoder | RecomputeDecoder
            if self.strategy == "recompute":
                decoder = RecomputeDecoder(self._model)
            else:
                decoder = CachedDecoder(self._model, new_tokens, self._pad_token_id)
            yield Batch(decoder, batch, rules, device), contextlib.nullcontext

    def _rollout(self, job: Job, record: Record) -> Rollout:
        finite = np.isfinite(record.full)
        if not finite.all():
            position = len(job.prompt.token_ids) + int(np.flatnonzero(~finite)[0])
            raise RolloutError(f"the student's logits are not finite: sample {job.uid}, position {position}")
        return Rollout(
            uid=job.uid,
            prompt=job.prompt,
            token_ids=record.tokens,
            finish="eos" if record.stopped else "length",
            behaviour_logprob=record.behaviour,
            full_logprob=record.full,
            student_topk_ids=record.topk,
            versions=np.full(len(record.tokens), self._version, dtype=np.int32),
        )


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
