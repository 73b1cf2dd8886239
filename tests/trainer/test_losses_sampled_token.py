"""k2 and k3: values and gradients by their definition, expected gradients by enumeration of a small vocabulary, and the
gradients of log q − log p itself, which hold nothing of the teacher."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from losscases import exact_rows, log_softmax, loss_inputs

from student_trainer import losses
from student_trainer.losses.objectives.k3 import LINEAR_BEYOND
from student_trainer.losses.student_side import logprob_of
from teacher_api.types import LOGPROB_FLOOR

N, V = 4, 7
TARGETS = [0, 3, 6, 2]
DEFINITION = {"k2": lambda delta: 0.5 * delta**2, "k3": lambda delta: torch.exp(-delta) - 1 + delta}


def build(name, **keys):
    return losses.build(losses.parse_loss({"objective": name, **keys}))


def random_logits(n=N, v=V, seed=0, scale=2.0):
    return torch.tensor(np.random.default_rng(seed).normal(scale=scale, size=(n, v)))


def of_token(name, z, log_p, target):
    return build(name).per_token(loss_inputs(z, exact_rows(log_p, [[t] for t in target], target), target)).value


def expected_gradient(value_of, z):
    """Σ_y q(y) ∇ value(y): the mean over the student's own untruncated samples, q without gradient."""
    q, total = torch.softmax(z, -1)[0], torch.zeros_like(z)
    for token in range(V):
        logits = z.clone().requires_grad_()
        total += q[token] * torch.autograd.grad(value_of(logits, token).sum(), logits)[0]
    return total


@pytest.mark.parametrize("name", DEFINITION)
def test_values_and_gradients_follow_the_definition_in_float64(name):
    log_p, z = log_softmax(random_logits(seed=1)), random_logits(v=V + 3, seed=2).requires_grad_()
    log_q = torch.log_softmax(z, -1)[torch.arange(N), TARGETS]
    expected = DEFINITION[name](log_q - torch.tensor(log_p[np.arange(N), TARGETS]))
    got = of_token(name, z, log_p, TARGETS)
    assert torch.allclose(got, expected, rtol=1e-12)
    (wanted,) = torch.autograd.grad(expected.sum(), z)
    (gradient,) = torch.autograd.grad(got.sum(), z)
    assert torch.allclose(gradient, wanted, rtol=1e-11, atol=1e-13)
    assert torch.autograd.gradcheck(lambda logits: of_token(name, logits, log_p, TARGETS), (z,))


