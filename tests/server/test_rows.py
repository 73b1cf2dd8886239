"""The row scorer against its definition in numpy float64, and its bounds on memory: by the compiled scan of a CPU, and
by the passes that torch makes where there is none."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_api.types import LOGPROB_FLOOR, Candidates, ScoreOptions
from teacher_server.backends import row_scan
from teacher_server.backends.rows import auto_chunk_rows, score_rows
from teacher_server.backends.topk import top_k_by_id

F64 = npt.NDArray[np.float64]


@pytest.fixture(scope="module", params=["scan", "passes"], autouse=True)
def _way(request) -> Iterator[None]:
    assert row_scan.available(), "numba comes with vLLM"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_scan, "available", lambda: request.param == "scan")
        yield


def clone(hidden: torch.Tensor) -> torch.Tensor:
    """A head for tests: the rows given are the logits."""
    return hidden.clone()


def log_softmax64(logits: npt.ArrayLike, temperature: float = 1.0) -> F64:
    z = np.asarray(logits, np.float64) / temperature
    z = z - z.max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return z - np.log(np.exp(z).sum(-1, keepdims=True))


def log_mass64(logprob: F64) -> float:
    """log Σ exp over what is left; the floor for nothing."""
    kept = logprob[np.isfinite(logprob)]
    if not len(kept):
        return LOGPROB_FLOOR
    top = kept.max()
    return max(float(top + np.log(np.exp(kept - top).sum())), LOGPROB_FLOOR)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    width = draw(st.integers(2, 40))
    size = draw(st.integers(2, width))
    num_rows = draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Multiples of a quarter: many ties, and every difference survives float32.
    logits = rng.integers(-60, 61, (num_rows, width)) / 4 * draw(st.sampled_from([0.0, 0.25, 1.0, 4.0]))
    if draw(st.booleans()):
        masked = rng.random((num_rows, width)) < 0.3
        masked[np.arange(num_rows), rng.integers(0, width, num_rows)] = False
        logits[masked] = -np.inf
    counts = rng.integers(0, 4, num_rows)
    return {
        "logits": logits.astype(np.float32),
        "targets": rng.integers(0, size, num_rows),
        "size": size,
        "top_k": draw(st.one_of(st.just("all"), st.integers(0, size))),
        "temperature": draw(st.sampled_from([1.0, 2.0, 0.5, 1.7])),
        "candidates": draw(st.sampled_from([None, Candidates.from_rows([rng.integers(0, size, n) for n in counts])])),
        "chunk_rows": draw(st.integers(1, num_rows + 1)),
    }


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_value_follows_its_definition(case: dict[str, Any]) -> None:
    logits, targets, size, k = case["logits"], case["targets"], case["size"], case["top_k"]
    candidates: Candidates | None = case["candidates"]
    options = ScoreOptions(top_k=k, temperature=case["temperature"], entropy=True, rank=True)
    got = score_rows(
        clone,
        torch.from_numpy(logits),
        torch.from_numpy(targets),
        options,
        candidates,
        tokenizer_size=size,
        chunk_rows=case["chunk_rows"],
    )
    logprob = log_softmax64(logits, case["temperature"])
    floored = np.maximum(logprob, LOGPROB_FLOOR)
    rows = np.arange(len(logits))
    assert not got.token_logprob.isnan().any()
    np.testing.assert_allclose(got.token_logprob, floored[rows, targets], rtol=1e-6, atol=1e-5)
    terms = np.exp(logprob) * floored
    assert got.entropy is not None
    np.testing.assert_allclose(got.entropy, -terms.sum(-1), rtol=1e-6, atol=1e-5)
    assert got.rank is not None
    np.testing.assert_array_equal(got.rank, 1 + (logits > logits[rows, targets][:, None]).sum(-1))

    outside = np.ones(logits.shape, bool)
    outside[rows, targets] = False
    if candidates is not None:
        assert got.candidate_logprob is not None
        row_of = np.repeat(rows, np.diff(candidates.row_offsets))
        np.testing.assert_allclose(got.candidate_logprob, floored[row_of, candidates.ids], rtol=1e-6, atol=1e-5)
        outside[row_of, candidates.ids] = False
    if k == "all":
        assert got.topk_ids is None
        assert got.topk_logprob is not None
        np.testing.assert_allclose(got.topk_logprob, floored[:, :size], rtol=1e-6, atol=1e-5)
        outside[:, :size] = False
    elif k:
        expected = np.lexsort((np.broadcast_to(np.arange(size), (len(rows), size)), -logits[:, :size]), axis=-1)[:, :k]
        np.testing.assert_array_equal(got.topk_ids, expected)
        assert got.topk_logprob is not None
        chosen = np.take_along_axis(floored, expected, -1)
        np.testing.assert_allclose(got.topk_logprob, chosen, rtol=1e-6, atol=1e-5)
        outside[rows[:, None], expected] = False
    tails = [log_mass64(row[left]) for row, left in zip(logprob, outside, strict=True)]
    np.testing.assert_allclose(got.log_tail, tails, rtol=1e-6, atol=1e-5)


def test_a_tiny_tail_keeps_its_digits() -> None:
    """Mass 1e-13 … 1e-40 outside the top 16, where 1 − Σ of float32 values has no correct digit."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (64, 1000))
    for row, gap in zip(logits, np.linspace(30, 90, 64), strict=True):
        row[rng.permutation(1000)[:16]] += gap
    logits = logits.astype(np.float32)
    targets = torch.from_numpy(logits.argmax(-1))
    options = ScoreOptions(top_k=16)
    got = score_rows(clone, torch.from_numpy(logits), targets, options, tokenizer_size=1000, chunk_rows=10)
    logprob = log_softmax64(logits)
    expected = np.array([log_mass64(np.sort(row)[:-16]) for row in logprob])
    assert expected.max() < np.log(1e-9)
    np.testing.assert_allclose(got.log_tail, expected, rtol=0, atol=1e-5)
    assert got.topk_logprob is not None
    sums = 1 - got.topk_logprob.exp().sum(-1).numpy()
    assert np.mean(np.abs(sums - np.exp(expected)) > np.exp(expected)) > 0.5  # why it isn't computed that way


