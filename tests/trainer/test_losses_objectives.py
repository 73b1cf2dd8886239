"""Objectives against their definitions in float64: autograd of the textbook expression, loops over outcomes, and
enumeration of a small vocabulary. Tests over `names()` cover a new objective; one without a reference fails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losscases import exact_rows, log_mass, log_softmax, loss_inputs

from student_trainer import losses
from student_trainer.losses import registry
from student_trainer.losses.base import LossInputs, PerToken, TeacherRows
from student_trainer.losses.config import DivergenceConfig
from student_trainer.losses.student_side import student_rows
from teacher_api.types import LOGPROB_FLOOR

pytestmark = pytest.mark.slow


def _forward(p, q):
    return (p * (p.log() - q.log())).sum(-1)


def _reverse(p, q):
    return (q * (q.log() - p.log())).sum(-1)


def _jsd(p, q, beta=0.5):
    r = beta * p + (1 - beta) * q
    return beta * _forward(p, r) + (1 - beta) * _forward(q, r)


def _adaptive(p, q, alpha=0.5, bucket_last=False):
    """Of one row or several; the head found by a loop over the ids, most likely first."""
    rows = []
    for p_row, q_row in zip(p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1]), strict=True):
        ids = list(range(len(p_row)))
        order = sorted(ids[:-1] if bucket_last else ids, key=lambda i: -p_row[i].item()) + ids[-1:] * bucket_last
        head, mass = [], 0.0
        for i in order:
            if mass >= alpha:
                break
            head, mass = [*head, i], mass + p_row[i].item()
        gap = (p_row - q_row).abs().detach()
        total = gap.sum().item()
        weight = gap[head].sum().item() / total if total else 0.5
        rows.append(weight * _forward(p_row, q_row) + (1 - weight) * _reverse(p_row, q_row))
    return torch.stack(rows).reshape(p.shape[:-1])


# D from plain probabilities over the whole vocabulary, one line of docs/losses.md each, at the default options.
TEXTBOOK = {
    "forward_kl": _forward,
    "reverse_kl": _reverse,
    "jsd": _jsd,
    "skewed_forward_kl": lambda p, q: _forward(p, 0.1 * p + 0.9 * q),
    "skewed_reverse_kl": lambda p, q: _forward(q, 0.9 * p + 0.1 * q),
    "adaptive_kl": _adaptive,
    "mixed_kl": lambda p, q: 0.5 * _forward(p, q) + 0.5 * _reverse(p, q),
    "tvd": lambda p, q: 0.5 * (p - q).abs().sum(-1),
}
VARIANTS = [
    ("jsd", {"beta": 0.0}, _forward),
    ("jsd", {"beta": 1.0}, _reverse),
    ("jsd", {"beta": 0.1}, lambda p, q: _jsd(p, q, 0.1)),
    ("jsd", {"beta": 0.999}, lambda p, q: _jsd(p, q, 0.999)),
    ("skewed_forward_kl", {"skew_lambda": 0.0}, _forward),
    ("skewed_forward_kl", {"skew_lambda": 0.7}, lambda p, q: _forward(p, 0.7 * p + 0.3 * q)),
    ("skewed_reverse_kl", {"skew_lambda": 0.0}, _reverse),
    ("skewed_reverse_kl", {"skew_lambda": 0.7}, lambda p, q: _forward(q, 0.3 * p + 0.7 * q)),
    ("mixed_kl", {"mixed_weight": 1.0}, _forward),
    ("mixed_kl", {"mixed_weight": 0.2}, lambda p, q: 0.2 * _forward(p, q) + 0.8 * _reverse(p, q)),
    ("adaptive_kl", {"adaptive_alpha": 0.05}, lambda p, q: _adaptive(p, q, 0.05)),
    ("adaptive_kl", {"adaptive_alpha": 0.95}, lambda p, q: _adaptive(p, q, 0.95)),
]
NOT_BOUNDED_BY_THE_FULL_VALUE = {"adaptive_kl"}  # its weight depends on what the tail lumps together
KINKED = {"tvd"}  # |p − q| has any slope in [−1, 1] where rounding alone separates p and q
DETACHED = {"adaptive_kl"}  # a weight without gradient, which numerical differentiation would see
DIVERGENCES = [n for n in losses.names() if issubclass(registry.get(n).config_class, DivergenceConfig)]
TOKENS = [n for n in losses.names() if n not in DIVERGENCES]
RNG = np.random.default_rng(3)
N, V = 4, 7


def build(name, **keys):
    return losses.build(losses.parse_loss({"objective": name, **keys}))


def random_logits(n=N, v=V, seed=0, scale=2.0):
    return torch.tensor(np.random.default_rng(seed).normal(scale=scale, size=(n, v)))


def any_inputs(name, logits, teacher, targets):
    """Inputs that suit any objective: advantages are there for those that want them."""
    advantage = torch.linspace(-1, 1, len(targets)).to(torch.promote_types(logits.dtype, torch.float32))
    return loss_inputs(logits, teacher, targets, advantage=None if name in DIVERGENCES else advantage)


def test_every_divergence_has_a_textbook_reference():
    assert set(DIVERGENCES) == set(TEXTBOOK)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("student_t", [1.0, 2.0])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("tail", ["bucket", "renormalise", "none"])
def test_whole_vocabulary_equals_the_textbook_in_value_and_gradient(name, student_t, sparse, tail):
    log_p = log_softmax(random_logits(seed=1), temperature=1.5)
    targets = [0, 3, 6, 2]
    supports = [RNG.permutation(V).tolist() for _ in range(N)] if sparse else None
    teacher = exact_rows(log_p, supports, targets)
    objective = build(name, student_temperature=student_t, tail=tail)
    z = random_logits(seed=2).requires_grad_()

    def value(logits):
        return objective.per_token(loss_inputs(logits, teacher, targets)).value

    p = torch.tensor(np.exp(log_p))
    expected = TEXTBOOK[name](p, torch.softmax(z / student_t, -1))
    got = value(z)
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-13)
    (wanted,) = torch.autograd.grad(expected.sum(), z)
    (gradient,) = torch.autograd.grad(got.sum(), z)
    assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-12)
    if name not in DETACHED:
        assert torch.autograd.gradcheck(value, (z,))


@pytest.mark.parametrize(("name", "keys", "textbook"), VARIANTS)
def test_options_of_an_objective_follow_the_textbook(name, keys, textbook):
    log_p, z = log_softmax(random_logits(seed=1)), random_logits(seed=2).requires_grad_()
    got = build(name, **keys).per_token(loss_inputs(z, exact_rows(log_p, None, [0] * N), [0] * N)).value
    expected = textbook(torch.tensor(np.exp(log_p)), torch.softmax(z, -1))
    assert torch.allclose(got, expected, rtol=1e-11, atol=1e-13)
    (wanted,) = torch.autograd.grad(expected.sum(), z)
    (gradient,) = torch.autograd.grad(got.sum(), z)
    assert torch.allclose(gradient, wanted, rtol=1e-9, atol=1e-12)


def partitioned(name, p, q, support, tail):
    """D over the outcomes of one row, by loops: the support's ids, and the rest as `tail` says."""
    inside_p, inside_q = p[support], q[support]
    if tail == "renormalise":
        inside_p, inside_q = inside_p / inside_p.sum(), inside_q / inside_q.sum()
    if tail == "bucket":
        rest = [v for v in range(len(q)) if v not in support]
        inside_p = torch.cat([inside_p, p[[v for v in rest if v < len(p)]].sum()[None]])
        inside_q = torch.cat([inside_q, q[rest].sum()[None]])
    if name == "adaptive_kl":
        return _adaptive(inside_p, inside_q, bucket_last=tail == "bucket")
    return TEXTBOOK[name](inside_p, inside_q)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("tail", ["bucket", "renormalise", "none"])
