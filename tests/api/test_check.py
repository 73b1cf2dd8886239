"""teacher-check: what it prints, what it refuses, and its exit status."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import stamina
from fake_teacher import SERVE, FakeTeacher, Fault

from teacher_api import check, errors, wire

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _retry_hooks_as_before():
    before = stamina.instrumentation.get_on_retry_hooks()
    yield
    stamina.instrumentation.set_on_retry_hooks(before)


@contextmanager
def served(teacher):
    """A fake teacher over HTTP on a loop of its own."""
    ready, box = threading.Event(), {}

    async def main():
        box["stop"], box["loop"] = asyncio.Event(), asyncio.get_running_loop()
        async with SERVE["http"](teacher) as box["url"]:
            ready.set()
            await box["stop"].wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(10)
    try:
        yield box["url"]
    finally:
        box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(10)


def test_a_good_teacher(capsys, monkeypatch):
    monkeypatch.setenv("TEACHER_API_KEY", "k")
    teacher = FakeTeacher()
    with served(teacher) as url:
        assert check.main([url]) == 0
        text = capsys.readouterr().out
        assert "fake at http://127.0.0.1" in text
        assert "fingerprint  fp" in text
        assert check.main([url, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
    assert facts["scored_rows"] == 15
    assert facts["missing_mass"] < 1e-5
    assert set(teacher.keys) == {"Bearer k"}


def test_a_slower_scoring_path_is_a_warning_with_its_reason(capsys):
    with served(FakeTeacher(scoring_path="prompt-logprobs", scoring_path_note="fell back from fused: because")) as url:
        assert check.main([url]) == 0
    assert "warning      scoring path prompt-logprobs: fell back from fused: because" in capsys.readouterr().out


def test_a_teacher_whose_probabilities_miss_one(capsys, monkeypatch):
    seal = wire.encode_scores

    def halved(scores, **options):
        object.__setattr__(scores, "log_tail", (scores.log_tail - 0.5).astype(np.float32))
        return seal(scores, **options)

    monkeypatch.setattr(wire, "encode_scores", halved)
    with served(FakeTeacher()) as url:
        assert check.main([url]) == 1
    assert "probabilities of a row miss 1 by" in capsys.readouterr().err


def test_a_teacher_that_refuses(capsys):
    with served(FakeTeacher(Fault(error=errors.PermissionDenied("not you")))) as url:
        assert check.main([url]) == 1
    err = capsys.readouterr().err
    assert err == f"teacher-check: {url}: permission_denied: not you\n"


def test_nobody_there(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert check.main([f"http://127.0.0.1:{taken.getsockname()[1]}", "--timeout-s", "0.3"]) == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "unavailable: gave up after the call's 0.3 s" in err


def test_a_bad_url(capsys):
    assert check.main(["ftp://x"]) == 2
    assert capsys.readouterr().err.startswith("teacher-check: teacher URL 'ftp://x': expected grpc://")
