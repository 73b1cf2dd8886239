"""The torch backend against a plain float32 transformers forward of each sequence alone, taken to float64."""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tinymodels import ARCHITECTURES, save_tiny, tiny_model

from teacher_api.errors import BackendFailed, InvalidBackendOutput, InvalidRequest, TeacherError, TooLarge
from teacher_api.types import LOGPROB_FLOOR, Candidates, ScoreOptions, Scores
from teacher_server.backends.base import FEATURES, ScoreJob
from teacher_server.backends.torch_backend import TorchBackend

TOLERANCE = 1e-5
WIDTH = 128


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def make(arch: str) -> Path:
        return save_tiny(tmp_path_factory.mktemp(arch) / "model", arch)

    return make


@pytest.fixture
def opened() -> Iterator[Any]:
    """Makes loaded backends and closes them."""
    backends: list[TorchBackend] = []

    def make(model: Path | str, **settings: Any) -> TorchBackend:
        backend = TorchBackend(str(model), **{"threads": 1, **settings})
        backends.append(backend)
        backend.load()
        return backend

    yield make
    for backend in backends:
        asyncio.run(backend.close())


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


def mixed_jobs(size: int, lengths: Sequence[int], temperature: float) -> list[ScoreJob]:
    """Every length with every kind of top-k, half with candidates, some with holes in their positions."""
    rng = np.random.default_rng(0)
    jobs = []
    for index, length in enumerate(lengths):
        ids = rng.integers(2, size, length)
        positions = np.arange(1, length)
        if index % 3 == 1 and length > 4:
            positions = positions[rng.random(length - 1) < 0.6]
            positions = positions if len(positions) else np.array([length - 2])
        candidates = None
        if index % 2:
            candidates = Candidates.from_rows([rng.integers(0, size, rng.integers(0, 4)) for _ in positions])
        top_k = (0, 1, 16, size, "all")[index % 5]
        options = {"top_k": top_k, "temperature": temperature, "entropy": True, "rank": True}
        jobs.append(job(f"job{index}", ids, positions, candidates, **options))
    return jobs


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


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_scores_as_transformers_does(
    arch: str, temperature: float, checkpoint: Any, opened: Any
) -> None:
    backend = opened(checkpoint(arch), batch_tokens=300, head_chunk_rows=7, max_sequence_tokens=128)
    facts = backend.load()
    assert facts.logit_width == WIDTH
    assert 120 <= facts.tokenizer_size < WIDTH
    assert facts.max_sequence_tokens == 128
    model = tiny_model(arch)
    jobs = mixed_jobs(facts.tokenizer_size, [2, 128, 3, 17, 64, 5, 33, 100, 9, 128, 2, 50, 21, 22, 23], temperature)
    for answer, asked in zip(scored(backend, jobs), jobs, strict=True):
        check(answer, asked, reference(model, asked), facts.tokenizer_size)


@pytest.mark.slow
def test_every_length_in_one_call(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("qwen3"), batch_tokens=1000)
    jobs = mixed_jobs(120, range(2, 129), 1.0)
    model = tiny_model("qwen3")
    for answer, asked in zip(scored(backend, jobs), jobs, strict=True):
        check(answer, asked, reference(model, asked), 120)


