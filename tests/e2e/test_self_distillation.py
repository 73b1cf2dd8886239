"""A student that is taught by its own past, served by a real `teacher-serve` that is started again as it learns."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tinymodels import save_tiny
from training import PROMPTS, TeacherProcess, arguments, assert_same_bits, metrics, weights
from transformers import AutoModelForCausalLM

from student_trainer import cli, launch

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

pytestmark = pytest.mark.slow

EMA = [
    "teacher.model=ema",
    "optim.ema_decay=0.5",
    "teacher.refresh_every=2",
    "teacher.prompt_template={question} {answer}",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("self")
    save_tiny(place / "student", seed=2)
    problems = [{"question": text, "answer": f"{n}"} for n, text in enumerate(PROMPTS)]
    (place / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    return place


@pytest.fixture(autouse=True)
def _own_torch_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def served(monkeypatch, tmp_path) -> list[str]:
    """What was served, in order. The children are forked from a process that has done their imports."""
    models: list[str] = []

    @contextlib.contextmanager
    def local_teacher(config: Any, model: str) -> Iterator[str]:
        models.append(Path(model).name)
        process = TeacherProcess(tmp_path / f"serve{len(models)}", model, *config.serve_args)
        try:
            yield process.start().url
        finally:
            process.stop()

    monkeypatch.setattr(launch, "local_teacher", local_teacher)
    return models


@pytest.fixture
def train(place, tmp_path, served) -> Callable[..., tuple[int, Path]]:
    def run(name: str, *more: str) -> tuple[int, Path]:
        argv = arguments(tmp_path / name, place / "student", place / "problems.jsonl", "", "checkpoint.save_every=1")
        argv = [a for a in argv if not a.startswith("--teacher-url")]
        return cli.run([*argv, "teacher.serve_args=[--reference]", *more]), tmp_path / name

    return run


def state(run_dir: Path, step: int) -> dict[str, Any]:
    return json.loads((run_dir / "checkpoints" / f"step-{step:08d}" / "trainer_state.json").read_text())


def test_the_average_teaches_is_served_anew_and_a_stopped_run_ends_in_the_same_bits(train, served, capfd) -> None:
    code, whole = train("whole", *EMA)
    assert code == 0
    assert served == ["ema-00000000", "ema-00000002", "ema-00000004"]
    assert [line["teacher_step"] for line in metrics(whole)] == [0, 0, 2, 2, 4, 4]
    history = state(whole, 6)["past"]["history"]
    assert [step for step, _, _ in history] == [0, 2, 4]
    assert len({fingerprint for _, _, fingerprint in history}) == 3
    said = capfd.readouterr().err
    assert all(fingerprint in said for _, _, fingerprint in history[1:])
    AutoModelForCausalLM.from_pretrained(whole / "ema")
    final, average = weights(whole / "final"), weights(whole / "ema")
    assert final.keys() == average.keys()
    assert any(not torch.equal(final[n], average[n]) for n in final)
    # What the last two checkpoints need, and what is served: r(5) = 4 and r(6) = 6.
    assert sorted(p.name for p in (whole / "teachers").iterdir()) == ["ema-00000004", "ema-00000006"]

    for steps in (3, 4):  # in the middle of a teacher's life, and where the next one is due
        served.clear()
        train("parts", *EMA, f"--steps={steps}")
    assert train("parts", *EMA)[0] == 0
    assert served == ["ema-00000002", "ema-00000004"]
    parts = whole.with_name("parts")
    for directory in ("final", "ema"):
        assert_same_bits(whole / directory, parts / directory)
    assert state(parts, 6)["past"] == state(whole, 6)["past"]


def test_without_refreshing_the_student_as_it_began_teaches(train, served, place, capfd) -> None:
    code, run_dir = train("plain", "teacher.model=self", "--steps=2")
    assert code == 0
    assert served == ["self-00000000"]
    lines = metrics(run_dir)
    assert abs(lines[0]["delta"]) < 1e-5  # before the first update both are the same model
    assert abs(lines[1]["delta"]) > 1e-4
    assert not (run_dir / "teachers").exists()
    capfd.readouterr()
    assert train("plain", *EMA)[0] == 2
    assert "teacher.model: 'self' -> 'ema'" in capfd.readouterr().err


def test_a_snapshot_that_is_gone_or_changed_is_refused(train, capfd) -> None:
    past = ["teacher.model=self", "teacher.refresh_every=2"]
    _, run_dir = train("hurt", *past, "--steps=3")
    config = run_dir / "teachers" / "self-00000002" / "config.json"
    config.write_text(config.read_text() + " ")
    capfd.readouterr()
    assert train("hurt", *past)[0] == 2
    assert "self-00000002 does not match its digest" in capfd.readouterr().err
    config.unlink()
    config.parent.rename(run_dir / "elsewhere")
    assert train("hurt", *past)[0] == 2
    assert "self-00000002: not there" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["teacher.model=ema", "teacher.refresh_every=2"], "teacher.model: got ema with optim.ema_decay 0"),
        (["teacher.model=ema", "optim.ema_decay=0.9"], "refresh_every: not set with model ema"),
        (["teacher.model=./x", "teacher.refresh_every=2"], "refresh_every: got 2 with model './x'"),
    ],
)
def test_what_has_no_effect_is_refused(more: list[str], words: str, train, capfd) -> None:
    assert train("refused", *more)[0] == 2
    assert words in capfd.readouterr().err
