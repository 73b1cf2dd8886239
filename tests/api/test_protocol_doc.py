"""docs/protocol.md says what the code does: its error table is the code's, its example runs."""

from __future__ import annotations

import re
from pathlib import Path

from teacher_api import errors

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(\w+)` \| (\d+) \| (\w+) \| (yes|no) \|", re.MULTILINE)


def test_the_error_table_is_the_codes():
    documented = {kind: (int(http), code, retry == "yes") for kind, http, code, retry in ROW.findall(TEXT)}
    assert documented == {kind: (c.http_status, c.grpc_code, c.retryable) for kind, c in errors.KINDS.items()}


def test_the_table_names_every_http_status_once_per_kind():
    kinds = [kind for kind, *_ in ROW.findall(TEXT)]
    assert len(kinds) == len(set(kinds))


def test_the_python_example_compiles_and_asks_what_it_says():
    (example,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    before_call = example.split("with TeacherClient")[0]
    request_line = next(line for line in example.splitlines() if "request =" in line)
    names: dict[str, object] = {}
    exec(before_call + request_line.strip(), names)
    request = names["request"]
    assert request.completions[0].prompt_index == 0
    assert request.prompts[0].tolist() == [1, 2, 3]
