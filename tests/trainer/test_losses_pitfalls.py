"""Mistakes that other systems made with such losses, one test each, named after the mistake. Those with a test of their
own among the objectives, rows, masks and steps are not repeated here."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from losscases import exact_rows, log_softmax, loss_inputs, scored_rollout

from student_trainer import losses
from student_trainer.config import TrainConfig
from student_trainer.losses import importance, normalise
from student_trainer.losses.mask import loss_mask
from student_trainer.losses.rows import loss_rows
from teacher_api import settings

V = 6
DOCS = Path(__file__).parents[2] / "docs" / "losses.md"


def build(name, **keys):
    return losses.build(losses.parse_loss({"objective": name, **keys}))


def logits(seed, n=1, v=V):
    return torch.tensor(np.random.default_rng(seed).normal(scale=2.0, size=(n, v)))


def test_adaptive_kl_divides_by_nothing_where_teacher_and_student_are_equal():
    """AKL divides by g_head + g_tail: NaN when teacher == student, the first thing everybody tries."""
    z = logits(1, n=3).requires_grad_()
    log_p = log_softmax(z.detach().numpy())
    for supports in (None, [[0, 1], [2], [3, 4, 5]]):
        targets = [0, 2, 3]
        value = build("adaptive_kl").per_token(loss_inputs(z, exact_rows(log_p, supports, targets), targets)).value
        (gradient,) = torch.autograd.grad(value.sum(), z)
        assert value.abs().max() < 1e-14
        assert gradient.abs().max() < 1e-14


def test_a_top_k_kl_as_reward_would_teach_nothing_and_the_sampled_tokens_does():
    """A top-k KL used as a policy-gradient reward doesn't depend on the action: zero expected gradient."""
    z, log_p = logits(2), log_softmax(logits(3).numpy())
    q = torch.softmax(z, -1)[0]
    divergence = float((q * (q.log() - torch.tensor(log_p[0]))).sum())
    from_divergence, from_token = torch.zeros_like(z), torch.zeros_like(z)
    for token in range(V):
        scored = scored_rollout(log_p, [token], vocabulary=V, full_logprob=q.log()[[token]].numpy())
        objective = build("policy_gradient")
        for total, advantage in (
            (from_divergence, torch.tensor([-divergence])),
            (from_token, torch.tensor(objective.prepare([scored], lambda x: x)[0])),
        ):
            leaf = z.clone().requires_grad_()
            inputs = loss_inputs(leaf, exact_rows(log_p, [[token]], [token]), [token], advantage=advantage.double())
            objective.per_token(inputs).value.sum().backward()
            total += q[token] * leaf.grad
    assert from_divergence.abs().max() < 1e-6
    assert from_token.abs().max() > 0.05


def test_added_special_tokens_are_scored_and_trained_on_like_any_other():
    """Never cut off added special tokens: chat end-of-turn ids are added tokens, the last ids of the vocabulary."""
    end = V - 1
    log_p, z = log_softmax(logits(4, v=V + 2).numpy()), logits(5, v=V + 2).requires_grad_()
    sample = scored_rollout(log_p, [end], vocabulary=V, top_k=2)
    objective = build("forward_kl")
    assert loss_mask(sample.rollout, objective.config).all()
    rows = loss_rows([sample], objective.config)
    assert end in rows.teacher.support_ids[0].tolist()
    objective.per_token(rows.inputs(torch.tensor([0]), z)).value.sum().backward()
    assert z.grad[0, end].item() == pytest.approx(
        (torch.softmax(z, -1) - torch.tensor(np.exp(log_p)))[0, end].item(), abs=1e-5
    )


def test_a_students_padding_columns_keep_their_probability():
    """Never pad the student with zero logits, they take probability; nor leave out those that it has."""
    z, log_p = logits(6, v=V + 3), log_softmax(logits(7).numpy())
    value = build("reverse_kl").per_token(loss_inputs(z, exact_rows(log_p, [[1, 2]], [1]), [1])).value.item()
    q, p = np.exp(log_softmax(z.numpy()))[0], np.exp(log_p)[0]
    rest = (1 - q[1] - q[2]) * np.log((1 - q[1] - q[2]) / (1 - p[1] - p[2]))
    assert value == pytest.approx(q[1] * np.log(q[1] / p[1]) + q[2] * np.log(q[2] / p[2]) + rest, rel=1e-12)


def test_logprob_at_t_is_of_token_t_given_what_came_before():
    """Off-by-one: a shifted target changes value and gradient, so the right one is held to a sum by hand."""
    log_p, z, tokens = log_softmax(logits(8, n=3).numpy()), logits(9, n=3), [4, 0, 5]
    objective = build("k2")
    rows = loss_rows([scored_rollout(log_p, tokens, vocabulary=V)], objective.config)
    log_q = log_softmax(z.numpy())
    got = objective.per_token(rows.inputs(torch.arange(3), z)).value
    wanted = [0.5 * (log_q[t, y] - log_p[t, y]) ** 2 for t, y in enumerate(tokens)]
    assert np.allclose(got, wanted, rtol=1e-5)


