"""Keys are digests, belong to tenants and change without a restart; without keys only this machine may call; every
route and RPC but the probes asks for one. The routes and RPCs are listed by the server itself."""

from __future__ import annotations

import hashlib
import hmac
import json
import threading
import time
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import structlog
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from teacher_api.client import TeacherClient
from teacher_api.errors import PermissionDenied, Unauthenticated
from teacher_api.types import CallMetadata, Completion, ScoreRequest
from teacher_server import key_cli
from teacher_server.auth import KeyRing
from teacher_server.caller import Caller
from teacher_server.config import ServerConfig
from teacher_server.tenants import Tenant, Tenants, read_tenants
from tests.serving import channel, serving, status_of

PROBES = ("/livez", "/readyz", "/health")
KEYS = {"vision": "pk_vision-0123456789abcdef0123456789", "ops": "pk_ops-0123456789abcdef0123456789abcd"}


def digest(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def tenants(**more) -> dict[str, object]:
    return {
        "vision": {"keys": [digest(KEYS["vision"])], **more},
        "ops": {"keys": [digest(KEYS["ops"]), digest("pk_ops-another-0123456789abcdef01234")], "admin": True},
    }


def bearer(key: str) -> str:
    return f"Bearer {key}"


def a_request(**metadata: str) -> ScoreRequest:
    return ScoreRequest([Completion("a", np.arange(1, 9, dtype=np.int32))], metadata=CallMetadata(**metadata))


def write(path: Path, found: object) -> None:
    """Whole or not at all, as a mounted secret changes."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"tenants": found}))
    fresh.replace(path)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = tmp_path_factory.mktemp("tenants") / "tenants.yaml"
    write(path, tenants())
    usage = path.with_name("usage.sqlite")
    with serving(tenants_file=str(path), usage_file=str(usage), log_level="debug") as one:
        one.tenants_path = path
        yield one


# ---- whose a key is --------------------------------------------------------------------------------------------------


def test_a_key_is_its_tenants_and_says_who_is_an_admin():
    ring = KeyRing.of(ServerConfig(model="m", tenants=tenants(), api_keys=["of-default"]))
    assert ring.check(bearer(KEYS["vision"])) == Caller("vision")
    assert ring.check(bearer("pk_ops-another-0123456789abcdef01234")) == Caller("ops", is_admin=True)
    assert ring.check(bearer("of-default")) == Caller("default")
    for wrong in (None, "", "Bearer ", "Basic x", bearer(KEYS["vision"][:-1]), bearer(digest(KEYS["vision"]))):
        with pytest.raises(Unauthenticated):
            ring.check(wrong)


def test_what_the_tenant_default_may_holds_for_api_keys_too():
    ring = KeyRing.of(ServerConfig(model="m", tenants={"default": {"admin": True}}, api_keys=["of-default"]))
    assert ring.check(bearer("of-default")) == Caller("default", is_admin=True)


def test_every_key_is_compared_whichever_matches(monkeypatch):
    compared: list[bytes] = []
    real = hmac.compare_digest

    def counted(a, b):
        compared.append(b)
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    ring = KeyRing.of(ServerConfig(model="m", tenants=tenants()))
    for key in (KEYS["vision"], KEYS["ops"]):
        compared.clear()
        ring.check(bearer(key))
        assert len(compared) == 3
        assert all(len(one) == 32 for one in compared), "digests, of one length"


def test_a_key_made_by_the_command_works_and_is_printed_once(capsys):
    assert key_cli.main([]) == 0
    key, hashed = capsys.readouterr().out.split()
    assert hashed == digest(key)
    ring = KeyRing.of(ServerConfig(model="m", tenants={"a": {"keys": [hashed]}}))
    assert ring.check(bearer(key)).tenant == "a"
    key_cli.main([])
    assert capsys.readouterr().out.split()[0] != key


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"a": {"keys": ["plain-text-key"]}}, "sha256:"),
        ({"a": {}}, "tenants.a.keys: none"),
        ({"a b": {"keys": [digest("x")]}}, "'a b'"),
        ({"a": {"keys": [digest("x")]}, "b": {"keys": [digest("x")]}}, "also a key of a"),
        ({"a": {"keys": [digest("x")], "weight": 0}}, "weight"),
        ({"a": {"keys": [digest("x")], "burst_tokens": 9}}, "burst_tokens"),
        ({"a": {"keys": [digest("x")], "wieght": 2}}, "wieght"),
    ],
)
def test_wrong_tenants_are_refused_in_a_line_that_repeats_no_key(tmp_path, found, expected):
    path = tmp_path / "tenants.yaml"
    write(path, found)
    with pytest.raises(ValueError, match=expected) as refused:
        read_tenants(path)
    assert "plain-text-key" not in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=expected):
        ServerConfig(model="m", tenants=found)


def test_a_file_that_is_damaged_leaves_the_keys_of_before_in_force(tmp_path):
    with structlog.testing.capture_logs() as logged:
        damaged(tmp_path)
    warned = [
        line["event"] for line in logged if line["log_level"] != "info"
    ]  # information is shown or not, by the level
    assert warned == ["tenants_not_read", "tenants_not_read"]


def damaged(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    write(path, tenants(weight=2))
    now = Tenants({}, path)
    assert now.of("vision").weight == 2
    path.write_text("tenants: [")
    now.read_again()
    assert now.of("vision").weight == 2
    path.unlink()
    now.read_again()
    assert len(now.digests) == 3
    write(path, {"ops": tenants()["ops"]})
    now.read_again()
    assert now.names == ("ops",)


def test_a_file_that_is_nested_without_end_is_refused_in_a_line(tmp_path):
    path = tmp_path / "tenants.yaml"
    path.write_text("[" * 20_000)
    with pytest.raises(ValueError, match=r"tenants\.yaml: nested too deeply"):
        read_tenants(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tenants:\n  a: {{keys: ['{0}']}}\n  a: {{keys: ['{1}']}}\n", "a name that is there twice at line 3"),
        ("tenants: {{a: {{keys: ['{0}'], weight: !!int ''}}}}", "not valid YAML"),
        ("tenants: {{a: {{keys: ['{0}'], admin: !!bool maybe}}}}", "not valid YAML"),
        ("tenants: {{a: {{keys: ['{0}'], weight: !!timestamp x}}}}", "not valid YAML"),
    ],
)
def test_a_file_that_says_a_tenant_twice_or_a_value_of_no_type_is_refused_and_looked_at_further(
    tmp_path, text, expected
):
    path = tmp_path / "tenants.yaml"
    write(path, tenants())
    now = Tenants({}, path)
    path.write_text(text.format(digest("x"), digest("y")))
    with pytest.raises(ValueError, match=f"tenants.yaml: {expected}") as refused:
        read_tenants(path)
    assert digest("x") not in str(refused.value)
    now.read_again()
    assert now.names == ("vision", "ops")
    write(path, {"ops": tenants()["ops"]})
    now.read_again()
    assert now.names == ("ops",)


def test_a_file_that_loses_its_last_key_opens_nothing(tmp_path):
    path = tmp_path / "tenants.yaml"
    write(path, tenants())
    config = ServerConfig(model="m", tenants_file=str(path))
    now = Tenants({}, path)
    ring = KeyRing.of(config, now)
    write(path, {"default": {}})
    now.read_again()
    for authorization in (None, bearer(KEYS["vision"])):
        with pytest.raises(Unauthenticated):
            ring.check(authorization)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "teacher.example"])
def test_without_keys_only_this_machine_may_call_unless_said_otherwise(host):
    with pytest.raises(ValueError, match="there are no keys"):
        ServerConfig(model="m", host=host)
    for allowed in ({"anonymous": True}, {"api_keys": ["long-enough"]}, {"tenants": tenants()}):
        assert ServerConfig(model="m", host=host, **allowed).host == host
    for loopback in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
        assert ServerConfig(model="m", host=loopback).needs_key is False


def test_options_without_meaning_are_refused(tmp_path):
    with pytest.raises(ValueError, match="anonymous"):
        ServerConfig(model="m", anonymous=True, tenants=tenants())
    with pytest.raises(ValueError, match="one of them"):
        ServerConfig(model="m", tenants=tenants(), tenants_file="x")
    assert Tenant(keys=(digest("x"),), tokens_per_s=100).rate == (100, 100.0)


# ---- a server --------------------------------------------------------------------------------------------------------


def routes(server) -> list[tuple[str, str]]:
    document = server.http.get(f"{server.http_url}/openapi.json", headers={"authorization": bearer(KEYS["ops"])}).json()
    found = [(method, path) for path, methods in document["paths"].items() if path not in PROBES for method in methods]
    return [
        *found,
        ("get", "/docs"),
        ("get", "/openapi.json"),
        ("get", "/no-such-path"),
        ("post", "/v1/chat/completions"),
    ]


@pytest.mark.slow
def test_every_route_and_rpc_but_the_probes_refuses_without_a_key(server):
    listed = routes(server)
    assert {("post", "/v1/score"), ("get", "/v1/usage"), ("get", "/v1/info")} <= set(listed)
    for method, path in listed:
        for headers in ({}, {"authorization": bearer("pk_wrong-0123456789abcdef0123456789abcd")}):
            refused = server.http.request(method, server.http_url + path, headers=headers)
            assert refused.status_code == 401, (method, path)
            assert refused.headers["www-authenticate"] == "Bearer"
    for path in PROBES:
        assert server.http.get(server.http_url + path).status_code == 200
    with grpc.insecure_channel(server.grpc_target) as channel:
        key = (("authorization", bearer(KEYS["ops"])),)
        allowed = grpc.intercept_channel(channel, _WithMetadata(key))
        names = ProtoReflectionDescriptorDatabase(allowed).get_services()
        assert "teacher.v1.TeacherService" in names
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(allowed))
        methods = [m for name in names for m in pool.FindServiceByName(name).methods]
        assert len(methods) >= 6
        for method in methods:
            call = channel.stream_stream(f"/{method.containing_service.full_name}/{method.name}")
            if method.containing_service.full_name == "grpc.health.v1.Health":
                continue
            with pytest.raises(grpc.RpcError) as refused:
                list(call(iter([b""]), timeout=30))
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED, method.full_name
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"", timeout=30) == b"\x08\x01"


class _WithMetadata(grpc.StreamStreamClientInterceptor):
    def __init__(self, metadata):
        self._metadata = metadata

    def intercept_stream_stream(self, continuation, details, requests):
        return continuation(details._replace(metadata=self._metadata), requests)


@pytest.mark.slow
def test_a_key_may_not_speak_for_another_tenant(server):
    for url in (f"grpc://{server.grpc_target}", server.http_url):
        with TeacherClient(url, api_key=KEYS["vision"]) as client:
            assert len(client.score(a_request(tenant="vision", experiment="e"))) == 1
            with pytest.raises(PermissionDenied) as refused:
                client.score(a_request(tenant="ops"))
            assert refused.value.field == "metadata.tenant"


@pytest.mark.slow
def test_keys_change_without_a_restart_and_are_never_logged(server, capfd):
    old, new = KEYS["vision"], "pk_vision-new-0123456789abcdef012345"

    def status(key: str) -> int:
        return server.http.get(f"{server.http_url}/v1/info", headers={"authorization": bearer(key)}).status_code

    def until(key: str, expected: int) -> None:
        deadline = time.monotonic() + 10
        while status(key) != expected:
            assert time.monotonic() < deadline, "the file is looked at every second"
            time.sleep(0.05)

    assert (status(old), status(new)) == (200, 401)
    both = tenants()
    both["vision"] = {"keys": [digest(old), digest(new)]}
    write(server.tenants_path, both)
    until(new, 200)
    assert status(old) == 200, "several keys of a tenant, so that callers can change over"
    both["vision"] = {"keys": [digest(new)]}
    write(server.tenants_path, both)
    until(old, 401)
    assert status(new) == 200
    write(server.tenants_path, tenants())
    until(old, 200)
    logged = "".join(capfd.readouterr())
    assert not any(key in logged or digest(key) in logged for key in (old, new, KEYS["ops"]))


@pytest.mark.slow
def test_a_stream_ends_soon_after_its_key_was_revoked_and_no_others_does(server):
    """Silent streams, which nothing but their key would end."""
    calls, over = {}, threading.Event()

    def silence():
        over.wait(60)
        yield from ()

    with channel(server) as opened:
        method = opened.stream_stream("/teacher.v1.TeacherService/ScoreStream")
        try:
            for name in KEYS:
                calls[name] = method(silence(), metadata=(("authorization", bearer(KEYS[name])),), timeout=60)
            deadline = time.monotonic() + 20
            ops = {"authorization": bearer(KEYS["ops"])}
            while server.http.get(f"{server.http_url}/v1/status", headers=ops).json()["queue"]["streams"] < 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            write(server.tenants_path, {"ops": tenants()["ops"]})
            revoked = time.monotonic()
            with pytest.raises(grpc.RpcError) as refused:
                next(calls["vision"])
            took_s = time.monotonic() - revoked
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert status_of(refused.value)[1].reason == "unauthenticated"
            assert took_s < 5, "the file is looked at every second"
            assert calls["ops"].is_active()
        finally:
            write(server.tenants_path, tenants())
            over.set()
        assert list(calls["ops"]) == []
    vision = {"authorization": bearer(KEYS["vision"])}
    while server.http.get(f"{server.http_url}/v1/info", headers=vision).status_code != 200:  # for the tests after this
        assert time.monotonic() < deadline + 60
        time.sleep(0.05)


@pytest.mark.slow
def test_usage_is_told_by_experiment_and_of_others_only_to_an_admin(server):
    def usage(key: str, **query: str) -> httpx.Response:
        headers = {"authorization": bearer(key)}
        return server.http.get(f"{server.http_url}/v1/usage", headers=headers, params=query)

    with TeacherClient(server.http_url, api_key=KEYS["vision"]) as client:
        for _ in range(3):
            client.score(a_request(experiment="told", run="1"))
    with TeacherClient(server.http_url, api_key=KEYS["ops"]) as client:
        client.score(a_request())
    own = usage(KEYS["vision"]).json()["rows"]
    assert {row["tenant"] for row in own} == {"vision"}
    (row,) = [row for row in own if row["experiment"] == "told"]
    assert (row["sequences"], row["computed_tokens"], row["refused_tokens"]) == (3, 24, 0)
    assert 0 < row["engine_s"] < 5
    of_all = usage(KEYS["ops"], by="tenant").json()["rows"]
    assert {row["tenant"] for row in of_all} == {"vision", "ops"}
    assert all("experiment" not in row for row in of_all)
    for query, field in (({"by": "run"}, "by"), ({"since": "yesterday"}, "since")):
        refused = usage(KEYS["vision"], **query)
        assert (refused.status_code, refused.json()["field"]) == (400, field)
