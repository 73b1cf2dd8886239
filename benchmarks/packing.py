"""`python -m benchmarks.packing`: tokens per second of learning from a batch of unlike lengths, padded, packed, and
under one dense mask; and from groups of completions with and without a shared prompt. Keys: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from benchmarks.models import make
from student_trainer import measure
from student_trainer.config import StudentConfig, TrainConfig
from student_trainer.distributed import Distributed
from student_trainer.losses import build
from student_trainer.packing import PADDED, Packing, Row
from student_trainer.packing_check import choose
from student_trainer.parallel.base import Replicated
from student_trainer.student import Student, load
from student_trainer.train import accumulate
from student_trainer.types import ScoredRollout

VOCABULARY, HIDDEN, LAYERS = 2_048, 256, 3
BUDGET = 4_096
SIGMA = 1.0  # of the logarithm of the completions' lengths
PROMPT, MEDIAN, LONGEST = 32, 96, 1_024
SEQUENCES = 24
GROUPS, MEMBERS, COMPLETION = 2, 8, 64
PROMPTS = (8, 64, 512)
CPU = torch.device("cpu")
PACKED, SHARED = Packing(packed=True), Packing(packed=True, shared=True, min_saved_tokens=0)


class DenseRow(Row):
    """A row as transformers packs by itself: positions that start again, and one mask of tokens × tokens."""

    def hidden(self, parts: Any, device: torch.device) -> torch.Tensor:
        ids, positions = (torch.from_numpy(x)[None].to(device) for x in (self.token_ids, self.positions))
        return parts.trunk(ids, None, positions)[0]  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class DenseStudent(Student):
    def hidden_rows(self, rollouts: Any) -> torch.Tensor:
        return DenseRow.of(rollouts, PACKED).hidden_rows(self.parts, self.device)


def seconds(student: Student, scored: list[ScoredRollout]) -> float:
    """CPU seconds of one forward and backward over all micro-batches, the loss included."""
    config = TrainConfig.model_validate(
        {
            "student": {"model": "unused"},
            "teacher": {"url": "grpc://unused:1"},
            "data": {"source": "unused"},
            "train": {"micro_batch_tokens": BUDGET},
        }
    )
    dist = Distributed(0, 1, 0, CPU)
    run: Any = SimpleNamespace(
        config=config, dist=dist, student=student, objective=build(config.loss), strategy=Replicated(dist),
        chunk_rows=1024,
    )  # fmt: skip
    started = time.process_time()
    accumulate(run, scored)
    taken = time.process_time() - started
    student.model.zero_grad()
    return taken


def turns(students: dict[str, Student], scored: list[ScoredRollout], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in turns, after one round to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in students}
    for number in range(rounds + 1):
        for name, student in students.items():
            got = seconds(student, scored)
            if number:
                taken[name].append(got)
    return taken


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def measured(rounds: int) -> dict[str, float]:
    needs = build(TrainConfig.model_fields["loss"].get_default(call_default_factory=True)).needs(64)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), vocabulary=VOCABULARY, hidden=HIDDEN, layers=LAYERS)
        student = load(StudentConfig(model=folder), CPU)
        dense = DenseStudent(**{f.name: getattr(load(StudentConfig(model=folder), CPU), f.name)
                                for f in dataclasses.fields(Student)})  # fmt: skip
    assert choose(student.model, student.parts, CPU, "on", "on") == SHARED
    padded, packed, shared = (dataclasses.replace(student, packing=p) for p in (PADDED, PACKED, SHARED))
    dense = dataclasses.replace(dense, packing=PACKED)

    draw = np.random.default_rng(0)
    lengths = np.minimum(np.exp(draw.normal(np.log(MEDIAN), SIGMA, SEQUENCES)).astype(int) + 1, LONGEST)
    scored = measure.made_up([(i, PROMPT, int(n)) for i, n in enumerate(lengths)], VOCABULARY, needs)
    taken = turns({"padded": padded, "packed": packed, "dense": dense}, scored, rounds)
    tokens = int(lengths.sum()) + PROMPT * SEQUENCES
    figures = {f"tokens_per_s_{name}": tokens / statistics.median(s) for name, s in taken.items()}
    figures |= {f"packed_vs_{name}": ratio(taken[name], taken["packed"]) for name in ("padded", "dense")}
    for prompt in PROMPTS:
        scored = measure.made_up(
            [(i // MEMBERS, prompt, COMPLETION) for i in range(GROUPS * MEMBERS)], VOCABULARY, needs
        )
        taken = turns({"packed": packed, "shared": shared}, scored, rounds)
        figures[f"shared_vs_packed_prompt_{prompt}"] = ratio(taken["packed"], taken["shared"])
    return {name: round(value, 3) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # CPU seconds are then those of the work
    figures = {**measured(arguments.rounds), "rounds": arguments.rounds}
    for name, value in figures.items():
        print(f"{name}: {value}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
