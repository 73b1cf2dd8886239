"""How a test says that it shows a row of docs/reliability.md. Records three properties in pytest's junit file, from
which `make reliability` makes the table: `reliability` = the row's id, `figure ID` = what was seen, `machine ID` =
where, unless it is the machine of the run.

A test of several rows calls `holds` for each; several tests may show one row.
"""

from __future__ import annotations

import re
from collections.abc import Callable

RecordProperty = Callable[[str, object], None]
ROW = re.compile(r"[SCT]\d{1,2}")


def holds(record_property: RecordProperty, row: str, figure: str, machine: str = "") -> None:
    """Call it last, once everything of the row that this test checks has been asserted.

    Args:
        row: an id of the tables: S8, C2, ….
        figure: what was measured, with its unit and what it was held to, in a few words:
            "p95 41 ms under load, 22 ms alone (≤ 3×)".
        machine: where a figure is of another machine than the run's, such as "one H100".
    """
    assert ROW.fullmatch(row), f"{row!r} is no row of the tables"
    assert figure.strip(), "a row without a figure"
    record_property("reliability", row)
    record_property(f"figure {row}", figure)
    if machine:
        record_property(f"machine {row}", machine)
