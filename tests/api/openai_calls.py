"""How the tests ask a server of vLLM's API: requests, a client around a piece of work, and the check of every answer
against float64 arithmetic written here.
"""

from __future__ import annotations

import asyncio

import numpy as np
from client_calls import ids
from fake_teacher import WIDTH, V, logprobs
from stock_vllm import FakeVllm, serve_vllm

from teacher_api.client import AsyncTeacherClient
from teacher_api.types import LOGPROB_FLOOR, Completion, ScoreOptions, ScoreRequest

MASS = 4e-6
"""By which a tail that is the rest to 1 may miss: a few float32 roundings of probabilities."""


class Tokenizer:
    """What is read of a transformers tokenizer: V ids, a character each."""

    bos_token_id = eos_token_id = unk_token_id = 0

    def __init__(self, size=V, shift=0):
        self.size, self.shift = size, shift

    def get_vocab(self):
        return {chr(65 + i): i for i in range(self.size)}

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return [(ord(c) + self.shift) % self.size for c in text]

    def ids_of(self, text):
        return self.encode(text, add_special_tokens=False)


def fake(model=logprobs, **settings):
    return FakeVllm(model, WIDTH, **settings)


def run(vllm, work, **options):
    async def main():
        async with (
            serve_vllm(vllm) as url,
            AsyncTeacherClient.openai(url, **{"timeout_s": 20, **options}) as client,
        ):
            return await work(client)

    return asyncio.run(main())


def a_request(n=3, *, ranges=(), **options):
    rng = np.random.default_rng(0)
    completions = [
        Completion(f"c{i}", rng.integers(0, V, 4 + i).astype(np.int32), i % 2 if i else None, ranges) for i in range(n)
    ]
    return ScoreRequest(completions, [ids(1, 2, 3), ids(9, 8)], ScoreOptions(**{"top_k": 5, **options}))


def check_scores(request, scores, *, size=WIDTH, model=logprobs):
    """Every array against the definition, over the whole float64 row."""
    k = request.options.top_k
    assert [s.id for s in scores] == [c.id for c in request.completions]
    for completion, got in zip(request.completions, scores, strict=True):
        prompt = [] if completion.prompt_index is None else request.prompts[completion.prompt_index].tolist()
        tokens = [*prompt, *completion.token_ids.tolist()]
        spans = completion.ranges or ((max(len(prompt), 1), len(tokens)),)
        at = np.concatenate([np.arange(a, b) for a, b in spans])
        logp, rows, actual = model(tokens)[at], np.arange(len(at)), np.array(tokens)[at]
        np.testing.assert_array_equal(got.positions, at)
        np.testing.assert_allclose(got.token_logprob, logp[rows, actual], atol=1e-6)
        inside = np.zeros(logp.shape, bool)
        inside[rows, actual] = True
        if k == "all":
            inside[:, :size] = True
            np.testing.assert_allclose(got.topk_logprob, np.maximum(logp[:, :size], LOGPROB_FLOOR), atol=1e-6)
            assert got.topk_ids is None
        elif k:
            best = np.argsort(-logp[:, :size], axis=1, kind="stable")[:, :k]
            np.testing.assert_array_equal(got.topk_ids, best)
            tolerance = 5e-3 if request.options.value_type == "float16" else 1e-6
            np.testing.assert_allclose(got.topk_logprob, np.take_along_axis(logp, best, 1), atol=tolerance)
            np.put_along_axis(inside, best, True, 1)
        np.testing.assert_allclose(np.exp(got.log_tail), np.where(inside, 0, np.exp(logp)).sum(1), atol=MASS)
        if request.options.rank:
            np.testing.assert_array_equal(got.rank, 1 + (logp > logp[rows, actual][:, None]).sum(1))
