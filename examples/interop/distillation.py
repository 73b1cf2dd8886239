"""`python -m examples.interop.distillation`: TRL distils a small student from a server through its
`ServerDistillationTrainer`."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from pathlib import Path

from examples.interop import harness, parts
from examples.interop.environment import VENV, InteropError, program, run

SCRIPT = Path(__file__).with_name("train_with_trl.py")
FORWARD_KL, REVERSE_KL = ("--beta", "0", "--top-k", "16"), ("--beta", "1", "--top-k", "1")


def distil(
    teacher: tuple[str, str | Path], tokenizer: Path | str, folder: Path, *options: str, venv: Path = VENV
) -> list[float]:
    """The loss of each step.

    Args:
        teacher: ("--teacher-url", a server's URL without /v1), or ("--teacher-model", a checkpoint that TRL loads).
        tokenizer: the teacher's, a folder or a hub id; the student is made with it.
        folder: for the student, prompts, losses and TRL's log.
        options: of train_with_trl.py.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    command = [
        program(venv, "python"), "-P", SCRIPT, *teacher,
        "--student", parts.student(folder / "student", tokenizer),
        "--prompts", parts.prompts(folder / "prompts.jsonl"),
        "--output", folder, *options,
    ]  # fmt: skip
    run(command, folder, folder / "trl.log", {"OMP_NUM_THREADS": "1"})
    losses: list[float] = json.loads((folder / "losses.json").read_text())
    return losses


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.interop.distillation", description=__doc__)
    harness.add_arguments(parser, Path("runs/interop/distillation"))
    parser.add_argument(
        "--reverse", action="store_true", help="reverse KL of the sampled token; else forward KL, top 16"
    )
    parser.add_argument("--steps", type=int, default=20, help="of training (default: 20)")
    arguments = parser.parse_args()
    harness.check_arguments(parser, arguments)
    objective = REVERSE_KL if arguments.reverse else FORWARD_KL
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    try:
        program(arguments.venv, "python")
        with contextlib.ExitStack() as stack:
            url, tokenizer = harness.chosen(arguments, stack)
            steps = ("--steps", str(arguments.steps))
            losses = distil(
                ("--teacher-url", url), tokenizer, arguments.output, *objective, *steps, venv=arguments.venv
            )
    except InteropError as error:
        print(f"distillation: {error}", file=sys.stderr)
        return 1
    for step, loss in enumerate(losses, start=1):
        print(f"step {step:4}  loss {loss:.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
