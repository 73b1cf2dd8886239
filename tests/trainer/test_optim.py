"""Schedules by their definition; updates equal to torch.optim used directly; state survives a save."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from onestep import CPU, bare_run, gradients, relative, scored_samples
from pydantic import ValidationError
from tinymodels import save_tiny, tiny_model
from torch import nn

from student_trainer.config import StudentConfig
from student_trainer.muon import Muon
from student_trainer.optim import OptimConfig, Optimizer, check_length, schedule_factor
from student_trainer.student import load
from student_trainer.train import accumulate


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"embed": nn.Embedding(7, 6), "hidden": nn.Linear(6, 5), "norm": nn.LayerNorm(5)})


def gradients_for(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_cosine_goes_from_peak_to_its_floor_and_warms_up_in_a_straight_line() -> None:
    config = OptimConfig(schedule="cosine", warmup_steps=4, min_lr_ratio=0.1)
    factors = [schedule_factor(config, step, 24) for step in range(25)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[14] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert factors[24] == pytest.approx(0.1)
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_wsd_is_flat_then_falls_over_its_last_steps() -> None:
    config = OptimConfig(schedule="wsd", decay_steps=5, min_lr_ratio=0.2)
    factors = [schedule_factor(config, step, 20) for step in range(20)]
    assert factors[:16] == [1.0] * 16
    assert factors[19] == pytest.approx(1.0 - 0.8 * 4 / 5)


def test_linear_hits_the_middle_halfway() -> None:
    assert schedule_factor(OptimConfig(schedule="linear"), 50, 100) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd"])
@settings(deadline=None)
@given(st.integers(0, 20), st.integers(1, 20), st.integers(0, 60), st.floats(0, 1))
def test_every_schedule_is_that_of_transformers_after_its_warm_up(
    schedule: str, warmup: int, decay: int, more: int, floor: float
) -> None:
    """Ours begins at peak / w where theirs begins at 0: a first step without effect is no warm-up."""
    floor = 0.0 if schedule == "constant" else floor
    steps = warmup + decay + more
    config = OptimConfig(
        schedule=schedule, warmup_steps=warmup, decay_steps=decay if schedule == "wsd" else 0, min_lr_ratio=floor
    )
    factors = [schedule_factor(config, step, steps) for step in range(steps)]
    assert factors[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = {
        "constant": lambda: transformers.get_constant_schedule_with_warmup(optimizer, warmup),
        "linear": lambda: transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps),
        "cosine": lambda: transformers.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, steps, min_lr_rate=floor
        ),
        "wsd": lambda: transformers.get_wsd_schedule(
            optimizer, warmup, decay, num_training_steps=steps, min_lr_ratio=floor, decay_type="linear"
        ),
    }[schedule]().lr_lambdas[0]
    expected = [theirs(step) for step in range(warmup, steps)]
    if schedule == "linear":  # theirs knows no floor
        expected = [floor + (1 - floor) * factor for factor in expected]
    np.testing.assert_allclose(factors[warmup:], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"warmup_steps": 11}, "warmup_steps is 11, more than train.steps 10"),
        ({"schedule": "wsd", "warmup_steps": 4, "decay_steps": 7}, "decay_steps is 7, with 4 of optim.warmup_steps"),
    ],
)
def test_a_schedule_longer_than_the_run_is_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_length(OptimConfig.model_validate(settings), 10)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"schedule": "wsd"}, "decay_steps"),
        ({"decay_steps": 3}, "wsd"),
        ({"min_lr_ratio": 0.1}, "min_lr_ratio"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": float("inf")}, "eps"),
        ({"grad_clip": float("inf")}, "grad_clip"),
        ({"lr": 1}, "lr"),
        ({"no_decay": ("norms",)}, r"no_decay: got \['norms'\] with weight_decay 0"),
        ({"no_decay": ("heads",), "weight_decay": 0.1}, "no_decay"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, object], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        OptimConfig.model_validate(settings)


def test_update_equals_torch_adamw_with_its_own_clipping() -> None:
    ours, theirs = small_model(), small_model()
    config = OptimConfig(learning_rate=0.01, weight_decay=0.1, grad_clip=0.5, warmup_steps=2)
    optimizer = Optimizer(ours.named_parameters(), config, total_steps=10)
    decayed = [p for p in theirs.parameters() if p.ndim >= 2]
    others = [p for p in theirs.parameters() if p.ndim < 2]
    reference = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01, betas=(0.9, 0.95)
    )
    for step in range(3):
        gradients_for(ours, step)
        gradients_for(theirs, step)
        norm = optimizer.step(step)
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in reference.param_groups:
            group["lr"] = 0.01 * min(1.0, (step + 1) / 2)
        reference.step()
        assert norm == pytest.approx(float(expected_norm), rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_muon_takes_hidden_matrices_and_adamw_the_rest() -> None:
    model = small_model()
    optimizer = Optimizer(model.named_parameters(), OptimConfig(name="muon"), total_steps=10)
    gradients_for(model, 0)
    optimizer.step(0)
    slots = set(optimizer.state()[0])
    assert "muon/hidden.weight/momentum_buffer" in slots
    assert {"adamw/embed.weight/exp_avg", "adamw/hidden.bias/exp_avg", "adamw/norm.weight/exp_avg_sq"} <= slots


def muon_by_definition(weight: np.ndarray, gradients: list[np.ndarray], rate: float, decay: float) -> np.ndarray:
    """https://kellerjordan.github.io/posts/muon with Nesterov's momentum, in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    momentum = np.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        x = 0.95 * momentum + 0.05 * gradient
        x = x / np.linalg.norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = a * x + b * gram @ x + c * gram @ gram @ x
        weight = weight - rate * decay * weight - rate * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5 * x
    return weight


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8), (1, 12), (12, 1)])
def test_muon_is_its_definition_and_torchs_up_to_bfloat16(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    start, *gradients = (rng.normal(size=shape) for _ in range(4))
    ends = []
    for kind in (Muon, torch.optim.Muon):
        weight = nn.Parameter(torch.tensor(start, dtype=torch.float32))
        optimizer = kind([weight], lr=0.1, weight_decay=0.2)
        for gradient in gradients:
            weight.grad = torch.tensor(gradient, dtype=torch.float32)
            optimizer.step()
        ends.append(weight.detach().double().numpy() - start)
    moved = muon_by_definition(start, gradients, 0.1, 0.2) - start
    assert np.linalg.norm(ends[0] - moved) < 1e-5 * np.linalg.norm(moved)
    assert np.linalg.norm(ends[1] - moved) < 3e-2 * np.linalg.norm(moved)


def test_muon_refuses_vectors_and_other_rates() -> None:
    with pytest.raises(ValueError, match="2D"):
        Muon([nn.Parameter(torch.zeros(3))])
    optimizer = Muon([nn.Parameter(torch.zeros(3, 3))], adjust_lr_fn="match_rms_adamw")
    with pytest.raises(ValueError, match="adjust_lr_fn: got 'match_rms_adamw', expected None"):
        optimizer.step()


@pytest.mark.parametrize("arch", ["qwen3", "qwen2", "gpt2", "mixtral", "mamba2", "bamba"])
@pytest.mark.parametrize("left", [(), ("norms",), ("biases",), ("embeddings",), ("norms", "biases", "embeddings")])
def test_weights_that_no_decay_names_are_left_alone(arch: str, left: tuple[str, ...]) -> None:
    """By what modules they belong to, not by name. Without a gradient's pull, decay is all that moves a weight."""
    model = tiny_model(arch)
    kinds: dict[str, str] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(prefix=prefix, recurse=False):
            if isinstance(module, nn.Embedding) or module is model.get_output_embeddings():
                kinds[attribute] = "embeddings"
            elif attribute.endswith("bias"):
                kinds[attribute] = "biases"
            else:
                kinds[attribute] = "norms" if parameter.ndim == 1 else "weights"
    config = OptimConfig(weight_decay=0.5, learning_rate=0.1, no_decay=left)
    optimizer = Optimizer(model.named_parameters(), config, 10)
    before = {}
    for name, parameter in model.named_parameters():
        parameter.data.add_(1.0)
        before[name] = parameter.detach().clone()
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0)
    for name, parameter in model.named_parameters():
        share = 1.0 if kinds[name] in left else 1.0 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), share * before[name], msg=f"{name}: {kinds[name]}")


