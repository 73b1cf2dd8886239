"""Weights for samples of another policy: expectations by enumeration of every completion, weights by loops in float64,
and the gradients of whole micro-batches."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from losscases import log_softmax, scored_rollout

from student_trainer import losses
from student_trainer.losses import importance
from student_trainer.losses.rows import loss_rows
from student_trainer.metrics import means

V = 3
ALL = list(itertools.product(range(V), repeat=2))  # every completion of two tokens


def build(name, **keys):
    support = {"support": "teacher"} if name == "reverse_kl" else {}
    return losses.build(losses.parse_loss({"objective": name, **support, **keys}))


def language(seed, scale=1.5):
    """log π(y1) [V] and log π(y2 | y1) [V, V] of a random policy over completions of two tokens."""
    generator = np.random.default_rng(seed)
    return log_softmax(generator.normal(size=V, scale=scale)), log_softmax(generator.normal(size=(V, V), scale=scale))


TEACHER, NOW, OLD = language(1), language(2), language(3)


def tempered(policy, temperature):
    return tuple(log_softmax(part, temperature) for part in policy)


def rows_of(policy, y1):
    """log probabilities [2, V] at the two positions of a completion that begins with y1."""
    return np.stack([policy[0], policy[1][y1]])


def probability(policy, y1, y2):
    return math.exp(policy[0][y1] + policy[1][y1, y2])


def expectation(objective, behaviour, old, per_position=None):
    """Σ over all completions of b(y) · (the loss of its two positions): value, sums, and gradient at NOW's logits. The
    head is the identity, so a hidden row is a position's logits. `per_position` (0 or 1) takes that position alone."""
    scored, weights, hidden = [], [], []
    for uid, (y1, y2) in enumerate(ALL):
        own = rows_of(old, y1)[[0, 1], [y1, y2]]
        sample = scored_rollout(rows_of(TEACHER, y1), [y1, y2], vocabulary=V, top_k=objective.needs("all").top_k,
                                full_logprob=own, uid=uid)  # fmt: skip
        object.__setattr__(
            sample.rollout, "behaviour_logprob", rows_of(behaviour, y1)[[0, 1], [y1, y2]].astype(np.float32)
        )
        scored.append(sample)
        both = probability(behaviour, y1, y2)
        weights += [both * (per_position in (None, 0)), both * (per_position in (None, 1))]
        hidden.append(rows_of(NOW, y1))
    hidden = torch.tensor(np.concatenate(hidden)).requires_grad_()
    advantages = objective.prepare(scored, lambda x: x)
    loss, sums = importance.backward(
        lambda h: h,
        hidden,
        objective,
        loss_rows(scored, objective.config, advantages=advantages),
        torch.tensor(weights),
        5,
    )
    return loss, sums, hidden.grad


def reverse_kl(y1, position):
    q, p = rows_of(NOW, y1)[position], rows_of(TEACHER, y1)[position]
    return float((np.exp(q) * (q - p)).sum())


def test_a_stale_sample_counts_a_position_as_often_as_the_new_weights_would_come_to_it():
    """Σ_y q_old(y) Π_{j<t} (q_now/q_old)(y_j) D(s_t) is Σ_y q_now(y) D(s_t): a divergence is off by its prefix only."""
    wanted = sum(probability(NOW, *y) * (reverse_kl(y[0], 0) + reverse_kl(y[0], 1)) for y in ALL)
    biased = sum(probability(OLD, *y) * (reverse_kl(y[0], 0) + reverse_kl(y[0], 1)) for y in ALL)
    corrected, _, _ = expectation(build("reverse_kl", staleness="prefix", staleness_cap=1e4), OLD, OLD)
    plain, _, _ = expectation(build("reverse_kl"), OLD, OLD)
    assert corrected == pytest.approx(wanted, rel=1e-6)
    assert plain == pytest.approx(biased, rel=1e-6)
    assert abs(wanted - biased) > 0.05


@pytest.mark.parametrize(("name", "value"), [("k2", lambda d: 0.5 * d**2), ("k3", lambda d: np.exp(-d) - 1 + d)])
def test_a_stale_sampled_token_counts_by_its_own_ratio_too(name, value):
    wanted = sum(
        probability(NOW, *y) * value(rows_of(NOW, y[0])[t, y[t]] - rows_of(TEACHER, y[0])[t, y[t]])
        for y in ALL
        for t in (0, 1)
    )
    got, _, _ = expectation(build(name, staleness="prefix", staleness_cap=1e4), OLD, OLD)
    assert got == pytest.approx(wanted, rel=1e-6)


