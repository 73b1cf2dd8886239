"""The output head as a teacher shares it: hidden states through it are the whole rows that the teacher itself gives,
the bytes are the same by both ways in, and only who may have it gets it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import torch
import transformers
from serving import Server, channel, serving, status_of
from tinymodels import ARCHITECTURES, ATTENTION, SPECIAL_IDS, save_tiny
from torch_jobs import job, scored

from teacher_api.client import TeacherClient
from teacher_api.errors import (
    CorruptResponse,
    FingerprintMismatch,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from teacher_api.head import Head, digest_of, logprobs_from_hidden, read_head
from teacher_api.types import Completion, ScoreOptions, ScoreRequest, TeacherInfo
from teacher_api.v1 import teacher_pb2 as pb
from teacher_server.app import StartError
from teacher_server.backends.base import OutputHead
from teacher_server.config import ServerConfig
from teacher_server.head_share import as_client_has_it, check_head, write_head
from teacher_server.identity import teacher_infos

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
# Heads with a bias, a divisor and a factor; tied and untied ones, and a soft cap, are among ARCHITECTURES.
FAMILIES: dict[str, dict[str, Any]] = {
    "GPTJ": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.25},
}


def checkpoint_of(family: str, path: Path) -> Path:
    """A checkpoint of another family with the tiny tokenizer beside it."""
    save_tiny(path, "llama")
    torch.manual_seed(0)
    settings = {**SPECIAL_IDS, **ATTENTION, "vocab_size": 128, **FAMILIES[family]}
    config = getattr(transformers, f"{family}Config")(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "lm_head.bias":
                parameter.normal_()
            elif parameter.ndim == 2:
                parameter.mul_(4.0)
    model.save_pretrained(path)
    return path


def shared(backend: Any, directory: Path) -> tuple[Head, TeacherInfo]:
    """The head of a loaded backend, through its file."""
    facts = backend._loaded.facts
    info = teacher_infos(ServerConfig(model="m"), backend.features, facts)[""]
    file = write_head(backend.output_head(), info, directory)
    assert file.digest == digest_of(file.path, info.fingerprint)
    return read_head(file.path), info


@pytest.mark.parametrize("arch", [*ARCHITECTURES, *FAMILIES])
def test_hidden_states_through_the_head_are_the_whole_rows(
    arch: str, checkpoint: Any, opened: Any, tmp_path: Path
) -> None:
    path = checkpoint_of(arch, tmp_path / "model") if arch in FAMILIES else checkpoint(arch)
    backend = opened(path, max_sequence_tokens=128)
    head, _ = shared(backend, tmp_path)
    assert (head.bias is not None) == (arch == "GPTJ")
    assert (head.soft_cap is not None) == (arch == "gemma2")
    assert (head.logit_width, head.hidden_size, head.dtype) == (128, 32, "float32")
    for temperature in (1.0, 2.0):
        asked = job("a", np.arange(2, 100), top_k="all", temperature=temperature, hidden=True)
        (scores,) = scored(backend, [asked])
        assert scores.hidden is not None
        for dtype in (np.float32, np.float64):
            got = logprobs_from_hidden(scores.hidden, head, temperature, dtype)
            np.testing.assert_allclose(got, scores.topk_logprob, rtol=0, atol=TOLERANCE)


def test_a_bfloat16_teacher_shares_bfloat16(checkpoint: Any, opened: Any, tmp_path: Path) -> None:
    backend = opened(checkpoint("qwen3"), dtype="bfloat16")
    head, _ = shared(backend, tmp_path)
    assert (head.dtype, head.weight.dtype) == ("bfloat16", np.uint16)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("qwen3"), dtype=torch.bfloat16)
    np.testing.assert_array_equal(head.weight_float32(), model.lm_head.weight.detach().float().numpy())
    (scores,) = scored(backend, [job("a", np.arange(2, 60), top_k="all", hidden=True)])
    assert scores.hidden is not None
    np.testing.assert_allclose(logprobs_from_hidden(scores.hidden, head), scores.topk_logprob, rtol=0, atol=TOLERANCE)


def test_the_check_refuses_a_head_that_is_not_the_models(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("gemma2"))
    info = teacher_infos(ServerConfig(model="m"), backend.features, backend._loaded.facts)[""]
    head = backend.output_head()

    async def ask(asked: Any) -> Any:
        return (await backend.score([asked]))[0]

    def check(head: OutputHead) -> None:
        asyncio.run(check_head(as_client_has_it(head, info), info, ask))

    check(head)
    for wrong in ({"soft_cap": None}, {"scale": 1.01}, {"weight": head.weight.flip(0)}, {"bias": torch.ones(128)}):
        if "bias" in wrong:  # the same for all columns changes nothing without a soft cap; with one it does
            assert head.soft_cap is not None
        with pytest.raises(ValueError, match=r"not understood: .*start without share_head"):
            check(replace(head, **wrong))


def test_a_quantised_head_is_refused_by_name(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("llama"))
    parts = backend._loaded.parts
    quantised = torch.nn.Embedding.from_pretrained(torch.zeros(128, 32, dtype=torch.int8))
    backend._loaded = replace(backend._loaded, parts=replace(parts, project=quantised))
    with pytest.raises(ValueError, match=r"a Embedding of torch\.int8; only a linear layer in float can be shared"):
        backend.output_head()


# ---- over the wire ---------------------------------------------------------------------------------------------------

API_KEY, HEAD_KEY = "an-api-key", "a-head-key"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("head") / "model", "gemma2")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    keys = {"api_keys": (API_KEY,), "head_keys": (HEAD_KEY,)}
    with serving(backend="torch", model=str(model), threads=1, share_head="keys", **keys) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def by_grpc(server: Server, key: str, **request: str) -> bytes:
    with channel(server) as opened:
        method = opened.unary_stream("/teacher.v1.TeacherService/GetHead")
        metadata = tuple(bearer(key).items())
        data = b""
        for message in method(pb.GetHeadRequest(**request).SerializeToString(), metadata=metadata, timeout=60):
            chunk = pb.HeadChunk.FromString(message)
            assert chunk.offset == len(data)
            data += chunk.data
    return data


def info_of(server: Server, key: str = HEAD_KEY) -> pb.TeacherInfo:
    headers = {"accept": "application/x-protobuf", **bearer(key)}
    return pb.TeacherInfo.FromString(server.http.get(f"{server.http_url}/v1/info", headers=headers).content)


def test_both_ways_in_give_the_same_bytes(server: Server, tmp_path: Path) -> None:
    info = info_of(server)
    assert {"head", "hidden", "hidden_bfloat16"} <= set(info.features)
    response = server.http.get(f"{server.http_url}/v1/head", headers=bearer(HEAD_KEY))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["etag"] == f'"{info.head_digest}"'
    assert int(response.headers["content-length"]) == len(response.content) == info.head_bytes
    assert by_grpc(server, HEAD_KEY) == response.content
    path = tmp_path / "head"
    path.write_bytes(response.content)
    assert digest_of(path, info.fingerprint) == info.head_digest


@pytest.mark.parametrize("way", ["grpc", "http"])
def test_a_client_forms_the_whole_distribution(way: str, server: Server, tmp_path: Path) -> None:
    url = server.http_url if way == "http" else f"grpc://{server.grpc_target}"
    with TeacherClient(url, api_key=HEAD_KEY, timeout_s=60) as teacher:
        head = teacher.head(cache_dir=tmp_path)
        assert len(list(tmp_path.iterdir())) == 1
        assert teacher.head(cache_dir=tmp_path).fingerprint == head.fingerprint == server.fingerprint
        assert teacher.head().soft_cap == head.soft_cap == 5.0
        for temperature in (1.0, 2.0):
            options = ScoreOptions(top_k="all", temperature=temperature, hidden=True)
            (scores,) = teacher.score(ScoreRequest([Completion("a", np.arange(2, 40, dtype=np.int32))], (), options))
            assert scores.hidden is not None
            got = logprobs_from_hidden(scores.hidden, head, temperature)
            np.testing.assert_allclose(got, scores.topk_logprob, rtol=0, atol=TOLERANCE)


def test_a_key_for_scores_is_no_key_for_the_head(server: Server) -> None:
    with TeacherClient(server.http_url, api_key=API_KEY) as teacher:
        assert teacher.info().head_digest
        with pytest.raises(PermissionDenied, match="not among head_keys"):
            teacher.head()
    response = server.http.get(f"{server.http_url}/v1/head", headers=bearer(API_KEY))
    assert (response.status_code, response.json()["kind"]) == (403, "permission_denied")
    with pytest.raises(grpc.RpcError) as raised:
        by_grpc(server, API_KEY)
    assert raised.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert status_of(raised.value)[1].reason == "permission_denied"


def test_a_wrong_key_is_no_key_at_all(server: Server) -> None:
    with (
        TeacherClient(f"grpc://{server.grpc_target}", api_key="wrong-key") as teacher,
        pytest.raises(Unauthenticated),
    ):
        teacher.head()
    assert server.http.get(f"{server.http_url}/v1/head", headers=bearer("wrong-key")).status_code == 401
    assert server.http.get(f"{server.http_url}/v1/head").status_code == 401


def test_another_teacher_than_expected_gives_nothing(server: Server) -> None:
    response = server.http.get(f"{server.http_url}/v1/head?expect_fingerprint=another", headers=bearer(HEAD_KEY))
    assert (response.status_code, response.json()["kind"]) == (412, "fingerprint_mismatch")
    with pytest.raises(grpc.RpcError) as raised:
        by_grpc(server, HEAD_KEY, expect_fingerprint="another")
    assert raised.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    with (
        TeacherClient(server.http_url, api_key=HEAD_KEY, expect_fingerprint="another") as teacher,
        pytest.raises(FingerprintMismatch),
    ):
        teacher.head()


def test_without_keys_it_is_everybodys_or_nobodys(model: Path) -> None:
    settings = {"backend": "torch", "model": str(model), "threads": 1}
    with serving(**settings, share_head="all") as everybodys, TeacherClient(everybodys.http_url) as teacher:
        assert teacher.head().logit_width == 128
    with serving(fake_vocabulary=120) as nobodys, TeacherClient(nobodys.http_url) as teacher:
        assert "head" not in teacher.info().features
        assert teacher.info().head_digest == ""
        with pytest.raises(PermissionDenied, match="share_head is none"):
            teacher.head()


def test_a_download_ends_where_its_key_is_revoked(tmp_path: Path) -> None:
    """Of a head that no buffer on the way holds whole."""
    model = save_tiny(tmp_path / "model", "llama", logit_width=400_000)
    file = tmp_path / "tenants.yaml"

    def write(*keys: str) -> None:
        digests = ["sha256:" + hashlib.sha256(key.encode()).hexdigest() for key in keys]
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps({"tenants": {"them": {"keys": digests}}}))
        fresh.replace(file)

    stays, goes = "pk_stays-0123456789abcdef0123456789", "pk_goes-0123456789abcdef01234567890"
    write(stays, goes)
    settings = {"backend": "torch", "model": str(model), "threads": 1, "share_head": "all"}
    with serving(**settings, tenants_file=str(file)) as server, channel(server) as opened:
        num_bytes = info_of(server, stays).head_bytes
        method = opened.unary_stream("/teacher.v1.TeacherService/GetHead")
        question = pb.GetHeadRequest().SerializeToString()
        over_grpc = {key: method(question, metadata=tuple(bearer(key).items()), timeout=60) for key in (stays, goes)}
        got = {key: [next(call)] for key, call in over_grpc.items()}
        with server.http.stream("GET", f"{server.http_url}/v1/head", headers=bearer(goes)) as response:
            pieces = response.iter_raw(1 << 16)
            over_http = [next(pieces)]
            write(stays)
            deadline = time.monotonic() + 20
            while server.http.get(f"{server.http_url}/v1/info", headers=bearer(goes)).status_code != 401:
                assert time.monotonic() < deadline, "the file is looked at every second"
                time.sleep(0.05)
            with pytest.raises(httpx.RemoteProtocolError):
                over_http.extend(pieces)
        assert sum(len(piece) for piece in over_http) < num_bytes
        with pytest.raises(grpc.RpcError) as refused:
            got[goes].extend(over_grpc[goes])
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        got[stays].extend(over_grpc[stays])
        bytes_of = {
            key: sum(len(pb.HeadChunk.FromString(one).data) for one in messages) for key, messages in got.items()
        }
        assert bytes_of[goes] < num_bytes == bytes_of[stays]


def test_a_file_that_changes_under_the_server_reaches_nobody(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest is the one that was stated at the start."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with serving(backend="torch", model=str(model), threads=1, share_head="all") as server:
        (path,) = tmp_path.glob("teacher-head-*/head.safetensors")
        data = path.read_bytes()
        urls = (server.http_url, f"grpc://{server.grpc_target}")
        for spoiled in (data[:-1] + bytes([data[-1] ^ 1]), data[:-100]):
            path.write_bytes(spoiled)
            for url in urls:
                # Both are retried until the time is over: a cut connection, and what fails a check.
                with TeacherClient(url, timeout_s=1.0) as teacher, pytest.raises((CorruptResponse, Unavailable)):
                    teacher.head(cache_dir=tmp_path / "cache")
        assert not list((tmp_path / "cache").iterdir())
        path.write_bytes(data)
        for url in urls:
            with TeacherClient(url) as teacher:
                assert teacher.head().fingerprint == server.fingerprint
    assert not list(tmp_path.glob("teacher-head-*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "fake", "share_head": "all"}, "share_head has no meaning for backend fake"),
        ({"share_head": "keys"}, "share_head is keys and there are 0 head_keys"),
        ({"share_head": "all", "head_keys": (HEAD_KEY,)}, "share_head is all and there are 1 head_keys"),
        ({"head_keys": (HEAD_KEY,)}, "share_head is none and there are 1 head_keys"),
        ({"share_head": "keys", "head_keys": ("short",)}, "fewer than 8 characters"),
        ({"share_head": "all", "control": "random"}, "share_head has no meaning for control random"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerConfig(**{"model": "m", "backend": "torch", **settings})


def test_a_teacher_that_has_no_head_to_share_does_not_start(model: Path) -> None:
    from teacher_server.backends.torch_backend import TorchBackend

    class Headless(TorchBackend):
        features = TorchBackend.features - {"hidden"}

    def create(config: ServerConfig) -> Headless:
        return Headless(config.model, threads=1)

    with (
        pytest.raises(StartError, match="share_head needs a teacher that offers hidden and full_vocabulary"),
        serving(create, backend="torch", model=str(model), share_head="all"),
    ):
        pass


# ---- the type of hidden states ---------------------------------------------------------------------------------------


def ask_hidden(server: Server, **options: Any) -> tuple[Any, pb.ScoreRows]:
    """The client's answer, and the rows as they came."""
    request = ScoreRequest(
        [Completion("a", np.arange(2, 40, dtype=np.int32))], (), ScoreOptions(hidden=True, **options)
    )
    with TeacherClient(server.http_url, api_key=API_KEY) as teacher:
        (scores,) = teacher.score(request)
    from teacher_api import wire

    body = wire.encode_request(request).SerializeToString()
    headers = {"content-type": "application/x-protobuf", **bearer(API_KEY)}
    answer = server.http.post(f"{server.http_url}/v1/score", content=body, headers=headers)
    (frame,) = pb.ScoreResponse.FromString(answer.content).frames
    return scores, pb.ScoreRows.FromString(frame.rows)


