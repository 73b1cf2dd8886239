"""The memory that --dry-run measures, against the formula printed beside it; and the shape of what it runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planned import run_of

from student_trainer import plan
from student_trainer.measure import measure, worst_case
from student_trainer.planning.asked import micro_batch_tokens

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", ["reverse_kl", "policy_gradient"])
def test_the_formula_is_near_what_is_measured(objective: str, checkpointing: bool) -> None:
    run = run_of(256, checkpointing=checkpointing, loss={"objective": objective})
    before = {name: p.clone() for name, p in run.student.model.named_parameters()}
    got = measure(run)
    assert (got.sequences, got.tokens) == (8, 200)  # 1700 tokens hold no ninth
    formula = plan.phases(run, 8 * 200)["learn"]
    expected = sum(formula[part] for part in ("gradients", "activations", "logits", "teacher scores"))
    assert got.num_bytes == pytest.approx(expected, rel=0.3)
    for name, parameter in run.student.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_more_sequences_take_more() -> None:
    few = measure(run_of(128, train={"micro_batch_tokens": 400, "loss_chunk_rows": 256}))
    many = measure(run_of(128, train={"micro_batch_tokens": 3200, "loss_chunk_rows": 256}))
    assert (few.sequences, many.sequences) == (2, 16)
    assert many.num_bytes > 3 * few.num_bytes


@pytest.mark.parametrize(
    ("train", "sequences"),
    [({"micro_batch_tokens": 10}, 1), ({"micro_batch_size": 3}, 3), ({"batch_size": 2}, 2)],
)
@pytest.mark.parametrize(
    ("top_k", "loss"),
    [(16, {"support": "union"}), ("all", {}), (16, {"support": "student"}), (16, {"objective": "policy_gradient"})],
)
def test_the_samples_are_the_longest_that_can_come_up(train: dict, sequences: int, top_k: Any, loss: dict) -> None:
    run = run_of(64, top_k=top_k, loss=loss, train=train)
    samples = worst_case(run)
    assert [len(s.rollout.prompt.token_ids) + s.rollout.num_tokens for s in samples] == [200] * sequences
    assert micro_batch_tokens(run.config, 200, 1) >= 200 * sequences
    assert measure(run).num_bytes > 0
