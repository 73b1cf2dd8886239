"""The table of docs/reliability.md says what passed tests saw, and what nothing showed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import reliability_table
from reliability import holds
from reliability_table import BEGIN, END, NOT_ON_A_CPU, ROWS

pytestmark = pytest.mark.slow

SUITE = """
from reliability import holds

def test_good(record_property):
    holds(record_property, "S8", "p99 12 ms | bound 50 ms")
    holds(record_property, "C2", "1.1 attempts a request", machine="one H100")

def test_bad(record_property):
    holds(record_property, "S9", "p95 2.0x")
    assert False
"""
DOCUMENT = f"# Head\n\n{BEGIN}\nformerly\n{END}\n\ntail\n"


def test_what_passed_is_in_the_table_and_what_failed_is_told(tmp_path: Path):
    (tmp_path / "test_two.py").write_text(SUITE)
    junit, document = tmp_path / "short.xml", tmp_path / "doc.md"
    document.write_text(DOCUMENT)
    tests = Path(__file__).parent
    options = [
        "-p",
        "no:cacheprovider",
        "-o",
        "junit_family=xunit1",
        "-o",
        f"pythonpath={tests}",
        "--junitxml",
        str(junit),
    ]
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *options, str(tmp_path)], cwd=tmp_path, capture_output=True, timeout=120
    )
    command = [sys.executable, str(tests / "reliability_table.py"), str(junit), "--document", str(document)]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert made.returncode == 1
    assert "failed: test_bad" in made.stderr
    missing = re.search("no test: (.*)", made.stderr)
    assert missing
    assert set(missing[1].split(", ")) == ROWS.keys() - {"S8", "C2"}
    written = document.read_text()
    assert written.startswith("# Head\n")
    assert written.endswith("\ntail\n")
    assert "formerly" not in written
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in written.splitlines() if line.startswith("| ")}
    assert "test_two.py: `test_good`" in rows["S8"]
    assert "short: p99 12 ms \\| bound 50 ms" in rows["S8"]
    assert "1.1 attempts a request (one H100)" in rows["C2"]
    assert "nothing in this run" in rows["S9"]
    assert NOT_ON_A_CPU["S24"] in rows["S24"]


def test_a_document_without_the_marks_is_refused():
    with pytest.raises(ValueError, match="marks"):
        reliability_table.replaced("# Head\n", "table")


@pytest.mark.parametrize(("row", "figure"), [("X1", "1 s"), ("S8", " "), ("S", "1")])
def test_a_row_that_is_none_and_a_figure_that_says_nothing_are_refused(row: str, figure: str):
    with pytest.raises(AssertionError):
        holds(lambda *_: None, row, figure)