@pytest.mark.slow
def test_small_updates_are_not_lost_where_the_arithmetic_is_bfloat16(tmp_path) -> None:
    """Weights in bfloat16 would round them away: its next number after 1 is 1.0078."""
    base = save_tiny(tmp_path, scale=2.0)
    grads, updates = [], []
    for dtype in ("float32", "bfloat16"):
        run = bare_run(
            base, student=load(StudentConfig(model=str(base), dtype=dtype), CPU), optim={"learning_rate": 1e-6}
        )
        before = [p.detach().clone() for p in run.student.model.parameters()]
        _, sums, _ = accumulate(run, scored_samples())
        assert sums["loss"] > 0
        grads.append(gradients(run))
        run.optimizer.step(0)
        after = [p.detach() for p in run.student.model.parameters()]
        updates.append(torch.cat([(p - b).reshape(-1) for p, b in zip(after, before, strict=True)]))
        assert {t.dtype for t in run.optimizer.state()[0].values()} == {torch.float32}
    assert 0.0 < relative(grads[1], grads[0]) < 0.05
    moved = updates[1][grads[1] != 0].abs()
    assert float((moved > 0).double().mean()) > 0.99
    assert float(moved.mean()) == pytest.approx(1e-6, rel=0.2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_updates_nothing(bad: float) -> None:
    model = small_model()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = Optimizer(model.named_parameters(), OptimConfig(), total_steps=10)
    gradients_for(model, 0)
    next(model.parameters()).grad[0, 0] = bad  # type: ignore[index]
    assert not math.isfinite(optimizer.step(0))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_restored_state_continues_bit_for_bit(name: str) -> None:
    config = OptimConfig.model_validate({"name": name, "learning_rate": 0.01, "schedule": "cosine"})
    straight, resumed = small_model(), small_model()
    first, second = (Optimizer(m.named_parameters(), config, 10) for m in (straight, resumed))
    for step in range(3):
        for model, optimizer in ((straight, first), (resumed, second)):
            gradients_for(model, step)
            optimizer.step(step)
    tensors, description = second.state()
    third = Optimizer(resumed.named_parameters(), config, 10)
    third.load_state({k: v.clone() for k, v in tensors.items()}, description)
    for model, optimizer in ((straight, first), (resumed, third)):
        gradients_for(model, 9)
        optimizer.step(3)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


def test_state_of_another_optimizer_or_model_is_refused() -> None:
    model = small_model()
    optimizer = Optimizer(model.named_parameters(), OptimConfig(), 10)
    with pytest.raises(ValueError, match="muon"):
        optimizer.load_state({}, {"optimizer": "muon", "parameters": []})
    with pytest.raises(ValueError, match="other parameters"):
        optimizer.load_state({}, {"optimizer": "adamw", "parameters": ["elsewhere"]})


def test_tied_parameters_count_once() -> None:
    model = small_model()
    named = [*model.named_parameters(), ("again.weight", model["embed"].weight)]  # type: ignore[index]
    assert "again.weight" not in Optimizer(named, OptimConfig(), 1).state()[1]["parameters"]
