"""The command on a tiny checkpoint: its accuracy equals a count by hand over transformers' greedy output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tinymodels import save_tiny, tiny_model, tiny_tokenizer

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