def test_partial_supports_of_different_sizes_follow_their_definition(name, tail):
    width = V + 2  # columns only the student has
    supports, targets = [[4], [5, 0], [6, 2, 1, 3], [0, 1, 2, 3]], [4, 0, 3, 3]
    log_p = log_softmax(random_logits(seed=5))
    z = random_logits(v=width, seed=6).requires_grad_()
    got = build(name, tail=tail).per_token(loss_inputs(z, exact_rows(log_p, supports, targets), targets)).value
    q = torch.softmax(z, -1)
    p = torch.tensor(np.exp(log_p))
    expected = torch.stack([partitioned(name, p[n], q[n], supports[n], tail) for n in range(N)])
    assert torch.allclose(got, expected, rtol=1e-11, atol=1e-13)
    got_grad, wanted_grad = (torch.autograd.grad(x.sum(), z, retain_graph=True)[0] for x in (got, expected))
    assert torch.allclose(got_grad, wanted_grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tail", ["bucket", "renormalise", "none"])
def test_equal_distributions_give_exactly_zero_and_finite_gradients(name, dtype, tail):
    z = random_logits(n=16, v=50, seed=7).to(dtype).requires_grad_()
    targets = [0] * 16
    log_p = torch.log_softmax(z.detach(), -1)
    teacher = TeacherRows(None, log_p, None, torch.full((16,), LOGPROB_FLOOR, dtype=dtype), log_p[:, 0])
    value = build(name, tail=tail).per_token(loss_inputs(z, teacher, targets)).value
    assert torch.equal(value, torch.zeros(16, dtype=dtype))
    value.sum().backward()
    assert z.grad.isfinite().all()
    assert z.grad.abs().max() < 1e-6


@pytest.mark.parametrize("name", DIVERGENCES)
def test_bucket_with_the_whole_vocabulary_equals_no_bucket(name):
    log_p, z, targets = log_softmax(random_logits(seed=8)), random_logits(seed=9), [1, 1, 1, 1]
    results = []
    for tail in ("bucket", "none"):
        logits = z.clone().requires_grad_()
        value = build(name, tail=tail).per_token(loss_inputs(logits, exact_rows(log_p, None, targets), targets)).value
        value.sum().backward()
        results.append((value.detach(), logits.grad))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-15, atol=1e-15)
    assert torch.allclose(results[0][1], results[1][1], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - NOT_BOUNDED_BY_THE_FULL_VALUE))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bucketed_divergence_is_between_zero_and_the_full_one(name, data):
    vocabulary = data.draw(st.integers(2, 8))
    number = st.floats(-12, 12, allow_nan=False)
    logits = data.draw(st.lists(number, min_size=2 * vocabulary, max_size=2 * vocabulary))
    support = data.draw(st.sets(st.integers(0, vocabulary - 1), min_size=1))
    z = torch.tensor([logits[:vocabulary]], dtype=torch.float64)
    log_p = log_softmax(np.array([logits[vocabulary:]]))
    target = [min(support)]
    objective = build(name)
    bucketed = objective.per_token(loss_inputs(z, exact_rows(log_p, [sorted(support)], target), target)).value.item()
    full = objective.per_token(loss_inputs(z, exact_rows(log_p, None, target), target)).value.item()
    assert -1e-12 <= bucketed <= full + 1e-10