def test_policy_gradients_own_ratio_is_in_its_value_and_the_prefix_is_the_weight():
    """Two positions' surrogate −Σ_y q_now(y_≤t) A(y_t), whatever policy the samples are of."""
    advantage = lambda y, t: -(rows_of(OLD, y[0])[t, y[t]] - rows_of(TEACHER, y[0])[t, y[t]])  # noqa: E731
    wanted = -sum(probability(NOW, *y) * advantage(y, t) for y in ALL for t in (0, 1))
    got, _, _ = expectation(build("policy_gradient", staleness="prefix", staleness_cap=1e4), OLD, OLD)
    assert got == pytest.approx(wanted, rel=1e-6)


def test_the_gradient_does_not_flow_through_the_weights():
    _, _, got = expectation(build("reverse_kl", staleness="prefix", staleness_cap=1e4), OLD, OLD, per_position=0)
    z = torch.tensor(np.concatenate([rows_of(NOW, y1) for y1, _ in ALL])).requires_grad_()
    log_q = torch.log_softmax(z, -1)
    log_p = torch.tensor(np.concatenate([rows_of(TEACHER, y1) for y1, _ in ALL]))
    weights = torch.tensor([w for y in ALL for w in (probability(OLD, *y), 0.0)])
    (weights * (log_q.exp() * (log_q - log_p)).sum(1)).sum().backward()
    assert torch.allclose(got, z.grad, atol=1e-7)


@pytest.mark.parametrize("name", ["k2", "reverse_kl"])
def test_tempered_sampling_is_corrected_by_q_old_over_b(name):
    """Sampling with a temperature while scoring the T=1 distribution makes the on-policy estimate biased. The sampled
    token's own ratio mends its own distribution; a divergence is mended by the prefix's."""
    sampled_from = tempered(NOW, 0.5)
    if name == "reverse_kl":
        wanted = sum(probability(NOW, *y) * (reverse_kl(y[0], 0) + reverse_kl(y[0], 1)) for y in ALL)
        only = None
    else:  # of the first position, before which nothing is sampled
        wanted = sum(math.exp(NOW[0][y]) * 0.5 * (NOW[0][y] - TEACHER[0][y]) ** 2 for y in range(V))
        only = 0
    corrected, _, _ = expectation(build(name, behaviour="weight", behaviour_cap=1e4), sampled_from, NOW, only)
    plain, _, _ = expectation(build(name), sampled_from, NOW, only)
    assert corrected == pytest.approx(wanted, rel=1e-6)
    assert abs(plain - wanted) > 0.02


# Caps, bounds and figures on longer samples ------------------------------------------------------------------------

LENGTHS = [5, 1, 7, 4]
W = 11


def stale_batch(*, source="on_policy", prompt_tokens=0, seed=1, spread=0.6):
    """Samples with q_old and b a little off q_now: scored, hidden rows (logits), log q_now − log q_old, log q_old/b."""
    generator = np.random.default_rng(seed)
    scored, hidden, stale, behaviour = [], [], [], []
    for uid, length in enumerate(LENGTHS):
        z, tokens = generator.normal(size=(length, W)), generator.integers(0, W, length)
        now = log_softmax(z)[np.arange(length), tokens]
        stale.append(generator.normal(scale=spread, size=length))
        behaviour.append(generator.normal(scale=spread, size=length))
        old = (now - stale[-1]).astype(np.float32)
        sample = scored_rollout(log_softmax(generator.normal(size=(length, W))), tokens, vocabulary=W, top_k=4,
                                full_logprob=old, uid=uid)  # fmt: skip
        object.__setattr__(sample.rollout, "behaviour_logprob", (old - behaviour[-1]).astype(np.float32))
        object.__setattr__(sample.rollout, "source", source)
        object.__setattr__(sample.rollout, "scored_prompt_tokens", min(prompt_tokens, length))
        scored.append(sample)
        hidden.append(z)
    return scored, torch.tensor(np.concatenate(hidden)), stale, behaviour


