"""A network of its own for one process, and a cable to it that can be pulled: no reset, no end, nothing arrives. Linux
and root: `is_available` says whether it can be had."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def is_available() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, timeout=30)
    if made.returncode == 0:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=30)
    return made.returncode == 0


class Network:
    """`host` is this side's address, `guest` that of what runs behind `command`."""

    def __init__(self) -> None:
        number = os.getpid() % 250
        self._name, self._ours, self._theirs = f"t{os.getpid()}", f"th{os.getpid()}"[:15], f"tg{os.getpid()}"[:15]
        self.host, self.guest = f"10.231.{number}.1", f"10.231.{number}.2"

    def __enter__(self) -> Network:
        _run("ip", "netns", "add", self._name)
        try:
            _run("ip", "link", "add", self._ours, "type", "veth", "peer", "name", self._theirs, "netns", self._name)
            _run("ip", "addr", "add", f"{self.host}/30", "dev", self._ours)
            _run("ip", "link", "set", self._ours, "up")
            for command in (f"addr add {self.guest}/30 dev {self._theirs}", "link set lo up"):
                _run("ip", "-n", self._name, *command.split())
            self.plug()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):  # the pair goes with it
            _run("ip", "netns", "del", self._name)

    def command(self, *command: str) -> list[str]:
        """Runs `command` on the other side."""
        return ["ip", "netns", "exec", self._name, *command]

    def plug(self) -> None:
        _run("ip", "-n", self._name, "link", "set", self._theirs, "up")

    @contextlib.contextmanager
    def unplugged(self) -> Iterator[None]:
        _run("ip", "-n", self._name, "link", "set", self._theirs, "down")
        try:
            yield
        finally:
            self.plug()
