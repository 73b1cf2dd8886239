"""Servers that write text, and callers of theirs over /v1/completions."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from serving import Server, serving
from tinymodels import save_tiny

VOCABULARY, WIDTH, LONGEST = 120, 128, 96
HANG, POISON, DEATH = 12, 13, 14  # none of which the self-check at the start has
ANY = 1e-9  # high_water: /readyz says no while anything at all is in work


def a_checkpoint(path: Path) -> Path:
    return save_tiny(path, tokenizer_size=VOCABULARY, logit_width=WIDTH)


@contextlib.contextmanager
def a_torch_server(directory: Path) -> Iterator[Server]:
    settings = {"max_sequence_tokens": LONGEST, "max_generated_tokens": 80, "max_completions": 4096}
    with serving(backend="torch", model=str(directory), threads=1, generate=True, **settings) as running:
        yield running


@contextlib.contextmanager
def a_fake_server() -> Iterator[Server]:
    faults = {"fake_hang_token": HANG, "fake_poison_token": POISON, "fake_death_token": DEATH, "fake_restart_s": 0.2}
    with serving(generate=True, max_completions=8192, high_water=ANY, **faults) as running:
        yield running


def ask(server: Server, **body: Any) -> Any:
    return server.http.post(f"{server.http_url}/v1/completions", json=body)


def choices(server: Server, **body: Any) -> list[dict[str, Any]]:
    answer = ask(server, **{"return_token_ids": True, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def texts(server: Server, **body: Any) -> list[list[int]]:
    """The ids of each completion."""
    return [one["token_ids"] for one in choices(server, **body)]


def error_of(answer: Any, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def some_ids(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(20, VOCABULARY, length).tolist()


def until(condition: Callable[[], bool], complaint: str, limit_s: float = 30) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, complaint


def idle(server: Server) -> bool:
    return server.http.get(f"{server.http_url}/readyz").status_code == 200