def test_mean_of_micro_batch_means_is_not_the_global_token_mean_and_factors_do_not_bring_it_back():
    """Cross-entropy and divergence share one mean over all tokens, wherever the fixed ones are."""
    generator = np.random.default_rng(10)
    samples, hidden = [], []
    for uid, (length, source) in enumerate([(5, "on_policy"), (1, "fixed"), (3, "fixed")]):
        log_p = log_softmax(generator.normal(size=(length, V)))
        sample = scored_rollout(log_p, generator.integers(0, V, length), vocabulary=V, top_k=3, uid=uid)
        object.__setattr__(sample.rollout, "source", source)
        samples.append(sample)
        hidden.append(torch.tensor(generator.normal(size=(length, V))))
    objective = build("forward_kl", distill_weight=0.4)
    masks = [loss_mask(s.rollout, objective.config) for s in samples]
    weights = normalise.token_weights(masks, normalise.count(masks), "token")

    def run(parts):
        total, gradients = 0.0, []
        for part in parts:
            rows = loss_rows([samples[i] for i in part], objective.config)
            leaf = torch.cat([hidden[i] for i in part]).requires_grad_()
            taken = torch.from_numpy(np.concatenate([weights[i] for i in part]))
            loss, _ = importance.backward(lambda h: h, leaf, objective, rows, taken, 2)
            total += loss
            gradients.append(leaf.grad)
        return total, torch.cat(gradients)

    together, apart = run([[0, 1, 2]]), run([[0], [1], [2]])
    assert together[0] == pytest.approx(apart[0], rel=1e-6)
    assert torch.allclose(together[1], apart[1], atol=1e-8)
    by_hand = 0.0
    for sample, z in zip(samples, hidden, strict=True):
        rows = loss_rows([sample], objective.config)
        own = build("forward_kl").per_token(rows.inputs(torch.arange(len(z)), z)).value.sum()
        log_q = torch.log_softmax(z, -1)[torch.arange(len(z)), sample.rollout.token_ids.tolist()].sum()
        by_hand += (0.4 * own - 0.6 * log_q * (sample.rollout.source == "fixed")) / 9
    assert together[0] == pytest.approx(float(by_hand), rel=1e-5)


@pytest.mark.parametrize("keys", [{"ce_weight": 1.0}, {"staleness": "prefix"}, {"ratio_bounds": [0.1, 9.0]}])
def test_logits_of_all_rows_never_exist_at_once_with_cross_entropy_or_weights(keys):
    """Memory is chunk × vocabulary, whatever is mixed in."""
    n, seen = 23, []
    log_p = log_softmax(logits(11, n=n).numpy())
    sample = scored_rollout(log_p, [1] * n, vocabulary=V, top_k=2, full_logprob=np.full(n, -1.5))
    objective = build("forward_kl", **keys)

    def head(hidden):
        seen.append(len(hidden))
        return 1.0 * hidden

    leaf = logits(12, n=n).requires_grad_()
    importance.backward(head, leaf, objective, loss_rows([sample], objective.config), torch.full((n,), 1 / n), 4)
    assert max(seen) == 4
    assert (leaf.grad.abs().sum(1) > 0).sum() > 8  # of some, the ratio is out of bounds


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("jsd", {"beta": 1e-4}),
        ("jsd", {"beta": 1 - 1e-4}),
        ("skewed_forward_kl", {"skew_lambda": 1e-6}),
        ("skewed_reverse_kl", {"skew_lambda": 1e-6}),
    ],
)
def test_mixtures_with_a_tiny_weight_keep_their_digits_in_float32(name, keys):
    """1 − λ rounds to 1 in float32: λ would be gone, and log 0 in its place."""
    z = logits(13, n=6, v=300).float()
    z[:, :3] += torch.linspace(2, 20, 6)[:, None]
    teacher = exact_rows(log_softmax(logits(14, n=6, v=300).numpy()), [[0, 1]] * 6, [0] * 6)
    gradients = []
    for leaf in (z.clone().requires_grad_(), z.double().requires_grad_()):
        value = build(name, support="teacher", **keys).per_token(loss_inputs(leaf, teacher, [0] * 6)).value
        value.sum().backward()
        gradients.append(leaf.grad.double())
    scale = gradients[1].abs().amax(1, keepdim=True)
    assert ((gradients[0] - gradients[1]).abs() <= 1e-5 * scale).all()


def test_every_recipe_of_the_docs_is_a_configuration_that_is_accepted():
    """A recipe that is refused, or names keys that are not there, helps nobody."""
    table = DOCS.read_text().partition("## Recipes")[2].partition("\n## ")[0]
    recipes = re.findall(r"\| `([^`]+=[^`]+)`", table)
    assert len(recipes) >= 9
    for recipe in recipes:
        line = ["--student=x", "--prompts=y.jsonl", "--teacher-url=grpc://h:1", *recipe.split()]
        config, _ = settings.load(
            TrainConfig, line, prog="p", description="", env_prefix="NONE_", environ={},
            shortcuts={"student": "student.model", "prompts": "data.source", "teacher-url": "teacher.url"},
        )  # fmt: skip
        assert losses.build(config.loss).needs(config.teacher.top_k) is not None
