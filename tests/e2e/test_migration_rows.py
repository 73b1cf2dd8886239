"""Every row of docs/migration.md, run as it is written there on tiny models: that the option took effect is read off
the samples that were trained on, the recorded configuration and what the run left, and losses are held to their
definitions in float64. A row that no run here is made of fails a test.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cachedhub
import migrated
import pytest
import torch
import yaml
from migrated import SMALL, assert_loss
from migrationrows import DOCS, ON_ANSWERS, ROWS, SECTIONS, Row
from training import DEEPSPEED, TeacherProcess, finish, ranks, teacher

from student_trainer import cli
from student_trainer.config import TrainConfig
from student_trainer.losses import registry

# Runs in this process leave gRPC's threads behind; its handlers must not run when a later test starts processes.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

pytestmark = pytest.mark.slow

APART: dict[str, str] = {
    "nemo/generation": "the engines' own tests",
    "nemo/DTensor": "test_strategies_of_the_rows_on_two_ranks",
    "nemo/tensor": "not offered",
    "nemo/several nodes": "tests/e2e/test_ranks.py",
    "nemo/a functional": "tests/e2e/test_quickstart.py",
    "roll/`exp_name`": "test_a_run_goes_on_in_its_directory_and_from_a_path",
    "roll/Hydra": "test_a_key_that_is_none_is_refused",
    "roll/Ray": "test_strategies_of_the_rows_on_two_ranks and test_a_teacher_of_the_runs_own",
    "local/steps": "tests/e2e/test_migration_commands.py",
    "local/accelerate": "test_strategies_of_the_rows_on_two_ranks",
    "local/a toy": "tests/e2e/test_quickstart.py",
    "hybrid/a teacher": "test_a_teacher_of_the_runs_own",
    "hybrid/ZeroRedundancyOptimizer": "test_strategies_of_the_rows_on_two_ranks",
    "hybrid/rank-local": "test_strategies_of_the_rows_on_two_ranks",
    "hybrid/a guard": "test_losses_that_are_no_numbers_end_the_run",
    "hybrid/`eval_mmlu": "tests/trainer/test_eval_harness.py",
    "hybrid/offline": "the environment of every test",
}
"""Rows that no single run shows, and where they are seen."""
RANKS_S = 300.0
"""Longest wait for two processes on a machine that does other things."""
STRATEGIES = ("fsdp2", "zero2", "ddp_sharded")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = migrated.make_place(tmp_path_factory.mktemp("rows"))
    (place / "run.yaml").write_text(
        yaml.safe_dump(
            {
                "student": {"model": str(place / "qwen3")},
                "data": {"source": str(place / "prompts.txt")},
                "loss": {"objective": "jsd"},
                "train": {"seed": 3},
            }
        )
    )
    return place


@pytest.fixture(scope="module")
def served(place: Path) -> Iterator[TeacherProcess]:
    with teacher(place / "serve", place / "teacher", "--reference", f"--max-top-k={migrated.V}") as one:
        yield one


@pytest.fixture(autouse=True)
def _as_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The caches of the hub are ours; what a run sets in torch is put back."""
    cachedhub.use(monkeypatch, models=place / "hub", data=place / "datasets")
    monkeypatch.syspath_prepend(place)
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def arguments(place: Path, served: TeacherProcess) -> Callable[..., list[str]]:
    """A small run on the shared student and teacher, `text` stronger."""

    def made(text: str) -> list[str]:
        words = [word.format(place=place) for word in text.split()]
        recipe = [word for word in words if "/recipes/" in word]
        scale = [] if recipe else [f"--student={place / 'qwen3'}", *SMALL]
        if any(word.startswith("--config") for word in words) and not recipe:
            scale = list(SMALL)
        return [f"--teacher-url={served.url}", *scale, *words]

    return made


CASES = [
    pytest.param(row, id=f"{name.replace('`', '')}-{number}")
    for name, rows in ROWS.items()
    for number, row in enumerate(rows)
]


@pytest.mark.parametrize("row", CASES)
def test_a_row_runs_as_it_is_written(row: Row, arguments, place, tmp_path, monkeypatch) -> None:
    argv = arguments(f"{row.needs} {row.says}")
    row.check(migrated.run(argv, tmp_path / "run", monkeypatch, place / "teacher"))


@pytest.mark.long
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_of_the_rows_on_two_ranks(strategy: str, arguments, place, tmp_path, monkeypatch) -> None:
    """The strategy is the one that a checkpoint names; the loss is the whole batch's, not one rank's."""
    argv = arguments(f"{ON_ANSWERS} train.num_processes=0 train.strategy={strategy}")
    argv.append(f"--output-dir={tmp_path / strategy}")
    path = {"PYTHONPATH": os.pathsep.join(filter(None, [str(DEEPSPEED), os.environ.get("PYTHONPATH")]))}
    for process in ranks(argv, 2, tmp_path / "log", **(path if strategy == "zero2" else {})):
        assert finish(process, tmp_path / "log", timeout_s=RANKS_S) == 0, (tmp_path / "log").read_text()
    state = json.loads((tmp_path / strategy / "checkpoints" / "step-00000002" / "trainer_state.json").read_text())
    assert (state["world"], state["strategy"]) == (2, strategy)
    alone = migrated.run(arguments(ON_ANSWERS), tmp_path / "alone", monkeypatch, place / "teacher")
    lines = migrated.metrics(tmp_path / strategy)
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in alone.lines], rel=1e-5)
    assert_loss(alone, migrated.reverse_kl)


