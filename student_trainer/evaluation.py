"""Evaluation while a run goes on: the problems, who solves them (each process its share, or an engine of vLLM in a
process of its own), and what it gives. Changes nothing of the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from student_trainer import checkpoint, launch
from student_trainer.config import TrainConfig
from student_trainer.data import load_prompts
from student_trainer.distributed import Distributed
from student_trainer.evaluate import NO_ANSWER, EvalResult, Judged, in_order, judged, summarise, unanswered
from student_trainer.parallel.base import Replicated
from student_trainer.rollout.base import RolloutEngine, RolloutError
from student_trainer.rollout.chat import Chat
from student_trainer.rollout.vllm_engine import refuse_unfit_for_vllm
from student_trainer.student import Student, room_for
from student_trainer.types import Prompt

FOLDER = ".evaluating"
"""In the output directory: the weights that an engine of its own evaluates, and what it found."""


@dataclass(frozen=True, slots=True)
class Evaluator:
    """What `eval` says, on one process of a run."""

    config: TrainConfig
    dist: Distributed
    student: Student
    prompts: Sequence[Prompt]
    sampler: RolloutEngine

    def due(self, step: int) -> bool:
        every = self.config.eval.every
        return bool(every) and (step % every == 0 or step == self.config.train.steps)

    def result(self, strategy: Replicated, undivided: contextlib.AbstractContextManager[None]) -> EvalResult:
        """Accuracy of the weights as they are; the same on every process, all of which must call it.

        Args:
            undivided: Run.whole_or_not_at_all(), in which the problems are solved.
        """
        if self.config.eval.engine == "vllm":
            found: EvalResult | None = None
            with strategy.whole(main_only=True, on_host=True), undivided:
                if self.dist.is_main:
                    found = self._solved_by_vllm()
            results: list[EvalResult] = [result for result in self.dist.gather(found) if result is not None]
            return results[0]
        with strategy.whole(), undivided:
            mine = self._own_share()
        return summarise(in_order(self.dist.gather(mine)))

    def _own_share(self) -> list[Judged]:
        places = [place for place in range(len(self.prompts)) if self.dist.owns(place)]
        with self.student.arithmetic():
            return list(judged(self.sampler, self.prompts, places, self.config.eval.task, decode=self._decode))

    def _solved_by_vllm(self) -> EvalResult:
        """Writes the weights and has `student-eval --engine vllm` solve the problems.

        Raises:
            RolloutError: it failed; its own line of cause is on standard error.
        """
        folder = Path(self.config.train.output_dir) / FOLDER
        try:
            model = self.student.exports()[""]
            checkpoint.export(folder / "student", model=model, tokenizer=self.student.tokenizer)
            settings, output = folder / "settings.yaml", folder / "result.json"
            settings.write_text(yaml.safe_dump(_command(self.config, folder / "student", output)))
            code = launch.run_child([sys.executable, "-m", "student_trainer.eval_cli", "--config", str(settings)])
            if code:
                raise RolloutError(f"student-eval --engine vllm ended with code {code} (eval.engine is vllm)")
            result = json.loads(output.read_text())
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return EvalResult(result["accuracy"], result["low"], result["high"], result["num"])

    def _decode(self, token_ids: Sequence[int]) -> str:
        return str(self.student.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def _command(config: TrainConfig, model: Path, output: Path) -> dict[str, Any]:
    """The configuration of student-eval that asks what `eval` asks."""
    assert config.eval.data is not None, "load_problems refuses it"
    limits = [n for n in (config.eval.num_prompts, config.eval.data.limit) if n is not None]
    return {
        "model": str(model),
        "dtype": config.student.dtype,
        "data": {**config.eval.data.model_dump(mode="json", exclude_defaults=True), "limit": min(limits)},
        "rollout": {
            "max_new_tokens": config.eval.max_new_tokens or config.rollout.max_new_tokens,
            "stop_token_ids": list(config.rollout.stop_token_ids),
            **config.rollout.conversation,
        },
        "task": config.eval.task,
        "engine": "vllm",
        "vllm": config.eval.vllm,
        "output": os.fspath(output),
    }


def sampling_changes(config: TrainConfig) -> dict[str, Any]:
    """What an evaluation samples otherwise than training: greedily, and as long as it says."""
    changes: dict[str, Any] = {"greedy": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    if config.eval.max_new_tokens:
        changes["max_new_tokens"] = config.eval.max_new_tokens
    return changes


def load_problems(config: TrainConfig, student: Student) -> Sequence[Prompt]:
    """The prompts of `eval.data`; none where nothing is evaluated.

    Raises:
        ValueError: there is no data, a problem has no answer or an empty one, the student has no positions for it, or
            vLLM can't have the student.
    """
    if not config.eval.every:
        return ()
    if config.eval.data is None:
        raise ValueError("eval.every is set, but eval.data is not: name problems with answers (eval.data.source)")
    if config.eval.engine == "vllm":
        refuse_unfit_for_vllm(config, student, "eval.engine")
    source = load_prompts(config.eval.data, student.tokenizer, limit=config.eval.num_prompts)
    prompts = source.all()
    without = unanswered(prompts, config.eval.task)
    if without:
        raise ValueError(
            f"eval.data: {len(without)} of {len(prompts)} problems have {NO_ANSWER[config.eval.task]}, the first is "
            f"row {without[0]}"
        )
    sampling = config.rollout.model_copy(update=sampling_changes(config))
    if sampling.environment:
        chat = Chat(student.tokenizer, student.eos_token_ids)
        for prompt in prompts:
            chat.check(prompt)
    key = "rollout.max_total_tokens" if sampling.environment else "eval.max_new_tokens"
    room_for(source.longest.prompt, sampling.longest_completion, student, key, "eval.data.max_prompt_tokens")
    return prompts
