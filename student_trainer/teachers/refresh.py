"""What a run does for teachers that are the student's own past: it keeps snapshots for them, and puts newer ones in
their place. Called by every rank at the same point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from student_trainer import checkpoint

if TYPE_CHECKING:
    from student_trainer.run import Run


def keep(run: Run) -> None:
    """Writes the snapshots of the student, as it is now, that later steps are taught by.

    Raises:
        CheckpointError: the disk refused.
    """
    for kind in run.past.kinds_due(run.step):
        run.export(run.past.path(kind, run.step), averaged=kind == "ema")
        if run.dist.is_main:
            run.past.kept(kind, run.step)


def refresh(run: Run) -> None:
    """Where something newer is to teach the next step: starts it, and shakes hands with it.

    Raises:
        StopRequested, TeacherGone: the checkpoint of the last whole step has been written.
        ValueError, CheckpointError, TeacherError: it can't be served or used.
    """
    for name in run.past.outdated(run.step):
        url = ""
        with run.whole_or_not_at_all():
            if run.dist.is_main:
                url = run.past.refresh(name, run.step)
        url = run.dist.first(url)
        with run.whole_or_not_at_all():
            run.scorer.reconnect(name, url)
        fingerprint = run.scorer.fingerprints[name]
        run.past.note(name, run.step, fingerprint)
        if run.dist.is_main:
            run.past.prune(checkpoint.steps(run.run_dir))
        who, served = f"teacher {name}" if name else "the teacher", run.past.served[name]
        run.console.say(f"step {run.step}: {who} is now the student after {served} steps, fingerprint {fingerprint}")