def test_a_teacher_of_the_runs_own(arguments, place, tmp_path, monkeypatch) -> None:
    """teacher.model, served by a child on the devices that teacher.visible_devices names, as teacher.serve_args say."""
    argv = [word for word in arguments("--prompts={place}/prompts.txt teacher.top_k=9") if "--teacher-url" not in word]
    argv += [f"teacher.model={place / 'teacher'}", "teacher.visible_devices=4"]
    argv += ['teacher.serve_args=["--reference", "--max-top-k=9"]']
    ran = migrated.run(argv, tmp_path / "run", monkeypatch, place / "teacher")
    ran.has(teacher__visible_devices="4", teacher__model=str(place / "teacher"))
    assert all(s.scores.topk_ids.shape[1] == 9 for s in ran.scored[0])


def test_a_run_goes_on_in_its_directory_and_from_a_path(arguments, place, tmp_path, monkeypatch) -> None:
    argv = arguments("--prompts={place}/prompts.txt checkpoint.save_every=1")
    migrated.run([*argv, "--steps=1"], tmp_path / "parts", monkeypatch, place / "teacher")
    went_on = migrated.run(argv, tmp_path / "parts", monkeypatch, place / "teacher")
    assert ([line["step"] for line in went_on.lines], len(went_on.scored)) == ([1, 2], 1)
    first = tmp_path / "parts" / "checkpoints" / "step-00000001"
    branch = migrated.run([*argv, f"checkpoint.resume={first}"], tmp_path / "branch", monkeypatch, place / "teacher")
    assert [line["step"] for line in branch.lines] == [2]
    assert branch.lines[0]["loss"] == went_on.lines[1]["loss"]


def test_a_key_that_is_none_is_refused(arguments, tmp_path, capfd) -> None:

    assert (
        cli.run([*arguments("--prompts={place}/prompts.txt distill_loss_weight=0.5"), f"--output-dir={tmp_path}"]) == 2
    )
    assert "distill_loss_weight" in capfd.readouterr().err


def test_losses_that_are_no_numbers_end_the_run(arguments, place, tmp_path, monkeypatch, capfd) -> None:
    options = (
        '--prompts={place}/prompts.txt loss.objective=of_mine:seven loss.options={{"value":.nan}} train.max_bad_steps=2'
    )
    argv = arguments(f"{options} train.steps=5")
    ran = migrated.run(argv, tmp_path / "run", monkeypatch, place / "teacher", code=1)
    assert [line["skipped"] for line in ran.lines] in ([1.0], [1.0, 1.0])
    assert "2" in capfd.readouterr().err.splitlines()[-1]


# -- the docs and the rows are the same


def rows_of_the_docs() -> dict[str, str]:
    """`system/what they have` -> what is here."""
    found = {}
    for heading, system in SECTIONS.items():
        section = DOCS.split(f"### {heading}\n", 1)[1].split("\n#", 1)[0]
        for line in section.splitlines():
            cells = [cell.strip() for cell in line.split(" | ")]
            if line.startswith("| ") and cells[0] != "| they have":
                found[f"{system}/{cells[0].removeprefix('| ')}"] = cells[1]
    return found


def matching(names: Any, row: str) -> list[str]:
    return [name for name in names if row.startswith(name)]


def test_every_row_of_the_docs_is_run() -> None:
    rows = rows_of_the_docs()
    assert len(rows) > 40
    for row in rows:
        assert len(matching([*ROWS, *APART], row)) == 1, row
    for name in [*ROWS, *APART]:
        assert any(row.startswith(name) for row in rows), name


SECTION_NAMES = "|".join(TrainConfig.model_fields)
SCALED = ("rollout.max_new_tokens",)
"""Numbers that the rows have for large models."""
ON_GPUS = ("train.cpu_offload",)
""""What is refused elsewhere: tests/trainer/test_parallel_ranks.py has it below the configuration."""


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_run_with_what_the_docs_say(name: str) -> None:
    (said,) = (said for row, said in rows_of_the_docs().items() if row.startswith(name))
    ran = " ".join(f"{row.needs} {row.says}" for row in ROWS[name])
    words = [word for span in re.findall(r"`([^`]+)`", said) for word in span.split()]
    for word in words:
        key, equals, value = word.partition("=")
        if word.startswith("recipes/"):
            assert word in ran
        elif key not in ON_GPUS and re.fullmatch(rf"(--config|--prompts)|({SECTION_NAMES})\.[a-z_.]+", key):
            own = not equals or key in SCALED or re.fullmatch(r"[A-Z]+|package\.module:\w+|x\.yaml", value)
            assert (key if own else word) in ran, word
        elif key in registry.names():
            assert f"loss.objective={key}" in ran, word