def test_columns_only_the_student_has_count_in_its_tail():
    """Same tokenizer, different padded logit width (151936 vs 152064 in one model family)."""
    z = random_logits(v=V + 5, seed=10).requires_grad_()
    log_p, targets = log_softmax(random_logits(seed=11)), [0, 1, 2, 3]
    teacher = exact_rows(log_p, None, targets)
    value = build("forward_kl").per_token(loss_inputs(z, teacher, targets)).value
    q = torch.softmax(z, -1)[:, :V]  # normalised over all its columns
    p = torch.tensor(np.exp(log_p))
    assert torch.allclose(value, (p * (p.log() - q.log())).sum(1), rtol=1e-12)
    value.sum().backward()
    assert (z.grad[:, V:] > 0).all()  # mass on them is pushed down, not ignored


def test_student_narrower_than_the_vocabulary_is_refused():
    teacher = exact_rows(log_softmax(random_logits()), None, [0] * N)
    with pytest.raises(ValueError, match="student has 5 logits, but the teacher scored 7"):
        build("reverse_kl").per_token(loss_inputs(random_logits(v=5), teacher, [0] * N))


def extreme_cases():
    """(label, student logits, teacher rows, targets): values at the floor, one-token supports, masked columns."""
    floor_p = np.full((2, V), -2e4)
    floor_p[:, 0] = 0.0
    spread = random_logits(n=2, seed=12)
    minus_inf = spread.clone()
    minus_inf[:, 1:] = -math.inf
    padded = exact_rows(log_softmax(random_logits(n=2, seed=13)), [[3], [3, 2, 5]], [3, 2])
    one = exact_rows(log_softmax(random_logits(n=2, seed=14)), [[1], [6]], [1, 6])
    floored = exact_rows(np.maximum(floor_p, LOGPROB_FLOOR), [[1, 0], [2, 3]], [1, 2])
    return {
        "teacher at the floor, dense": (spread, exact_rows(np.maximum(floor_p, LOGPROB_FLOOR), None, [1, 0]), [1, 0]),
        "teacher at the floor, sparse": (spread, floored, [1, 2]),
        "one-token support": (spread, one, [1, 6]),
        "one-token support beside a wider one": (spread, padded, [3, 2]),
        "student's columns masked, dense": (minus_inf, exact_rows(log_softmax(spread), None, [0, 0]), [0, 0]),
        "student's columns masked, sparse": (minus_inf, exact_rows(log_softmax(spread), [[0, 1], [0]], [0, 0]), [0, 0]),
        "very sharp student": (spread * 300, padded, [3, 2]),
    }


