"""What the files in deploy/ say, read by the programs that they are for."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from imagebuild import ROOT

from teacher_api import settings
from teacher_server.config import SHORTCUTS, ServerConfig

DEPLOY = ROOT / "deploy"
FORMS = {"gpu": "", "cpu": "deploy/compose.yaml:deploy/compose.cpu.yaml"}
"""COMPOSE_FILE of each; empty: what the `.env` says."""
V2 = Path(sys.prefix) / "bin" / "docker-compose"
V1 = Path("/usr/bin/docker-compose")
"""Debian's: the last version written in Python."""


def compose(form: str, program: Path = V2, **variables: str) -> dict[str, Any]:
    """compose.yaml as Compose understands it, from the repository's root with nothing else in the environment."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "COMPOSE_PROFILES": "student"}
    if FORMS[form]:
        environment["COMPOSE_FILE"] = FORMS[form]
    environment |= variables
    done = subprocess.run([program, "config"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    result = yaml.safe_load(done.stdout)
    assert isinstance(result, dict)
    return result


def is_v1() -> bool:
    return V1.exists() and "version 1.29" in subprocess.run([V1, "version"], capture_output=True, text=True).stdout


def server_config(environment: Mapping[str, str], secret: Path) -> ServerConfig:
    """What teacher-serve makes of a container's environment. Raises SettingsError for an unknown name or value."""
    places = {"/run/secrets/teacher": str(secret)}
    environ = {name: places.get(value, value) for name, value in environment.items()}
    config, _ = settings.load(
        ServerConfig,
        [],
        prog="teacher-serve",
        description="",
        env_prefix="TEACHER_",
        shortcuts=SHORTCUTS,
        flat=True,
        environ=environ,
    )
    return config


def seconds(text: str) -> float:
    """Of `1m20s`, `30m0s`, `80s`."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    parts = re.findall(r"(\d+)([hms])", text)
    assert "".join(number + unit for number, unit in parts) == text, text
    return sum(float(number) * units[unit] for number, unit in parts)


def without_nulls(environment: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if value is not None}


def promtool() -> str | None:
    return shutil.which("promtool")


def documented(name: str, language: str) -> str:
    """The fenced block of docs/deployment.md whose first line is `# name`."""
    text = (ROOT / "docs/deployment.md").read_text()
    (block,) = re.findall(rf"```{language}\n(# {re.escape(name)}\n.*?)```", text, re.DOTALL)
    return str(block)
