"""Steps of TRL's server-distillation trainer, timed. Runs in the environment of `make interop`, with nothing of this
project in sight; `python -m benchmarks.pipeline` calls it. The trainer is TRL's own: what is added looks at the clock.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer

PARTS = {"generate": "_prepare_inputs", "teacher": "_get_teacher_token_logprobs_from_server"}
"""Of a step, the trainer's methods that make them up; forward, backward and the optimizer's step are the rest."""


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds of each step, from its first line to the end of the optimizer's step, and of its parts."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._started = 0.0

    def timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = method(*arguments, **named)
            self._parts[name] += time.perf_counter() - started
            return result

        return call

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        step = time.perf_counter() - self._started
        self.steps.append({"step": step, **self._parts, "learn": step - sum(self._parts.values())})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher-url", required=True, help="a server with vLLM's API, without /v1")
    parser.add_argument("--student", required=True, help="checkpoint with the teacher's tokenizer")
    parser.add_argument("--prompts", required=True, help="JSON lines with `prompt`")
    parser.add_argument("--output", type=Path, required=True, help="file for the steps, as JSON")
    parser.add_argument("--settings", type=json.loads, required=True, help="of ServerDistillationConfig, as JSON")
    arguments = parser.parse_args()
    trainer = ServerDistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.student, dtype=torch.float32),
        args=ServerDistillationConfig(
            output_dir=str(arguments.output.parent / "trl"),
            teacher_model_server_url=arguments.teacher_url,
            **arguments.settings,
        ),
        train_dataset=load_dataset("json", data_files=arguments.prompts, split="train"),
        processing_class=AutoTokenizer.from_pretrained(arguments.student),
    )
    clock = Clock()
    trainer.add_callback(clock)
    for name, method in PARTS.items():
        setattr(trainer, method, clock.timed(name, getattr(trainer, method)))
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, entry in zip(clock.steps, logged, strict=True):
        step["loss"] = entry["loss"]
        step["tokens"] = entry["completions/mean_length"] * arguments.settings["per_device_train_batch_size"]
    arguments.output.write_text(json.dumps(clock.steps))


if __name__ == "__main__":
    main()