@pytest.mark.parametrize("name", DEFINITION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_distributions_give_exactly_zero_and_no_gradient(name, dtype):
    """0 to the last bit where p has q's bits: those of torch's log_softmax where every sum is exact, and of the
    student's own sum anywhere. Elsewhere two right sums of the same logits round differently, by a δ of a few units in
    the last place (and a teacher's sum is another program's anyway): ½δ² (k2), or ½δ² + O(δ³) (k3), is then the square
    of a rounding error, and nothing smaller can be asked of it."""
    exact = torch.full((3, 50), -1e4, dtype=dtype)
    exact[0, 5] = exact[1, 5] = exact[1, 7] = exact[2, 5] = exact[2, 0] = 3.25  # log q(5) is 0, and twice −log 2
    of_torch = torch.log_softmax(exact, -1).double().numpy()
    assert of_torch[0, 5] == 0.0
    assert torch.equal(of_token(name, exact, of_torch, [5] * 3), torch.zeros(3, dtype=dtype))
    z = random_logits(n=16, v=50, seed=3).to(dtype).requires_grad_()
    log_p = torch.log_softmax(z.detach(), -1).double().numpy()
    rounded = 4 * torch.finfo(dtype).eps * np.abs(log_p[:, 5]).max()
    assert np.abs(of_token(name, z, log_p, [5] * 16).detach().numpy()).max() <= rounded**2
    log_p[:, 5] = logprob_of(z.detach(), torch.full((16,), 5)).double().numpy()
    value = of_token(name, z, log_p, [5] * 16)
    assert torch.equal(value, torch.zeros(16, dtype=value.dtype))
    value.sum().backward()
    assert z.grad.abs().max() == 0


def _textbook(direction):
    def value(z, log_p):
        log_q, p = torch.log_softmax(z, -1), torch.tensor(log_p)
        return (log_q.exp() * (log_q - p)).sum() if direction == "reverse" else (p.exp() * (p - log_q)).sum()

    return value


@pytest.mark.parametrize(("name", "direction"), [("k2", "reverse"), ("k3", "forward")])
def test_expected_gradient_by_enumeration(name, direction):
    """k2's expected gradient is the reverse KL's, k3's is the *forward* KL's."""
    log_p, z = log_softmax(random_logits(n=1, seed=4)), random_logits(n=1, seed=5)
    got = expected_gradient(lambda logits, y: of_token(name, logits, log_p, [y]), z)
    logits = z.clone().requires_grad_()
    _textbook(direction)(logits, log_p).backward()
    assert torch.allclose(got, logits.grad, rtol=1e-10, atol=1e-12)
    other = z.clone().requires_grad_()
    _textbook("forward" if direction == "reverse" else "reverse")(other, log_p).backward()
    assert (got - other.grad).abs().max() > 0.05


def test_k3s_expected_value_is_reverse_kl():
    log_p, z = log_softmax(random_logits(n=1, seed=4)), random_logits(n=1, seed=5)
    q = torch.softmax(z, -1)[0]
    got = sum(q[y] * of_token("k3", z, log_p, [y])[0] for y in range(V))
    assert got.item() == pytest.approx(_textbook("reverse")(z, log_p).item(), rel=1e-12)


def test_backpropagating_log_q_minus_log_p_teaches_nothing():
    """Back-propagating log q - log p of the sampled token: the teacher vanishes from the gradient."""
    z, gradients = random_logits(n=1, seed=6), []
    for seed in (7, 8):
        log_p = torch.tensor(log_softmax(random_logits(n=1, seed=seed)))

        def delta(logits, y, log_p=log_p):
            return torch.log_softmax(logits, -1)[:, y] - log_p[:, y]

        gradients.append(expected_gradient(delta, z))
    assert gradients[0].abs().max() < 1e-15
    assert torch.equal(gradients[0], gradients[1])


def test_k3_beyond_its_bound_goes_on_as_a_tangent_with_its_gradient():
    """Clamping can turn the loss upside down; a clamp in a hand-written forward must be in its backward."""
    log_p = np.log(np.array([[1 - 1e-12, 1e-12]]))
    for gap in (LINEAR_BEYOND - 1e-3, LINEAR_BEYOND + 1e-3, LINEAR_BEYOND + 500.0, -LOGPROB_FLOOR):
        z = torch.tensor([[-gap, 0.0]], dtype=torch.float64).requires_grad_()
        value = of_token("k3", z, log_p, [0])
        (gradient,) = torch.autograd.grad(value.sum(), z)
        delta = -gap - math.log1p(math.exp(-gap)) - log_p[0, 0]
        slope = 1 - math.exp(min(-delta, LINEAR_BEYOND))
        wanted = math.exp(min(-delta, LINEAR_BEYOND)) * (1 + max(-delta - LINEAR_BEYOND, 0.0)) - 1 + delta
        assert value.item() == pytest.approx(wanted, rel=1e-9)
        assert gradient[0, 0].item() == pytest.approx(slope, rel=1e-6)  # dδ/dz = 1 − q(y), q(y) ~ e^−20
        assert of_token("k3", z.float(), log_p, [0]).isfinite().all()


@pytest.mark.parametrize("name", DEFINITION)
def test_metrics_match_numpy(name):
    log_p, z = log_softmax(random_logits(seed=9)), random_logits(seed=10).float()
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0])
    inputs = loss_inputs(z, exact_rows(log_p, [[t] for t in TARGETS], TARGETS), TARGETS, old_logprob=old)
    metrics = build(name).per_token(inputs).metrics
    log_q = log_softmax(z.double().numpy())
    now = log_q[np.arange(N), TARGETS]
    assert np.allclose(metrics["delta"], now - log_p[np.arange(N), TARGETS], atol=1e-5)
    assert np.allclose(metrics["student_entropy"], -(np.exp(log_q) * log_q).sum(1), atol=1e-5)
    assert np.allclose(metrics["rollout_gap"], np.abs(old.numpy() - now), atol=1e-5)
