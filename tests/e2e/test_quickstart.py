"""The quickstart itself, scaled down, through the real commands: what it leaves behind, and that a second run skips the
pre-training. Plus the parts whose mistakes would make its figures untrue: the task and its splits.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.quickstart import pretrain, task
from examples.quickstart.prepare import PROMPT_STREAM, STUDENT_STREAM, TEACHER_STREAM
from examples.quickstart.settings import FAST, FULL, cache_key
from examples.quickstart.tokenizer import make_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SUMMARY = {"teacher_accuracy", "student_before", "student_after", "recovered", "seconds", "seed"}


def _evaluate(expression: str) -> int:
    """A sum or difference of small numbers, with nothing of the task's own code."""
    assert re.fullmatch(r"\d+([+-]\d+)+", expression), expression
    return sum(int(term) for term in re.findall(r"[+-]?\d+", expression))


def test_every_step_of_every_solution_is_true():
    for problem in task.problems("train", 3_000, seed=5):
        *steps, last = problem.solution.split("\n")
        assert len(steps) == 2
        for step in steps:
            whole, work, result = re.fullmatch(r"(.+?): (.+) -> (\d+)", step).groups()
            assert _evaluate(whole) == int(result)
            units, tens = [column.split("=") for column in work.split(", ")]
            assert _evaluate(units[0]) == int(units[1])
            assert _evaluate(tens[0]) == int(tens[1])
            assert int(tens[1]) * 10 + int(units[1]) % 10 == int(result)
        assert last == f"Answer: {result}" == f"Answer: {problem.answer}"
        assert 10 <= problem.answer <= 99


def test_the_question_asks_what_the_solution_answers():
    for problem in task.problems("report", 500, seed=5):
        start, *changes = re.findall(r"\d+", problem.question)
        value = int(start)
        for verb, number in zip(re.findall(r"([a-z]+) \d+", problem.question.split("has ")[1]), changes, strict=True):
            value += int(number) if verb in task.GAINS else -int(number)
            assert (verb in task.GAINS) != (verb in task.LOSSES)
        assert value == problem.answer


def test_no_numbers_are_in_two_splits():
    numbers = {split: {tuple(sorted(p.numbers)) for p in task.problems(split, 2_000, 0)} for split in task.SPLITS}
    assert not numbers["train"] & numbers["tuning"]
    assert not numbers["train"] & numbers["report"]
    assert not numbers["tuning"] & numbers["report"]
    for problem in task.problems("report", 200, 0):
        assert sorted(map(int, re.findall(r"\d+", problem.question))) == sorted(problem.numbers)


def test_problems_are_a_pure_function_and_streams_differ():
    assert task.problems("train", 50, 3, 1) == task.problems("train", 80, 3, 1)[:50]
    streams = [tuple(task.problems("train", 50, 3, s)) for s in (TEACHER_STREAM, STUDENT_STREAM, PROMPT_STREAM)]
    assert len(set(streams)) == 3
    assert task.problems("train", 50, 3, 1) != task.problems("train", 50, 4, 1)


def test_both_templates_come_up():
    kinds = Counter("more, then" in p.question for p in task.problems("train", 1_000, 0))
    assert min(kinds.values()) > 300


def test_the_tokenizer_keeps_digits_apart_and_text_whole():
    tokenizer = make_tokenizer(0)
    digits = {tokenizer.convert_tokens_to_ids(str(n)) for n in range(10)}
    assert tokenizer.unk_token_id not in digits
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for problem in task.problems("report", 100, 1):
        text = task.prompt_text(problem) + problem.solution
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert sum(i in digits for i in ids) == len(re.findall(r"\d", text))
        apart = tokenizer(task.prompt_text(problem))["input_ids"] + tokenizer(problem.solution)["input_ids"]
        assert apart == ids


def test_pretraining_targets_are_the_solution_and_its_end_alone():
    tokenizer = make_tokenizer(0)
    problems = task.problems("train", 7, 0)
    ids, target = pretrain.encode(problems, tokenizer)
    for row, wanted, problem in zip(ids, target, problems, strict=True):
        scored = wanted != pretrain.IGNORED
        assert tokenizer.decode(wanted[scored]) == problem.solution + tokenizer.eos_token
        assert (row[1:][scored[:-1]] == wanted[scored]).all()
        assert not scored[-1]


def test_share_solved_agrees_with_greedy_decoding():
    tokenizer = make_tokenizer(0)
    recipe = pretrain.Recipe(1, 32, 2, 64, steps=60, batch_sequences=16)
    few = [task.Problem("1", "Answer: 7", 7, (1, 2, 3)), task.Problem("2", "Answer: 3", 3, (1, 2, 3))]
    model = pretrain.train(recipe, tokenizer, few * 480, few, seed=0)
    wrong = task.Problem("1", "Answer: 8", 8, (1, 2, 3))
    assert pretrain.share_solved(model, *pretrain.encode([*few, wrong], tokenizer)) == pytest.approx(2 / 3)
    for problem in few:
        prompt = tokenizer(task.prompt_text(problem), return_tensors="pt")
        out = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(out) == problem.solution + tokenizer.eos_token


def test_the_cache_key_follows_settings_and_seed():
    keys = [cache_key(FULL, 0), cache_key(FULL, 1), cache_key(FAST, 0)]
    assert len(set(keys)) == 3
    assert keys[0] == cache_key(FULL, 0)


def _quickstart(output: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "examples.quickstart", "--fast", "--seed", "3"]
    command += ["--output", str(output), "--cache", str(cache)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)


@pytest.mark.slow
def test_the_whole_way_twice(tmp_path: Path):
    output, cache = tmp_path / "out", tmp_path / "cache"
    first = _quickstart(output, cache)
    assert first.returncode == 0, first.stderr[-3000:]
    _check_results(output, from_cache=False)
    started_from = (output / "student_before" / "model.safetensors").read_bytes()
    second = _quickstart(output, cache)
    assert second.returncode == 0, second.stderr[-3000:]
    _check_results(output, from_cache=True)
    assert "found in" in second.stdout
    assert len(list(cache.iterdir())) == 1
    assert (output / "student_before" / "model.safetensors").read_bytes() == started_from


def _check_results(output: Path, *, from_cache: bool) -> None:
    summary = json.loads((output / "summary.json").read_text())
    assert summary.keys() >= SUMMARY
    assert summary["seed"] == 3
    assert summary["pretraining_from_cache"] is from_cache
    assert 0 < summary["seconds"] == pytest.approx(sum(summary["stage_seconds"].values()), abs=1)
    for name in ("teacher_accuracy", "student_before", "student_after"):
        assert 0 <= summary[name] <= 1
    weights = {}
    for name in ("teacher", "student_before", "student_after"):
        model = AutoModelForCausalLM.from_pretrained(output / name)
        tokenizer = AutoTokenizer.from_pretrained(output / name)
        assert tokenizer.decode(tokenizer("12+30: ")["input_ids"]) == "12+30: "
        weights[name] = model.get_input_embeddings().weight.detach().numpy()
    assert not np.array_equal(weights["student_before"], weights["student_after"])
    page = (output / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert page.count('class="card"') == FAST.num_shown
    assert (output / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path: Path):
    from examples.quickstart.run import _clear
    from examples.quickstart.services import QuickstartError

    (tmp_path / "distillation").mkdir()
    (tmp_path / "distillation" / "thesis.txt").write_text("mine")
    with pytest.raises(QuickstartError, match="not an earlier quickstart"):
        _clear(tmp_path)
    assert (tmp_path / "distillation" / "thesis.txt").exists()
