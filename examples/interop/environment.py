"""The environment that the other programs are installed in, `make interop`, and how they are run there: offline, and
with nothing of this project in sight."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-interop"
OURS = ("PYTHONPATH", "TEACHER_", "STUDENT_", "VLLM_")  # beginnings of variables that are not theirs to see


class InteropError(Exception):
    """A program is missing or failed; shown without a traceback."""


def program(venv: Path, name: str) -> Path:
    """Path of a command of that environment."""
    path = venv / "bin" / name
    if not path.exists():
        raise InteropError(f"there is no {path}; `make interop` installs lm-evaluation-harness and TRL")
    return path


def run(command: Sequence[str | Path], folder: Path, log: Path, extra: Mapping[str, str] | None = None) -> None:
    """Runs `command` with its caches under `folder` and its output in `log`.

    Raises:
        InteropError: it ended with another status than 0.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    offline = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    quiet = {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
    with log.open("w") as stream:
        ended = subprocess.run(
            [str(part) for part in command],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=kept | offline | quiet | dict(extra or {}),
            cwd=folder,
            check=False,
        )
    if ended.returncode:
        raise InteropError(
            f"{Path(command[0]).name} ended with {ended.returncode}; the end of {log}:\n{log.read_text()[-3000:]}"
        )
