"""TLS and mutual TLS on both ports: who has no certificate of the right authority gets nothing but a closed
connection, and the probes have a port of their own."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import pytest
from certificates import Authority, Pair
from reliability import holds
from serving import Server, call, request_of, serving

from student_trainer import scoring
from student_trainer.teachers.config import TeacherConfig
from teacher_api import check, usage, wire
from teacher_api.client import TeacherClient
from teacher_api.errors import TeacherError
from teacher_api.generation import AsyncGenerationClient, Sampling
from teacher_api.tls import ClientTls
from teacher_api.v1 import teacher_pb2 as pb
from teacher_server.app import StartError
from teacher_server.config import ServerConfig

pytestmark = pytest.mark.slow

PROTOBUF = {"content-type": "application/x-protobuf"}
BODY = wire.encode_request(request_of([1, 2, 3])).SerializeToString()
HEADER_S = 1.0


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`ours` and `theirs` are authorities, with certificates of each."""
    folder = tmp_path_factory.mktemp("certificates")
    ours, theirs = Authority(folder, "ours"), Authority(folder, "theirs")
    return SimpleNamespace(
        ours=ours, theirs=theirs, server=ours.issue("server"), client=ours.issue("client"), other=theirs.issue("other")
    )


@pytest.fixture(scope="module")
def mutual(files: Any) -> Iterator[Server]:
    tls = {"tls_cert": files.server.cert, "tls_key": files.server.key, "tls_client_ca": files.ours.file}
    with serving(**tls, probe_port=0, header_s=HEADER_S, generate=True) as running:
        yield running


def context(authority: Authority, pair: Pair | None) -> ssl.SSLContext:
    made = ssl.create_default_context(cafile=authority.file)
    if pair is not None:
        made.load_cert_chain(pair.cert, pair.key)
    return made


def over_http(server: Server, authority: Authority, pair: Pair | None) -> httpx.Response:
    with httpx.Client(verify=context(authority, pair), timeout=30) as client:
        return client.post(f"{server.http_url}/v1/score", content=BODY, headers=PROTOBUF)


def over_grpc(server: Server, authority: Authority, pair: Pair | None) -> bytes:
    def data(path: str) -> bytes:
        return Path(path).read_bytes()

    credentials = grpc.ssl_channel_credentials(
        data(authority.file), data(pair.key) if pair else None, data(pair.cert) if pair else None
    )
    with grpc.secure_channel(server.grpc_target, credentials) as opened:
        return call(opened, "Score", BODY, timeout=5)


def rows_of(data: bytes) -> int:
    return pb.ScoreRows.FromString(pb.ScoreResponse.FromString(data).frames[0].rows).num_rows


def test_a_certificate_of_the_right_authority_is_served_and_no_other(mutual: Server, files: Any, record_property: Any):
    assert mutual.http_url.startswith("https://")
    assert rows_of(over_http(mutual, files.ours, files.client).content) == 2
    assert rows_of(over_grpc(mutual, files.ours, files.client)) == 2
    before = len(mutual.backend.scored_ids)
    refused = [(files.ours, None), (files.ours, files.other), (files.theirs, files.client), (files.theirs, None)]
    for authority, pair in refused:
        with pytest.raises(httpx.TransportError):
            over_http(mutual, authority, pair)
        with pytest.raises(grpc.RpcError) as raised:
            over_grpc(mutual, authority, pair)
        assert raised.value.code().name in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    assert len(mutual.backend.scored_ids) == before
    assert rows_of(over_grpc(mutual, files.ours, files.client)) == 2
    holds(record_property, "S14", f"mTLS: {2 * len(refused)} of {2 * len(refused)} wrong certificates refused")


def test_probes_without_a_certificate_have_a_port_of_their_own(mutual: Server):
    host, port = mutual.probe_url.removeprefix("http://").split(":")
    assert host == "127.0.0.1"
    assert port
    for name in ("livez", "readyz", "health"):
        assert httpx.get(f"{mutual.probe_url}/{name}").status_code == 200
    for path in ("/v1/info", "/v1/score", "/", "/docs"):
        answer = httpx.post(mutual.probe_url + path, content=BODY, headers=PROTOBUF)
        assert (answer.status_code, answer.json()["kind"]) == (404, "not_found")


