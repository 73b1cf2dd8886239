"""Writes the table of docs/reliability.md from pytest's junit files: one line a check, with the tests that showed it
(those which called `reliability.holds` and passed), what they saw, and in which run. `make reliability` calls it.

    python tests/reliability_table.py run.xml [run-long.xml …]

A run's name is its file's. Exit status 1 where a check has no test that passed.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- made by `make reliability`: begin -->", "<!-- made by `make reliability`: end -->"

ROWS: Mapping[str, str] = {
    "S1": "`/livez` ≤ 1 s after the start; `/readyz` 503 until the self-check; a broken model: exit ≠ 0, one line",
    "S2": "engine hung: `/readyz` 503 ≤ 10 s, `/livez` fails at `stall_s`; under full load `/livez` never fails",
    "S3": "engine killed: calls in flight fail as retryable ≤ 2 s; up again ≤ 10 s + load time; no call hangs",
    "S4": "SIGTERM, 32 calls in flight, half a body: 0 failed; exit 0 ≤ lame duck + grace + 1 s; a second: ≤ 1 s",
    "S6": "a deadline behind a long job: on time, and the backend never ran it",
    "S7": "a caller that leaves: its queued work is dropped ≤ 1 s",
    "S8": "10× burst: queue within its bound, the rest 429; rejects' p99 < 50 ms; goodput ≥ 90 % of unloaded",
    "S9": "64 callers against one in series: its p95 ≤ 3× alone; shares of tokens within 5 % of 1:1 and 1:2:4",
    "S10": "one poison request among 16: it alone fails",
    "S11": "body over the limit, 1 GB in chunks, wrong ids, lengths, K: 4xx, the field, memory bounded, no work",
    "S12": "NaN, Infinity, deep JSON: 400; NaN or short output of a backend: withheld; finite numbers on the wire",
    "S13": "errors ≤ 4 KiB, without an echo of the input",
    "S14": "every route and method needs the key but the probes; rotation; mTLS refuses a wrong authority",
    "S15": "token rate per key within 5 %, others unaffected; obeying Retry-After works the first time ≥ 95 %",
    "S16": "200 half-sent headers, 200 half-sent bodies: closed ≤ 10 s, others' p95 ≤ 2×",
    "S17": "a duplicate in flight: equal to the bit, computed once",
    "S18": "request id in header, trailer, error, log, span; CRLF refused",
    "S19": "metrics: received = Σ outcomes after a soak",
    "S21": "bytes of every released message decode; another fingerprint is refused, naming both",
    "S22": "fuzz: 2,000 cases over OpenAPI, gRPC descriptors, 10,000 raw bodies: no 5xx but a meant 503, still serving",
    "S23": "soak at 80 % load, 5 % faults: memory flat, descriptors, tasks, threads ± 2; a leaking backend is noticed",
    "S24": "scores ≤ 1e-5 of a float32 forward; alone = batched = after shared prefixes (vLLM ≤ 1e-3)",
    "C1": "what is asked again is exactly what the table of errors says; unknown errors are not",
    "C2": "32 clients after an outage of 10 s: attempts per request ≤ 1.2, no thundering herd",
    "C3": "a dripping connection: the call ends at its deadline; no answer is handed out twice",
    "C4": "a half-open connection: the same",
    "C5": "1,000 bit flips in a response: none accepted",
    "C6": "3 URLs, 2 killed: nothing lost, traffic back after recovery, a replica with another fingerprint refused",
}
NOT_ON_A_CPU: Mapping[str, str] = {
    "S2": "A hang inside a GPU's kernel is not among the tests; the rule that notices it knows nothing of kernels.",
    "S24": "The numbers are a CPU's, in float32; a GPU's in bfloat16 depend on its kernels.",
}
"""What of a row a machine without a GPU can't show."""


FIGURES_OF_A_TEST = 3


@dataclass(frozen=True)
class Seen:
    test: str
    figure: str
    run: str
    machine: str


def read(path: Path) -> tuple[dict[str, list[Seen]], list[str]]:
    """What the passed tests of one junit file showed, by row; and the names of those that showed a row and failed."""
    found: dict[str, list[Seen]] = {}
    failed = []
    for case in ET.parse(path).getroot().iter("testcase"):
        properties = [(p.get("name", ""), p.get("value", "")) for p in case.iter("property")]
        rows = [value for name, value in properties if name == "reliability"]
        if any(case.find(outcome) is not None for outcome in ("failure", "error", "skipped")):
            failed += [case.get("name", "")] if rows else []
            continue
        test = f"{case.get('classname', '').rpartition('.')[2]}.py: `{case.get('name', '').partition('[')[0]}`"
        values = dict(properties)
        for row in dict.fromkeys(rows):
            figures = [value for name, value in properties if name == f"figure {row}"]
            seen = [Seen(test, figure, path.stem, values.get(f"machine {row}", "")) for figure in figures]
            found.setdefault(row, []).extend(seen)
    return found, failed


def table(found: Mapping[str, Iterable[Seen]]) -> str:
    lines = ["| # | what must hold | shown by | seen |", "|---|---|---|---|"]
    for row, meaning in ROWS.items():
        seen = list(found.get(row, ()))
        tests = "<br>".join(dict.fromkeys(one.test for one in seen)) or "**nothing in this run**"
        told = "<br>".join(_figures(seen))
        if row in NOT_ON_A_CPU:
            told = "<br>".join(filter(None, [told, f"*{NOT_ON_A_CPU[row]}*"]))
        lines.append(f"| {row} | {meaning} | {tests} | {told} |")
    return "\n".join(lines)


def _figures(seen: Iterable[Seen]) -> list[str]:
    """One line a figure; of a test with many cases the first ones stand for all."""
    by_test: dict[tuple[str, str], dict[str, None]] = {}
    for one in seen:
        figure = one.figure.replace("|", "\\|") + (f" ({one.machine})" if one.machine else "")
        by_test.setdefault((one.run, one.test), {})[figure] = None
    lines = []
    for (run, _), figures in by_test.items():
        few = list(figures)[:FIGURES_OF_A_TEST]
        more = f"; {len(figures) - len(few)} more alike" if len(figures) > len(few) else ""
        lines.append(f"{run}: {'; '.join(few)}{more}")
    return lines


def machine() -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return f"commit {commit.strip() or 'unknown'}, {platform.machine()}, {os.cpu_count()} cores"


def replaced(document: str, text: str) -> str:
    """Raises ValueError where `document` has not both marks."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the marks {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the table of docs/reliability.md.")
    parser.add_argument("junit", nargs="+", type=Path)
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "reliability.md")
    args = parser.parse_args()
    found: dict[str, list[Seen]] = {}
    failed: list[str] = []
    for path in args.junit:
        shown, broken = read(path)
        failed += broken
        for row, seen in shown.items():
            found.setdefault(row, []).extend(seen)
    unknown = sorted(found.keys() - ROWS.keys())
    missing = [row for row in ROWS if row not in found]
    note = f"Runs: {', '.join(path.stem for path in args.junit)}; {machine()}."
    args.document.write_text(replaced(args.document.read_text(), f"{note}\n\n{table(found)}"))
    for complaint, names in (("no test", missing), ("failed", failed), ("no such row", unknown)):
        if names:
            print(f"reliability: {complaint}: {', '.join(names)}", file=sys.stderr)
    return 1 if missing or failed or unknown else 0


if __name__ == "__main__":
    raise SystemExit(main())
