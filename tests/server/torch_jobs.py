"""Jobs for the torch backend, and the check of its answers against a plain float32 transformers forward of each
sequence alone, taken to float64."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from teacher_api.errors import TeacherError
from teacher_api.types import LOGPROB_FLOOR, ScoreOptions, Scores
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.torch_backend import TorchBackend

TOLERANCE = 1e-5
WIDTH = 128


def score(backend: TorchBackend, jobs: Sequence[ScoreJob]) -> list[Scores | TeacherError]:
    return asyncio.run(backend.score(jobs))


def scored(backend: TorchBackend, jobs: Sequence[ScoreJob]) -> list[Scores]:
    answers = score(backend, jobs)
    for answer in answers:
        assert isinstance(answer, Scores), answer
    return [answer for answer in answers if isinstance(answer, Scores)]


def job(
    name: str, tokens: npt.ArrayLike, positions: npt.ArrayLike | None = None, candidates: Any = None, **options: Any
) -> ScoreJob:
    ids = np.asarray(tokens, np.int32)
    asked = np.arange(1, len(ids)) if positions is None else np.asarray(positions)
    return ScoreJob(name, ids, 0, asked.astype(np.int32), ScoreOptions(**options), candidates)


def reference(model: Any, asked: ScoreJob) -> npt.NDArray[np.float64]:
    """log p [N, W] at the asked positions: the whole sequence alone through the stock model, softmax in float64."""
    with torch.inference_mode():
        logits = model(torch.from_numpy(asked.token_ids.astype(np.int64))[None]).logits[0].double()
    return (logits / asked.options.temperature).log_softmax(-1).numpy()[asked.positions - 1]


def check(answer: Scores, asked: ScoreJob, logprob: npt.NDArray[np.float64], size: int) -> None:
    """Every value of `answer` against the reference distribution, within TOLERANCE."""
    rows, targets, k = np.arange(len(asked.positions)), asked.token_ids[asked.positions], asked.options.top_k

    def close(got: Any, expected: Any) -> None:
        np.testing.assert_allclose(got, np.maximum(expected, LOGPROB_FLOOR), rtol=0, atol=TOLERANCE)

    assert answer.id == asked.id
    np.testing.assert_array_equal(answer.positions, asked.positions)
    token = logprob[rows, targets]
    close(answer.token_logprob, token)
    close(answer.entropy, -(np.exp(logprob) * logprob).sum(-1))
    # A rank is exact up to ids whose logprob is the token's within the tolerance.
    low = 1 + (logprob > token[:, None] + TOLERANCE).sum(-1)
    high = 1 + (logprob > token[:, None] - TOLERANCE).sum(-1)
    assert answer.rank is not None
    assert np.all((low <= answer.rank) & (answer.rank <= high))
    inside = np.zeros(logprob.shape, bool)
    inside[rows, targets] = True
    if asked.candidates is not None:
        row_of = np.repeat(rows, np.diff(asked.candidates.row_offsets))
        close(answer.candidate_logprob, logprob[row_of, asked.candidates.ids])
        inside[row_of, asked.candidates.ids] = True
    else:
        assert answer.candidate_logprob is None
    if k == "all":
        assert answer.topk_ids is None
        close(answer.topk_logprob, logprob[:, :size])
        inside[:, :size] = True
    elif k:
        assert answer.topk_ids is not None
        assert answer.topk_ids.shape == (len(rows), k)
        assert answer.topk_ids.max() < size
        assert all(len(set(row)) == k for row in answer.topk_ids.tolist())
        close(answer.topk_logprob, np.take_along_axis(logprob, answer.topk_ids.astype(np.int64), -1))
        close(answer.topk_logprob, -np.sort(-logprob[:, :size], -1)[:, :k])
        inside[rows[:, None], answer.topk_ids] = True
    else:
        assert answer.topk_ids is None
        assert answer.topk_logprob is None
    with np.errstate(divide="ignore"):
        close(answer.log_tail, np.log(np.where(inside, 0.0, np.exp(logprob)).sum(-1)))


def spy_on_trunk(backend: TorchBackend, before: Any = None, after: Any = None) -> list[tuple[int, ...]]:
    """Records the shape of each forward; `before(ids)` may raise or wait, `after(ids, hidden)` may spoil the states."""
    assert backend._loaded is not None
    shapes: list[tuple[int, ...]] = []
    parts = backend._loaded.parts

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(parts, name)

        def trunk(self, ids: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(ids.shape))
            if before is not None:
                before(ids)
            hidden: torch.Tensor = parts.trunk(ids)
            if after is not None:
                after(ids, hidden)
            return hidden

    backend._loaded = replace(backend._loaded, parts=Spy())
    return shapes


def spy_on_steps(backend: TorchBackend, before: Any = None) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Records the shapes of the forwards with a cache, and of those without; `before(ids)` of the former may raise."""
    without = spy_on_trunk(backend)
    assert backend._loaded is not None
    inner = backend._loaded.parts
    shapes: list[tuple[int, ...]] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def step(self, ids: torch.Tensor, *arguments: Any, **named: Any) -> Any:
            shapes.append(tuple(ids.shape))
            if before is not None:
                before(ids)
            return inner.step(ids, *arguments, **named)

    backend._loaded = replace(backend._loaded, parts=Spy())
    return shapes, without
