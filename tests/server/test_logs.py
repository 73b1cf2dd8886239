"""Lines are JSON whoever writes them: the server, libraries in its process, and vLLM's loggers as vLLM sets them up."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from teacher_server import logs

OURS = """
import logging, sys
from teacher_server import logs
logs.configure("json", "info")
import structlog
log = structlog.get_logger("teacher_server.test")
with structlog.contextvars.bound_contextvars(request_id="an-id"):
    log.info("said", text="a line\\nand another")
    logging.getLogger("library").warning("of a %s", "library")
log.debug("not at this level")
try:
    raise ValueError("broken")
except ValueError as error:
    log.error("failed", exc_info=error)
    logging.getLogger("library").exception("failed too")
"""
VLLMS = """
from teacher_server import logs
logs.vllm_in_json()
from teacher_server.backends.vllm_engine import prepare_environment
prepare_environment()
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging, init_logger
configure_logging(LoggingConfig())  # as its engine does in each of its processes
init_logger("vllm.test").warning("a line\\nand %s", "another")
init_logger("vllm.test").info("not at this level")
"""


def lines(program: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=kept)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


def test_every_line_is_an_object_with_the_requests_id() -> None:
    said, library, failed, too = map(json.loads, lines(OURS))
    assert (said["event"], said["text"], said["request_id"]) == ("said", "a line\nand another", "an-id")
    assert (said["level"], said["logger"]) == ("info", "teacher_server.test")
    assert (library["event"], library["request_id"]) == ("of a library", "an-id")
    assert (library["level"], library["logger"]) == ("warning", "library")
    for line in (failed, too):
        assert line["level"] == "error"
        assert "ValueError: broken" in line["exception"]
        assert "request_id" not in line
    assert all("timestamp" in line for line in (said, library, failed, too))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllms_loggers_write_json() -> None:
    (line,) = [json.loads(line) for line in lines(VLLMS) if "and another" in line]
    assert (line["event"], line["level"], line["logger"]) == ("a line\nand another", "warning", "vllm.test")
    assert line["vllm_process_name"]


@pytest.mark.parametrize(
    ("said", "ours"),
    [
        ({}, True),
        ({"VLLM_LOGGING_LEVEL": "WARNING"}, True),
        ({"VLLM_LOGGING_LEVEL": "INFO"}, False),
        ({"VLLM_CONFIGURE_LOGGING": "0"}, False),
        ({"VLLM_LOGGING_CONFIG_PATH": "theirs.json"}, False),
    ],
)
def test_what_the_environment_says_of_vllms_logs_holds(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], ours: bool
) -> None:
    for name in ("VLLM_LOGGING_LEVEL", "VLLM_CONFIGURE_LOGGING", "VLLM_LOGGING_CONFIG_PATH"):
        monkeypatch.setenv(name, "")  # so that it is as it was, afterwards
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    logs.vllm_in_json()
    found = os.environ.get("VLLM_LOGGING_CONFIG_PATH", "")
    assert Path(found).name == ("vllm_logging.json" if ours else said.get("VLLM_LOGGING_CONFIG_PATH", ""))
    assert not ours or json.loads(Path(found).read_text())["version"] == 1
