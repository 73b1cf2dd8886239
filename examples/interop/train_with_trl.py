"""TRL's own server-distillation trainer, as its documentation has it: nothing here knows whose server answers. Runs in
the environment of `make interop`; `python -m examples.interop.distillation` calls it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.server_distillation import ServerDistillationConfig, ServerDistillationTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    teacher = parser.add_mutually_exclusive_group(required=True)
    teacher.add_argument("--teacher-url", help="a server with vLLM's API, without /v1")
    teacher.add_argument(
        "--teacher-model", help="a checkpoint, loaded into this process: the loss of the whole vocabulary"
    )
    parser.add_argument("--student", required=True, help="checkpoint with the teacher's tokenizer")
    parser.add_argument("--prompts", required=True, help="JSON lines with `prompt`")
    parser.add_argument("--output", type=Path, required=True, help="folder; losses.json is written there")
    parser.add_argument("--beta", type=float, default=0.0, help="0: forward KL; 1: reverse KL")
    parser.add_argument("--top-k", type=int, default=16, help="of a server teacher; 1 with --beta above 0")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    settings: dict[str, Any] = {
        "output_dir": str(arguments.output / "trl"),
        "beta": arguments.beta,
        "max_steps": arguments.steps,
        "seed": arguments.seed,
        "per_device_train_batch_size": 8,
        "max_completion_length": 32,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
    }
    common: dict[str, Any] = {
        "model": AutoModelForCausalLM.from_pretrained(arguments.student, dtype=torch.float32),
        "train_dataset": load_dataset("json", data_files=arguments.prompts, split="train"),
        "processing_class": AutoTokenizer.from_pretrained(arguments.student),
    }
    if arguments.teacher_url:
        trainer = ServerDistillationTrainer(
            args=ServerDistillationConfig(
                teacher_model_server_url=arguments.teacher_url, loss_top_k=arguments.top_k, **settings
            ),
            **common,
        )
    else:
        in_process = AutoModelForCausalLM.from_pretrained(arguments.teacher_model, dtype=torch.float32)
        trainer = DistillationTrainer(teacher_model=in_process, args=DistillationConfig(**settings), **common)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (arguments.output / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
