"""/v1/status and the page that carries it, on a real server: what it says is what was sent, and a caller without an
admin's key sees nothing that another tenant does."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Server, channel, post, request_of, serving

from teacher_api import wire
from teacher_server import history
from teacher_server.admission import Cost
from teacher_server.caller import Caller
from teacher_server.config import ServerConfig
from teacher_server.lifecycle import Lifecycle
from teacher_server.service import TeacherService
from teacher_server.status import status_of

pytestmark = pytest.mark.slow
KEYS = {"boss": "the-key-of-the-boss", "left": "the-key-of-left", "right": "the-key-of-right"}


def tenants() -> dict[str, dict[str, Any]]:
    hashed = {name: [f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"] for name, key in KEYS.items()}
    return {name: {"keys": keys, "admin": name == "boss"} for name, keys in hashed.items()}


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """History in steps that a test can wait for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "STEP_S", 0.1)
        yield


@pytest.fixture(scope="module")
def server(quick: None) -> Iterator[Server]:
    with serving(tenants=tenants(), max_sequence_tokens=64, cache={"enabled": True}) as running:
        yield running


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


def status(server: Server, name: str) -> dict[str, Any]:
    answer = server.http.get(f"{server.http_url}/v1/status", headers=bearer(name))
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    found: dict[str, Any] = answer.json()
    return found


def settled(server: Server, name: str) -> dict[str, Any]:
    """Once everything that has happened is in the history."""
    deadline = time.monotonic() + 30
    while True:
        found = status(server, name)
        hour, total = found["hour"], found["total"]
        if all(hour[key] == total[key] for key in hour):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.05)


def of_time_only(found: dict[str, Any]) -> dict[str, Any]:
    """Without what moves while nobody does anything."""
    still = {key: value for key, value in found.items() if key not in ("now", "uptime_s", "rates", "history")}
    still["tenants"] = [{key: value for key, value in one.items() if key != "rates"} for one in found["tenants"]]
    return still


def test_it_says_what_was_sent_and_an_admin_sees_everybody(server: Server) -> None:
    for name, sequences in (("left", [[1, 2, 3], [4, 5]]), ("right", [[1] * 10])):
        assert post(server, request_of(*sequences), **bearer(name)).status_code == 200
    assert post(server, b"\xff", **bearer("right")).status_code == 400
    found = settled(server, "boss")
    assert found["you"] == {"tenant": "boss", "admin": True}
    assert found["teacher"]["fingerprint"] == server.fingerprint
    assert found["state"] == {"ready": True, "status": "ready", "live": True}
    assert found["total"]["computed_tokens"] + found["total"]["cached_tokens"] == 15
    assert found["total"]["sequences"] == 3
    assert found["total"]["outcomes"] == {"ok": 2, "invalid_request": 1}
    by_name = {one["name"]: one for one in found["tenants"]}
    assert by_name["left"]["hour"]["outcomes"] == {"ok": 1}
    assert by_name["right"]["hour"]["outcomes"] == {"ok": 1, "invalid_request": 1}
    assert by_name["left"]["share"] == pytest.approx(5 / 15)
    assert by_name["right"]["share"] == pytest.approx(10 / 15)
    assert 0 < found["latency_s"]["p50"] <= found["latency_s"]["p95"] <= found["latency_s"]["p99"] < 600
    assert found["cache"]["enabled"]
    assert found["cache"]["sequences"] == {"memory": 0, "disk": 0, "flight": 0, "engine": 3}
    assert 0 < found["cache"]["bytes"] < found["cache"]["limit_bytes"]
    step_s, kept = found["history"]["step_s"], found["history"]
    assert sum(kept["computed"]) * step_s + sum(kept["cached"]) * step_s == pytest.approx(15)
    assert sum(kept["answered"]) * step_s == pytest.approx(2)
    assert sum(kept["refused"]) * step_s == pytest.approx(1)
    assert len({len(kept[name]) for name in kept if name != "step_s"}) == 1


def test_another_tenants_work_changes_nothing_that_a_tenant_sees(server: Server) -> None:
    post(server, request_of([1, 2, 3]), **bearer("left"))
    before = settled(server, "left")
    assert set(before["cache"]) == {"enabled", "sequences"}
    everybody = settled(server, "boss")
    for _ in range(5):
        assert post(server, request_of([7] * 20, [8] * 30), **bearer("right")).status_code == 200
        post(server, b"\xff", **bearer("right"))
    after = settled(server, "boss")
    assert of_time_only(after) != of_time_only(everybody)  # there is something to be seen
    assert of_time_only(settled(server, "left")) == of_time_only(before)
    own = settled(server, "left")
    for kept, name in (("computed", "computed_tokens"), ("cached", "cached_tokens")):
        assert sum(own["history"][kept]) * own["history"]["step_s"] == pytest.approx(own["hour"][name])
    told = server.http.get(f"{server.http_url}/v1/status", headers=bearer("left")).text
    assert [one["name"] for one in before["tenants"]] == ["left"]
    assert "right" not in told
    assert "boss" not in told


