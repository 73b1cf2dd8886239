"""Ports for servers that a test starts, some of them again where they were: below those that connections take as they
come, so that nothing else of this machine has taken one meanwhile."""

from __future__ import annotations

import random
import socket

FIRST, STOP = 20_000, 32_000
_CHANCE = random.SystemRandom()  # processes that run tests side by side choose apart from each other


def free_port(host: str = "127.0.0.1") -> int:
    """One that nobody listens on."""
    while True:
        port = _CHANCE.randrange(FIRST, STOP)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
        return port
