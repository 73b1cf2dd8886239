"""Whole runs of students of every form against a real `teacher-serve`, from the shipped recipes where there is one,
with nothing but their scale changed: killed and gone on with, they end with the bits of a run left alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tinymodels import save_tiny
from training import PROMPTS, TeacherProcess, assert_same_bits, finish, metrics, trainer, wait_until
from transformers import AutoModelForCausalLM

from student_trainer import cli, eval_cli
from student_trainer.config import StudentConfig
from student_trainer.student import load

# Runs in this process leave gRPC's threads behind; its handlers must not run when a later test starts processes.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parents[2] / "recipes"
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
IDS = torch.arange(3, 40)[None]
CPU = torch.device("cpu")
SCALE = [
    "--steps=6",
    "train.batch_size=4",
    "train.micro_batch_tokens=64",
    "train.num_processes=1",
    "train.strategy=auto",
    "train.reference=true",
    "student.device=cpu",
    "checkpoint.save_every=1",
    "tracking.trackers=[]",
    "tracking.wandb_mode=offline",
    "tracking.samples_every=0",
]
SAMPLED = ["rollout.max_new_tokens=8", "teacher.top_k=8", "optim.learning_rate=0.002"]
FORMS: dict[str, tuple[str, list[str]]] = {
    "lora": (
        "qwen3",
        [
            f"--config={RECIPES / 's3-lora-1.7b.yaml'}",
            "data.source={place}/turns.jsonl",
            "rollout.max_new_tokens=8",
            "data.max_prompt_tokens=100",
            "optim.warmup_steps=1",
            "student.lora.r=4",
            "student.lora.alpha=8",
            "student.lora.dropout=0.1",
        ],
    ),
    "hybrid": (
        "mamba2",
        [
            f"--config={RECIPES / 's4-hybrid.yaml'}",
            "teacher.model=",
            "teacher.serve_args=[]",
            "teacher.visible_devices=",
            "teacher.top_k=8",
            "data.source={place}/texts.jsonl",
            "data.seq_length=24",
            "optim.warmup_steps=1",
            "optim.decay_steps=2",
            "student.layers_from_teacher=[1]",
            "student.graft_from={place}/teacher",
            "student.freeze=[replaced_layers]",  # a Mamba2 model has no feed-forward blocks of its own
        ],
    ),
    "mamba2": ("mamba2", ["--prompts={place}/prompts.txt", *SAMPLED]),
    "bamba": ("bamba", ["--prompts={place}/prompts.txt", "student.gradient_checkpointing=true", *SAMPLED]),
    "graft": (
        "bamba",
        [
            "--prompts={place}/prompts.txt",
            *SAMPLED,
            "student.layers_from_teacher=[0]",
            "student.graft_from={place}/teacher",
            "student.freeze=[mlp]",
        ],
    ),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "teacher", seed=1, scale=2.5)
    for arch in ("qwen3", "mamba2", "bamba"):
        save_tiny(place / arch, arch, seed=2, scale=2.0)
        (place / arch / "chat_template.jinja").write_text(CHAT)
    turns = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "the dog"}]}
        for text in PROMPTS
    ]
    (place / "turns.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    texts = [{"text": f"{a} {b} {c}"} for a in PROMPTS for b in PROMPTS for c in PROMPTS[:3]]
    (place / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    problems = [{"question": text, "answer": "never said"} for text in PROMPTS[:3]]
    (place / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    return place


@pytest.fixture(scope="module")
def teacher(place) -> Iterator[TeacherProcess]:
    served = TeacherProcess(place / "serve", place / "teacher", "--reference", "--max-top-k=32")
    try:
        yield served.start()
    finally:
        served.stop()


@pytest.fixture(autouse=True)
def _own_torch_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("form", [*list(FORMS)[:-1], pytest.param("graft", marks=pytest.mark.long)])
def test_t2_a_killed_run_ends_with_the_bits_of_one_left_alone(form: str, place, teacher, tmp_path, monkeypatch) -> None:
    arch, settings = FORMS[form]

    def command(run_dir: Path) -> list[str]:
        more = [argument.format(place=place) for argument in settings]
        return [*more, f"--student={place / arch}", f"--teacher-url={teacher.url}", f"--output-dir={run_dir}", *SCALE]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert cli.run(command(whole)) == 0
    assert len(metrics(whole)) == 6
    log = tmp_path / "log"
    process = trainer(command(killed), log)
    second = killed / "checkpoints" / "step-00000002"
    wait_until(lambda: second.exists() or process.exitcode is not None, what="the second checkpoint")
    process.kill()
    finish(process, log)
    assert second.exists(), log.read_text()
    assert not (killed / "final").exists(), "it was to be killed before its end"
    assert cli.run(command(killed)) == 0
    assert_same_bits(whole / "final", killed / "final")
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [line[name] for line in metrics(whole)] == [line[name] for line in metrics(killed)]
    if form == "lora":
        assert_same_adapters(whole, killed, place / arch)
    else:
        assert_same_bits(whole / "final", killed / "checkpoints" / "step-00000006")
    checkpoint = str(killed / "checkpoints" / "step-00000006")
    evaluated = [f"--model={checkpoint}", f"--data={place / 'problems.jsonl'}", "--max-new-tokens=4", "device=cpu"]
    assert eval_cli.run([*evaluated, "task=exact_match"]) == 0
    student = load(StudentConfig(model=str(killed / "final")), CPU)
    assert torch.isfinite(logits(student.model)).all()
    if form in ("mamba2", "bamba"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(killed / "final")), logits(student.model))


def assert_same_adapters(whole: Path, killed: Path, base: Path) -> None:
    """Those of both runs are equal, and give in plain peft what the merged weights give in plain transformers."""
    a, b = ((d / "final-adapter" / "adapter_model.safetensors").read_bytes() for d in (whole, killed))
    assert a == b
    merged = AutoModelForCausalLM.from_pretrained(whole / "final")
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    adapted = logits(peft.PeftModel.from_pretrained(plain, whole / "final-adapter"))
    torch.testing.assert_close(logits(merged), adapted, atol=1e-5, rtol=1e-5)
    assert float((adapted - before).abs().max()) > 1e-5
