"""The torch backend's batches: within their budget; a sequence that fails, or a caller that leaves, harms no other."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
import torch
from tinymodels import tiny_model
from torch_jobs import TOLERANCE, job, reference, score, scored, spy_on_trunk

from teacher_api.errors import BackendFailed, InvalidBackendOutput, InvalidRequest, TooLarge
from teacher_api.types import Candidates, Scores
from teacher_server.backends.base import ScoreJob

pytestmark = pytest.mark.slow


def test_batches_respect_the_budget(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("llama"), batch_tokens=100, batch_sequences=5)
    shapes = spy_on_trunk(backend)
    lengths = [2, 90, 40, 3, 3, 3, 3, 3, 3, 128, 41, 20]
    scored(backend, [job(str(i), np.full(n, 7)) for i, n in enumerate(lengths)])
    assert sum(rows for rows, _ in shapes) == len(lengths)
    assert all(rows * tokens <= 100 or rows == 1 for rows, tokens in shapes)
    assert max(rows for rows, _ in shapes) == 5
    assert len(shapes) <= 7
    assert backend.policy.max_tokens == 100


def test_rows_that_are_not_numbers_are_withheld_and_named(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("llama"))

    def spoil(ids: torch.Tensor, hidden: torch.Tensor) -> None:
        hidden[ids == 77] = torch.nan

    spy_on_trunk(backend, after=spoil)
    good = [job("good", range(2, 30), top_k=4), job("also good", range(5, 20), top_k=4)]
    first, second, third = score(backend, [good[0], job("bad", [2, 3, 77, 77, 4, 5], top_k=4), good[1]])
    assert isinstance(second, InvalidBackendOutput)
    assert second.message == ("sequence 'bad': the model's output is not finite at position 3 (2 of 5 rows); withheld")
    model = tiny_model("llama")
    for answer, asked in zip((first, third), good, strict=True):
        assert isinstance(answer, Scores)
        expected = reference(model, asked)[np.arange(len(asked.positions)), asked.token_ids[1:]]
        np.testing.assert_allclose(answer.token_logprob, expected, rtol=0, atol=TOLERANCE)


def test_a_failing_sequence_fails_alone(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("llama"))

    def fail(ids: torch.Tensor) -> None:
        if bool((ids == 99).any()):
            raise torch.OutOfMemoryError("no memory\nleft")

    shapes = spy_on_trunk(backend, fail)
    jobs = [job("a", range(2, 20)), job("b", [2, 99, 3]), job("c", range(2, 9))]
    first, second, third = score(backend, jobs)
    assert isinstance(first, Scores)
    assert isinstance(third, Scores)
    assert isinstance(second, BackendFailed)
    assert second.message == "sequence 'b' of 3 tokens: no memory left"
    assert len(shapes) == 4  # the batch, then each alone


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (job("x", [2, 120, 3]), InvalidRequest, "id outside 0 … 119"),
        (job("x", [2, -1, 3]), InvalidRequest, "id outside 0 … 119"),
        (job("x", [2, 3, 4], [1], Candidates.from_rows([[120]])), InvalidRequest, "id outside 0 … 119"),
        (job("x", [2, 3, 4], top_k=121), InvalidRequest, "top_k is 121"),
        (job("x", [2, 3, 4], [0, 1]), InvalidRequest, "positions outside 1 … 2"),
        (job("x", [2, 3, 4], [1, 3]), InvalidRequest, "positions outside 1 … 2"),
        (job("x", [2], []), InvalidRequest, "positions outside"),
        (job("x", np.full(129, 5)), TooLarge, "129 tokens; the model takes 128"),
    ],
)
def test_what_would_crash_the_engine_is_refused_alone(
    bad: ScoreJob, kind: type, message: str, checkpoint: Any, opened: Any
) -> None:
    backend = opened(checkpoint("llama"))
    first, second = score(backend, [bad, job("good", range(2, 9))])
    assert isinstance(first, kind)
    assert message in str(first)
    assert isinstance(second, Scores)


def test_a_cancelled_caller_stops_its_remaining_batches(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("llama"), batch_sequences=1)
    running, go_on = threading.Event(), threading.Event()

    def wait(ids: torch.Tensor) -> None:
        running.set()
        assert go_on.wait(30)

    shapes = spy_on_trunk(backend, wait)

    async def cancel() -> None:
        task = asyncio.create_task(backend.score([job(str(i), range(2, 9)) for i in range(5)]))
        assert await asyncio.to_thread(running.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        await backend.score([job("next", range(2, 12))])

    asyncio.run(cancel())
    assert shapes == [(1, 6), (1, 9)]
