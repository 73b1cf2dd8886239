"""The behaviour policy's distribution, against float64 from the definition; draws, against that distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from student_trainer.rollout import sampling
from student_trainer.rollout.config import RolloutConfig

WIDTH, VOCABULARY = 14, 12
SETTINGS = [
    (1.0, 0, 1.0),
    (0.6, 0, 1.0),
    (1.7, 5, 1.0),
    (1.0, 0, 0.8),
    (0.8, 6, 0.7),
    (1.0, 1, 1.0),
    (1.0, 0, 1e-9),
]
# Chi-squared values that a true distribution exceeds once in 10,000 runs, by degrees of freedom (standard tables).
CHI2_1E4 = {
    1: 15.14,
    2: 18.42,
    3: 21.11,
    4: 23.51,
    5: 25.74,
    6: 27.86,
    7: 29.88,
    8: 31.83,
    9: 33.72,
    10: 35.56,
    11: 37.37,
}


def logits() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).normal(0, 1.5, size=(1, WIDTH)).astype(np.float32))


def expected(z: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """float64 by the definition: ids below V, temperature, the k largest, then the shortest prefix of mass >= p."""
    z = z[:VOCABULARY].astype(np.float64) / temperature
    p = np.exp(z - z.max())
    order = sorted(range(VOCABULARY), key=lambda i: -p[i])
    if top_k:
        p[order[top_k:]] = 0.0
    p /= p.sum()
    mass, kept = 0.0, set()
    for i in order:
        if p[i] == 0.0 or mass >= top_p:
            break
        kept.add(i)
        mass += p[i]
    p[[i for i in range(VOCABULARY) if i not in kept]] = 0.0
    return p / p.sum()


def draw(z: torch.Tensor, u: np.ndarray, temperature: float, top_k: int, top_p: float) -> sampling.Draw:
    return sampling.draw(
        z.expand(len(u), -1),
        torch.from_numpy(u),
        vocabulary_size=VOCABULARY,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_draws_follow_the_truncated_distribution_and_report_both_logprobs(
    temperature: float, top_k: int, top_p: float
) -> None:
    z, count = logits(), 20_000
    p = expected(z[0].numpy(), temperature, top_k, top_p)
    got = draw(z, np.random.default_rng(1).random(count), temperature, top_k, top_p)
    tokens = got.token_B.numpy()
    seen = np.bincount(tokens, minlength=VOCABULARY).astype(np.float64)
    assert seen[p == 0].sum() == 0
    assert len(seen) == VOCABULARY
    support = p > 0
    chi2 = ((seen - count * p)[support] ** 2 / (count * p)[support]).sum()
    freedom = int(support.sum()) - 1
    assert freedom == 0 or chi2 < CHI2_1E4[freedom]
    np.testing.assert_allclose(got.behaviour_logprob_B.numpy(), np.log(p[tokens]), atol=1e-5)
    wide = z[0].numpy().astype(np.float64)
    q = wide - np.log(np.exp(wide).sum())  # T = 1, all columns, those beyond the vocabulary too
    np.testing.assert_allclose(got.full_logprob_B.numpy(), q[tokens], atol=1e-5)


def test_extreme_uniforms_only_give_ids_that_have_mass() -> None:
    z = torch.full((1, 6), -torch.inf)
    z[0, [1, 3]] = 0.0
    u = np.array([0.0, np.nextafter(0.5, 0), 0.5, np.nextafter(1.0, 0)])
    got, total = sampling.inverse_cdf(z.softmax(-1).expand(4, -1), torch.from_numpy(u))
    assert got.tolist() == [1, 1, 3, 3]
    assert total.tolist() == [1.0] * 4


@pytest.mark.parametrize("size", [40, 256, 1000, 32_000, 50_257])
def test_the_id_drawn_is_where_the_distribution_function_reaches_the_uniform(size: int) -> None:
    """Against sums over the whole vocabulary in float64, whatever the number of blocks and the length of the last."""
    rng = np.random.default_rng(size)
    z = rng.normal(0.0, 2.0, size=(50, size)).astype(np.float32)
    z[rng.random(z.shape) < 0.3] = -np.inf
    z[:, [0, -1]] = 3.0  # so that both ends are reached
    u = np.concatenate([rng.random((40, 50)), np.zeros((1, 50)), np.full((1, 50), np.nextafter(1.0, 0.0))])
    p = np.exp(z.astype(np.float64) - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    upto = np.cumsum(p, axis=-1)
    mass = torch.from_numpy(z).softmax(-1)
    rows = np.arange(50)
    for uniform in u:
        ids = sampling.inverse_cdf(mass, torch.from_numpy(uniform))[0].numpy()
        assert (p[rows, ids] > 0).all()
        assert (upto[rows, ids] - p[rows, ids] <= uniform + 1e-6).all()
        assert (uniform <= upto[rows, ids] + 1e-6).all()
    # And the other way round: the middle of each id's stretch gives that id, where it is wider than rounding.
    middle = upto - p / 2
    wide = np.argsort(-p, axis=-1)[:, :20]
    for column in wide.T:
        ids = sampling.inverse_cdf(mass, torch.from_numpy(middle[rows, column]))[0].numpy()
        assert np.array_equal(ids, column)


def test_last_uniform_before_one_never_overruns_whatever_the_mass_rounds_to() -> None:
    z = torch.from_numpy(np.random.default_rng(0).normal(size=(200, 50)).astype(np.float32))
    z[:, 40:] = -torch.inf
    last = torch.full((200,), float(np.nextafter(1.0, 0)), dtype=torch.float64)
    got, _ = sampling.inverse_cdf(z.softmax(-1), last)
    assert int(got.max()) <= 39


def test_ties_at_the_kth_are_all_kept() -> None:
    z = sampling.behaviour_logits(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), temperature=1.0, top_k=2, top_p=1.0)
    assert torch.isfinite(z).tolist() == [[True, True, True, False]]


def test_greedy_takes_the_lowest_of_equal_ids_below_the_vocabulary() -> None:
    got = sampling.draw_greedy(torch.tensor([[0.0, 2.0, 2.0, 9.0]]), vocabulary_size=3)
    assert got.token_B.tolist() == [1]
    assert got.behaviour_logprob_B.tolist() == [0.0]
    assert got.full_logprob_B.item() == pytest.approx(2.0 - np.log(1 + 2 * np.e**2 + np.e**9), abs=1e-5)


def test_most_likely_ids_leave_out_the_columns_beyond_the_vocabulary() -> None:
    got = sampling.most_likely(torch.tensor([[0.0, 3.0, 2.0, 9.0]]), 10, vocabulary_size=3)
    assert got.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("size", [300, 32_000, 50_257])
def test_searching_by_blocks_finds_what_a_search_of_all_ids_finds(size: int) -> None:
    rng = np.random.default_rng(size)
    z = rng.permuted(np.tile(np.arange(size + 7, dtype=np.float32), (6, 1)), axis=-1)  # all different
    z[0, :size] = -np.inf
    z[0, size - 3 : size] = [1.0, 3.0, 2.0]
    z[1, [5, size // 2, size - 1]] = 1e9  # equal ones: the first is taken
    logits = torch.from_numpy(z)
    valid = z[:, :size]
    assert np.array_equal(sampling.first_of_largest(logits[:, :size]).numpy(), valid.argmax(-1))
    assert np.array_equal(sampling.draw_greedy(logits, vocabulary_size=size).token_B.numpy(), valid.argmax(-1))
    for k in (1, 16, 64):
        got = sampling.most_likely(logits, k, vocabulary_size=size).numpy()
        assert got.max() < size
        assert all(len(set(row)) == k for row in got.tolist())
        best = np.take_along_axis(valid, got.astype(np.int64), axis=-1)
        assert np.array_equal(best, -np.sort(-valid, axis=-1)[:, :k])


def test_uniforms_depend_on_seed_and_uid_alone() -> None:
    a = sampling.uniforms(7, [0, 5, 2**40], 16)
    assert np.array_equal(sampling.uniforms(7, [5], 16)[0], a[1])
    assert np.array_equal(sampling.uniforms(7, [5], 9)[0], a[1, :9])
    assert len({*a.ravel(), *sampling.uniforms(8, [0, 5], 16).ravel()}) == 5 * 16


@pytest.mark.parametrize("changes", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}])
def test_greedy_with_sampling_settings_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="greedy takes the most likely token"):
        RolloutConfig(greedy=True, **changes)
    assert RolloutConfig(**changes).model_copy(update={"greedy": True}).greedy