@pytest.mark.parametrize("name", losses.names())
@pytest.mark.parametrize("label", extreme_cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_rows_keep_values_metrics_and_gradients_finite(name, label, dtype):
    """-inf used as filler gives NaN gradients although the loss is finite."""
    logits, teacher, targets = extreme_cases()[label]
    for tail in ("bucket", "renormalise", "none") if name in DIVERGENCES else (None,):
        z = logits.to(dtype).requires_grad_()
        result = build(name, **({"tail": tail} if tail else {})).per_token(any_inputs(name, z, teacher, targets))
        assert result.value.isfinite().all()
        assert all(m.isfinite().all() and not m.requires_grad for m in result.metrics.values())
        result.value.sum().backward()
        assert z.grad.isfinite().all()


@pytest.mark.parametrize("name", losses.names())
def test_bfloat16_logits_are_worked_on_in_float32(name):
    log_p, targets = log_softmax(random_logits(v=400, seed=15)), [5, 9, 0, 399]
    teacher = exact_rows(log_p, [[5, 1], [9, 2], [0, 7], [399, 8]], targets)
    half = random_logits(v=400, seed=16).bfloat16()
    from_half = build(name).per_token(any_inputs(name, half, teacher, targets)).value
    from_double = build(name).per_token(any_inputs(name, half.double(), teacher, targets)).value
    assert torch.allclose(from_half.double(), from_double, rtol=1e-5, atol=1e-5)


def test_truncated_forward_kl_may_be_negative_and_keeps_its_gradient():
    """Truncated forward KL goes negative; clamping at 0 kills the gradient."""
    log_p = np.log(np.array([[0.3, 0.1, 0.6]]))
    z = torch.tensor(np.log(np.array([[0.8, 0.1, 0.1]]))).requires_grad_()
    value = build("forward_kl", tail="none").per_token(loss_inputs(z, exact_rows(log_p, [[0, 1]], [0]), [0])).value
    assert value.item() == pytest.approx(0.3 * math.log(0.3 / 0.8))
    value.sum().backward()
    assert z.grad[0].tolist() == pytest.approx([0.4 * 0.8 - 0.3, 0.4 * 0.1 - 0.1, 0.4 * 0.1])


def test_top_k_reverse_kl_without_tail_pushes_mass_out_and_the_bucket_pulls_it_back():
    """Top-k reverse KL without tail is minimised by pushing mass out of the top-k."""
    log_p = np.log(np.array([[0.6, 0.3, 0.05, 0.05]]))
    start = torch.tensor(np.log(np.array([[0.5, 0.2, 0.2, 0.1]])))  # too little mass on the support {0, 1}
    inside = {}
    for tail in ("none", "bucket"):
        z = start.clone().requires_grad_()
        for _ in range(200):
            value = (
                build("reverse_kl", support="teacher", tail=tail)
                .per_token(loss_inputs(z, exact_rows(log_p, [[0, 1]], [0]), [0]))
                .value
            )
            (gradient,) = torch.autograd.grad(value.sum(), z)
            z = (z - 0.5 * gradient).detach().requires_grad_()
        inside[tail] = torch.softmax(z, -1)[0, :2].sum().item()
    assert inside["none"] < 0.5
    assert inside["bucket"] == pytest.approx(0.9, abs=0.01)


def test_a_renormalised_support_never_sees_the_tail():
    log_p = np.log(np.array([[0.6, 0.3, 0.1]]))
    z = torch.tensor(np.log(np.array([[0.02, 0.01, 0.97]]))).requires_grad_()  # right proportions, wrong mass
    teacher = exact_rows(log_p, [[0, 1]], [0])
    assert build("reverse_kl", tail="renormalise").per_token(loss_inputs(z, teacher, [0])).value.item() == (
        pytest.approx(0, abs=1e-15)
    )
    assert build("reverse_kl", tail="bucket").per_token(loss_inputs(z, teacher, [0])).value.item() > 1


def test_tiny_student_tail_is_exact_in_float32():
    """Never as 1 - sum: at a tail of 1e-7 that would be off by as much as the tail itself."""
    generator = np.random.default_rng(17)
    logits = generator.normal(size=(6, 300))
    logits[:, :3] += np.linspace(12, 24, 6)[:, None]
    supports, targets = [[2, 0, 1]] * 6, [0] * 6
    z = torch.tensor(logits, dtype=torch.float32)
    got = student_rows(loss_inputs(z, exact_rows(log_softmax(logits), supports, targets), targets))
    exact = [log_mass(row[3:]) for row in log_softmax(z.double().numpy())]
    assert min(exact) < -17
    assert np.abs(got.log_tail.numpy() - exact).max() < 1e-5


@pytest.mark.parametrize("supports", [None, [[0, 2]], [[0, 1, 2, 3]]])
def test_masked_columns_and_an_empty_tail_stand_at_the_floor_without_gradient(supports):
    z = torch.tensor([[1.0, -math.inf, -math.inf, 0.5]]).requires_grad_()
    log_p = log_softmax(np.zeros((1, 4)))
    got = student_rows(loss_inputs(z, exact_rows(log_p, supports, [0]), [0]))
    masked = (1, 2) if supports is None or len(supports[0]) == 4 else (1,)
    assert all(got.support_logprob[0, slot].item() == LOGPROB_FLOOR for slot in masked)
    if len(masked) == 2:
        assert got.log_tail.item() == LOGPROB_FLOOR
    (got.support_logprob.sum() + got.log_tail.sum()).backward()
    assert z.grad.isfinite().all()
    assert z.grad[0, 1] == z.grad[0, 2] == 0


def test_masked_columns_past_the_vocabulary_leave_an_empty_tail():
    z = torch.tensor([[1.0, 0.5, -math.inf, -math.inf]]).requires_grad_()
    got = student_rows(loss_inputs(z, exact_rows(log_softmax(np.zeros((1, 2))), None, [0]), [0]))
    assert got.log_tail.item() == LOGPROB_FLOOR
    got.log_tail.sum().backward()
    assert torch.equal(z.grad, torch.zeros(1, 4))


def test_padded_slots_take_no_share_when_a_support_is_renormalised_at_the_floor():
    log_p = np.full((2, V), LOGPROB_FLOOR)
    log_p[:, 5] = 0.0
    teacher = exact_rows(log_p, [[1], [2, 3]], [1, 2])  # row 0: one slot and one padded
    value = build("forward_kl", tail="renormalise").per_token(loss_inputs(random_logits(n=2), teacher, [1, 2])).value
    assert value[0].item() == 0.0
    assert value[1].item() > 0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_float32_gradients_of_sharp_rows_match_float64(name):
    logits = np.random.default_rng(30).normal(size=(6, 300))
    logits[:, :3] += np.linspace(2, 20, 6)[:, None]
    teacher = exact_rows(log_softmax(random_logits(n=6, v=300, seed=31)), [[2, 0, 1], *[[0, 1]] * 5], [0] * 6)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        z = torch.tensor(logits, dtype=torch.float32).to(dtype).requires_grad_()
        build(name).per_token(loss_inputs(z, teacher, [0] * 6)).value.sum().backward()
        gradients.append(z.grad.double())
    scale = gradients[1].abs().amax(1, keepdim=True)
    assert ((gradients[0] - gradients[1]).abs() <= 1e-5 * scale).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("tail", ["bucket", "renormalise", "none"])
def test_equal_distributions_on_a_partial_support_give_zero_and_no_gradient(name, tail):
    logits = random_logits(n=3, v=40, seed=32)
    supports = [[4], [5, 0], [6, 2, 1, 3]]
    z = logits.clone().requires_grad_()
    inputs = loss_inputs(z, exact_rows(log_softmax(logits), supports, [4, 0, 3]), [4, 0, 3])
    value = build(name, tail=tail).per_token(inputs).value
    assert torch.allclose(value, torch.zeros(3).double(), atol=1e-14)
    value.sum().backward()
    if tail == "none" or name in KINKED:
        assert z.grad.isfinite().all()  # truncated sums have their minimum elsewhere
    else:
        assert z.grad.abs().max() < 1e-14


def test_metrics_of_a_divergence_match_numpy():
    log_p, z = log_softmax(random_logits(seed=18)), random_logits(v=V + 1, seed=19)
    supports, targets = [[4], [5, 0], [6, 2, 1, 3], [0, 1, 2, 3]], [4, 0, 3, 3]
    old = torch.tensor([-1.0, -2.0, -0.5, -3.0]).double()
    inputs = loss_inputs(z, exact_rows(log_p, supports, targets), targets, old_logprob=old)
    metrics = build("reverse_kl", student_temperature=2.0).per_token(inputs).metrics
    log_q, log_q_1 = log_softmax(z, 2.0), log_softmax(z)
    for n, (support, target) in enumerate(zip(supports, targets, strict=True)):
        p, q = np.exp(log_p[n]), np.exp(log_q[n])
        for side, mass in (("teacher", p), ("student", q)):
            parts = np.append(mass[support], np.delete(mass, support).sum())
            assert metrics[f"{side}_mass"][n].item() == pytest.approx(mass[support].sum(), rel=1e-12)
            assert metrics[f"{side}_entropy"][n].item() == pytest.approx(-(parts * np.log(parts)).sum(), rel=1e-12)
        assert metrics["delta"][n].item() == pytest.approx(log_q[n, target] - log_p[n, target], rel=1e-12)
        assert metrics["rollout_gap"][n].item() == pytest.approx(abs(old[n].item() - log_q_1[n, target]), rel=1e-12)
    assert "topk_overlap" not in metrics


def test_dense_overlap_compares_the_likeliest_of_both():
    log_p = log_softmax(np.arange(40.0)[None])
    z = torch.tensor(np.roll(np.arange(40.0), -4))[None]  # its 16 likeliest: 20..35; the teacher's: 24..39
    metrics = build("reverse_kl").per_token(loss_inputs(z, exact_rows(log_p, None, [0]), [0])).metrics
    assert metrics["topk_overlap"].item() == 12 / 16


# One's own --------------------------------------------------------------------------------------------------------


def my_total_variation(inputs: LossInputs, config: object) -> PerToken:
    p, q = inputs.teacher.support_logprob.exp(), torch.softmax(inputs.student_logits, -1)
    return PerToken(0.5 * (p - q).abs().sum(1), {"seen": q.sum(1)})


def my_wrong_shape(inputs: LossInputs, config: object) -> PerToken:
    return PerToken(inputs.student_logits.sum())


def my_wrong_type(inputs: LossInputs, config: object) -> torch.Tensor:
    return inputs.student_logits.sum(1)


def test_a_users_own_function_is_called_and_checked():
    z, log_p = random_logits(seed=28).requires_grad_(), log_softmax(random_logits(seed=29))
    inputs = loss_inputs(z, exact_rows(log_p, None, [0] * N), [0] * N)
    result = build(f"{__name__}:my_total_variation", options={"a": 1}).per_token(inputs)
    wanted = 0.5 * np.abs(np.exp(log_p) - np.exp(log_softmax(z.detach()))).sum(1)
    assert np.allclose(result.value.detach(), wanted)
    assert not result.metrics["seen"].requires_grad
    with pytest.raises(ValueError, match=r"my_wrong_shape returned value of shape \(\); expected \(4,\)"):
        build(f"{__name__}:my_wrong_shape").per_token(inputs)
    with pytest.raises(ValueError, match="my_wrong_type returned a Tensor; expected a PerToken"):
        build(f"{__name__}:my_wrong_type").per_token(inputs)