def test_tail_is_the_floor_when_nothing_is_left() -> None:
    logits = torch.randn(5, 12)
    zeros = torch.zeros(5, dtype=torch.long)
    for k in (12, "all"):
        got = score_rows(clone, logits, zeros, ScoreOptions(top_k=k), tokenizer_size=12, chunk_rows=2)
        np.testing.assert_array_equal(got.log_tail, np.full(5, LOGPROB_FLOOR, np.float32))


def test_masked_columns_come_back_as_the_floor() -> None:
    logits = torch.zeros(1, 6)
    logits[0, 3:] = -torch.inf
    target = torch.tensor([4])
    got = score_rows(clone, logits, target, ScoreOptions(top_k=6, entropy=True), tokenizer_size=6, chunk_rows=1)
    assert got.token_logprob[0] == LOGPROB_FLOOR
    np.testing.assert_array_equal(got.topk_ids, [[0, 1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(got.topk_logprob[:, 3:], np.full((1, 3), LOGPROB_FLOOR))
    np.testing.assert_allclose(got.entropy, np.log(3), rtol=1e-6)


def test_float16_values_are_the_nearest() -> None:
    logits = torch.randn(20, 200, generator=torch.Generator().manual_seed(0)) * 6
    targets = torch.zeros(20, dtype=torch.long)
    options = ScoreOptions(top_k=200, value_type="float16")
    got = score_rows(clone, logits, targets, options, tokenizer_size=200, chunk_rows=7)
    exact = -np.sort(-log_softmax64(logits.numpy()), -1)
    assert got.topk_logprob is not None
    assert got.topk_logprob.dtype == torch.float16
    np.testing.assert_allclose(got.topk_logprob.double(), exact, rtol=2.0**-11 + 1e-6, atol=1e-5)


def test_rows_without_a_distribution_are_marked() -> None:
    logits = torch.zeros(6, 8)
    logits[1, 2] = torch.nan
    logits[2, 7] = torch.inf
    logits[3] = -torch.inf
    logits[4, :7] = -torch.inf
    options = ScoreOptions(top_k=3, entropy=True, rank=True)
    got = score_rows(clone, logits, torch.zeros(6, dtype=torch.long), options, tokenizer_size=8, chunk_rows=4)
    np.testing.assert_array_equal(got.token_logprob.isnan(), [False, True, True, True, False, False])


@pytest.mark.parametrize("levels", [2, 3, 30, 10_000])
@pytest.mark.parametrize(("width", "k"), [(16, 1), (16, 3), (16, 15), (16, 16), (1000, 1), (1024, 3), (2000, 7)])
def test_ties_go_to_the_smaller_id(width: int, k: int, levels: int) -> None:
    """From rows of all equal entries to rows without ties; narrow, and wide enough to be searched by blocks."""
    values = torch.randint(0, levels, (60, width), generator=torch.Generator().manual_seed(k)).float()
    values[0], values[1, 1:], values[2, :-1] = 5.0, -torch.inf, -torch.inf
    values[3] = 0.0
    values[3, 5:55] = 1.0  # in the wide ones: in more blocks than k, one of the equal entries in each
    got_values, got_ids = top_k_by_id(values, k)
    for row, ids, top in zip(values.tolist(), got_ids.tolist(), got_values.tolist(), strict=True):
        expected = sorted(range(width), key=lambda i: (-row[i], i))[:k]
        assert ids == expected
        assert top == [row[i] for i in expected]


@pytest.mark.parametrize("k", [0, 4, "all"])
def test_logits_exist_for_one_chunk_at_a_time(k: Any) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    sizes: list[int] = []

    def head(hidden: torch.Tensor) -> torch.Tensor:
        assert not any(ref() is not None for ref in alive), "the logits of an earlier chunk are still held"
        logits = hidden @ torch.ones(3, 50)
        sizes.append(len(logits))
        alive.append(weakref.ref(logits))
        return logits

    for num_rows in (10, 1000):
        sizes.clear()
        options = ScoreOptions(top_k=k, entropy=True, rank=True)
        targets = torch.zeros(num_rows, dtype=torch.long)
        score_rows(head, torch.randn(num_rows, 3), targets, options, tokenizer_size=50, chunk_rows=8)
        assert max(sizes) == 8
        assert sum(sizes) == num_rows


def test_the_chunk_follows_the_vocabulary() -> None:
    assert auto_chunk_rows(32_000) == 256  # 31.25 MiB of float32 logits; 262 would fit, and be slower
    assert auto_chunk_rows(151_936) == 128  # 74 MiB: fewer rows would be bound by the weights
    assert auto_chunk_rows(1_000_000) == 33  # 126 MiB, and never more than 128
    assert auto_chunk_rows(10**9) == 1


def peak_above_answer(num_rows: int, width: int, options: ScoreOptions, candidates: Candidates | None) -> int:
    """Bytes that the allocator held at the same time beside inputs and answer, with chunks of 4 MiB."""
    random = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(width, 16, generator=random), torch.randn(num_rows, 16, generator=random)
    targets = torch.randint(0, width, (num_rows,), generator=random)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        got = score_rows(
            lambda rows: rows @ weight.T,
            hidden,
            targets,
            options,
            candidates,
            tokenizer_size=width,
            chunk_rows=(4 << 20) // (4 * width),
        )
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    answer = sum(values.nbytes for name in got.__slots__ if (values := getattr(got, name)) is not None)
    assert held[-1] == answer
    return int(held.max()) - answer


@pytest.mark.slow
@pytest.mark.parametrize("case", ["token", "top-k", "all", "everything"])
def test_memory_beside_inputs_and_answer_grows_neither_with_rows_nor_with_the_vocabulary(case: str) -> None:
    """The bound of docs/operations.md: one chunk of logits, here 4 MiB, and six slices of 1 MiB. From two chunks on
    nothing is added but what is made of the candidates: their rows and ids as int64."""
    k: Any = {"token": 0, "all": "all"}.get(case, 64)
    options = ScoreOptions(top_k=k, entropy=case == "everything", rank=case == "everything")
    for width in (2000, 16_000):
        chunk_rows = (4 << 20) // (4 * width)
        peaks = []
        for num_rows in (2 * chunk_rows, 4 * chunk_rows):
            candidates = Candidates.from_rows([[1, 2, 3]] * num_rows) if case == "everything" else None
            peak = peak_above_answer(num_rows, width, options, candidates)
            peaks.append(peak - (16 * 3 * num_rows if candidates is not None else 0))
            assert 4 * width * chunk_rows <= peaks[-1] <= 4 * width * chunk_rows + (6 << 20), (width, num_rows)
        assert peaks[1] <= peaks[0] + 1024
