"""How the client's tests ask: small requests, a client and a fake teacher around one piece of work, and the check of
every answer against the teacher's own arithmetic."""

from __future__ import annotations

import asyncio

import numpy as np
from fake_teacher import V, assert_same, expected_scores

from teacher_api.client import AsyncTeacherClient
from teacher_api.types import Completion, ScoreOptions, ScoreRequest


def ids(*values):
    return np.array(values, dtype=np.int32)


def a_request(n=3, *, prefix="c", **options):
    options = {"top_k": 5, **options}
    rng = np.random.default_rng(0)
    completions = [
        Completion(f"{prefix}{i}", rng.integers(0, V, 4 + i).astype(np.int32), i % 2 if i else None) for i in range(n)
    ]
    return ScoreRequest(completions, [ids(1, 2, 3), ids(9, 8)], ScoreOptions(**options))


def check(request, scores):
    assert [s.id for s in scores] == [c.id for c in request.completions]
    for completion, got in zip(request.completions, scores, strict=True):
        prompt = [] if completion.prompt_index is None else request.prompts[completion.prompt_index].tolist()
        tokens = [*prompt, *completion.token_ids.tolist()]
        positions = np.arange(max(len(prompt), 1), len(tokens))
        if completion.ranges:
            positions = np.concatenate([np.arange(a, b) for a, b in completion.ranges])
        assert_same(got, expected_scores(tokens, positions, request.options, completion.candidates))


def run(serve, teacher, work, **options):
    async def main():
        async with serve(teacher) as url, AsyncTeacherClient(url, **{"timeout_s": 20, **options}) as client:
            return await work(client)

    return asyncio.run(main())


async def streamed(client, requests):
    """All that `score_many` gives."""
    return [scores async for scores in client.score_many(requests)]


async def collect(client, request):
    """As `client.score(request)`, over the stream."""
    found = await streamed(client, [request])
    by_id = {s.id: s for s in found}
    assert len(by_id) == len(found), "none is delivered twice"
    return [by_id[c.id] for c in request.completions]
