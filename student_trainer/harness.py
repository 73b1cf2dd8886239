"""lm-evaluation-harness on a loaded student: `student-eval --tasks mmlu,…`. The only module that imports lm_eval."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor

from student_trainer.distributed import Distributed
from student_trainer.student import Student
from teacher_api.settings import Section

Z_95 = 1.959964
"""Half the width of a 95 % interval, in standard errors."""
NOT_INSTALLED = "harness.tasks: lm-evaluation-harness is not installed; install preceptor[eval]"


class HarnessConfig(Section):
    """Tasks of lm-evaluation-harness."""

    tasks: tuple[str, ...] = ()
    """Its names (mmlu, gsm8k, arc_easy, …), with commas between them or repeated; a group counts as one."""
    include_path: str = ""
    """Directory of task files (YAML) of your own, beside those that the harness brings. They may name local data, and
    are then evaluated without a network."""
    num_fewshot: int | None = Field(None, ge=0)
    """Worked examples before each question; unset: as the task says."""
    limit: int | None = Field(None, ge=1)
    """Only the first so many questions of each task; unset: all."""
    batch_size: int = Field(8, ge=1)
    """Sequences of one forward pass."""
    apply_chat_template: bool = False
    """Put the questions as a user's turns of the tokenizer's chat template."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _between_commas(cls, value: Any) -> Any:
        listed = [value] if isinstance(value, str) else value
        if not isinstance(listed, list | tuple) or not all(isinstance(part, str) for part in listed):
            return value
        return tuple(name for part in listed for name in (piece.strip() for piece in part.split(",")) if name)


@dataclass(frozen=True, slots=True)
class Found:
    """One metric of one task, with its 95 % interval where the harness gives a standard error."""

    task: str
    metric: str
    value: float
    low: float | None
    high: float | None
    num: int  # questions


def evaluate(student: Student, config: HarnessConfig, seed: int, dist: Distributed) -> list[Found]:
    """Runs the tasks, each rank its share of the questions; what was found, in the harness's own order, on the main
    rank, nothing on the others.

    Args:
        seed: of the worked examples that are drawn.

    Raises:
        ValueError: it is not installed, does not know a task, or its data can't be read; in one line.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"{NOT_INSTALLED} ({error})") from error
    if config.include_path and not Path(config.include_path).is_dir():
        raise ValueError(f"harness.include_path: got {config.include_path!r}, expected a directory of task files")
    if config.apply_chat_template and not getattr(student.tokenizer, "chat_template", None):
        raise ValueError("harness.apply_chat_template: got true, but the tokenizer has no chat template")
    with _quiet():
        # Reading the harness's thousands of task files takes seconds; one's own may be all that is asked for.
        manager = TaskManager(include_path=config.include_path, include_defaults=False) if config.include_path else None
        if manager is None or not set(config.tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=config.include_path or None)
        unknown = [name for name in config.tasks if name not in manager.all_tasks]
        if unknown:
            raise ValueError(
                f"harness.tasks: got {', '.join(unknown)}, expected names of lm-evaluation-harness"
                + (f" or of tasks in {config.include_path}" if config.include_path else "")
            )
        model = HFLM(
            pretrained=student.model,
            tokenizer=student.tokenizer,
            batch_size=config.batch_size,
            device=str(student.device),
            max_length=student.max_tokens or None,
        )
        if dist.world > 1:
            model._rank, model._world_size, model.accelerator = dist.rank, dist.world, _Ranks(dist)
        try:
            with student.arithmetic():
                results = lm_eval.simple_evaluate(
                    model=model,
                    tasks=list(config.tasks),
                    num_fewshot=config.num_fewshot,
                    limit=config.limit,
                    apply_chat_template=config.apply_chat_template,
                    task_manager=manager,
                    log_samples=False,
                    random_seed=seed,
                    numpy_random_seed=seed,
                    torch_random_seed=seed,
                    fewshot_random_seed=seed,
                )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"harness.tasks: {' '.join(str(error).split())[:300]}") from error
    return [] if results is None else _found(results)


def _found(results: Any) -> list[Found]:
    """`results["results"]` has `metric,filter` beside `metric_stderr,filter`; a standard error may be "N/A"."""
    found = []
    for task, values in results["results"].items():
        num = int(results["n-samples"].get(task, {}).get("effective", values.get("sample_len", 0)) or 0)
        for key, value in values.items():
            metric, _, rule = key.partition(",")
            if not rule or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{rule}")
            half = Z_95 * error if isinstance(error, int | float) else None
            name = metric if rule == "none" else f"{metric} ({rule})"
            low, high = (None, None) if half is None else (value - half, value + half)
            found.append(Found(task, name, float(value), low, high, num))
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness's own notes left out; its progress bars stay."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Ranks:
    """What its model asks of accelerate, answered by our process group."""

    def __init__(self, dist: Distributed) -> None:
        self._dist = dist

    def gather(self, tensor: Tensor) -> Tensor:
        return torch.cat([one.reshape(-1) for one in self._dist.gather(tensor.cpu())])

    def wait_for_everyone(self) -> None:
        self._dist.barrier()

    def unwrap_model(self, model: Any) -> Any:
        return model
