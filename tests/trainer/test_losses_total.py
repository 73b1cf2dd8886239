"""Cross-entropy beside an objective, factors, T²: against the formula, by float64 autograd, over the registry."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from losscases import exact_rows, log_softmax, loss_inputs

from student_trainer import losses
from student_trainer.losses import registry
from student_trainer.losses.config import DivergenceConfig

N, V = 4, 7
TARGETS = [0, 3, 6, 2]
FIXED = torch.tensor([True, False, False, True])


def build(name, **keys):
    return losses.build(losses.parse_loss({"objective": name, **keys}))


def inputs_of(z):
    log_p = log_softmax(np.random.default_rng(1).normal(size=(N, V), scale=2.0))
    inputs = loss_inputs(z, exact_rows(log_p, None, TARGETS), TARGETS, advantage=torch.linspace(-1, 1, N).double())
    return dataclasses.replace(inputs, sampled=~FIXED, fixed=FIXED)


def logits():
    return torch.tensor(np.random.default_rng(2).normal(size=(N, V), scale=2.0)).requires_grad_()


FORMS = [
    ({"distill_weight": 0.3}, 0.7, 0.3),
    ({"distill_weight": 1.0}, 0.0, 1.0),
    ({"distill_weight": 0.0}, 1.0, 0.0),
    ({"ce_weight": 0.5, "kl_weight": 2.0}, 0.5, 2.0),
    ({"ce_weight": 0.5}, 0.5, 1.0),
    ({"kl_weight": 3.0}, 0.0, 3.0),
]


@pytest.mark.parametrize("name", losses.names())
@pytest.mark.parametrize(("keys", "a", "b"), FORMS)
def test_a_position_is_a_ce_plus_b_d_with_cross_entropy_on_fixed_data_only(name, keys, a, b):
    z = logits()
    got = build(name, **keys).per_token(inputs_of(z))
    own = build(name).per_token(inputs_of(z))
    cross_entropy = -torch.log_softmax(z, -1)[torch.arange(N), TARGETS]
    wanted = a * cross_entropy * FIXED + b * own.value
    assert torch.allclose(got.value, wanted, rtol=1e-12)
    (gradient,) = torch.autograd.grad(got.value.sum(), z, retain_graph=True)
    (expected,) = torch.autograd.grad(wanted.sum(), z)
    assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-14)
    if (a, b) != (0.0, 1.0):
        assert torch.equal(got.metrics["distillation"], own.value)
    assert ("cross_entropy" in got.metrics) == (a > 0)
    if a > 0:
        assert torch.allclose(got.metrics["cross_entropy"], (cross_entropy * FIXED).detach(), rtol=1e-12)
        assert got.metrics["rows_of_cross_entropy"].sum() == 2


@pytest.mark.parametrize("name", [n for n in losses.names() if n not in ("k2", "k3", "policy_gradient")])
def test_t_squared_multiplies_the_divergence_once_and_cross_entropy_not_at_all(name):
    keys = {"student_temperature": 2.0, "teacher_temperature": 2.0}
    z = logits()
    plain = build(name, **keys).per_token(inputs_of(z)).value
    scaled = build(name, scale_by_t2=True, ce_weight=0.5, kl_weight=0.25, **keys).per_token(inputs_of(z)).value
    cross_entropy = -torch.log_softmax(z, -1)[torch.arange(N), TARGETS] * FIXED
    assert torch.allclose(scaled, 0.5 * cross_entropy + 0.25 * 4.0 * plain, rtol=1e-12)
    alone = build(name, scale_by_t2=True, **keys).per_token(inputs_of(z)).value
    assert torch.allclose(alone, 4.0 * plain, rtol=1e-12)


def test_a_hot_divergence_times_t_squared_keeps_its_gradients_size():
    """KL between softmaxes at T has a gradient about T² times smaller; scaled it goes to a limit as T grows."""
    sizes = []
    for temperature in (20.0, 40.0):
        z = logits()
        keys = {"student_temperature": temperature, "teacher_temperature": temperature, "scale_by_t2": True}
        log_p = log_softmax(np.random.default_rng(1).normal(size=(N, V), scale=2.0), temperature)
        build("forward_kl", **keys).per_token(
            loss_inputs(z, exact_rows(log_p, None, TARGETS), TARGETS)
        ).value.sum().backward()
        sizes.append(z.grad.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_cross_entropy_on_the_students_own_samples_would_be_noise_alone():
    """Its expected gradient over y ~ q is zero, by enumeration."""
    z = logits()
    q, total = torch.softmax(z, -1).detach()[0], torch.zeros(V, dtype=torch.float64)
    for token in range(V):
        (gradient,) = torch.autograd.grad(-torch.log_softmax(z, -1)[0, token], z)
        total += q[token] * gradient[0]
    assert total.abs().max() < 1e-15


@pytest.mark.parametrize("name", ["k2", "k3", "policy_gradient"])
def test_objectives_of_the_sampled_token_are_zero_where_nobody_sampled(name):
    z = logits()
    inputs = inputs_of(z)
    undefined = torch.where(FIXED, math.nan, inputs.old_logprob)
    result = build(name).per_token(dataclasses.replace(inputs, old_logprob=undefined, behaviour_logprob=undefined))
    assert result.value[FIXED].abs().max() == 0
    result.value.sum().backward()
    assert z.grad[FIXED].abs().max() == 0
    assert z.grad[~FIXED].abs().min() > 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"distill_weight": 0.5, "ce_weight": 1.0}, "loss.ce_weight: got 1.0 with distill_weight 0.5, expected one"),
        ({"distill_weight": 0.5, "kl_weight": 1.0}, "loss.kl_weight: got 1.0 with distill_weight 0.5, expected one"),
        ({"distill_weight": 1.5}, "loss.distill_weight: .*less than or equal to 1, got 1.5"),
        ({"kl_weight": 0.0}, "loss.kl_weight: got 0 without a ce_weight"),
        ({"scale_by_t2": True, "student_temperature": 2.0}, "loss.scale_by_t2: .*expected equal temperatures"),
        ({"objective": "k2", "scale_by_t2": True}, "loss.scale_by_t2: not a key of objective 'k2'"),
        ({"objective": "policy_gradient", "on_prompt": True}, "loss.on_prompt: .*prompts it did not, got True"),
        ({"ratio_bounds": [1.2, 2.0]}, r"loss.ratio_bounds: expected .lo, hi. with 0 <= lo < 1 < hi, got .1.2"),
        ({"staleness_cap": 3.0}, "loss.staleness_cap: got 3.0 with staleness none, expected none"),
        ({"behaviour_cap": 3.0}, "loss.behaviour_cap: got 3.0 with behaviour none, expected none"),
        ({"staleness": "token"}, "loss.staleness: .*'none' or 'prefix', got 'token'"),
    ],
)  # fmt: skip
def test_bad_combinations_are_refused_in_one_line(keys, message):
    with pytest.raises(ValueError, match=message) as caught:
        losses.parse_loss(keys)
    assert "\n" not in str(caught.value)


def test_factors_reach_every_objective_of_the_registry_and_the_users_own():
    for name in losses.names():
        config_class = registry.get(name).config_class
        assert ("scale_by_t2" in config_class.model_fields) == issubclass(config_class, DivergenceConfig)
    z = logits()
    own = build(f"{__name__}:half_of_q", kl_weight=4.0).per_token(inputs_of(z))
    assert torch.allclose(own.value, 2.0 * torch.softmax(z, -1)[:, 0])


def half_of_q(inputs, config):
    return losses.base.PerToken(0.5 * torch.softmax(inputs.student_logits, -1)[:, 0])
