"""Other people's programs against this server: lm-evaluation-harness and TRL find the numbers of a float64 forward, of
a teacher in TRL's own process, and of stock `vllm serve`. `make interop` installs both programs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.interop import __main__ as comparison
from examples.interop import parts
from examples.interop.distillation import distil
from examples.interop.environment import ROOT, VENV, InteropError
from examples.interop.harness import evaluate
from examples.interop.servers import model_of, server

pytestmark = pytest.mark.slow

installed = pytest.mark.skipif(not (VENV / "bin" / "lm_eval").exists(), reason="`make interop` installs the programs")

NUM_QUESTIONS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return parts.teacher(tmp_path_factory.mktemp("interop") / "teacher")


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server("torch", model, tmp_path_factory.mktemp("server")) as running:
        yield running


class Reference:
    """Log-likelihoods by definition, in float64."""

    def __init__(self, model: Path) -> None:
        self._network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(model)

    def __call__(self, context: str, continuation: str) -> tuple[float, bool]:
        """Of `continuation` after `context`, or after the end token alone, and whether it is the most likely one."""
        before = self._tokenizer(context)["input_ids"] or [self._tokenizer.eos_token_id]
        after = self._tokenizer(continuation)["input_ids"]
        with torch.inference_mode():
            log_p = self._network(torch.tensor([before + after])).logits[0].log_softmax(-1)[len(before) - 1 : -1]
        own = log_p.gather(1, torch.tensor(after)[:, None])[:, 0]
        return float(own.sum()), log_p.argmax(-1).tolist() == after


@installed
@pytest.mark.slow
def test_the_harness_finds_what_a_float64_forward_gives(model: Path, url: str, tmp_path: Path):
    found = evaluate(url, model, tmp_path, num_questions=NUM_QUESTIONS)
    reference = Reference(model)

    def rows(task: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "tasks" / f"{task}.jsonl").read_text().splitlines()]

    expected: dict[tuple[str, int, int], tuple[float, bool]] = {}
    right, right_by_length, metrics = [], [], {}
    for n, row in enumerate(rows("number_words")):
        context = f"Question: What is {row['first']} plus {row['second']}?\nAnswer:"
        answers = [reference(context, f" {choice}") for choice in row["choices"]]
        expected |= {("number_words", n, m): answer for m, answer in enumerate(answers)}
        values = np.array([value for value, _ in answers])
        right.append(values.argmax() == row["label"])
        right_by_length.append((values / [len(choice) for choice in row["choices"]]).argmax() == row["label"])
    metrics |= {"number_words/acc": np.mean(right), "number_words/acc_norm": np.mean(right_by_length)}
    runs = [reference(row["start"], row["rest"]) for row in rows("letter_runs")]
    expected |= {("letter_runs", n, 0): answer for n, answer in enumerate(runs)}
    metrics["letter_runs/acc"] = np.mean([greedy for _, greedy in runs])
    metrics["letter_runs/perplexity"] = math.exp(-np.mean([value for value, _ in runs]))
    texts = [row["text"] for row in rows("passages")]
    passages = [reference("", text) for text in texts]
    expected |= {("passages", n, 0): answer for n, answer in enumerate(passages)}
    metrics["passages/byte_perplexity"] = math.exp(-sum(value for value, _ in passages) / sum(map(len, texts)))

    assert found.loglikelihoods == pytest.approx({key: value for key, (value, _) in expected.items()}, abs=1e-4, rel=0)
    assert found.greedy == {key: greedy for key, (_, greedy) in expected.items() if key in found.greedy}
    assert set(found.greedy.values()) == {True, False}
    assert found.metrics == pytest.approx(metrics, rel=1e-5)


@installed
@pytest.mark.long
@pytest.mark.slow
def test_trl_loses_as_with_the_teacher_in_its_own_process(model: Path, url: str, tmp_path: Path):
    """With all of the vocabulary as top-k, the server's forward KL is the one of TRL's trainer with a local teacher."""
    whole = ("--beta", "0", "--top-k", str(parts.VOCABULARY), "--steps", "8")
    served = distil(("--teacher-url", url), model, tmp_path / "served", *whole)
    local = distil(("--teacher-model", str(model)), model, tmp_path / "local", *whole)
    assert len(served) == 8
    assert min(served) > 0.1
    assert served == pytest.approx(local, abs=1e-3)


@installed
@pytest.mark.long
@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(3000)
def test_both_find_what_they_find_with_stock_vllm(model: Path, tmp_path: Path):
    pytest.importorskip("vllm")
    stock = comparison.measure("stock", model, tmp_path / "stock")
    assert set(stock.evaluation.greedy.values()) == {True, False}
    for kind in ("torch", "vllm"):
        ours = comparison.measure(kind, model, tmp_path / kind)
        apart = comparison.differences(ours, stock)
        assert apart["accuracy"] == 0
        assert apart["greedy_flags"] == 0
        assert apart["loglikelihood_nats"] < 1e-4
        assert apart["loss_forward_kl"] < 1e-3
        assert apart["loss_reverse_kl"] < 1e-3


@pytest.mark.parametrize("program", ["examples.interop", "examples.interop.harness", "examples.interop.distillation"])
def test_without_the_programs_one_line_says_how_to_get_them(tmp_path: Path, program: str):
    command = [sys.executable, "-m", program, "--venv", str(tmp_path / "none"), "--output", str(tmp_path / "out")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "`make interop`" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_url_that_nobody_answers_at_is_named():
    with pytest.raises(InteropError, match=r"--url http://127\.0\.0\.1:9: expected a server"):
        model_of("http://127.0.0.1:9")


@installed
@pytest.mark.long
def test_the_pinned_list_is_what_the_environment_has():
    command = [str(VENV / "bin" / "python"), "requirements/pin.py", "--check", "interop.txt"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