def test_sharp_teachers_keep_their_tails(tmp_path: Path, opened: Any) -> None:
    """A head so large that most of the vocabulary has less mass than float32 can add to 1."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(50.0)
    path = save_tiny(tmp_path / "sharp", "llama")
    model.save_pretrained(path)
    backend = opened(path)
    jobs = mixed_jobs(120, [20, 21, 22, 23, 24, 25, 26, 27, 28, 29], 1.0)
    jobs = [replace(each, options=replace(each.options, top_k=16)) for each in jobs]
    deepest = 0.0
    for answer, asked in zip(scored(backend, jobs), jobs, strict=True):
        logprob = reference(model, asked)
        rows = np.arange(len(asked.positions))
        outside = np.ones(logprob.shape, bool)
        outside[rows, asked.token_ids[asked.positions]] = False
        outside[rows[:, None], answer.topk_ids] = False
        if asked.candidates is not None:
            outside[np.repeat(rows, np.diff(asked.candidates.row_offsets)), asked.candidates.ids] = False
        expected = np.log(np.where(outside, np.exp(logprob), 0.0).sum(-1))
        deepest = min(deepest, float(expected.min()))
        # The forward's own float32 rounding grows with the logits: a relative bound.
        np.testing.assert_allclose(answer.log_tail, expected, rtol=1e-6, atol=5e-5)
    assert deepest < -20


def test_float16_values_and_hidden_states(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("gemma2"))
    asked = job("a", range(2, 40), top_k=8, value_type="float16", hidden=True)
    exact = replace(asked, options=replace(asked.options, value_type="float32"))
    half, full = scored(backend, [asked, exact])
    assert half.topk_logprob is not None
    assert half.topk_logprob.dtype == np.float16
    assert full.topk_logprob is not None
    np.testing.assert_allclose(half.topk_logprob, full.topk_logprob, rtol=2.0**-11, atol=1e-7)
    np.testing.assert_array_equal(half.topk_ids, full.topk_ids)
    model = tiny_model("gemma2")
    with torch.inference_mode():
        states = model.model(torch.from_numpy(asked.token_ids.astype(np.int64))[None]).last_hidden_state[0]
    assert half.hidden is not None
    np.testing.assert_allclose(half.hidden, states[asked.positions - 1], rtol=0, atol=1e-5)


def test_only_what_precedes_the_last_position_runs(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("llama"))
    whole, early = scored(backend, [job("a", range(2, 42)), job("b", range(2, 42), [3, 7])])
    assert (whole.computed_tokens, early.computed_tokens) == (39, 7)
    np.testing.assert_allclose(early.token_logprob, whole.token_logprob[[2, 6]], rtol=0, atol=TOLERANCE)


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


def as_bytes(answer: Scores) -> list[bytes]:
    values = (answer.token_logprob, answer.log_tail, answer.topk_ids, answer.topk_logprob, answer.entropy, answer.rank)
    return [value.tobytes() for value in values if value is not None]


REFERENCE_JOB = {"top_k": 16, "entropy": True, "rank": True}


@pytest.mark.parametrize("arch", ["qwen3", "mixtral", "mamba2"])
def test_reference_mode_gives_the_same_bits_alone_and_in_company(arch: str, checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint(arch), reference=True, threads=0)
    shapes = spy_on_trunk(backend)
    rng = np.random.default_rng(1)
    jobs = [job(str(i), rng.integers(2, 120, n), **REFERENCE_JOB) for i, n in enumerate([30, 31, 30, 128, 2, 64])]
    together = scored(backend, jobs)
    assert {rows for rows, _ in shapes} == {1}
    for asked, answer in zip(reversed(jobs), reversed(together), strict=True):
        assert as_bytes(scored(backend, [asked])[0]) == as_bytes(answer)
    again = opened(checkpoint(arch), reference=True, threads=0)
    for asked, answer in zip(jobs, together, strict=True):
        assert as_bytes(scored(again, [asked])[0]) == as_bytes(answer)


SCORE_ELSEWHERE = """
import asyncio, sys
import numpy as np
from teacher_api.types import ScoreOptions
from teacher_server.backends.base import ScoreJob
from teacher_server.backends.torch_backend import TorchBackend