def run(objective, scored, hidden, counted=None, chunk_rows=4):
    advantages = objective.prepare(scored, lambda x: x)
    rows = loss_rows(scored, objective.config, advantages=advantages)
    weights = torch.full((len(hidden),), 0.1, dtype=torch.float64)
    if counted is not None:
        weights[~counted] = 0.0
    hidden = hidden.clone().requires_grad_()
    loss, sums = importance.backward(lambda h: h, hidden, objective, rows, weights, chunk_rows)
    return loss, hidden.grad, sums


def by_loops(stale, behaviour, own_token, keys):
    """The weight of every token, sample by sample."""
    out = []
    for r, b in zip(stale, behaviour, strict=True):
        for t in range(len(r)):
            weight = 1.0
            if keys.get("staleness") == "prefix":
                last = t + 1 if own_token == "weight" else t
                weight *= min(math.exp(sum(r[:last])), keys.get("staleness_cap", 2.0))
            if keys.get("behaviour") == "weight":
                total = sum(b[:t]) if own_token == "none" else b[t]
                weight *= min(math.exp(total), keys.get("behaviour_cap", 2.0))
            low, high = keys.get("ratio_bounds", (0, math.inf))
            out.append(weight * (low <= math.exp(r[t]) <= high))
    return torch.tensor(out)


OPTIONS = [
    {"staleness": "prefix"},
    {"staleness": "prefix", "staleness_cap": 1.25},
    {"behaviour": "weight", "behaviour_cap": 1.5},
    {"ratio_bounds": [0.7, 1.4]},
    {"staleness": "prefix", "behaviour": "weight", "ratio_bounds": [0.5, 2.0]},
]


@pytest.mark.parametrize("name", losses.names())
@pytest.mark.parametrize("keys", OPTIONS, ids=lambda k: "-".join(k))
def test_every_objectives_rows_are_weighted_as_defined_and_cut_at_the_cap(name, keys):
    scored, hidden, stale, behaviour = stale_batch()
    weighted, plain = build(name, **keys), build(name)
    loss, gradient, _ = run(weighted, scored, hidden)
    own = {"k2": "weight", "k3": "weight", "policy_gradient": "ratio"}.get(name, "none")
    factor = by_loops(stale, behaviour, own, keys)
    assert factor.max() > 1.1 or "ratio_bounds" in keys
    _, unweighted, _ = run(plain, scored, hidden)
    assert torch.allclose(gradient, unweighted * factor[:, None], rtol=1e-4, atol=1e-7)
    values = torch.stack([_row_value(plain, scored, hidden, n) for n in range(len(hidden))])
    assert loss == pytest.approx(float((0.1 * factor * values).sum()), rel=1e-4)


def _row_value(objective, scored, hidden, n):
    rows = loss_rows(scored, objective.config, advantages=objective.prepare(scored, lambda x: x))
    return objective.per_token(rows.inputs(torch.tensor([n]), hidden[n : n + 1])).value[0]


@pytest.mark.parametrize("keys", [{}, {"staleness": "prefix", "staleness_cap": 1.5}])
def test_effective_sample_size_and_cut_weights_are_logged_with_and_without_weighting(keys):
    scored, hidden, stale, behaviour = stale_batch()
    cap = keys.get("staleness_cap", 2.0)
    _, _, sums = run(build("reverse_kl", **keys), scored, hidden)
    figures = means(sums)
    uncut = np.concatenate([np.exp(np.cumsum(r) - r) for r in stale])
    weights = np.minimum(uncut, cap)
    assert figures["staleness_ess"] == pytest.approx(weights.sum() ** 2 / (len(weights) * (weights**2).sum()), rel=1e-5)
    assert figures["staleness_clipped"] == pytest.approx((uncut > cap).mean())
    assert 0 < figures["staleness_clipped"] < 1
    other = np.concatenate([np.exp(np.cumsum(b) - b) for b in behaviour])
    weights = np.minimum(other, 2.0)
    assert figures["behaviour_ess"] == pytest.approx(weights.sum() ** 2 / (len(weights) * (weights**2).sum()), rel=1e-5)
    assert figures["behaviour_clipped"] == pytest.approx((other > 2.0).mean())
    assert "ratio_masked" not in figures
    stale = np.concatenate(stale)
    assert figures["rollout_gap_max"] == pytest.approx(np.abs(stale).max(), rel=1e-5)
    assert figures["rollout_kl"] == pytest.approx((np.exp(stale) - 1 - stale).mean(), rel=1e-4)
    assert sums["trained_tokens"] == len(hidden)


