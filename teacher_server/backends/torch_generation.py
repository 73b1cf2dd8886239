"""Text of the torch backend: transformers' own `generate` with its cache of keys and values, in the backend's one model
thread. Scoring goes between two tokens, so that it never waits for a text to end.

Jobs of the same temperature, top_p, top_k and min_p that wait together are written together, padded on the left; those
that come later wait until that batch has ended. Each text has a random stream of its own, on the CPU, so that a seed
means the same whatever is written beside it.

Shape legend: B texts of a batch, T tokens, W logit width.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from teacher_api.errors import BackendFailed
from teacher_server.backends.generation import Generated, GenerationJob, Generator, Sampling, TokenWatch
from teacher_server.backends.model_thread import ModelThread

logger = logging.getLogger(__name__)

PAD_ID = 0  # left of a shorter prompt, masked


@dataclass(eq=False, slots=True)
class _Text:
    job: GenerationJob
    watch: TokenWatch
    future: Future[Generated]
    random: torch.Generator
    abandoned: bool = False  # nobody waits for it: written on only as long as its batch is

    @property
    def is_done(self) -> bool:
        return self.abandoned or self.watch.ending is not None


class TorchGenerator(Generator):
    """
    Args:
        network: a transformers causal language model; its own generation settings are taken from it.
        tokenizer_size: ids from here on are never drawn.
        batch_tokens: padded prompt tokens of one batch; a longer prompt is written alone.
        batch_texts: texts of one batch.
    """

    def __init__(
        self, network: Any, thread: ModelThread, *, tokenizer_size: int, batch_tokens: int, batch_texts: int
    ) -> None:
        self._network = network
        # What the checkpoint's file says (penalties, forced tokens, a temperature) would be added to what was asked.
        network.generation_config = GenerationConfig()
        self._thread = thread
        self._tokenizer_size = tokenizer_size
        self._batch_tokens = batch_tokens
        self._batch_texts = batch_texts
        self._waiting: list[_Text] = []
        self._lock = threading.Lock()

    async def generate(self, job: GenerationJob) -> Generated:
        random = torch.Generator()
        if job.sampling.seed is None:
            random.seed()
        else:
            random.manual_seed(job.sampling.seed)
        text = _Text(job, TokenWatch(job), Future(), random)
        with self._lock:
            self._waiting.append(text)
        # Those that come in the same moment are there by then.
        asyncio.get_running_loop().call_soon(self._thread.submit_long, self._write_next)
        try:
            return await asyncio.wrap_future(text.future)
        finally:
            text.abandoned = True

    def _write_next(self) -> None:
        """In the model's thread: the oldest text that waits, and its company."""
        with self._lock:
            self._waiting = [text for text in self._waiting if not text.abandoned]
            batch = self._company(self._waiting)
            self._waiting = [text for text in self._waiting if text not in batch]
        batch = [text for text in batch if text.future.set_running_or_notify_cancel()]  # from here on nobody cancels
        if not batch:
            return
        try:
            self._write(batch)
        except Exception as error:  # the boundary to foreign code; out of memory is a RuntimeError
            logger.warning("writing %d texts failed: %s", len(batch), error)
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            for text in batch:
                if not text.future.done():
                    text.future.set_exception(BackendFailed(f"writing {text.job.id!r} failed: {message}"))

    def _company(self, waiting: Sequence[_Text]) -> list[_Text]:
        batch: list[_Text] = []
        longest = 0
        for text in waiting:
            if len(batch) == self._batch_texts:
                break
            length = max(longest, len(text.job.prompt_ids))
            alike = not batch or _drawn_alike(text.job.sampling, batch[0].job.sampling)
            if alike and (not batch or length * (len(batch) + 1) <= self._batch_tokens):
                batch.append(text)
                longest = length
        return batch

    @torch.inference_mode()
    def _write(self, batch: Sequence[_Text]) -> None:
        device = self._network.device
        longest = max(len(text.job.prompt_ids) for text in batch)
        ids_BT = torch.full((len(batch), longest), PAD_ID, dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for row, text in enumerate(batch):
            prompt = torch.from_numpy(text.job.prompt_ids.astype("int64"))
            ids_BT[row, longest - len(prompt) :] = prompt
            mask_BT[row, longest - len(prompt) :] = 1
        self._network.generate(
            ids_BT.to(device),
            attention_mask=mask_BT.to(device),
            generation_config=GenerationConfig(
                max_new_tokens=max(text.job.max_tokens for text in batch), do_sample=False, pad_token_id=PAD_ID
            ),
            logits_processor=_processors(batch, self._tokenizer_size),
            stopping_criteria=StoppingCriteriaList([_Follow(batch, self._thread)]),
        )


def _drawn_alike(a: Sampling, b: Sampling) -> bool:
    return replace(a, seed=None) == replace(b, seed=None)


def _processors(batch: Sequence[_Text], tokenizer_size: int) -> LogitsProcessorList:
    """What turns logits into those of which `generate` takes the largest."""
    sampling = batch[0].job.sampling
    steps: list[Any] = [_OnlyTokens(tokenizer_size)]
    if sampling.temperature == 0:
        return LogitsProcessorList(steps)
    if sampling.temperature != 1:
        steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(float(sampling.top_p)))
    return LogitsProcessorList([*steps, _Draw([text.random for text in batch])])


class _OnlyTokens(LogitsProcessor):  # type: ignore[misc]  # transformers has no types here
    """Columns without a token are never drawn."""

    def __init__(self, tokenizer_size: int) -> None:
        self._size = tokenizer_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self._size :] = -torch.inf  # a copy, made by `generate`
        return scores


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """y ~ softmax(scores), by inverting the distribution function at one number of each text's own stream; all mass on
    y. float64: over 150,000 ids, float32 sums would shift probability by more than many ids have."""

    def __init__(self, random: Sequence[torch.Generator]) -> None:
        self._random = random

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform_B1 = torch.stack([torch.rand(1, generator=each, dtype=torch.float64) for each in self._random])
        mass_BW = scores.double().softmax(-1).cumsum(-1)
        total_B1 = mass_BW[:, -1:]
        # Rounding may lift u * total to total itself, beyond the last id.
        below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
        target_B1 = torch.minimum(uniform_B1.to(scores.device) * total_B1, below_B1)
        drawn_B1 = torch.searchsorted(mass_BW, target_B1, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn_B1, 0.0)


class _Follow(StoppingCriteria):  # type: ignore[misc]
    """Hands each new token to its text, tells whoever waits for a text that it has ended, and lets scoring in."""

    def __init__(self, batch: Sequence[_Text], thread: ModelThread) -> None:
        self._batch = batch
        self._thread = thread

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        for text, token in zip(self._batch, input_ids[:, -1].tolist(), strict=True):
            if not text.is_done and text.watch.add([token]):
                text.future.set_result(text.watch.result())
        self._thread.between()
        return torch.tensor([text.is_done for text in self._batch], device=input_ids.device)
