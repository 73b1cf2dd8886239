"""Tenants that have text written: none waits behind all that another asked for, and each has its account."""

from __future__ import annotations

import hashlib
import threading
import time

import httpx
import pytest
from writing import ANY

from tests.serving import Server, serving

KEYS = {"flood": "pk_flood-0123456789abcdef01234567890", "late": "pk_late-0123456789abcdef012345678901"}
pytestmark = pytest.mark.slow


def write(server: Server, tenant: str, number: int) -> float:
    """Returns when all are written."""
    asked = {"prompt": [5, 6], "n": number, "max_tokens": 10, "ignore_eos": True}
    headers = {"authorization": f"Bearer {KEYS[tenant]}", "preceptor-experiment": "texts"}
    answer = httpx.post(f"{server.http_url}/v1/completions", json=asked, headers=headers, timeout=60)
    assert answer.status_code == 200, answer.text
    return time.monotonic()


def test_a_tenants_text_waits_for_no_flood_of_another_and_is_accounted():
    tenants = {name: {"keys": [f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"]} for name, key in KEYS.items()}
    settings = {"generate": True, "max_generations": 2, "fake_latency_s": 0.005, "high_water": ANY}
    with serving(tenants=tenants, **settings) as server:
        ended: list[float] = []
        flood = threading.Thread(target=lambda: ended.append(write(server, "flood", 60)))
        flood.start()
        generator = server.backend.generator
        while generator.begun < 2:
            time.sleep(0.001)
        write(server, "late", 2)
        assert not ended
        assert generator.begun < 20
        flood.join()
        usage = server.http.get(f"{server.http_url}/v1/usage", headers={"authorization": f"Bearer {KEYS['late']}"})
    (row,) = usage.json()["rows"]
    assert (row["experiment"], row["sequences"], row["computed_tokens"]) == ("texts", 2, 2 * (2 + 10))
    assert row["engine_s"] > 0
