"""lm-evaluation-harness through `student-eval --tasks`: on local tasks and without a network it finds what a float64
forward gives; on two processes the same.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from ports import free_port
from tinymodels import save_tiny
from training import FORKS
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer import eval_cli
from student_trainer.harness import HarnessConfig

pytestmark = pytest.mark.slow

TASK = """\
task: animals
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""
CHOICES = ["fox", "dog", "lazy 1", "brown"]
NUM = 9


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("harness")
    save_tiny(place / "model", scale=2.0)
    rows = [
        {"question": f"the quick {n} + {n * 7 % 10} = ?", "choices": CHOICES, "label": n % len(CHOICES)}
        for n in range(NUM)
    ]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "tasks").mkdir()
    (place / "tasks" / "animals.yaml").write_text(TASK.format(data=json.dumps(str(place / "rows.jsonl"))))
    return place


def command(place: Path, output: Path, *more: str) -> list[str]:
    return [
        "--model", str(place / "model"), "--tasks", "animals", "--include-path", str(place / "tasks"),
        "--json", str(output), "device=cpu", *more,
    ]  # fmt: skip


def expected_accuracy(place: Path) -> float:
    """By definition: the choice of highest log p(" choice" | question), in float64."""
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    right = []
    for line in (place / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        values = []
        for choice in row["choices"]:
            whole = tokenizer(f"{row['question']} {choice}")["input_ids"]
            start = len(tokenizer(row["question"])["input_ids"])
            with torch.inference_mode():
                log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            values.append(sum(float(log_p[t - 1, whole[t]]) for t in range(start, len(whole))))
        right.append(values.index(max(values)) == row["label"])
    return sum(right) / len(right)


def _share(rank: int, port: int, argv: list[str]) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if eval_cli.run(argv):
        raise SystemExit(1)


@pytest.fixture(scope="module")
def found(place: Path) -> dict[str, object]:
    assert eval_cli.run(command(place, place / "one.json")) == 0
    return json.loads((place / "one.json").read_text())


def test_the_harness_finds_what_a_float64_forward_gives(place: Path, found: dict[str, object]) -> None:
    accuracy = expected_accuracy(place)
    assert 0 < accuracy < 1
    error = math.sqrt(accuracy * (1 - accuracy) / (NUM - 1))
    assert found["tasks"] == [
        {
            "task": "animals",
            "metric": "acc",
            "value": pytest.approx(accuracy),
            "low": pytest.approx(accuracy - 1.959964 * error),
            "high": pytest.approx(accuracy + 1.959964 * error),
            "num": NUM,
        }
    ]


@pytest.mark.long
def test_two_processes_share_the_questions_and_find_the_same(place: Path, found: dict[str, object]) -> None:
    assert FORKS.get_start_method() == "forkserver"
    argv = command(place, place / "two.json")
    multiprocessing.start_processes(_share, (free_port(), argv), nprocs=2, start_method="forkserver")
    assert json.loads((place / "two.json").read_text())["tasks"] == found["tasks"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        pytest.param(
            ["--tasks", "animls"],
            "got animls, expected names of lm-evaluation-harness or of tasks in",
            marks=pytest.mark.long,  # reads all the harness's task files
        ),
        (["harness.apply_chat_template=true"], "the tokenizer has no chat template"),
        (["--include-path", "nowhere"], "harness.include_path: got 'nowhere', expected a directory"),
    ],
)
def test_tasks_that_do_not_fit_are_one_line(
    more: list[str], words: str, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = command(place, tmp_path / "out.json")
    assert eval_cli.run([*argv[:2], *argv[4:], *(more if "--tasks" in more else [*argv[2:4], *more])]) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("student-eval: ")
    assert words in error
    assert not (tmp_path / "out.json").exists()


def test_tasks_are_listed_with_commas_or_repeated() -> None:
    assert HarnessConfig(tasks="mmlu, gsm8k").tasks == ("mmlu", "gsm8k")
    assert HarnessConfig(tasks=["mmlu,gsm8k", "arc_easy"]).tasks == ("mmlu", "gsm8k", "arc_easy")
