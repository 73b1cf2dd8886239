"""What planning and measuring take of a Run: a random model, made-up prompts, no teacher, data and directory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from student_trainer.config import StudentConfig, TrainConfig
from student_trainer.data import PromptSource
from student_trainer.distributed import Distributed
from student_trainer.losses import build
from student_trainer.parallel.base import Replicated
from student_trainer.student import Student, _prepare
from student_trainer.types import Prompt
from teacher_api import causal_lm

CPU = torch.device("cpu")


def run_of(
    hidden: int,
    *,
    layers: int = 4,
    vocabulary: int = 2000,
    checkpointing: bool = False,
    packing: Any = None,
    prompts: tuple[int, ...] = (28, 100),
    **sections: Any,
) -> Any:
    """Prompts of 100 and of 28 tokens, 100 new tokens."""
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
    shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "head_dim": 32, "vocab_size": vocabulary}
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64, "num_hidden_layers": layers}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**shape, **heads, max_position_embeddings=1024)).eval()
    _prepare(model, StudentConfig(model="unused", gradient_checkpointing=checkpointing))
    student = Student(model, range(vocabulary), causal_lm.split(model), CPU, (1,), 0, 1024, False)
    if packing is not None:
        import dataclasses

        student = dataclasses.replace(student, packing=packing)
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
        chunk_rows=config.train.loss_chunk_rows or 256,
        longest_tokens=max(prompts) + config.rollout.max_new_tokens,
        prompts=PromptSource([Prompt(i, np.full(n, i + 2, dtype=np.int32)) for i, n in enumerate(prompts)]),
        step=0,
    )
