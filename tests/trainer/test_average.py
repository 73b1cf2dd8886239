"""The moving average of the weights, against its formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tinymodels import tiny_model

from student_trainer.average import averages, in_place_of
from student_trainer.optim import OptimConfig, Optimizer


def trained(model: Any, optimizer: Optimizer, steps: range) -> list[dict[str, torch.Tensor]]:
    """Weights after each step of made-up gradients."""
    found = []
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step(step)
        found.append({name: p.detach().double().clone() for name, p in model.named_parameters()})
    return found


def made(name: str = "adamw", decay: float = 0.75) -> tuple[Any, Optimizer]:
    model = tiny_model(seed=3)
    return model, Optimizer(model.named_parameters(), OptimConfig(name=name, learning_rate=0.01, ema_decay=decay), 10)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_average_is_the_weighted_sum_of_all_weights_so_far(name: str) -> None:
    """e_n = d^n w_0 + Σ_i (1 − d) d^(n−i) w_i, for every weight, whichever optimizer updates it."""
    model, optimizer = made(name)
    start = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    after = trained(model, optimizer, range(4))
    found = averages(optimizer.state()[0])
    assert found.keys() == start.keys()
    for n, value in found.items():
        expected = 0.75**4 * start[n] + sum(0.25 * 0.75 ** (3 - i) * w[n] for i, w in enumerate(after))
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
        assert value.dtype == torch.float32


def test_it_changes_nothing_of_the_training() -> None:
    plain, averaged = made(decay=0.0), made(decay=0.75)
    for a, b in zip(trained(*plain, range(3)), trained(*averaged, range(3)), strict=True):
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_it_goes_on_from_a_checkpoint_bit_for_bit_and_a_run_without_one_may_begin_there() -> None:
    model, optimizer = made()
    trained(model, optimizer, range(2))
    tensors, description = optimizer.state()
    saved, weights = {k: v.clone() for k, v in tensors.items()}, [p.detach().clone() for p in model.parameters()]
    trained(model, optimizer, range(2, 5))
    expected = averages(optimizer.state()[0])

    again, other = made()
    with torch.no_grad():
        for parameter, weight in zip(again.parameters(), weights, strict=True):
            parameter.copy_(weight)
    other.load_state(saved, description)
    trained(again, other, range(2, 5))
    found = averages(other.state()[0])
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    made(decay=0.0)[1].load_state(saved, description)


def test_a_skipped_step_is_not_averaged() -> None:
    model, optimizer = made()
    before = {n: v.clone() for n, v in averages(optimizer.state()[0]).items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step(0)
    assert all(torch.equal(v, before[n]) for n, v in averages(optimizer.state()[0]).items())


def test_a_model_has_the_average_for_a_while_and_tied_weights_stay_tied() -> None:
    model, optimizer = made()
    trained(model, optimizer, range(2))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    average = averages(optimizer.state()[0])
    with in_place_of(model, average):
        assert all(torch.equal(p, average[n]) for n, p in model.named_parameters())
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert any(not torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    with pytest.raises(ValueError, match="for example elsewhere"), in_place_of(model, {"elsewhere": weights}):
        pass
