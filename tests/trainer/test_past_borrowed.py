"""Snapshots of a student that teaches itself, in a run that began from another run's checkpoint."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from student_trainer import checkpoint
from student_trainer.teachers.config import TeacherConfig
from student_trainer.teachers.past import PastTeachers


@contextlib.contextmanager
def serve(_config: TeacherConfig, model: str) -> Iterator[str]:
    yield model


def write(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text(path.name)


def past(run_dir: Path) -> PastTeachers:
    return PastTeachers({"": TeacherConfig(model="self", refresh_every=8)}, run_dir, serve)


def test_a_run_that_began_from_anothers_checkpoint_keeps_the_teacher_that_it_needs(tmp_path) -> None:
    first = past(tmp_path / "first")
    write(first.path("self", 8))
    first.kept("self", 8)
    state = {"step": 10, "past": first.state()}
    second = past(tmp_path / "second")
    assert second.begin(state, tmp_path / "first/checkpoints/step-10", write)[""].startswith(str(tmp_path / "first"))
    assert not (tmp_path / "second").exists()  # a dry run writes nothing
    second.bring()
    second.note("", 10, "fingerprint")
    state = {"step": 12, "past": second.state()}
    second.close()
    shutil.rmtree(tmp_path / "first")

    again = past(tmp_path / "second")
    own = tmp_path / "second/teachers/self-00000008"
    assert again.begin(state, tmp_path / "second/checkpoints/step-12", write) == {"": str(own)}
    again.bring()  # there is nothing to bring
    again.prune([12])
    assert (own / "model.safetensors").read_text() == "self-00000008"
    assert [p.name for p in own.parent.iterdir()] == [own.name]


def test_a_snapshot_that_goes_before_it_is_brought_is_one_clear_line(tmp_path) -> None:
    first = past(tmp_path / "first")
    write(first.path("self", 8))
    first.kept("self", 8)
    second = past(tmp_path / "second")
    second.begin({"step": 10, "past": first.state()}, tmp_path / "first/checkpoints/step-10", write)
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(checkpoint.CheckpointError, match="can't copy"):
        second.bring()
    assert not any((tmp_path / "second").rglob("*.safetensors"))
