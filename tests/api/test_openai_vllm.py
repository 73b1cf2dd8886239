"""The client against vLLM's own server, over the same float32 checkpoint as a float64 transformers forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tinymodels import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.processes import stock_vllm
from teacher_api import check, errors
from teacher_api.client import TeacherClient
from teacher_api.info import tokenizer_fingerprint
from teacher_api.types import Completion, ScoreOptions, ScoreRequest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

VOCABULARY, WIDTH, LENGTH, KEY = 120, 128, 96, "s3cret"
TOLERANCE = 1e-5
MASS = 2e-6  # a tail that is the rest to 1 of float32 probabilities


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # vLLM's attention on CPUs knows heads of 32 and more.
    place = tmp_path_factory.mktemp("stock") / "teacher"
    heads = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return save_tiny(place, "qwen3", **heads, max_position_embeddings=LENGTH, scale=3.0)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64).eval()


@contextlib.contextmanager
def served(checkpoint: Path, folder: Path, max_logprobs: int) -> Iterator[str]:
    options = [
        "--served-model-name=org/teacher",
        "--dtype=float32",
        f"--max-model-len={LENGTH}",
        f"--max-logprobs={max_logprobs}",
        f"--api-key={KEY}",
        "--max-num-batched-tokens=128",
        "--max-num-seqs=8",
        "--kv-cache-memory-bytes=134217728",
        "--no-enable-log-requests",
        "--enforce-eager",
    ]
    with stock_vllm(checkpoint, folder, *options) as root:
        yield f"{root}/v1"


@pytest.fixture(scope="module")
def url(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(checkpoint, tmp_path_factory.mktemp("limited"), 40) as url:
        yield url


def client(url: str, **options: object) -> TeacherClient:
    return TeacherClient.openai(url, api_key=KEY, timeout_s=60, **options)  # type: ignore[arg-type]


@torch.inference_mode()
def log_p(reference: torch.nn.Module, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
    logits = reference(torch.tensor(tokens[None].astype(np.int64))).logits[0]
    return logits.log_softmax(-1)[positions - 1].numpy()


def a_request(count: int, **options: object) -> ScoreRequest:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, VOCABULARY, n).astype(np.int32) for n in (5, 30)]
    completions = [
        Completion(f"c{i}", rng.integers(0, VOCABULARY, 3 + 7 * i).astype(np.int32), i % 2) for i in range(count)
    ]
    return ScoreRequest(completions, prompts, ScoreOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"top_k": 0, "rank": True}, {"top_k": 1}, {"top_k": 16, "rank": True}])
def test_scores_are_the_models(url, checkpoint, reference, options) -> None:
    request = a_request(8, **options)
    with client(url, tokenizer=AutoTokenizer.from_pretrained(checkpoint)) as teacher:
        answers = teacher.score(request)
    for completion, scores in zip(request.completions, answers, strict=True):
        tokens = np.concatenate([request.prompts[completion.prompt_index], completion.token_ids])
        at = np.arange(len(tokens) - len(completion.token_ids), len(tokens))
        expected, rows, actual = log_p(reference, tokens, at), np.arange(len(at)), tokens[at]
        own = expected[rows, actual]
        inside = np.zeros(expected.shape, bool)
        inside[rows, actual] = True
        assert scores.positions.tolist() == at.tolist()
        np.testing.assert_allclose(scores.token_logprob, own, atol=TOLERANCE)
        if options.get("rank"):
            np.testing.assert_array_equal(scores.rank, 1 + (expected > own[:, None]).sum(1))
        if options["top_k"]:
            best = np.argsort(-expected[:, :VOCABULARY], axis=1)[:, : options["top_k"]]
            np.testing.assert_array_equal(scores.topk_ids, best)
            values = np.take_along_axis(expected, best, axis=1)
            np.testing.assert_allclose(scores.topk_logprob, values, atol=TOLERANCE)
            np.put_along_axis(inside, best, True, axis=1)
        tail = np.where(inside, 0, np.exp(expected)).sum(1)
        np.testing.assert_allclose(np.exp(scores.log_tail), tail, atol=MASS)


def test_what_it_says_of_itself(url, checkpoint, capsys, monkeypatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with client(url, tokenizer=tokenizer) as teacher:
        info = teacher.info()
    assert (info.model_name, info.max_sequence_tokens, info.max_top_k) == ("org/teacher", LENGTH - 1, 40)
    assert (info.logit_width, info.tokenizer_size) == (WIDTH, VOCABULARY)
    assert info.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)[0]
    assert info.engine_version
    monkeypatch.setenv("TEACHER_API_KEY", KEY)
    assert check.main([f"openai+{url}"]) == 0
    assert "fingerprint unverified" in capsys.readouterr().out


def test_the_longest_sequence_and_one_more(url) -> None:
    tokens = np.arange(LENGTH, dtype=np.int32) % VOCABULARY
    request = ScoreRequest([Completion("fits", tokens[:-1]), Completion("not", tokens)], options=ScoreOptions(top_k=2))
    with client(url) as teacher:
        fits, refused = teacher.score(request, return_errors=True)
    assert fits.num_rows == LENGTH - 2
    assert isinstance(refused, errors.TooLarge)


def test_its_refusals_are_ours(url) -> None:
    with (
        TeacherClient.openai(url, api_key="wrong", timeout_s=20) as stranger,
        pytest.raises(errors.Unauthenticated),
    ):
        stranger.info()
    with client(url, model="another") as teacher, pytest.raises(errors.NotFound, match="it has org/teacher"):
        teacher.info()
    with client(url) as teacher:
        teacher.info()
        transport = teacher._client._transport
        for length in (LENGTH, LENGTH + 1):  # past our own check: what vLLM says itself
            with pytest.raises(errors.TooLarge, match="HTTP 400"):
                teacher._run(transport._complete("org/teacher", [1] * length, 1, "id"))
        with pytest.raises(errors.NotFound, match="HTTP 404"):
            teacher._run(transport._complete("another", [1, 2], 1, "id"))
        with pytest.raises(errors.InvalidRequest, match="out of vocabulary"):
            teacher._run(transport._complete("org/teacher", [1, 4096], 1, "id"))


def test_whole_rows_where_the_server_gives_all(checkpoint, reference, tmp_path) -> None:
    request = a_request(4, top_k="all")
    with served(checkpoint, tmp_path, -1) as url, client(url) as teacher:
        assert teacher.info().max_top_k == WIDTH
        answers = teacher.score(request)
    for completion, scores in zip(request.completions, answers, strict=True):
        tokens = np.concatenate([request.prompts[completion.prompt_index], completion.token_ids])
        at = np.arange(len(tokens) - len(completion.token_ids), len(tokens))
        np.testing.assert_allclose(scores.topk_logprob, log_p(reference, tokens, at), atol=TOLERANCE)
