"""`python -m examples.calculator`: see docs/training.md, "Environments and tools"."""

import argparse
import os
import signal
import sys
from pathlib import Path

# Read when torch is loaded. Threads that spin while they wait lose several times the speed where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import transformers
from rich.console import Console

from examples.calculator.run import FAST, FULL, run
from examples.quickstart.services import QuickstartError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.calculator", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of problems, models, samples (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("runs/calculator"), help="where results go; must not exist")
    parser.add_argument("--fast", action="store_true", help="the same path scaled down, for tests: learns nothing")
    arguments = parser.parse_args()
    if arguments.seed < 0:
        parser.error(f"--seed {arguments.seed} is negative")
    transformers.utils.logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the teacher is stopped on the way out
    try:
        run(FAST if arguments.fast else FULL, arguments.seed, arguments.output, Console())
    except QuickstartError as error:
        print(f"calculator: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
