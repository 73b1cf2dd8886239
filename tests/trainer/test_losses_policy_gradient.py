"""Policy gradient: its expected gradient by enumeration, advantages against sums written out, the clipped ratio."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from losscases import exact_rows, log_softmax, loss_inputs, scored_rollout

from student_trainer import losses
from student_trainer.losses.rows import loss_rows

N, V = 4, 7


def build(**keys):
    return losses.build(losses.parse_loss({"objective": "policy_gradient", **keys}))


def random_logits(n=N, v=V, seed=0, scale=2.0):
    return torch.tensor(np.random.default_rng(seed).normal(scale=scale, size=(n, v)))


def rollouts(lengths, *, groups=None, seed=20, **keys):
    """Scored rollouts of random tokens, with float64 (log q_old, log p) of each."""
    generator = np.random.default_rng(seed)
    scored, truth = [], []
    for uid, length in enumerate(lengths):
        log_p, log_q = log_softmax(generator.normal(size=(length, V))), log_softmax(generator.normal(size=(length, V)))
        tokens = generator.integers(0, V, length)
        rows = np.arange(length)
        truth.append(log_q[rows, tokens] - log_p[rows, tokens])
        index = uid if groups is None else groups[uid]
        full = log_q[rows, tokens]
        scored.append(
            scored_rollout(log_p, tokens, vocabulary=V, full_logprob=full, uid=uid, prompt_index=index, **keys)
        )
    return scored, truth


def identity(array):
    return array


def test_expected_gradient_over_the_students_own_samples_is_that_of_reverse_kl():
    log_p, z = log_softmax(random_logits(n=1, seed=21)), random_logits(n=1, seed=22)
    sampled = torch.softmax(z, -1)[0]
    expected = torch.zeros_like(z)
    objective = build(kl_coef=1.0)
    for token in range(V):
        scored = scored_rollout(log_p, [token], vocabulary=V, full_logprob=sampled.log()[[token]].numpy())
        advantage = torch.tensor(objective.prepare([scored], identity)[0])
        logits = z.clone().requires_grad_()
        value = objective.per_token(
            loss_inputs(logits, exact_rows(log_p, [[token]], [token]), [token], advantage=advantage)
        ).value
        value.sum().backward()
        expected += sampled[token] * logits.grad
    logits = z.clone().requires_grad_()
    p, q = torch.tensor(np.exp(log_p)), torch.softmax(logits, -1)
    (q * (q.log() - p.log())).sum().backward()
    assert torch.allclose(expected, logits.grad, atol=1e-6)
    assert logits.grad.abs().max() > 0.05


def test_backpropagating_delta_would_lose_the_teacher_and_ours_does_not():
    """Back-propagating log q - log p of the sampled token: the teacher vanishes from the gradient."""
    scored, _ = rollouts([5])
    other = rollouts([5], seed=23)[0][0]
    gradients = []
    for teacher in (scored[0], other):
        sample = type(scored[0])(scored[0].rollout, teacher.scores)
        objective = build()
        rows = loss_rows([sample], objective.config, advantages=objective.prepare([sample], identity))
        z = random_logits(n=5, seed=24).float().requires_grad_()
        objective.per_token(rows.inputs(torch.arange(5), z)).value.sum().backward()
        gradients.append(z.grad)
    assert (gradients[0] - gradients[1]).abs().max() > 0.1


def test_advantages_are_scaled_discounted_and_stay_inside_their_completion():
    """Discounted sums leaking across padding, prompt or packed neighbours."""
    scored, deltas = rollouts([4, 1, 6])
    got = build(kl_coef=0.5, kl_discount=0.9).prepare(scored, identity)
    for advantage, d in zip(got, deltas, strict=True):
        n = len(d)
        wanted = [sum(0.9**j * -0.5 * d[t + j] for j in range(n - t)) for t in range(n)]
        assert np.allclose(advantage, wanted, atol=1e-5)
    alone = build(kl_coef=0.5, kl_discount=0.9).prepare(scored[1:2], identity)
    assert np.array_equal(alone[0], got[1])


def test_without_discount_a_token_is_credited_with_its_own_advantage_only():
    scored, deltas = rollouts([4])
    assert np.allclose(build(kl_coef=2.0).prepare(scored, identity)[0], -2.0 * deltas[0], atol=1e-5)


def test_centring_subtracts_the_mean_over_counted_tokens_of_batch_or_prompt():
    scored, _ = rollouts([4, 3, 5, 2], groups=[8, 8, 9, 9])
    ignored = sorted({int(s.rollout.token_ids[0]) for s in scored})[:2]
    keys = {"kl_discount": 0.5, "ignore_token_ids": ignored}
    plain = build(**keys).prepare(scored, identity)
    masks = [~np.isin(s.rollout.token_ids, ignored) for s in scored]
    assert any(not m.all() for m in masks)
    batch_mean = np.concatenate([a[m] for a, m in zip(plain, masks, strict=True)]).mean()
    for a, b in zip(plain, build(center="batch", **keys).prepare(scored, identity), strict=True):
        assert np.allclose(b, a - batch_mean, atol=1e-6)
    grouped = build(center="group", **keys).prepare(scored, identity)
    for members in ((0, 1), (2, 3)):
        mean = np.concatenate([plain[i][masks[i]] for i in members]).mean()
        for i in members:
            assert np.allclose(grouped[i], plain[i] - mean, atol=1e-6)


def test_masked_tokens_earn_nothing_for_the_tokens_before_them():
    scored, deltas = rollouts([5], seed=25)
    last = int(scored[0].rollout.token_ids[-1])
    counted = scored[0].rollout.token_ids != last
    got = build(kl_discount=1.0, ignore_token_ids=[last]).prepare(scored, identity)[0]
    assert np.allclose(got, [-(deltas[0] * counted)[t:].sum() for t in range(5)], atol=1e-5)


@pytest.mark.parametrize("center", ["batch", "group"])
def test_centring_does_not_depend_on_which_rank_holds_a_sample(center):
    groups = [70_000, 3, 70_000, 255, 3, 2**31]
    scored, _ = rollouts([4, 3, 5, 2, 6, 1], groups=groups)
    objective = build(center=center, kl_discount=0.3)
    alone = objective.prepare(scored, identity)
    ranks = [[0, 1, 5], [2, 3], [4], []]
    barrier, parts = threading.Barrier(len(ranks)), [np.zeros(0)] * len(ranks)

    def on_rank(rank):
        def all_reduce_sum(local):
            parts[rank] = local
            barrier.wait(10)
            total = np.sum(parts, axis=0)
            barrier.wait(10)
            return total

        return objective.prepare([scored[i] for i in ranks[rank]], all_reduce_sum)

    with ThreadPoolExecutor(len(ranks)) as pool:
        together = list(pool.map(on_rank, range(len(ranks))))
    for members, got in zip(ranks, together, strict=True):
        for i, advantage in zip(members, got, strict=True):
            assert np.allclose(advantage, alone[i], atol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_policy_gradient_value_and_gradient_follow_the_clipped_ratio(clip):
    targets = [0, 1, 2, 3, 4, 5]
    z = random_logits(n=6, seed=26).requires_grad_()
    log_q = torch.log_softmax(z, -1)[torch.arange(6), targets]
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 0.9]).double()
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 2.0, -2.0]).double()
    teacher = exact_rows(log_softmax(random_logits(n=6)), [[t] for t in targets], targets)
    inputs = loss_inputs(z, teacher, targets, old_logprob=(log_q - ratios.log()).detach(), advantage=advantage)
    result = build(clip=clip).per_token(inputs)
    # Clipped where the ratio has already moved past the bound in the advantage's direction.
    clipped = torch.tensor([True, False, False, True, False, False]) if clip else torch.zeros(6, dtype=torch.bool)
    bound = torch.tensor([1.2, 0, 0, 0.8, 0, 0]).double()
    wanted = -advantage * torch.where(clipped, bound, ratios)
    assert torch.allclose(result.value, wanted)
    assert torch.equal(result.metrics["clipped"], clipped.float())
    (gradient,) = torch.autograd.grad(result.value.sum(), z)
    per_row = torch.autograd.grad(log_q.sum(), z)[0] * (-advantage * ratios * ~clipped)[:, None]
    assert torch.allclose(gradient, per_row)


def test_policy_gradient_metrics_match_numpy():
    scored, deltas = rollouts([6])
    objective = build()
    rows = loss_rows(scored, objective.config, advantages=objective.prepare(scored, identity))
    z = random_logits(n=6, seed=27).float()
    metrics = objective.per_token(rows.inputs(torch.arange(6), z)).metrics
    log_q = log_softmax(z.double().numpy())
    now = log_q[np.arange(6), scored[0].rollout.token_ids]
    assert np.allclose(metrics["delta"], deltas[0], atol=1e-5)
    assert np.allclose(metrics["student_entropy"], -(np.exp(log_q) * log_q).sum(1), atol=1e-5)
    assert np.allclose(metrics["rollout_gap"], np.abs(scored[0].rollout.full_logprob - now), atol=1e-5)
    assert np.allclose(metrics["ratio"], np.exp(now - scored[0].rollout.full_logprob), rtol=1e-4)


def test_policy_gradient_without_advantages_is_refused():
    inputs = loss_inputs(random_logits(), exact_rows(log_softmax(random_logits()), None, [0] * N), [0] * N)
    with pytest.raises(ValueError, match="no advantages"):
        build().per_token(inputs)
