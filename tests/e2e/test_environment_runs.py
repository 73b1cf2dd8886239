"""Whole runs whose samples are conversations: they go on bit by bit, do not depend on the number of processes, and end
with one line where the environment fails. And the example, scaled down.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import talking
import torch
from training import TeacherProcess, arguments, assert_same_bits, finish, metrics, ranks, teacher, trainer, weights

from examples.calculator import run as example
from examples.calculator import task
from examples.quickstart.pretrain import IGNORED
from examples.quickstart.task import problems

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
QUESTIONS = ["the quick", "brown fox", "over the lazy dog", "0123", "4 + 5 =", "fox"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("conversations")
    talking.save_student(place / "teacher", seed=1, scale=2.5, max_position_embeddings=256)
    talking.save_student(place / "student", seed=2, scale=2.0, max_position_embeddings=256)
    lines = [json.dumps({"question": q, "answer": str(n)}) for n, q in enumerate(QUESTIONS)]
    (place / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return place


@pytest.fixture(scope="module")
def served(place) -> Iterator[TeacherProcess]:
    with teacher(place / "serve", place / "teacher", "--reference") as one:
        yield one


@pytest.fixture(scope="module")
def command(place, served) -> Callable[..., list[str]]:
    def make(run_dir: Path, *more: str) -> list[str]:
        settings = [
            "--steps=4",
            "rollout.environment=talking:scripted",
            "rollout.max_total_tokens=110",
            f"rollout.stop_token_ids={list(talking.STOPS)}",
            "rollout.group_size=2",
            "train.num_processes=0",
        ]
        return arguments(run_dir, place / "student", place / "prompts.jsonl", served.url, *settings, *more)

    return make


def run(argv: list[str], log: Path) -> int:
    return finish(trainer(argv, log), log)


@pytest.fixture(scope="module")
def alone(place, command) -> Path:
    evaluation = ["eval.every=2", f"eval.data.source={place / 'prompts.jsonl'}", "eval.task=exact_match"]
    assert run(command(place / "alone", *evaluation), place / "alone.log") == 0, (place / "alone.log").read_text()
    return place / "alone"


def figures(run_dir: Path) -> list[tuple[float, ...]]:
    names = ("step", "turns", "environment_tokens", "completion_tokens", "finished")
    return [tuple(line[name] for name in names) for line in metrics(run_dir) if "turns" in line]


def test_a_run_of_conversations_goes_on_bit_by_bit(alone, command, tmp_path):
    evaluation = ["eval.every=2", f"eval.data.source={alone.parent / 'prompts.jsonl'}", "eval.task=exact_match"]
    for steps in (1, 3, 4):
        log = tmp_path / f"{steps}.log"
        argv = command(tmp_path / "parts", f"--steps={steps}", "checkpoint.save_every=1", *evaluation)
        assert run(argv, log) == 0, log.read_text()
    assert_same_bits(tmp_path / "parts" / "final", alone / "final")
    assert figures(tmp_path / "parts") == figures(alone)
    assert all(turns > 1.5 and tokens > 10 for _, turns, tokens, *_ in figures(alone))
    assert len([line for line in metrics(alone) if "eval_accuracy" in line]) == 3


def test_two_processes_hold_the_conversations_of_one(alone, command, tmp_path):
    log = tmp_path / "two.log"
    for process in ranks(command(tmp_path / "two"), 2, log):
        assert finish(process, log) == 0, log.read_text()
    assert figures(tmp_path / "two") == figures(alone)
    one, two = (
        torch.cat([t.reshape(-1) for _, t in sorted(weights(d / "final").items())]) for d in (alone, tmp_path / "two")
    )
    assert float((one - two).norm() / one.norm()) < 1e-5


def test_an_environment_that_fails_ends_the_run_with_one_line(command, tmp_path):
    log = tmp_path / "failing.log"
    argv = command(tmp_path / "run", "rollout.environment=talking:failing", "rollout.environment_options.how=raise")
    assert run(argv, log) == 1
    said = [line for line in log.read_text().splitlines() if "rollout.environment talking:failing" in line]
    assert len(said) == 1
    assert "turn 2: KeyError" in said[0]
    assert "Traceback" not in log.read_text()


def test_prompts_and_limits_that_do_not_fit_are_refused_before_anything_is_written(command, tmp_path):
    for more, message in (
        (["data.template=plain"], "is text as it stands; expected messages under the chat template"),
        (["rollout.max_total_tokens=250"], "rollout.max_total_tokens make"),
    ):
        log = tmp_path / f"{message.split()[0]}.log"
        assert run(command(tmp_path / "run", *more), log) == 2, log.read_text()
        assert message in log.read_text()
        assert not (tmp_path / "run").exists()


def test_the_examples_conversations_are_those_of_the_template_with_only_the_assistants_tokens_learned():
    tokenizer = task.tokenizer_for(0)
    made = problems("train", 50, seed=3)
    ids, target = task.encode(made, tokenizer)
    for problem, row, learned in zip(made, ids, target, strict=True):
        text = tokenizer.apply_chat_template(task.conversation(problem), tokenize=False)
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert row[: len(whole)].tolist() == whole
        assert (row[len(whole) :] == tokenizer.pad_token_id).all()
        says = [m["content"] for m in task.conversation(problem) if m["role"] == "assistant"]
        assert len(says) == 3
        assert tokenizer.decode(learned[learned != IGNORED].tolist()) == "".join(f"{s}<|end|>" for s in says)
        results = [m["content"] for m in task.conversation(problem) if m["role"] == "tool"]
        assert [str(eval(s.removeprefix("<calc>").removesuffix("</calc>"))) for s in says[:2]] == results
        assert says[2] == f"Answer: {results[1]}" == f"Answer: {problem.answer}"


def test_the_example_runs_from_end_to_end(tmp_path):
    command = [sys.executable, "-m", "examples.calculator", "--fast", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(example.SIDES) < summary.keys()
    assert summary["num_problems"] == example.FAST.num_report
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 1
    assert "is there already" in again.stderr