def test_a_handshake_that_stops_is_given_up(mutual: Server):
    for url in (mutual.http_url.removeprefix("https://"), mutual.grpc_target):
        host, port = url.split(":")
        with socket.create_connection((host, int(port)), timeout=20) as half:
            half.sendall(b"\x16\x03\x01\x02\x00")  # the head of a ClientHello
            started = time.monotonic()
            assert half.recv(64) == b""
            assert time.monotonic() - started < HEADER_S + 3


def test_without_a_client_authority_a_key_is_enough(files: Any):
    with serving(tls_cert=files.server.cert, tls_key=files.server.key) as server:
        assert rows_of(over_http(server, files.ours, None).content) == 2
        assert rows_of(over_grpc(server, files.ours, None)) == 2
        with pytest.raises(httpx.TransportError):
            over_http(server, files.theirs, None)
        with pytest.raises(grpc.RpcError), grpc.insecure_channel(server.grpc_target) as opened:
            call(opened, "Score", BODY, timeout=2)


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
def test_our_client_trusts_the_authority_that_its_environment_names(files: Any, scheme: str):
    with serving(tls_cert=files.server.cert, tls_key=files.server.key) as server:
        url = server.http_url if scheme == "https" else f"grpcs://{server.grpc_target}"
        for authority, status in ((files.ours, 0), (files.theirs, 3)):
            trusts = {"SSL_CERT_FILE": authority.file, "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": authority.file}
            command = [sys.executable, "-m", "teacher_api.check", "--timeout-s", "3", url]
            environment = {**os.environ, **trusts, "PYTHONPATH": os.pathsep.join(sys.path)}
            made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
            assert made.returncode == status, made.stderr


def client_url(server: Server, scheme: str) -> str:
    return f"grpcs://{server.grpc_target}" if scheme == "grpcs" else server.http_url


def own(files: Any, pair: Pair | None = None, authority: Authority | None = None) -> ClientTls:
    pair = pair or files.client
    return ClientTls(pair.cert, pair.key, (authority or files.ours).file)


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
def test_our_client_brings_its_certificate_and_trusts_its_own_authority(mutual: Server, files: Any, scheme: str):
    url = client_url(mutual, scheme)
    with TeacherClient([url], tls=own(files)) as client:
        assert client.score(request_of([1, 2, 3, 4]))[0].num_rows == 3
    for wrong in (own(files, files.other), own(files, authority=files.theirs), ClientTls(ca=files.ours.file)):
        before = len(mutual.backend.scored_ids)
        with TeacherClient(url, tls=wrong, timeout_s=1.5) as client, pytest.raises(TeacherError) as raised:
            client.score(request_of([1, 2, 3]))
        assert raised.value.kind in ("unavailable", "deadline_exceeded")
        assert len(mutual.backend.scored_ids) == before


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
def test_the_programs_bring_a_certificate(mutual: Server, files: Any, scheme: str, capsys: Any):
    url = client_url(mutual, scheme)
    flags = ["--tls-cert", files.client.cert, "--tls-key", files.client.key, "--tls-ca", files.ours.file]
    assert check.main([url, "--timeout-s=20", *flags]) == 0, capsys.readouterr().err
    assert check.main([url, "--timeout-s=1.5", *flags[4:]]) == 3
    if scheme == "https":
        assert usage.main([url, *flags]) == 0, capsys.readouterr().err
        assert usage.main([url, *flags[4:]]) == 3

        async def ask() -> int:
            async with AsyncGenerationClient(url, tls=own(files)) as client:
                fingerprint = (await client.info()).fingerprint
                answer = await client.generate([1, 2, 3], Sampling(max_tokens=2, ignore_eos=True), fingerprint)
                return len(answer.completions[0].token_ids)

        assert asyncio.run(ask()) == 2


