"""A teacher for the client's tests: its scores come from float64 arithmetic written here, its faults from a script."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import uvicorn
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2
from ports import free_port

from teacher_api import info as info_api
from teacher_api import wire
from teacher_api.errors import FingerprintMismatch, TeacherError, Unavailable
from teacher_api.types import Completion, Scores, TeacherInfo
from teacher_api.v1 import teacher_pb2 as pb

V, WIDTH = 40, 44


def logprobs(token_ids, temperature=1.0):
    """[T, WIDTH] float64; row t is log p(· | tokens before t), an arbitrary smooth function of the previous token."""
    columns = np.arange(WIDTH, dtype=np.float64)
    rows = []
    for t in range(len(token_ids)):
        previous = float(token_ids[t - 1]) if t else 0.0
        logits = 3 * np.sin(columns * 0.7 + previous * 1.3 + t * 0.1) / temperature
        rows.append(logits - np.log(np.exp(logits).sum()))
    return np.array(rows)


def expected_scores(token_ids, positions, options, candidates=None, fingerprint="fp"):
    logp = logprobs(token_ids, options.temperature)[positions]
    actual = np.asarray(token_ids)[positions]
    rows = np.arange(len(positions))
    inside = np.zeros(logp.shape, bool)
    inside[rows, actual] = True
    extra = {}
    if options.top_k == "all":
        extra["topk_logprob"] = logp[:, :V].astype(np.float32)
        inside[:, :V] = True
    elif options.top_k:
        order = np.argsort(-logp[:, :V], axis=1, kind="stable")[:, : options.top_k].astype(np.int32)
        extra["topk_ids"] = order
        extra["topk_logprob"] = np.take_along_axis(logp, order, 1).astype(np.float32)
        np.put_along_axis(inside, order, True, 1)
    if "topk_logprob" in extra and options.value_type == "float16":
        extra["topk_logprob"] = extra["topk_logprob"].astype(np.float16)
    if candidates is not None:
        row_of = np.repeat(rows, np.diff(candidates.row_offsets))
        extra["candidate_logprob"] = logp[row_of, candidates.ids].astype(np.float32)
        inside[row_of, candidates.ids] = True
    outside = np.where(inside, 0.0, np.exp(logp)).sum(1)
    if options.entropy:
        extra["entropy"] = -(np.exp(logp) * logp).sum(1).astype(np.float32)
    if options.rank:
        extra["rank"] = (1 + (logp > logp[rows, actual][:, None]).sum(1)).astype(np.uint32)
    if options.hidden:
        extra["hidden"] = np.stack([np.sin(positions + h) for h in range(4)], 1).astype(np.float32)
    return Scores(
        id="x",
        positions=np.asarray(positions, np.int32),
        token_logprob=logp[rows, actual].astype(np.float32),
        log_tail=np.log(outside).astype(np.float32),
        fingerprint=fingerprint,
        **extra,
    )


ARRAYS = ("positions", "token_logprob", "log_tail", "topk_ids", "topk_logprob", "candidate_logprob", "entropy", "rank")


def assert_same(got: Scores, want: Scores):
    for name in (*ARRAYS, "hidden"):
        a, b = getattr(got, name), getattr(want, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            np.testing.assert_array_equal(a, b, err_msg=name)


@dataclass
class Fault:
    """What goes wrong with one score call."""

    error: TeacherError | None = None  # the whole call fails
    of: dict[str, TeacherError] = field(default_factory=dict)  # these completions fail
    change: Callable[[pb.ScoreFrame], None] | None = None  # done to each frame
    becomes: str = ""  # the fingerprint of the teacher that is there from then on
    hang: bool = False
    break_after: int | None = None  # the connection breaks after so many frames
    raw: tuple[int, bytes] | None = None  # HTTP: an answer that is not ours


class Broken(Exception):
    """The connection is lost."""


class FakeTeacher:
    def __init__(self, *faults: Fault, fingerprint="fp", max_rows_bytes=None, **limits: Any) -> None:
        self.script = list(faults)
        self.fingerprint = fingerprint
        self.max_rows_bytes = max_rows_bytes
        self.asked: list[list[str]] = []  # completion ids of each score call
        self.requests: list[pb.ScoreRequest] = []
        self.paths: list[str] = []
        self.keys: list[str] = []
        self.timeouts: list[str] = []  # what HTTP requests said of their deadlines
        self.in_flight = self.most_in_flight = 0
        self.down = False  # it refuses everything, as a server does that is starting
        self.delay_s = 0.0  # of each score call
        self.held: dict[str, threading.Event] = {}  # completions whose frames wait
        self.arrived: list[float] = []  # the loop's time of each score call
        self.limits = {"max_completions": 64, "max_request_bytes": 1 << 20, "max_response_bytes": 1 << 20, **limits}

    @property
    def info(self) -> TeacherInfo:
        return TeacherInfo(
            fingerprint=self.fingerprint,
            model_name="fake",
            tokenizer_fingerprint="tok",
            tokenizer_size=V,
            logit_width=WIDTH,
            max_sequence_tokens=1000,
            max_top_k=V,
            max_candidates=8,
            hidden_size=4,
            features=("top_k", "exact_tail"),
            **self.limits,
        )

    async def frames(self, message: pb.ScoreRequest, *, split: bool) -> AsyncIterator[pb.ScoreFrame]:
        self.arrived.append(asyncio.get_running_loop().time())
        if self.down:
            raise Unavailable("starting")
        await asyncio.sleep(self.delay_s)
        decoded = wire.decode_request(message)
        self.asked.append(list(decoded.ids))
        self.requests.append(message)
        fault = self.script.pop(0) if self.script else Fault()
        if message.expect_fingerprint not in ("", self.fingerprint):
            raise FingerprintMismatch(f"expected {message.expect_fingerprint}, this is {self.fingerprint}")
        if fault.raw:
            raise RawAnswer(*fault.raw)
        if fault.hang:
            await asyncio.Event().wait()
        self.fingerprint = fault.becomes or self.fingerprint
        if fault.error:
            raise fault.error
        sent = 0
        for name, entry in zip(decoded.ids, decoded.entries, strict=True):
            while name in self.held and not self.held[name].is_set():
                await asyncio.sleep(0.005)
            for frame in self._frames_of(name, fault.of.get(name, entry), decoded.request, split):
                if fault.break_after is not None and sent >= fault.break_after:
                    raise Broken
                if fault.change:
                    fault.change(frame)
                yield frame
                sent += 1
                await asyncio.sleep(0)

    def _frames_of(self, name, entry, request, split):
        if isinstance(entry, TeacherError):
            yield wire.encode_error(name, entry, self.fingerprint)
            return
        assert isinstance(entry, Completion)
        tokens, positions = wire.resolve(request, entry)
        scores = expected_scores(tokens, positions, request.options, entry.candidates)
        key = wire.seal_key(tokens, positions, entry.candidates, request.options, self.fingerprint)
        scores = Scores(
            **{**{n: getattr(scores, n) for n in scores.__slots__}, "id": name, "computed_tokens": len(tokens)}
        )
        yield from wire.encode_scores(
            scores,
            options=request.options,
            candidates=entry.candidates,
            key=key,
            max_rows_bytes=self.max_rows_bytes if split else None,
        )

    async def unary(self, data: bytes, request_id: str) -> bytes:
        frames = [f async for f in self.frames(pb.ScoreRequest.FromString(data), split=False)]
        return pb.ScoreResponse(fingerprint=self.fingerprint, request_id=request_id, frames=frames).SerializeToString()

    @asynccontextmanager
    async def counted(self):
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1


class RawAnswer(Exception):
    """An HTTP answer, status and body, that is not ours."""


def status_of(error: TeacherError) -> bytes:
    info = error_details_pb2.ErrorInfo(reason=error.kind, domain="teacher.v1", metadata={"field": error.field})
    details = [info]
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(retry)
    status = status_pb2.Status(code=grpc.StatusCode[error.grpc_code].value[0], message=error.message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status.SerializeToString()


@asynccontextmanager
async def serve_grpc(teacher: FakeTeacher, port: int | None = None, host: str = "127.0.0.1"):
    def seen(context):
        metadata = dict(context.invocation_metadata())
        teacher.keys.append(metadata.get("authorization", ""))
        return metadata["x-request-id"]

    async def fail(context, error):
        if isinstance(error, Broken):
            await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
        trailers = (("grpc-status-details-bin", status_of(error)),)
        await context.abort(grpc.StatusCode[error.grpc_code], error.message, trailing_metadata=trailers)

    async def get_info(data, context):
        seen(context)
        if teacher.down:
            await fail(context, Unavailable("starting"))
        return info_api.to_proto(teacher.info).SerializeToString()

    async def score(data, context):
        teacher.paths.append("Score")
        try:
            async with teacher.counted():
                return await teacher.unary(data, seen(context))
        except (TeacherError, Broken) as error:
            await fail(context, error)

    async def stream(requests, context):
        teacher.paths.append("ScoreStream")
        seen(context)
        try:
            async with teacher.counted():
                async for data in requests:
                    async for frame in teacher.frames(pb.ScoreRequest.FromString(data), split=True):
                        await context.write(frame.SerializeToString())
        except (TeacherError, Broken) as error:
            await fail(context, error)

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    methods = {
        "GetInfo": grpc.unary_unary_rpc_method_handler(get_info),
        "Score": grpc.unary_unary_rpc_method_handler(score),
        "ScoreStream": grpc.stream_stream_rpc_method_handler(stream),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("teacher.v1.TeacherService", methods),))
    bound = server.add_insecure_port(f"{host}:{port or free_port(host)}")
    await server.start()
    try:
        yield f"grpc://{host}:{bound}"
    finally:
        await server.stop(0)


@asynccontextmanager
async def serve_http(teacher: FakeTeacher, port: int | None = None, host: str = "127.0.0.1"):
    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        teacher.keys.append(headers.get("authorization", ""))
        teacher.timeouts.append(headers.get("grpc-timeout", ""))
        body, more = b"", True
        while more:
            event = await receive()
            body += event.get("body", b"")
            more = event.get("more_body", False)

        async def answer(status, content, kind=b"application/x-protobuf"):
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
            await send({"type": "http.response.body", "body": content})

        if scope["path"] == "/v1/info" and teacher.down:
            await answer(503, b'{"kind": "unavailable", "detail": "starting"}', b"application/problem+json")
            return
        if scope["path"] == "/v1/info":
            await answer(200, info_api.to_proto(teacher.info).SerializeToString())
            return
        teacher.paths.append("ScoreStream" if scope["path"].endswith("stream") else "Score")
        started = False
        try:
            async with teacher.counted():
                if scope["path"] == "/v1/score":
                    await answer(200, await teacher.unary(body, headers["x-request-id"]))
                    return
                async for frame in teacher.frames(pb.ScoreRequest.FromString(body), split=True):
                    data = frame.SerializeToString()
                    if not started:
                        await send({"type": "http.response.start", "status": 200, "headers": []})
                        started = True
                    packed = struct.pack("<I", len(data)) + data
                    for cut in (packed[:3], packed[3:9], packed[9:]):
                        await send({"type": "http.response.body", "body": cut, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except Broken:
            if not started:
                await send({"type": "http.response.start", "status": 200, "headers": []})
            raise  # uvicorn cuts the connection
        except RawAnswer as raw:
            await answer(raw.args[0], raw.args[1], b"text/html")
        except TeacherError as error:
            problem = {"kind": error.kind, "detail": error.message, "field": error.field}
            if error.retry_after_s is not None:
                problem["retry_after_s"] = error.retry_after_s

            await answer(error.http_status, json.dumps(problem).encode(), b"application/problem+json")

    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port or free_port(host)))
    config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1, ws="none")
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None
    task = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield f"http://{host}:{sock.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        await task
        sock.close()


SERVE = {"grpc": serve_grpc, "http": serve_http}
