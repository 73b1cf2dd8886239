"""The memory that --dry-run measures, against the formula printed beside it; and the shape of what it runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from student_trainer import plan
from student_trainer.config import StudentConfig, TrainConfig
from student_trainer.data import PromptSource
from student_trainer.distributed import Distributed
from student_trainer.losses import build
from student_trainer.measure import measure, worst_case
from student_trainer.parallel.base import Replicated
from student_trainer.student import Student, _prepare
from student_trainer.types import Prompt
from teacher_api import causal_lm

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
VOCABULARY = 2000


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_of(hidden: int, *, checkpointing: bool = False, **sections: Any) -> Any:
    """What measuring takes of a Run: a random model, prompts of 100 and of 28 tokens, 100 new tokens."""
    config = TrainConfig.model_validate(
        {
            "student": {"model": "unused", "gradient_checkpointing": checkpointing},
            "teacher": {"url": "grpc://unused:1", "top_k": sections.pop("top_k", 16)},
            "data": {"source": "unused"},
            "rollout": {"max_new_tokens": 100},
            "train": {"micro_batch_tokens": 1700, "loss_chunk_rows": 256},
            **sections,
        }
    )
    shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "head_dim": 32, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64, "num_hidden_layers": 4}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, **heads, max_position_embeddings=256)).eval()
    _prepare(model, StudentConfig(model="unused", gradient_checkpointing=checkpointing))
    student = Student(model, range(VOCABULARY), causal_lm.split(model), CPU, (1,), 0, 256, False)
    objective = build(config.loss)
    dist = Distributed(0, 1, 0, CPU)
    strategy = Replicated(dist)
    strategy.spread(student, config.optim, config.train.steps)
    return SimpleNamespace(
        config=config,
        dist=dist,
        student=student,
        objective=objective,
        needs=objective.needs(config.teacher.top_k),
        strategy=strategy,
        optimizer=strategy.optimizer,
        chunk_rows=256,
        longest_tokens=200,
        prompts=PromptSource([Prompt(i, np.ones(n, dtype=np.int32)) for i, n in enumerate((28, 100))]),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objective", ["reverse_kl", "policy_gradient"])
def test_the_formula_is_near_what_is_measured(objective: str, checkpointing: bool) -> None:
    run = run_of(256, checkpointing=checkpointing, loss={"objective": objective})
    before = {name: p.clone() for name, p in run.student.model.named_parameters()}
    got = measure(run)
    assert (got.sequences, got.tokens) == (8, 200)  # 1700 tokens hold no ninth
    formula = plan.memory(run, 8 * 200)
    expected = formula["gradients"] + formula["activations"] + formula["logits"] + formula["teacher_scores"]
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
    assert plan.micro_batch_tokens(run) >= 200 * sequences
    assert measure(run).num_bytes > 0
