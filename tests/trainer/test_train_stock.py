"""`student-train` with a stock `vllm serve` as teacher: the same run as with ours, and what is said of differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stock_vllm import FakeVllm, in_thread
from tinymodels import save_tiny, tiny_tokenizer
from training import PROMPTS, arguments, metrics, teacher
from transformers import AutoModelForCausalLM

from student_trainer import cli

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning:uvicorn.*")]
ASKED = ["teacher.top_k=8", "loss.support=teacher"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "teacher", seed=1, scale=2.5)
    save_tiny(place / "student", seed=2)
    save_tiny(place / "other_tokenizer", seed=2, tokenizer_size=117)
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return place


@pytest.fixture
def vllm(place) -> FakeVllm:
    """The teacher's float64 log-softmax."""
    model = AutoModelForCausalLM.from_pretrained(place / "teacher", dtype=torch.float64).eval()

    @torch.inference_mode()
    def rows(tokens: list[int]) -> np.ndarray:
        logp = model(torch.tensor([tokens])).logits[0].log_softmax(-1).numpy()
        return np.concatenate([np.zeros_like(logp[:1]), logp[:-1]])

    def ids_of(text: str) -> list[int]:
        return list(tiny_tokenizer().encode(text, add_special_tokens=False))

    return FakeVllm(rows, model.config.vocab_size, max_model_len=128, tokenize=ids_of)


@pytest.fixture
def url(vllm) -> Iterator[str]:
    with in_thread(vllm) as served:
        yield f"openai+{served}"


@pytest.fixture
def train(place, tmp_path) -> Callable[..., tuple[int, Path]]:
    def run(url: str, *more: str, name: str = "run") -> tuple[int, Path]:
        argv = arguments(tmp_path / name, place / "student", place / "prompts.txt", url, *ASKED, *more)
        return cli.run(argv), tmp_path / name

    return run


def numbers(lines: list[dict[str, Any]]) -> dict[str, list[float]]:
    return {k: [line[k] for line in lines] for k in ("loss", "grad_norm", "delta")}


def test_a_run_goes_as_with_a_teacher_of_our_own(train, url, place, tmp_path, capfd) -> None:
    code, stock = train(url, name="stock")
    said = capfd.readouterr().err
    assert code == 0, said
    for words in ("weights can't be identified", "is unverified", "set teacher.tokenizer", "no exact_tail"):
        assert said.count(words) == 1, words
    with teacher(tmp_path / "serve", place / "teacher", "--reference", "--max-top-k=32") as ours:
        code, own = train(ours.url, name="own")
    assert code == 0
    got, expected = numbers(metrics(stock)), numbers(metrics(own))
    for name in expected:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_tokenizer_that_is_named_is_compared(train, url, place, capfd) -> None:
    code, _ = train(url, f"teacher.tokenizer={place / 'teacher'}", "--steps=1")
    said = capfd.readouterr().err
    assert code == 0, said
    assert "unverified" not in said
    code, _ = train(url, f"teacher.tokenizer={place / 'other_tokenizer'}", name="other")
    assert code == 2
    code, _ = train(url, f"teacher.tokenizer={place / 'nothing'}", name="nothing")
    assert code == 2
    assert "teacher.tokenizer" in capfd.readouterr().err


def test_a_server_of_other_ids_is_refused(train, vllm, url, capfd) -> None:
    vllm.tokenize = lambda text: [1, 2, 3]
    code, _ = train(url)
    assert code == 2
    assert "other ids of a known text" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["loss.support=student"], "does not offer candidates"),
        (["loss.teacher_temperature=2.0"], "does not offer temperature"),
        (["teacher.top_k=all"], "does not offer full_vocabulary"),
        (["teacher.top_k=21"], "gives at most 20"),
    ],
)
def test_what_it_would_ignore_is_refused_before_the_first_step(more, words, train, url, capfd) -> None:
    code, run_dir = train(url, *more)
    assert code == 2
    assert words in capfd.readouterr().err
    assert not run_dir.exists()


def test_dry_run(train, url, capsys) -> None:
    assert train(url, "--dry-run")[0] == 0
    out = capsys.readouterr().out
    assert "org/teacher (vllm serve 0.32.0, unknown, fingerprint stock-" in out
    assert "scored one sequence" in out