def test_fresh_untempered_samples_have_a_full_effective_sample_size():
    scored, hidden, _, _ = stale_batch(spread=0.0)
    figures = means(run(build("policy_gradient"), scored, hidden)[2])
    assert figures["staleness_ess"] == pytest.approx(1.0, abs=1e-6)
    assert figures["behaviour_ess"] == pytest.approx(1.0, abs=1e-6)
    assert figures["staleness_clipped"] == figures["behaviour_clipped"] == 0


def test_metrics_are_means_over_the_tokens_that_count():
    scored, hidden, stale, _ = stale_batch()
    inside = np.concatenate([(np.exp(r) >= 0.7) & (np.exp(r) <= 1.4) for r in stale])
    counted = torch.ones(len(hidden), dtype=torch.bool)
    counted[2] = False
    sums = run(build("k2", ratio_bounds=[0.7, 1.4]), scored, hidden, counted)[2]
    figures = means({**sums, "scored_tokens": float(len(hidden))})
    trained = inside & counted.numpy()
    log_q = log_softmax(hidden.numpy())[np.arange(len(hidden)), np.concatenate([s.rollout.token_ids for s in scored])]
    delta = log_q - np.concatenate([s.scores.token_logprob for s in scored])
    assert 3 < trained.sum() < len(hidden) - 3
    assert figures["delta"] == pytest.approx(delta[trained].mean(), rel=1e-5)
    assert figures["ratio_masked"] == pytest.approx((~inside)[counted.numpy()].mean())
    assert figures["skipped_tokens"] == len(hidden) - trained.sum()


@pytest.mark.parametrize("keys", OPTIONS, ids=lambda k: "-".join(k))
@pytest.mark.parametrize("name", ["reverse_kl", "k2"])
def test_tokens_that_nobody_sampled_have_weight_one(name, keys):
    """Fixed data and prompts have no b and no q_old; neither is a ratio of 1 made of 0 or NaN."""
    scored, hidden, stale, behaviour = stale_batch(source="fixed")
    for s in scored:
        s.rollout.full_logprob[:] = s.rollout.behaviour_logprob[:] = np.nan
    weighted, plain = run(build(name, **keys), scored, hidden), run(build(name), scored, hidden)
    assert torch.equal(weighted[1], plain[1])
    figures = means(plain[2])
    assert not {
        "staleness_ess",
        "behaviour_ess",
        "rollout_gap",
        "rollout_gap_max",
        "rollout_kl",
        "staleness_clipped",
    } & set(figures)

    scored, hidden, stale, behaviour = stale_batch(prompt_tokens=3)
    for s, r, b in zip(scored, stale, behaviour, strict=True):
        first = s.rollout.scored_prompt_tokens
        s.rollout.full_logprob[:first] = s.rollout.behaviour_logprob[:first] = np.nan
        r[:first] = b[:first] = 0.0
    factor = by_loops(stale, behaviour, "weight" if name == "k2" else "none", keys)
    weighted, plain = run(build(name, **keys), scored, hidden), run(build(name), scored, hidden)
    assert torch.allclose(weighted[1], plain[1] * factor[:, None], rtol=1e-4, atol=1e-7)


def test_discount_and_ratios_stop_at_a_completions_end():
    """Discounted sums leaking across padding, prompt or packed neighbours."""
    scored, hidden, _, _ = stale_batch()
    objective = build("policy_gradient", kl_discount=0.9, staleness="prefix")
    _, together, _ = run(objective, scored, hidden)
    start = 0
    for sample in scored:
        rows = slice(start, start + sample.rollout.num_tokens)
        _, alone, _ = run(objective, [sample], hidden[rows])
        assert torch.allclose(alone, together[rows], rtol=1e-6, atol=1e-9)
        start = rows.stop


def test_a_non_finite_ratio_reaches_the_loss():
    scored, hidden, _, _ = stale_batch()
    scored[0].rollout.full_logprob[1] = np.nan
    assert not math.isfinite(run(build("reverse_kl", staleness="prefix"), scored, hidden)[0])