def test_what_waits_is_in_the_queue_of_whoever_sent_it(quick: None) -> None:
    with serving(tenants=tenants(), fake_hang_token=401) as server, channel(server) as opened:
        method = opened.unary_unary("/teacher.v1.TeacherService/Score")
        metadata = (("authorization", f"Bearer {KEYS['left']}"),)
        message = wire.encode_request(request_of([1, 401, 3])).SerializeToString()
        pending = method.future(message, timeout=60, metadata=metadata)
        deadline = time.monotonic() + 30
        while status(server, "boss")["queue"]["tokens"] != 3:
            assert time.monotonic() < deadline
        found = status(server, "boss")
        assert {one["name"]: one["queue_tokens"] for one in found["tenants"]}["left"] == 3
        assert found["queue"]["forwards"] == 1
        assert status(server, "left")["queue"] == {"tokens": 3}
        assert status(server, "right")["queue"] == {"tokens": 0}
        pending.cancel()


@pytest.mark.parametrize("key", ["", "no-such-key"])
def test_without_a_key_there_is_the_page_that_asks_for_one_and_no_numbers(server: Server, key: str) -> None:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    assert server.http.get(f"{server.http_url}/v1/status", headers=headers).status_code == 401
    page = server.http.get(f"{server.http_url}/", headers={**headers, "accept": "text/html,*/*"})
    assert page.status_code == 401
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "x-request-id" in page.headers
    assert server.fingerprint not in page.text
    other = server.http.get(f"{server.http_url}/", headers=headers)
    assert (other.status_code, other.json()["kind"]) == (401, "unauthenticated")
    with_key = server.http.get(f"{server.http_url}/", headers=bearer("left"))
    assert (with_key.status_code, with_key.content) == (200, page.content)


def test_nothing_runs_but_what_the_policy_names_and_nothing_is_loaded(server: Server) -> None:
    page = server.http.get(f"{server.http_url}/", headers=bearer("left"))
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[kind] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert not re.findall(r"(?:src|href)=\"(?!data:|docs\")", page.text)
    assert "innerHTML" not in page.text


def test_without_keys_everybody_is_shown_everything() -> None:
    with serving() as server:
        post(server, request_of([1, 2, 3]))
        found = server.http.get(f"{server.http_url}/v1/status").json()
        assert found["you"] == {"tenant": "default", "admin": True}
        assert server.http.get(f"{server.http_url}/").status_code == 200


def test_while_the_model_loads_there_is_a_status_too() -> None:
    service = TeacherService(ServerConfig(model="m", backend="fake"), Lifecycle(stall_s=1.0, high_water=0.9))
    for caller in (Caller(is_admin=True), Caller("somebody")):
        found = json.loads(json.dumps(status_of(service, caller)))
        assert found["teacher"] is None
        assert found["state"] == {"ready": False, "status": "starting", "live": True}
        assert found["rates"] == {"tokens": 0, "cached_tokens": 0, "requests": 0, "refused": 0}
        assert found["latency_s"] == {"p50": None, "p95": None, "p99": None}


def test_a_page_of_many_tenants_costs_the_event_loop_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the queue is added up once, however many ask for their part of it."""
    hashed = {f"t{n}": {"keys": [f"sha256:{hashlib.sha256(b'%d' % n).hexdigest()}"]} for n in range(200)}
    config = ServerConfig(model="m", backend="fake", tenants=hashed)
    service = TeacherService(config, Lifecycle(stall_s=1.0, high_water=1.0))
    for name in hashed:
        service.counts.of(name)
        service.admission.adopt(Cost(3, 1, Caller(name)))
    service.history.sample()
    asked: list[int] = []
    held_by_tenant = service.admission.held_by_tenant
    monkeypatch.setattr(service.admission, "held_by_tenant", lambda: (asked.append(1), held_by_tenant())[1])
    rows = status_of(service, Caller("t0", is_admin=True))["tenants"]
    assert [row["queue_tokens"] for row in rows] == 200 * [3]
    assert len(asked) == 1
