"""The command on a tiny checkpoint: its accuracy equals a count by hand over transformers' greedy output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from ports import free_port
from tinymodels import save_tiny, tiny_model, tiny_tokenizer
from training import FORKS
from transformers import AutoModelForCausalLM

from student_trainer import eval_cli

pytestmark = pytest.mark.slow

QUESTIONS = ["fox", "dog 1", "lazy 2", "the quick", "brown 3 + 4"]


def first_greedy_token(question: str) -> int:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompt = tokenizer(question, return_tensors="pt").input_ids
    with torch.inference_mode():
        return int(model(prompt).logits[0, -1, : len(tokenizer)].argmax())


def test_accuracy_is_the_share_of_greedy_completions_that_match(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "model")
    tokens = [first_greedy_token(q) for q in QUESTIONS]  # each ends its completion: one token long
    texts = [tiny_tokenizer().decode([t]) for t in tokens]
    rows = [
        {"question": q, "answer": t if i != 2 else "wrong"}
        for i, (q, t) in enumerate(zip(QUESTIONS, texts, strict=True))
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = eval_cli.run(
        [
            "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data.jsonl"), "--task", "exact_match",
            "--max-new-tokens", "8", "--json", str(tmp_path / "out.json"), "device=cpu",
            f"rollout.stop_token_ids={tokens}",
        ]
    )  # fmt: skip
    result = json.loads((tmp_path / "out.json").read_text())
    assert code == 0
    assert [s["completion"] for s in result["samples"]] == texts
    assert [s["correct"] for s in result["samples"]] == [True, True, False, True, True]
    assert (result["num"], result["accuracy"]) == (5, 0.8)
    assert "80.0%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "x.jsonl"], "model is not set"),
        (["--model", "m"], "data.source is not set"),
        (["--model", "missing", "--data", "x.jsonl"], "missing"),
        (["--modle", "m"], "model"),
        (["--model", "m", "--data", "x.jsonl", "--tasks", "mmlu"], "data: set together with harness.tasks"),
        (["--model", "m", "--tasks", "mmlu", "--task", "exact_match"], "task: set together with harness.tasks"),
        (["--model", "m", "--data", "x.jsonl", "--num-fewshot", "5"], "harness: set without harness.tasks"),
        (["--model", "m", "--data", "x.jsonl", "--vllm.seed", "5"], "vllm: got {'seed': 5} with engine torch"),
        (["--model", "m", "--data", "x.jsonl", "--engine", "vllm", "--device", "cpu"], "expected auto: vLLM chooses"),
        (["--model", "m", "--data", "x.jsonl", "--seed=3"], "seed: got 3 with rollout.greedy"),
        (["--model", "m", "--data", "x.jsonl", "rollout.group_size=2"], "rollout.group_size: got 2, expected 1"),
        (["--model", "m", "--data", "x.jsonl", "--json", "nowhere/out.json"], "directory is not there"),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eval_cli.run(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


# -- who solves the problems


def problems(path: Path, tokenizer: Any, model: Path) -> list[int]:
    """Writes problems of which some are solved; tokens that end a completion, so that it is one token long."""
    reference = AutoModelForCausalLM.from_pretrained(model)
    rows, stops = [], set()
    for n, question in enumerate(QUESTIONS):
        with torch.inference_mode():
            logits = reference(tokenizer(question, return_tensors="pt").input_ids).logits[0, -1]
        token = int(logits[: len(tokenizer)].argmax())
        stops.add(token)
        rows.append({"question": question, "answer": "never said" if n % 2 else tokenizer.decode([token])})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return sorted(stops)


def test_an_id_that_the_tokenizer_has_not_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With either engine, and before that of vLLM is started."""
    model = save_tiny(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"question": "fox", "answer": "a"}\n')
    argv = ["--model", str(model), "--data", str(tmp_path / "data.jsonl"), "rollout.stop_token_ids=[120]"]
    for engine in (["device=cpu"], ["--engine=vllm"]):
        assert eval_cli.run([*argv, *engine]) == 2
        told = capsys.readouterr().err.splitlines()
        assert told[-1] == (
            "student-eval: rollout.stop_token_ids: got 120, expected ids from 0 to 119: the student's tokenizer has "
            "120 entries"
        )


def _share(rank: int, port: int, argv: list[str]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    raise SystemExit(eval_cli.run(argv))


def test_two_processes_share_the_problems_and_one_tells(tmp_path: Path) -> None:
    """Sampled, not greedy: a problem's random numbers are its own, whoever solves it."""
    model = save_tiny(tmp_path / "model")
    stops = problems(tmp_path / "data.jsonl", tiny_tokenizer(), model)
    argv = ["--model", str(model), "--data", str(tmp_path / "data.jsonl"), "--task", "exact_match", "--seed=3"]
    argv += ["rollout.greedy=false", "--max-new-tokens=6", f"rollout.stop_token_ids={stops}", "device=cpu", "--json"]
    assert eval_cli.run([*argv, str(tmp_path / "one.json")]) == 0
    assert FORKS.get_start_method() == "forkserver"
    arguments = (free_port(), [*argv, str(tmp_path / "two.json")])
    multiprocessing.start_processes(_share, arguments, nprocs=2, start_method="forkserver")
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two
    assert one["num"] == len(QUESTIONS)


@pytest.mark.vllm
def test_vllm_finds_what_the_sampler_finds(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    heads = {
        "head_dim": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }  # vLLM's kernels on CPUs know 32 and more
    model = save_tiny(tmp_path / "model", **heads, scale=3.0)
    stops = problems(tmp_path / "data.jsonl", tiny_tokenizer(), model)
    argv = ["--model", str(model), "--data", str(tmp_path / "data.jsonl"), "--task", "exact_match"]
    argv += ["--max-new-tokens=6", f"rollout.stop_token_ids={stops[:3]}", "--json"]
    assert eval_cli.run([*argv, str(tmp_path / "torch.json"), "--device=cpu"]) == 0
    engine = ["--engine", "vllm", "--vllm.enforce_eager", "true", "--vllm.max_model_len", "64"]
    command = [sys.executable, "-m", "student_trainer.eval_cli", *argv, str(tmp_path / "vllm.json"), *engine]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ours, theirs = (json.loads((tmp_path / name).read_text()) for name in ("torch.json", "vllm.json"))
    assert theirs == ours
    assert 0 < ours["accuracy"] < 1
