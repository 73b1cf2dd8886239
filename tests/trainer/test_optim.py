"""Schedules by their definition; updates equal to torch.optim used directly; state survives a save."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from student_trainer.optim import OptimConfig, Optimizer, schedule_factor


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


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"schedule": "wsd"}, "decay_steps"),
        ({"decay_steps": 3}, "wsd"),
        ({"min_lr_ratio": 0.1}, "min_lr_ratio"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"lr": 1}, "lr"),
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
