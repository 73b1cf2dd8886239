"""SECURITY.md names the tests that hold what it promises: they exist. So do the options that it tells of."""

from __future__ import annotations

import re
from pathlib import Path

from teacher_server.config import ServerConfig

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "SECURITY.md").read_text()


def test_the_tests_that_are_named_exist():
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    named = set(re.findall(r"`(test_\w+(?:\.py)?)`", TEXT))
    assert len(named) > 8
    for name in named:
        assert name in files or any(f"def {name}(" in text for text in files.values()), name


def test_the_options_that_are_named_exist():
    for name in set(re.findall(r"`--([a-z-]+)", TEXT)):
        assert name.replace("-", "_") in ServerConfig.model_fields, name
