"""`python -m benchmarks.sharing`: how a teacher is shared by a simulated fleet (sharing_fleet.py): the server's own
admission, queue and scheduler, an engine that is a formula, and a clock that nobody waits for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import sharing_fleet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--clients", type=int, default=2000)
    parser.add_argument("--tenants", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=120.0, help="simulated, after a quarter of it to warm up")
    options = parser.parse_args()
    figures = measure(options.clients, options.tenants, options.seconds)
    for name, value in figures.items():
        print(f"{name:40s} {value:14.4f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(clients: int, tenants: int, seconds: float) -> dict[str, float]:
    figures = sharing_fleet.fleet(clients, tenants, seconds)
    figures |= sharing_fleet.weighted(clients // 10, seconds)
    figures |= sharing_fleet.serial(clients, 60)
    return {f"simulated_{name}": value for name, value in figures.items()}


if __name__ == "__main__":
    main()
