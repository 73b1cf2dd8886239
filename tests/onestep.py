"""One training step without a teacher, for tests of steps and ranks: samples scored by another model, and what `learn`
takes of a Run.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from tinymodels import tiny_model

from student_trainer import guards
from student_trainer.config import StudentConfig, TrainConfig
from student_trainer.distributed import Distributed
from student_trainer.losses import build
from student_trainer.packing_check import applied
from student_trainer.parallel.base import Replicated
from student_trainer.student import Student, load
from student_trainer.types import Prompt, Rollout, ScoredRollout
from teacher_api.types import Scores

CPU = torch.device("cpu")
V, W = 120, 128
ALONE = Distributed(0, 1, 0, CPU)


def scored_samples() -> list[ScoredRollout]:
    """Seven samples of three prompts, lengths 1 to 9, scored over the whole vocabulary by another model in float64."""
    generator = np.random.Generator(np.random.Philox(1))
    teacher = tiny_model(seed=9, scale=2.0).double()
    student = tiny_model(seed=3, scale=2.0)
    scored = []
    for uid, length in enumerate([3, 1, 9, 4, 4, 2, 6]):
        prompt = Prompt(index=uid // 3, token_ids=np.arange(2 + uid // 3, 7, dtype=np.int32))
        tokens = generator.integers(2, V, length).astype(np.int32)
        full = torch.tensor([[*prompt.token_ids, *tokens]]).long()
        rows = slice(len(prompt.token_ids) - 1, -1)
        with torch.no_grad():
            log_p = teacher(full).logits[0, rows].log_softmax(-1)
            log_q = student(full).logits[0, rows].log_softmax(-1)
        at = torch.from_numpy(tokens).long()[:, None]
        scores = Scores(
            id=str(uid),
            positions=np.arange(len(prompt.token_ids), full.shape[1], dtype=np.int32),
            token_logprob=log_p.gather(1, at)[:, 0].float().numpy(),
            log_tail=log_p[:, V:].logsumexp(1).float().numpy(),
            topk_logprob=log_p[:, :V].float().numpy(),
        )
        own = log_q.gather(1, at)[:, 0].float().numpy()
        rollout = Rollout(uid, prompt, tokens, "length", behaviour_logprob=own, full_logprob=own)
        scored.append(ScoredRollout(rollout, scores))
    return scored


def bare_run(
    checkpoint: Path,
    dist: Distributed = ALONE,
    strategy: Replicated | None = None,
    student: Student | None = None,
    **sections: Any,
) -> Any:
    """What `learn` takes of a Run, without teacher, data and directory; `student` if it need not be loaded."""
    config = TrainConfig.model_validate(
        {
            "student": {"model": str(checkpoint)},
            "teacher": {"url": "grpc://unused:1", "top_k": "all"},
            "data": {"source": "unused"},
            **sections,
        }
    )
    student = student or applied(load(StudentConfig(model=str(checkpoint)), CPU), config)
    strategy = strategy or Replicated(dist)
    student = strategy.spread(student, config.optim, config.train.steps)
    return SimpleNamespace(
        config=config,
        dist=dist,
        student=student,
        objective=build(config.loss),
        strategy=strategy,
        optimizer=strategy.optimizer,
        bad_steps=guards.BadSteps(config.train.max_bad_steps),
        chunk_rows=config.train.loss_chunk_rows or 4096,
        step=0,
    )


def gradients(run: Any) -> torch.Tensor:
    return torch.cat([p.grad.reshape(-1) for p in run.student.model.parameters()]).double()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