backend = TorchBackend(sys.argv[1], reference=True)
backend.load()
ids = np.arange(2, 90, dtype=np.int32)
options = ScoreOptions(top_k=16, entropy=True, rank=True)
answer = asyncio.run(backend.score([ScoreJob("a", ids, 0, np.arange(1, 88, dtype=np.int32), options)]))[0]
parts = (answer.token_logprob, answer.log_tail, answer.topk_ids, answer.topk_logprob, answer.entropy, answer.rank)
sys.stdout.write(b"".join(part.tobytes() for part in parts).hex())
"""


@pytest.mark.slow
def test_reference_mode_gives_the_same_bits_in_another_process(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("qwen3"), reference=True, threads=0)
    ids = np.arange(2, 90)
    company = [job("x", ids[:50], **REFERENCE_JOB), job("a", ids, range(1, 88), **REFERENCE_JOB)]
    here = b"".join(as_bytes(scored(backend, company)[1])).hex()
    command = [sys.executable, "-c", SCORE_ELSEWHERE, str(checkpoint("qwen3"))]
    there = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert there.stdout == here


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


def test_bfloat16_gets_float32_logits(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("qwen3"), dtype="bfloat16")
    facts = backend.load()
    assert (facts.dtype, facts.head_dtype) == ("bfloat16", "float32")
    asked = job("a", range(2, 100), top_k=64)
    (answer,) = scored(backend, [asked])
    # Loaded, not cast: .bfloat16() would round the rotary frequencies too.
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("qwen3"), dtype=torch.bfloat16)
    with torch.inference_mode():
        hidden = model.model(torch.arange(2, 99)[None]).last_hidden_state[0]
        logprob = (hidden.double() @ model.lm_head.weight.double().T).log_softmax(-1)
    expected = np.take_along_axis(logprob.numpy(), answer.topk_ids.astype(np.int64), -1)
    np.testing.assert_allclose(answer.topk_logprob, expected, rtol=0, atol=1e-4)
    assert all(len(np.unique(row)) == 64 for row in answer.topk_logprob)


def test_long_rope_is_that_of_the_sequence_not_of_its_batch(tmp_path: Path, opened: Any) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 32,
    }
    settings = {**ARCHITECTURES["llama"][1], "original_max_position_embeddings": 32, "rope_parameters": rope}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.Phi3Config(**settings, vocab_size=WIDTH, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    path = save_tiny(tmp_path / "phi3", "llama")
    model.save_pretrained(path)
    backend = opened(path)
    size = backend.load().tokenizer_size
    options = {"entropy": True, "rank": True, "top_k": 3}
    rng = np.random.default_rng(0)
    jobs = [job(str(n), rng.integers(2, size, n), **options) for n in (10, 31, 32, 33, 34, 60)]
    jobs.append(job("early", rng.integers(2, size, 50), [3, 9], **options))
    together, alone = scored(backend, jobs), [scored(backend, [asked])[0] for asked in jobs]
    for answer, asked in zip(together + alone, jobs + jobs, strict=True):
        check(answer, asked, reference(model, asked), size)


def test_facts_and_features(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("mamba2"), reference=True, threads=0)
    facts = backend.load()
    assert backend.features == {*FEATURES, "exact_tail"}
    assert facts.max_sequence_tokens == 32_768
    assert facts.hidden_size == 32
    assert facts.scoring_path == "cpu, reference, 1 threads"
    assert facts.engine_version == f"torch {torch.__version__}, transformers {transformers.__version__}"
    assert facts.tokenizer_fingerprint
    chunked = opened(checkpoint("mamba2"), reference=True, threads=0, head_chunk_rows=3)
    assert chunked.load().scoring_path == "cpu, reference, 1 threads, head in chunks of 3 rows"
    assert facts.weights_digest


def test_a_directory_without_tokenizer_counts_every_column(
    tmp_path: Path, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    facts = opened(tmp_path / "bare").load()
    assert (facts.tokenizer_size, facts.tokenizer_fingerprint) == (WIDTH, "")
    assert "has no tokenizer" in caplog.text


def _drop_a_weight(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _cut_the_weights(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_drop_a_weight, r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight; its teacher would be partly random"),
        (_cut_the_weights, "can't load the model in"),
        (lambda path: (path / "config.json").unlink(), r"has no config\.json"),
        (lambda path: (path / "config.json").write_text('{"model_type": "unheard"}'), "can't load the model in"),
        (lambda path: (path / "tokenizer.json").write_text("{"), "can't load the tokenizer in"),
    ],
)
def test_a_broken_checkpoint_is_one_clear_line(tmp_path: Path, break_it: Any, message: str) -> None:
    path = save_tiny(tmp_path / "model", "llama")
    break_it(path)
    backend = TorchBackend(str(path))
    with pytest.raises(ValueError, match=message) as error:
        backend.load()
    assert "\n" not in str(error.value)
    asyncio.run(backend.close())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "runs/nothing/here"}, "model 'runs/nothing/here' is not a directory here"),
        ({"max_sequence_tokens": 129}, "max_sequence_tokens is 129, but the model has only 128 positions"),
        ({"device": "cuda:7"}, "device 'cuda:7' can't be used"),
        ({"device": "gpu"}, "device 'gpu' can't be used"),
        ({"revision": "main"}, "revision 'main' given, but model .* is a directory"),
    ],
)
def test_wrong_settings_are_one_clear_line(settings: dict[str, Any], message: str, checkpoint: Any) -> None:
    backend = TorchBackend(**{"model": str(checkpoint("llama")), **settings})
    with pytest.raises(ValueError, match=message) as error:
        backend.load()
    assert "\n" not in str(error.value)
    asyncio.run(backend.close())


def test_close_twice(checkpoint: Any) -> None:
    backend = TorchBackend(str(checkpoint("llama")), threads=1)
    backend.load()
    asyncio.run(backend.close())
    asyncio.run(backend.close())
