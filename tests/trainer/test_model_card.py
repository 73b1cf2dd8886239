"""The card says who taught whom and how it went, in YAML and tables that parse; nothing of a licence or of places."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from student_trainer import model_card
from student_trainer.config import TrainConfig
from teacher_api.types import TeacherInfo

TEACHER = TeacherInfo(
    fingerprint="f00dcafe",
    model_name="big|teacher",
    tokenizer_fingerprint="beef",
    tokenizer_size=10,
    logit_width=12,
    max_sequence_tokens=64,
    max_top_k=8,
    max_candidates=8,
    max_completions=8,
    max_request_bytes=1,
    max_response_bytes=1,
    engine="torch",
    scoring_path="embedded",
)
LINES = [
    {"step": step, "loss": 1 / step, "delta": None, "grad_norm": 0.5, "total_tokens": 10.0 * step}
    for step in range(1, 41)
] + [{"step": step, "eval_accuracy": step / 100, "eval_low": 0.0, "eval_high": 1.0} for step in (0, 20, 40)]


def card(student: str, key: str = "a-secret") -> str:
    config = TrainConfig.model_validate(
        {
            "student": {"model": student},
            "teacher": {"url": "grpc://inside.example:1", "api_key": key},
            "data": {"source": "prompts.jsonl"},
            "train": {"output_dir": "/home/somebody/runs/maths"},
            "optim": {"learning_rate": 3e-5},
        }
    )
    return model_card.render(config, {"": TEACHER}, LINES)


@pytest.mark.parametrize(
    ("fraction", "says", "tags"),
    [
        (1.0, "distilled on-policy: it wrote", ["distillation", "on-policy-distillation"]),
        (0.25, "that it wrote itself (a share of 0.25) and on given text", ["distillation", "on-policy-distillation"]),
        (0.0, "distilled on given text", ["distillation"]),
    ],
)
def test_the_card_says_whose_text_it_learned_from(fraction: float, says: str, tags: list[str]) -> None:
    data = {"source": "prompts.jsonl", "on_policy_fraction": fraction}
    config = TrainConfig.model_validate({"student": {"model": "s"}, "teacher": {"url": "grpc://t:1"}, "data": data})
    text = model_card.render(config, {"": TEACHER}, LINES)
    assert says in text
    assert ("it wrote" in text) == (fraction > 0)
    assert yaml.safe_load(text.split("---\n")[1])["tags"] == tags


def table_after(text: str, heading: str) -> list[list[str]]:
    rows = re.search(rf"## {heading}\n\n(?:[^|\n].*\n\n)?((?:\|.*\n)+)", text)
    assert rows is not None
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1].splitlines()]


def test_the_card_names_teacher_configuration_and_curves() -> None:
    text = card("org/small")
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["base_model"] == "org/small"
    assert "license" not in header
    assert "# maths\n" in text
    for said in ("`f00dcafe`", "`beef`", r"`big\|teacher`", "| Completion tokens trained on | 400 |"):
        assert said in text
    settings = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert settings["optim.learning_rate"] == 3e-5
    assert settings["data.source"] == "prompts.jsonl"
    training = table_after(text, "Training")
    assert training[0] == ["step", "loss", "grad_norm"]  # a metric that is null throughout is left out
    assert [row[0] for row in training[2:]][:: len(training) - 3] == ["1", "40"]
    assert len(training) == 2 + 12
    assert training[2][1] == "1"
    assert [row[:2] for row in table_after(text, "Evaluation")[2:]] == [["0", "0"], ["20", "0.2"], ["40", "0.4"]]


def test_the_card_keeps_keys_and_places_to_itself(tmp_path: Path) -> None:
    text = card(str(tmp_path))
    assert "base_model" not in yaml.safe_load(text.split("---\n")[1])
    for private in ("a-secret", "inside.example", "/home/somebody"):
        assert private not in text