@pytest.mark.parametrize("scheme", ["https", "grpcs"])
def test_a_run_brings_a_certificate(mutual: Server, files: Any, scheme: str):
    url, pair = client_url(mutual, scheme), files.client
    brings = {"url": url, "tls_cert": pair.cert, "tls_key": pair.key, "tls_ca": files.ours.file}
    client, info = scoring.connect(TeacherConfig(**brings), url, run_name="r", tokenizer=None)
    with client:
        assert info.fingerprint == mutual.fingerprint
        assert client.score(request_of([1, 2, 3]))[0].num_rows == 2
    config = TeacherConfig(**{**brings, "tls_cert": "", "tls_key": "", "start_timeout_s": 1.5})
    with pytest.raises(scoring.TeacherGone):
        scoring.connect(config, url, run_name="r", tokenizer=None)
    missing = TeacherConfig(**{**brings, "tls_ca": "/nowhere/ca.pem"})
    with pytest.raises(scoring.HandshakeError, match=r"^teachers\.b\.tls_ca '/nowhere/ca.pem': No such file"):
        scoring.connect(missing, url, run_name="r", tokenizer=None, name="b")


def test_files_that_a_client_can_not_use_are_named(files: Any, tmp_path: Path, capsys: Any):
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    pair = files.client
    wrong: list[tuple[dict[str, str], str]] = [
        ({"cert": pair.cert}, "tls_cert without tls_key"),
        ({"key": pair.key}, "tls_key without tls_cert"),
        ({"cert": pair.cert, "key": files.other.key}, "tls_cert .* and tls_key .*: expected a PEM certificate and its"),
        ({"cert": pair.cert, "key": "/nowhere/key"}, "tls_key '/nowhere/key': No such file"),
        ({"cert": str(junk), "key": pair.key}, "tls_cert"),
        ({"ca": str(junk)}, "tls_ca .*: expected PEM certificates"),
        ({"ca": "/nowhere"}, "tls_ca '/nowhere': No such file"),
        ({"ca": str(tmp_path)}, "tls_ca .*: Is a directory"),
    ]
    for given, cause in wrong:
        with pytest.raises(ValueError, match=cause) as raised:
            ClientTls(**given)
        assert "\n" not in str(raised.value)
        flags = [f"--tls-{name}={path}" for name, path in given.items()]
        assert check.main(["grpcs://127.0.0.1:1", *flags]) == 2
        assert "tls_" in capsys.readouterr().err
    for url in ("grpc://127.0.0.1:1", "http://127.0.0.1:1", "openai+http://127.0.0.1:1/v1"):
        with pytest.raises(ValueError, match=r"tls_cert with .* in the clear"):
            TeacherClient(url, tls=own(files))
        with pytest.raises(ValueError, match=r"tls_ca: got .* in the clear"):
            TeacherConfig(url=(url,), tls_ca=files.ours.file)
    with pytest.raises(ValueError, match=r"tls_ca: got .* the run starts itself"):
        TeacherConfig(model="m", tls_ca=files.ours.file)
    with pytest.raises(ValueError, match="tls_key: got '' with tls_cert"):
        TeacherConfig(url=("grpcs://a:1",), tls_cert=pair.cert)


def test_files_of_no_use_are_named_before_anything_is_loaded(files: Any, tmp_path: Path):
    junk = tmp_path / "junk.pem"
    junk.write_text("no certificate")
    good = {"tls_cert": files.server.cert, "tls_key": files.server.key}
    wrong = [
        ({**good, "tls_key": files.client.key}, "tls_key"),
        ({**good, "tls_key": "/nowhere/key"}, "tls_key '/nowhere/key'"),
        ({**good, "tls_cert": str(junk)}, "tls_cert"),
        ({**good, "tls_client_ca": str(junk)}, "tls_client_ca"),
    ]
    for settings, cause in wrong:
        with pytest.raises(StartError, match=cause) as raised, serving(**settings):
            pass
        assert "\n" not in str(raised.value)
    for idle in ({"tls_cert": files.server.cert}, {"tls_key": "k"}, {"tls_client_ca": "c"}):
        with pytest.raises(ValueError, match="tls_"):
            ServerConfig.model_validate({"model": "fake", "backend": "fake", **idle})
