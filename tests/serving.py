"""A real server on free ports inside the test process, and plain callers of its wire that share no code with the
client: what they send and read is made with the codec only."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from teacher_api import wire
from teacher_api.errors import TeacherError
from teacher_api.types import Completion, ScoreOptions, ScoreRequest, Scores
from teacher_api.v1 import teacher_pb2 as pb
from teacher_server.app import App, StartError
from teacher_server.backends.base import ScoringBackend
from teacher_server.config import ServerConfig

PROTOBUF = {"content-type": "application/x-protobuf"}
START_S = 120.0  # a loaded machine imports slowly


@dataclass
class Server:
    app: App
    http_url: str
    grpc_target: str
    fingerprint: str
    backend: Any = None
    metrics_url: str = ""
    probe_url: str = ""
    loop: Any = field(default=None, repr=False)
    http: httpx.Client = field(default_factory=lambda: httpx.Client(verify=False, timeout=60), repr=False)

    def info(self) -> pb.TeacherInfo:
        return pb.TeacherInfo.FromString(
            self.http.get(f"{self.http_url}/v1/info", headers={"accept": PROTOBUF_TYPE}).content
        )

    def drain(self) -> None:
        self.loop.call_soon_threadsafe(self.app.lifecycle.begin_drain)


PROTOBUF_TYPE = PROTOBUF["content-type"]


@contextlib.contextmanager
def serving(
    create: Callable[[ServerConfig], ScoringBackend] | None = None, *, wait: bool = True, **settings: Any
) -> Iterator[Server]:
    """Runs a server in a thread until the block ends. `create` makes the backend; None: as `settings` say."""
    values = {"model": "fake", "backend": "fake", "http_port": 0, "grpc_port": 0, "lame_duck_s": 0.0, "grace_s": 5.0}
    values["cache"] = {
        "enabled": False
    }  # what a test asks twice is to be computed twice, where it doesn't say otherwise
    config = ServerConfig.model_validate({**values, "log_level": "error", **settings})
    known, failed, made = threading.Event(), [], []
    ready: dict[str, Any] = {}
    holder: dict[str, Any] = {}

    def making(asked: ServerConfig) -> ScoringBackend:
        from teacher_server import backends

        made.append((create or backends.create)(asked))
        return made[-1]

    def told(facts: dict[str, Any]) -> None:
        ready.update(facts)
        known.set()

    async def body() -> None:
        holder["loop"] = asyncio.get_running_loop()
        holder["app"] = App(config, create=making, announce=told)
        try:
            await holder["app"].run()
        except StartError as error:
            failed.append(error)
        finally:
            known.set()

    thread = threading.Thread(target=lambda: asyncio.run(body()), daemon=True)
    thread.start()
    try:
        assert known.wait(START_S), "the server did not become ready"
        if failed:
            raise failed[0]
        server = Server(
            app=holder["app"],
            http_url=ready["http_url"],
            grpc_target=ready["grpc_url"].split("://")[1],
            fingerprint=ready["fingerprint"],
            backend=made[-1],
            metrics_url=ready.get("metrics_url", ""),
            probe_url=ready.get("probe_url", ""),
            loop=holder["loop"],
        )
        with server.http:
            yield server
    finally:
        with contextlib.suppress(RuntimeError):
            holder["loop"].call_soon_threadsafe(holder["app"].lifecycle.begin_drain)
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def unread(request: ScoreRequest, response: pb.ScoreResponse, size: int) -> list[Scores | TeacherError]:
    """The answers of a unary response, each checked against its question."""
    results: list[Scores | TeacherError] = []
    for completion, frame in zip(request.completions, response.frames, strict=True):
        results.append(assembled(request, completion.id, [frame], response.fingerprint, size))
    return results


def assembled(
    request: ScoreRequest, completion_id: str, frames: list[pb.ScoreFrame], fingerprint: str, size: int
) -> Scores | TeacherError:
    completion = next(c for c in request.completions if c.id == completion_id)
    asked = _question(request, completion, fingerprint, size)
    whole = wire.Assembler(asked)
    result = None
    for frame in frames:
        assert result is None, "nothing comes after the last frame"
        result = whole.add(frame)
    assert result is not None, "the answer ended early"
    return result


def _question(request: ScoreRequest, completion: Any, fingerprint: str, size: int) -> wire.Question:
    try:
        return wire.question(request, completion, fingerprint=fingerprint, tokenizer_size=size)
    except TeacherError:  # a wrong question still has an error frame to check
        return wire.Question(completion.id, np.zeros(0, np.int32), request.options, None, size, fingerprint, b"")


def post(server: Server, request: ScoreRequest | pb.ScoreRequest | bytes, **headers: str) -> httpx.Response:
    message = wire.encode_request(request) if isinstance(request, ScoreRequest) else request
    body = message if isinstance(message, bytes) else message.SerializeToString()
    return server.http.post(f"{server.http_url}/v1/score", content=body, headers={**PROTOBUF, **headers})


def ask_http(server: Server, request: ScoreRequest, size: int = 512) -> list[Scores | TeacherError]:
    answer = post(server, request)
    assert answer.status_code == 200, answer.text
    return unread(request, pb.ScoreResponse.FromString(answer.content), size)


def ask_http_stream(server: Server, request: ScoreRequest, size: int = 512) -> list[Scores | TeacherError]:
    body = wire.encode_request(request).SerializeToString()
    answer = server.http.post(f"{server.http_url}/v1/score/stream", content=body, headers=PROTOBUF)
    assert answer.status_code == 200, answer.text
    data, frames = answer.content, []
    while data:
        (length,) = struct.unpack_from("<I", data)
        frames.append(pb.ScoreFrame.FromString(data[4 : 4 + length]))
        data = data[4 + length :]
    return [
        assembled(request, c.id, [f for f in frames if f.completion_id == c.id], server.fingerprint, size)
        for c in request.completions
    ]


@contextlib.contextmanager
def channel(server: Server) -> Iterator[grpc.Channel]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.grpc_target, options) as opened:
        yield opened


def call(opened: grpc.Channel, method: str, request: Any, **options: Any) -> bytes:
    """A unary call with bytes or a message in, bytes out."""
    body = request if isinstance(request, bytes) else request.SerializeToString()
    return opened.unary_unary(f"/teacher.v1.TeacherService/{method}")(
        body, timeout=options.pop("timeout", 60), **options
    )


def ask_grpc(server: Server, request: ScoreRequest, size: int = 512) -> list[Scores | TeacherError]:
    with channel(server) as opened:
        data = call(opened, "Score", wire.encode_request(request))
    return unread(request, pb.ScoreResponse.FromString(data), size)


def ask_grpc_stream(server: Server, request: ScoreRequest, size: int = 512) -> list[Scores | TeacherError]:
    frames: dict[str, list[pb.ScoreFrame]] = {c.id: [] for c in request.completions}
    with channel(server) as opened:
        method = opened.stream_stream("/teacher.v1.TeacherService/ScoreStream")
        for data in method(iter([wire.encode_request(request).SerializeToString()]), timeout=60):
            frame = pb.ScoreFrame.FromString(data)
            frames[frame.completion_id].append(frame)
    return [assembled(request, name, got, server.fingerprint, size) for name, got in frames.items()]


def request_of(*sequences: Sequence[int], **options: Any) -> ScoreRequest:
    """Completions c0, c1, … without a prompt; `options` are of the scores, but for `timeout_s`."""
    timeout_s = options.pop("timeout_s", None)
    completions = [Completion(f"c{n}", np.asarray(s, np.int32)) for n, s in enumerate(sequences)]
    return ScoreRequest(completions, options=ScoreOptions(**options), timeout_s=timeout_s)


def status_of(error: grpc.RpcError) -> tuple[status_pb2.Status, error_details_pb2.ErrorInfo, Any]:
    """What a failed call carries: its status, its ErrorInfo, and its RetryInfo or None."""
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    info, retry = error_details_pb2.ErrorInfo(), None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            detail.Unpack(info)
        if detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
    assert info.metadata["request_id"] == trailers["x-request-id"]
    return status, info, retry


def refused(server: Server, request: Any, method: str = "Score", **options: Any) -> tuple[grpc.StatusCode, Any, Any]:
    """The status, ErrorInfo and RetryInfo with which a gRPC call fails."""
    with channel(server) as opened, pytest.raises(grpc.RpcError) as raised:
        call(opened, method, wire.encode_request(request) if isinstance(request, ScoreRequest) else request, **options)
    _, info, retry = status_of(raised.value)
    return raised.value.code(), info, retry
