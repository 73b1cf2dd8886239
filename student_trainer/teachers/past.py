"""Teachers that are the student's own past: the weights of an earlier step, or their moving average, served from a
child of the main rank. Owns the snapshots on disk (`<output_dir>/teachers`), which of them teaches which step, and the
children.

Invariants: step s is taught by the weights after r(s) = every · ⌊s / every⌋ steps (of `refresh_every`; 0: always those
that the run began with); a snapshot is on disk before any checkpoint that needs it, and stays as long as one does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from student_trainer import checkpoint
from student_trainer.teachers.config import TeacherConfig, prefix
from student_trainer.types import Metrics

FOLDER = "teachers"
Serve = Callable[[TeacherConfig, str], AbstractContextManager[str]]
"""Serves the model at a path as long as it is open; gives the URL."""


class PastTeachers:
    """The run's teachers with `model: self` or `model: ema`; there may be none.

    Args:
        teachers: all of the run's, by name.
        run_dir: where snapshots are kept.
        serve: launch.local_teacher.
        is_main: this rank has the children and the files.
    """

    def __init__(
        self, teachers: Mapping[str, TeacherConfig], run_dir: Path, serve: Serve, *, is_main: bool = True
    ) -> None:
        self.teachers = {name: one for name, one in teachers.items() if one.is_past}
        self.served: dict[str, int] = {}  # step of the weights that teach now
        self.digests: dict[str, str] = {}  # of the snapshots on disk, by name
        self.history: list[list[Any]] = []  # [step of the weights, teacher, fingerprint], in order
        self._borrowed: dict[str, Path] = {}  # snapshots that another run has, by name
        self._folder = run_dir / FOLDER
        self._serve = serve
        self._is_main = is_main
        self._children = {name: contextlib.ExitStack() for name in self.teachers}

    def begin(self, state: Mapping[str, Any], began: Path | None, initial: Callable[[Path], None]) -> dict[str, str]:
        """Serves what teaches the first step; URLs by name, empty on other ranks.

        Args:
            state: of the checkpoint that the run goes on from; empty where it begins.
            began: that checkpoint.
            initial: writes the student as it began to a path.

        Raises:
            CheckpointError: a snapshot is not there, or not what it was.
        """
        step = int(state.get("step", 0))
        past = state.get("past", {})
        self.digests, self.history = dict(past.get("snapshots", {})), list(past.get("history", []))
        self.served = {name: self.weights_of(name, step) for name in self.teachers}
        if not self._is_main:
            return {}
        urls = {}
        for name, at in self.served.items():
            if at:
                path = self._whole(self._name(name, at), began)
                urls[name] = self._children[name].enter_context(self._serve(self.teachers[name], str(path)))
                continue
            folder = self._children[name].enter_context(tempfile.TemporaryDirectory(prefix="student-"))
            path = Path(folder) / self._name(name, 0)
            initial(path)
            urls[name] = self._children[name].enter_context(self._serve(self.teachers[name], str(path)))
        return urls

    def bring(self) -> None:
        """Copies what is served from another run's directory, where this one began, to its own, which its checkpoints
        will need; main rank.

        Raises:
            CheckpointError: the disk refused, or the other run has deleted it.
        """
        for name, path in self._borrowed.items():
            checkpoint.copy(path, self._folder / name)
        self._borrowed = {}

    def weights_of(self, name: str, step: int) -> int:
        """r(step): after how many steps the weights were that teach `step`."""
        every = self.teachers[name].refresh_every
        return step // every * every if every else 0

    def held_to(self, state: Mapping[str, Any], fingerprints: Mapping[str, str]) -> dict[str, str]:
        """Of the fingerprints that a checkpoint names, those that must still be found: a newer snapshot has another."""
        served = state.get("past", {}).get("served", {})
        return {n: f for n, f in fingerprints.items() if n not in self.served or served.get(n) == self.served[n]}

    def kinds_due(self, step: int) -> list[str]:
        """What is to be kept of the student after `step` steps: self, ema, or both."""
        due = [one.model for one in self.teachers.values() if one.refresh_every and step % one.refresh_every == 0]
        return sorted(set(due))

    def path(self, kind: str, step: int) -> Path:
        return self._folder / _snapshot(kind, step)

    def kept(self, kind: str, step: int) -> None:
        """Notes a snapshot that has just been written; main rank."""
        self.digests[_snapshot(kind, step)] = _digest(self.path(kind, step))

    def outdated(self, step: int) -> list[str]:
        """The teachers that something newer takes the place of before `step`."""
        return [name for name in self.teachers if self.served[name] != self.weights_of(name, step)]

    def refresh(self, name: str, step: int) -> str:
        """Serves what teaches `step` in place of what is served; main rank. The old child ends first: there may be no
        room for two."""
        self._children[name].close()
        path = self._whole(self._name(name, self.weights_of(name, step)), None)
        return self._children[name].enter_context(self._serve(self.teachers[name], str(path)))

    def note(self, name: str, step: int, fingerprint: str) -> None:
        """A teacher is now the weights that teach `step`."""
        self.served[name] = self.weights_of(name, step)
        entry = [self.served[name], name, fingerprint]
        if entry not in self.history:  # a run that goes on finds what it knows
            self.history.append(entry)

    def state(self) -> dict[str, Any]:
        """For a checkpoint; JSON values."""
        return {"served": self.served, "snapshots": self.digests, "history": self.history}

    def figures(self) -> Metrics:
        """How old the teachers are: the steps after which their weights were taken."""
        return {f"{name}/step" if name else "teacher_step": float(step) for name, step in self.served.items()}

    def prune(self, steps: Iterable[int]) -> None:
        """Deletes snapshots that neither the checkpoints at `steps` need nor a teacher is served from."""
        needed = {self._name(n, at) for n, at in self.served.items()}
        needed |= {self._name(n, self.weights_of(n, step)) for n in self.teachers for step in steps}
        for path in self._folder.glob("*-*"):
            if path.name not in needed and not path.name.startswith("."):
                shutil.rmtree(path)
                self.digests.pop(path.name, None)

    def close(self) -> None:
        for child in self._children.values():
            child.close()

    def _name(self, name: str, step: int) -> str:
        return _snapshot(self.teachers[name].model, step)

    def _whole(self, name: str, began: Path | None) -> Path:
        """The snapshot, in this run's directory or, where it begins from another's checkpoint, in that one's."""
        path = self._folder / name
        if not path.is_dir() and began is not None:
            path = began.resolve().parent.parent / FOLDER / name
            self._borrowed[name] = path
        if not path.is_dir() or name not in self.digests:
            raise checkpoint.CheckpointError(
                f"{path}: not there, or not of the run that goes on: one of its teachers is the student after so many "
                "steps; put it back, go on from a run with such a teacher, or begin one with student.model"
            )
        if _digest(path) != self.digests[name]:
            raise checkpoint.CheckpointError(f"{path} does not match its digest: it was changed or damaged")
        return path


def check_past(teachers: Mapping[str, TeacherConfig], ema_decay: float) -> None:
    """Raises ValueError for a teacher that would be an average that nobody keeps."""
    for name, one in teachers.items():
        if one.model == "ema" and not ema_decay:
            raise ValueError(f"{prefix(name)}.model: got ema with optim.ema_decay 0, expected a decay to average with")


def _snapshot(kind: str, step: int) -> str:
    return f"{kind}-{step:08d}"


def _digest(path: Path) -> str:
    files = json.dumps(checkpoint.describe(path), sort_keys=True)
    return hashlib.blake2b(files.encode(), digest_size=16).hexdigest()
