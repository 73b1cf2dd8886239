"""`python -m benchmarks.sharing`: how a teacher is shared. By real callers of a real `teacher-serve` on this machine
(sharing_real.py), and by a simulated fleet (sharing_fleet.py): the server's own admission, queue and scheduler, an
engine that is a formula, and a clock that nobody waits for.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import processes, sharing_fleet, sharing_real
from benchmarks.scoring import ENVIRONMENT

PARTS = ("simulated", *sharing_real.PARTS)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharing", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what is measured; default: everything"
    )
    parser.add_argument("--quick", action="store_true", help="seconds of each: does it work at all")
    parser.add_argument("--rounds", type=int, default=0, help="of what takes turns; 0: 3, or 1 with --quick")
    parser.add_argument("--clients", type=int, default=2000, help="of the simulated fleet")
    parser.add_argument("--tenants", type=int, default=50, help="of the simulated fleet")
    parser.add_argument("--seconds", type=float, default=120.0, help="simulated, after a quarter of it to warm up")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that was started is stopped
    figures: dict[str, float] = {}
    if "simulated" in options.parts:
        figures |= simulated(options.clients, options.tenants, options.seconds)
    if set(options.parts) != {"simulated"}:
        sizes = sharing_real.QUICK if options.quick else sharing_real.Sizes()
        figures |= real(options.parts, replace(sizes, rounds=options.rounds or sizes.rounds))
    for name, value in figures.items():
        print(f"{name:40s} {value:14.4f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def simulated(clients: int, tenants: int, seconds: float) -> dict[str, float]:
    figures = sharing_fleet.fleet(clients, tenants, seconds)
    figures |= sharing_fleet.weighted(clients // 10, seconds)
    figures |= sharing_fleet.serial(clients, 60)
    return {f"simulated_{name}": value for name, value in figures.items()}


def real(parts: Sequence[str], sizes: sharing_real.Sizes) -> dict[str, float]:
    """Servers, engines and callers, all of them on two cores."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    cores = processes.engine_cores()
    os.environ.update(
        ENVIRONMENT,
        VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)),
        OMP_NUM_THREADS=str(len(cores)),
    )
    figures: dict[str, float] = {"engine_threads": len(cores)}
    for part, measure in sharing_real.PARTS.items():
        if part in parts:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as scratch:
                figures |= measure(Path(scratch), sizes)
            print(f"{part}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    return figures


if __name__ == "__main__":
    main()
