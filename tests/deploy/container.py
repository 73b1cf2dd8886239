"""Runs a built stage as compose.yaml asks, without a container engine: namespaces of its own for mounts, processes and
network, the image's user without capabilities, a root directory that can't be written to, volumes, secrets, tmpfs.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from imagebuild import CHROOT, Build, environment_of, exec_form, mount_script, setting

START_S = 30.0


@dataclass(frozen=True)
class Container:
    process: subprocess.Popen[str]
    pid: int  # of its first process, as this machine counts
    user: str
    environment: Mapping[str, str]
    log: Path

    def execute(self, command: Sequence[str], *, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """As `docker exec`: in its namespaces and with its environment."""
        line = ["nsenter", "-t", str(self.pid), "-m", "-n", "-p", "-r", *_as_user(self.user, self.environment, "/")]
        return subprocess.run([*line, *command], capture_output=True, text=True, timeout=timeout_s, check=False)

    def stop(self, timeout_s: float) -> tuple[int, float]:
        """As `docker stop`. Its exit status, and how long it took; raises TimeoutExpired where it would be killed."""
        start = time.monotonic()
        os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(timeout_s), time.monotonic() - start

    def said(self) -> str:
        return self.log.read_text()


@contextlib.contextmanager
def running(
    build: Build,
    stage: str,
    service: Mapping[str, Any],
    work: Path,
    *,
    volumes: Mapping[str, Path],
    secrets: Mapping[str, Path],
    environment: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
    entry_point: Sequence[str] = (),
    beside: Container | None = None,
) -> Iterator[Container]:
    """One service of compose.yaml, as Compose prints it, in an image built by `build`.

    Args:
        volumes: volume or path on the host -> directory that stands for it. A volume is given the owner that the
            image's directory has, as an engine does when it creates one.
        secrets: name -> file.
        environment: stronger than what the service says.
        arguments: after the entry point.
        entry_point: instead of the image's.
        beside: a container whose network it shares; names of services are this address.
    """
    layer, user = build.layer(stage), setting(build.stages, stage, "USER")
    place = work / "root"
    place.mkdir(parents=True)
    said = {key: value for key, value in service["environment"].items() if value is not None}
    variables = {**environment_of(build.stages, stage), **said, **(environment or {})}
    script = mount_script(place, layer, work / "overlay") + "ip link set lo up\n"
    for mount in service["volumes"]:
        script += _volume(place, layer, mount, volumes)
    for secret in service.get("secrets", []):
        target = f"{place}{secret['target']}"
        script += f"mkdir -p {place}/run/secrets; touch {target}; mount --bind {secrets[secret['source']]} {target}\n"
    (work / "hosts").write_text("127.0.0.1 localhost teacher\n")
    script += f"mount --bind {work / 'hosts'} {place}/etc/hosts\n"
    writable = {entry.split(":")[0] for entry in service.get("tmpfs", [])}
    for directory in {"/tmp", "/run"} - writable:
        script += f"mount -o remount,ro,bind {place}{directory}\n"
    assert service["read_only"] is True
    script += f"mount -o remount,ro,bind {place}\n"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    entry = [*(entry_point or exec_form(setting(build.stages, stage, "ENTRYPOINT"))), *arguments]
    line = [CHROOT, str(place), *_as_user(user, variables, setting(build.stages, stage, "WORKDIR")), *entry]
    script += f"exec {shlex.join(line)}\n"
    network = ["--net"] if beside is None else []
    joining = [] if beside is None else ["nsenter", "-t", str(beside.pid), "-n"]
    command = [*joining, "unshare", "--mount", "--pid", *network, "--fork", "--kill-child", "sh", "-ec", script]
    log = work / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True)
    try:
        yield Container(process, _first(process, log), user, variables, log)
    finally:
        process.kill()  # --kill-child takes the rest along
        process.wait()


def _as_user(user: str, environment: Mapping[str, str], directory: str) -> list[str]:
    number, group = user.split(":")
    return [
        *("setpriv", "--reuid", number, "--regid", group, "--clear-groups"),
        *("--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"),
        *("env", "-i", "-C", directory, *(f"{key}={value}" for key, value in environment.items())),
    ]


def _volume(place: Path, layer: Path, mount: Mapping[str, Any], volumes: Mapping[str, Path]) -> str:
    source, target = volumes[mount["source"]], f"{place}{mount['target']}"
    if mount["type"] == "volume":
        owner = os.stat(f"{layer}{mount['target']}")
        for path in [source, *source.rglob("*")]:
            os.chown(path, owner.st_uid, owner.st_gid)
    script = f"mkdir -p {target}; mount --bind {source} {target}\n"
    return script + (f"mount -o remount,ro,bind {target}\n" if mount.get("read_only") else "")


def _first(process: subprocess.Popen[str], log: Path) -> int:
    """The process that the container consists of, once it is the image's entry point and no longer a shell."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.Error):
                if child.uids().real != 0:
                    return child.pid
        time.sleep(0.02)
    raise AssertionError(f"it did not start: {log.read_text()[-2000:]}")
