"""What an output directory remembers of its run, and what may go on in it: the same experiment from its newest whole
checkpoint, or nothing at all. Owns run.json; checkpoints themselves are checkpoint.py's.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from student_trainer import checkpoint
from student_trainer.config import TrainConfig, differences, experiment
from student_trainer.data import DataError, Prompts
from student_trainer.teachers.config import ONLY
from teacher_api.settings import dump_yaml

RUN_FILE, CONFIG_FILE, FINAL, AVERAGE, LOCK_FILE = ("run.json", "config.yaml", "final", "ema", ".lock")
CLAIM_WAIT_S, CLAIM_POLL_S = 20.0, 0.1
"""How long a run that was told to end, or whose parent was killed, may take to leave its directory."""
SHOWN_DIFFERENCES = 5


class ResumeError(ValueError):
    """The output directory and the command don't go together; the message says what differs and what to do."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run begins: at a checkpoint, or fresh."""

    checkpoint: Path | None
    state: dict[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return int(self.state.get("step", 0))


def find_start(config: TrainConfig) -> Start:
    """Decides from train.output_dir and checkpoint.resume.

    Raises:
        ResumeError: the directory holds another experiment, a run that must not be gone on with, or one that is past
            train.steps.
        CheckpointError: the checkpoint that the run begins from is not whole.
    """
    start = look(config)
    if start.step > config.train.steps:
        raise ResumeError(
            f"{start.checkpoint} is at step {start.step}, train.steps is {config.train.steps}; ask for at least "
            "as many, or use another train.output_dir"
        )
    return start


def look(config: TrainConfig) -> Start:
    """As `find_start`, for a run whose length is not known yet."""
    run_dir, resume = Path(config.train.output_dir), config.checkpoint.resume
    if run_dir.exists() and not run_dir.is_dir():
        raise ResumeError(f"train.output_dir {run_dir} is a file; expected a directory, or a name that is free")
    recorded = _recorded(run_dir)
    if recorded is not None:
        changed = differences(recorded["experiment"], experiment(config))
        if changed:
            more = f" and {len(changed) - SHOWN_DIFFERENCES} more" if len(changed) > SHOWN_DIFFERENCES else ""
            raise ResumeError(
                f"train.output_dir {run_dir} holds a run with another configuration: "
                f"{'; '.join(changed[:SHOWN_DIFFERENCES])}{more}. Use those values again, or another directory"
            )
    if resume == "never":
        if recorded is not None:
            raise ResumeError(
                f"train.output_dir {run_dir} holds a run and checkpoint.resume is never; use another directory"
            )
        return Start(None, {})
    named = "" if resume == "auto" else str(Path(resume).expanduser().resolve())
    began_from = named if recorded is None else str(recorded.get("began_from", ""))
    if named and named != began_from:
        raise ResumeError(
            f"train.output_dir {run_dir} holds a run that did not begin from {resume}; use another directory, or go on "
            "with that run by leaving checkpoint.resume out"
        )
    latest, passed_over = checkpoint.find_whole(run_dir)
    if latest is None and began_from:
        latest = Path(began_from)
    goes_on = f"the run goes on from {latest}" if latest else "the run begins anew"
    warnings = tuple(f"{wrong}; {goes_on}" for wrong in passed_over)
    return Start(latest, {} if latest is None else checkpoint.read_state(latest), warnings)


def fingerprints(start: Start) -> dict[str, str]:
    """Of the teachers that the run was trained by so far, by their names in it; none where it begins."""
    only = start.state.get("teacher_fingerprint")  # as it was written before there could be several
    return dict(start.state.get("teacher_fingerprints", {ONLY: only} if only else {}))


def go_on_with_prompts(start: Start, config: TrainConfig, prompts: Prompts) -> None:
    """Lets a stream go on where the checkpoint left it. A run begun from another's checkpoint has its own prompts.

    Raises:
        ResumeError: the run would go on with other prompts than it was trained on so far, and that is not allowed.
    """
    before = start.state.get("prompts")
    if not before or start.checkpoint is None:
        return
    if not start.checkpoint.resolve().is_relative_to(Path(config.train.output_dir).resolve()):
        return
    cure = "put the old ones back, or pass --accept-new-prompts to go on with the new ones"
    verify, digest = not config.checkpoint.accept_new_prompts, prompts.digest()
    if verify and before["digest"] != digest:
        raise ResumeError(
            f"data.source {config.data.named} has changed: {start.checkpoint} was trained on "
            f"{_number_of(before['count'])} prompts with digest {before['digest']}, now there are "
            f"{_number_of(prompts.num_prompts)} with {digest}; {cure}"
        )
    try:
        prompts.restore(before.get("state", {}), verify=verify)
    except DataError as error:
        raise ResumeError(f"{error}; {cure}") from error


def prompts_state(prompts: Prompts, place: int, seed: int) -> dict[str, Any]:
    """What a checkpoint keeps of its prompts: what the resumed run is held to, and where in a stream it goes on."""
    return {"count": prompts.num_prompts, "digest": prompts.digest(), "state": prompts.state(place, seed)}


def _number_of(count: int | None) -> str:
    return "a stream of" if count is None else str(count)


def claim(run_dir: Path, wait_s: float = CLAIM_WAIT_S) -> IO[str]:
    """Takes the output directory for this process, until the file that is returned is closed or the process ends,
    however it ends: two runs in one directory would remove each other's checkpoints while they are written.

    Raises:
        ResumeError: another process has it still after `wait_s`, or the directory can't be made.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK_FILE).open("a")
    except OSError as error:
        raise ResumeError(f"train.output_dir {run_dir} can't be written: {error}") from error
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                raise ResumeError(
                    f"train.output_dir {run_dir} is in use by another student-train; stop that one first, or use "
                    "another directory"
                ) from None
            time.sleep(CLAIM_POLL_S)
        except OSError:  # a file system without locks: as safe as its users
            return file
        else:
            return file


def record(config: TrainConfig) -> None:
    """Writes run.json, which later starts are held against, and the resolved configuration for people to read.

    Raises:
        ResumeError: the directory can't be made or written to.
    """
    run_dir, resume = Path(config.train.output_dir), config.checkpoint.resume
    recorded = _recorded(run_dir)
    if recorded is not None:
        began_from = str(recorded.get("began_from", ""))
    else:
        began_from = "" if resume in ("auto", "never") else str(Path(resume).expanduser().resolve())
    content = {"experiment": experiment(config), "began_from": began_from}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _replace(run_dir / CONFIG_FILE, dump_yaml(config))
        _replace(run_dir / RUN_FILE, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise ResumeError(f"train.output_dir {run_dir} can't be written: {error}") from error


def _recorded(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / RUN_FILE
    if not path.exists():
        return None
    try:
        recorded: dict[str, Any] = json.loads(path.read_text())
        dict(recorded["experiment"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{path} can't be read: {error}; use another train.output_dir") from error
    return recorded


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
