"""`python -m examples.quickstart`: see docs/quickstart.md."""

import time

_STARTED = time.monotonic()  # before the slow imports: they count

import argparse  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

# Read when torch is loaded. Threads that spin while they wait lose several times the speed where cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import transformers  # noqa: E402
from rich.console import Console  # noqa: E402

from examples.quickstart.run import quickstart  # noqa: E402
from examples.quickstart.services import QuickstartError  # noqa: E402
from examples.quickstart.settings import FAST, FULL  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of problems, models, samples (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="where results go")
    parser.add_argument("--cache", type=Path, default=Path(".cache/quickstart"), help="where pre-trained models stay")
    parser.add_argument("--fast", action="store_true", help="the same path scaled down, for tests: learns nothing")
    arguments = parser.parse_args()
    if arguments.seed < 0:
        parser.error(f"--seed {arguments.seed} is negative")
    console = Console()
    transformers.utils.logging.disable_progress_bar()  # of shards and weights: ours are enough
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the teacher is stopped on the way out
    try:
        quickstart(
            FAST if arguments.fast else FULL, arguments.seed, arguments.output, arguments.cache, _STARTED, console
        )
    except QuickstartError as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("quickstart: interrupted; what was pre-trained stays in the cache", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