def test_hidden_states_travel_as_bfloat16_when_asked(server: Server) -> None:
    exact, wide = ask_hidden(server)
    rounded, narrow = ask_hidden(server, hidden_type="bfloat16")
    assert (wide.hidden.dtype, narrow.hidden.dtype) == (pb.DTYPE_FLOAT32, pb.DTYPE_BFLOAT16)
    assert 2 * len(narrow.hidden.data) == len(wide.hidden.data)
    assert rounded.hidden.dtype == np.float32
    expected = torch.from_numpy(exact.hidden.copy()).bfloat16().float().numpy()
    np.testing.assert_array_equal(rounded.hidden, expected)
    assert not np.array_equal(rounded.hidden, exact.hidden)


def test_a_type_that_is_not_offered_or_has_no_meaning_is_refused(server: Server) -> None:
    sequence = [Completion("a", np.arange(2, 9, dtype=np.int32))]
    with TeacherClient(server.http_url, api_key=API_KEY) as teacher:
        for options in (ScoreOptions(hidden_type="bfloat16"), ScoreOptions(hidden=True, hidden_type="float16")):  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=r"options\.hidden_type"):
                teacher.score(ScoreRequest(sequence, (), options))
    asked = ScoreRequest(sequence, (), ScoreOptions(hidden=True, hidden_type="bfloat16"))
    with (
        serving(fake_vocabulary=120) as fake,
        TeacherClient(fake.http_url) as teacher,
        pytest.raises(Unsupported, match=r"options\.hidden"),
    ):
        teacher.score(asked)
