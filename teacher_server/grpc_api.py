"""The service over gRPC: the contract's methods, standard health and reflection, errors as google.rpc.Status.
Maps messages and nothing else; rules live in service.py.

Requests arrive as bytes and are parsed here, so that a damaged message is the caller's error and not an internal one.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_reflection.v1alpha import reflection

from teacher_api import compression, wire
from teacher_api import info as info_api
from teacher_api.errors import Incomplete, InternalError, InvalidRequest, Overloaded, TeacherError, TooLarge
from teacher_api.v1 import teacher_pb2 as pb
from teacher_server import grpc_health
from teacher_server.answers import FRAME_BYTES, encoded, streamed_frames
from teacher_server.auth import KeyRing
from teacher_server.caller import Caller
from teacher_server.counts import Outcome
from teacher_server.lifecycle import Lifecycle
from teacher_server.problem import REQUEST_ID_HEADER, request_id_of
from teacher_server.service import TeacherService
from teacher_server.stream import StreamSession, taken_within
from teacher_server.tls import Tls
from teacher_server.watch import watched

log = structlog.get_logger("teacher_server.grpc")
SERVICE: str = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
METHOD_OF = {
    f"/{SERVICE}/{name}": method
    for name, method in (("GetInfo", "info"), ("Score", "score"), ("ScoreStream", "score_stream"), ("GetHead", "head"))
}
"""How counts.py calls a method."""
Work = Callable[[str, Caller], Awaitable[Any]]
DOMAIN = "teacher.v1"  # of the ErrorInfo that carries our error kinds
STATUS_KEY = "grpc-status-details-bin"
KEEPALIVE_MS = 20_000
IDLE_MS = 600_000
"""After which a connection without calls is closed: a caller's next call makes another."""
OVERSIZE_ROOM_BYTES = 1 << 20  # gRPC's own limit lies this far above twice ours, so that a refusal is ours


class GrpcServer:
    """`await start()`, then `port`; `await stop(grace_s)`."""

    def __init__(self, service: TeacherService, lifecycle: Lifecycle, keys: KeyRing, tls: Tls | None = None) -> None:
        limit = 2 * service.config.max_request_bytes + OVERSIZE_ROOM_BYTES
        self._server = grpc.aio.server(
            interceptors=[_KeyCheck(keys, service)],
            maximum_concurrent_rpcs=service.config.max_calls,  # gRPC holds a whole message of each before we see it
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", -1),  # bounded by max_response_bytes, before anything is scored
                ("grpc.so_reuseport", 0),
                ("grpc.server_handshake_timeout_ms", int(service.config.header_s * 1000)),
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),  # a caller that vanished without a word is noticed
                ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
                ("grpc.max_connection_idle_ms", IDLE_MS),
            ],
        )
        self._tls = tls
        self._health = grpc_health.Health(
            lifecycle, (SERVICE,), max_calls=service.config.max_calls, message_s=service.config.header_s
        )
        self._server.add_generic_rpc_handlers((_handlers(service, keys), self._health.handler()))
        names = (SERVICE, grpc_health.SERVICE, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Raises ValueError when the port can't be had."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, _credentials(self._tls))
        except RuntimeError:
            raise ValueError(f"cannot listen for gRPC on {address}: the address is in use or not ours") from None
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        self._health.close()
        await self._server.stop(grace_s)


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    pair, client_ca = [(tls.key, tls.certificate)], tls.client_ca or None
    return grpc.ssl_server_credentials(pair, client_ca, require_client_auth=client_ca is not None)


def _handlers(service: TeacherService, keys: KeyRing) -> grpc.GenericRpcHandler:
    async def get_info(requests: AsyncIterator[bytes], context: Any) -> Any:
        async def work(_: str, __: Caller) -> None:
            try:
                asked = pb.GetInfoRequest.FromString(await _only(requests, service))
            except DecodeError:
                raise InvalidRequest("the message is not a teacher.v1.GetInfoRequest") from None
            await context.write(info_api.sealed(service.info_of(asked.teacher)))

        return await _answered(context, service, keys, "info", work)

    async def score(requests: AsyncIterator[bytes], context: Any) -> None:
        async def work(request_id: str, caller: Caller) -> None:
            await _score(service, requests, caller, request_id, context)

        await _answered(context, service, keys, "score", work)

    async def score_stream(requests: AsyncIterator[bytes], context: Any) -> None:
        async def work(request_id: str, caller: Caller) -> None:
            await _score_stream(service, keys, requests, caller, request_id, context)

        await _answered(context, service, keys, "score_stream", work)

    async def get_head(requests: AsyncIterator[bytes], context: Any) -> None:
        async def work(_: str, caller: Caller) -> None:
            await _get_head(service, keys, requests, caller, context)

        await _answered(context, service, keys, "head", work)

    methods = {
        # Of one message, read by ourselves, for gRPC would wait for its end for ever; and of one answer, written by
        # ourselves: one that is returned may lie unread for ever and counts as sent. The wire is the contract's.
        "GetInfo": grpc.stream_stream_rpc_method_handler(get_info),
        "Score": grpc.stream_stream_rpc_method_handler(score),
        "GetHead": grpc.stream_stream_rpc_method_handler(get_head),
        "ScoreStream": grpc.stream_stream_rpc_method_handler(score_stream),
    }
    return grpc.method_handlers_generic_handler(SERVICE, methods)


async def _only(requests: AsyncIterator[bytes], service: TeacherService) -> bytes:
    """The one message of a call. Raises InvalidRequest when it does not come in time."""
    config = service.config
    limit_s = config.body_idle_s + config.max_request_bytes / config.body_bytes_per_s
    try:
        async with asyncio.timeout(limit_s):
            async for data in requests:
                return data
    except TimeoutError:
        raise Incomplete(f"the message had not come whole after {limit_s:.3g} s") from None
    raise InvalidRequest("the call ended without a message")


async def _score(
    service: TeacherService, requests: AsyncIterator[bytes], caller: Caller, request_id: str, context: Any
) -> None:
    service.open_info()  # before the message is read
    decoded = await _decoded(await _only(requests, service), service)
    fingerprint = service.open_info(decoded.request.teacher).fingerprint
    async with service.scored(decoded, caller, transport_s=context.time_remaining()) as answers:
        message = await encoded(answers, fingerprint, request_id, decoded.compression)
        del answers  # what is being sent is held once
        pieces = math.ceil(len(message) / FRAME_BYTES)
        await context.send_initial_metadata(())  # apart from the message: a status can follow one that is stuck
        async with taken_within(service.config.answer_idle_s * pieces):
            await context.write(message)


async def _score_stream(
    service: TeacherService,
    keys: KeyRing,
    requests: AsyncIterator[bytes],
    caller: Caller,
    request_id: str,
    context: Any,
) -> None:
    service.open_info()
    authorization = dict(context.invocation_metadata() or ()).get("authorization")
    asked: dict[str, compression.Compression] = {}  # of the completions that are not answered yet

    async def decoded() -> AsyncIterator[wire.DecodedRequest]:
        async for data in requests:
            request = await _decoded(data, service)
            asked.update(dict.fromkeys(request.ids, request.compression))
            yield request

    left_s = context.time_remaining()
    session = StreamSession(service, decoded(), caller, left_s, lambda: keys.check(authorization))
    async with session, contextlib.aclosing(session.answers()) as answers:
        async for answer in answers:
            allowed = asked.pop(answer.completion_id)
            async for frame in streamed_frames(answer, request_id, allowed):
                async with taken_within(service.config.answer_idle_s):
                    await context.write(frame.SerializeToString())


async def _get_head(
    service: TeacherService, keys: KeyRing, requests: AsyncIterator[bytes], caller: Caller, context: Any
) -> None:
    try:
        expected = pb.GetHeadRequest.FromString(await _only(requests, service)).expect_fingerprint
    except DecodeError:
        raise InvalidRequest("the message is not a teacher.v1.GetHeadRequest") from None
    authorization = dict(context.invocation_metadata() or ()).get("authorization")
    file, offset = service.head_file(authorization, expected, caller), 0
    sent = service.head_pieces(file, FRAME_BYTES, caller, lambda: keys.check(authorization))
    async with contextlib.aclosing(sent) as pieces:
        async for piece in pieces:
            async with taken_within(service.config.answer_idle_s):
                await context.write(pb.HeadChunk(offset=offset, data=piece).SerializeToString())
            offset += len(piece)


async def _decoded(data: bytes, service: TeacherService) -> wire.DecodedRequest:
    limit = service.config.max_request_bytes
    if len(data) > limit:
        raise TooLarge(f"the message has {len(data)} bytes; this server takes {limit}")
    try:
        message = pb.ScoreRequest.FromString(data)
    except DecodeError:
        raise InvalidRequest("the message is not a teacher.v1.ScoreRequest") from None
    if message.packed:
        message = await asyncio.to_thread(compression.unpack_request, message, limit)
    return wire.decode_request(message)


async def _answered(context: Any, service: TeacherService, keys: KeyRing, method: str, work: Work) -> Any:
    """Counts one call."""
    metadata = dict(context.invocation_metadata() or ())
    with watched(service.counts, service.tracing, "grpc", method, metadata) as outcome:
        try:
            return await _with_status(context, metadata, keys, _in_a_place(service, work), outcome)
        except asyncio.CancelledError:  # gRPC's way to say that the caller has gone, or its deadline
            left_s = context.time_remaining()
            outcome.name = "cancelled" if left_s is None or left_s > 0 else "deadline_exceeded"
            raise


def _in_a_place(service: TeacherService, work: Work) -> Work:
    """`work`, for callers whose tenant has not too many calls open already."""

    async def placed(request_id: str, caller: Caller) -> Any:
        if not service.calls.has_room(caller.tenant):
            raise Overloaded("as many calls are open as are this tenant's part; come back later", retry_after_s=1.0)
        with service.calls.held(caller.tenant):
            return await work(request_id, caller)

    return placed


async def _with_status(context: Any, metadata: dict[str, str], keys: KeyRing, work: Work, outcome: Outcome) -> Any:
    """Runs `work` for the call's id and caller and turns what it raises into a status."""
    request_id = outcome.request_id
    try:
        request_id_of(metadata.get(REQUEST_ID_HEADER))
        key = keys.check(metadata.get("authorization"))
        outcome.tenant = key.tenant
        context.set_trailing_metadata(((REQUEST_ID_HEADER, request_id),))
        caller = key.from_headers(metadata)
        outcome.called_by(caller)
        return await work(request_id, caller)
    except TeacherError as error:
        outcome.refused(error)
        await _abort(context, error, request_id)
    except (grpc.RpcError, grpc.aio.AbortError):
        outcome.name = "cancelled"
        raise
    except Exception as error:  # the process boundary: a bug must not show its insides
        outcome.name = "internal"
        log.error("internal_error", exc_info=error)
        await _abort(context, InternalError("a bug; the server's log has it"), request_id)


async def _abort(context: Any, error: TeacherError, request_id: str) -> NoReturn:
    code = grpc.StatusCode[error.grpc_code]
    trailers = ((STATUS_KEY, _status(error, code, request_id)), (REQUEST_ID_HEADER, request_id))
    await context.abort(code, error.message, trailing_metadata=trailers)
    raise AssertionError("abort returned")


def _status(error: TeacherError, code: Any, request_id: str) -> bytes:
    info = error_details_pb2.ErrorInfo(reason=error.kind, domain=DOMAIN, metadata={"request_id": request_id})
    if error.field:
        info.metadata["field"] = error.field
    details: list[Any] = [info]
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(retry)
    status = status_pb2.Status(code=code.value[0], message=error.message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    data: bytes = status.SerializeToString()
    return data


class _KeyCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Refuses every method without a key, but health: probes have none."""

    def __init__(self, keys: KeyRing, service: TeacherService) -> None:
        self._keys = keys
        self._service = service

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler_call_details.method.startswith(f"/{grpc_health.SERVICE}/"):
            return handler
        metadata = dict(handler_call_details.invocation_metadata or ())
        try:
            self._keys.check(metadata.get("authorization"))
        except TeacherError as error:
            refused, method = error, METHOD_OF.get(handler_call_details.method, "other")

            async def refuse(_: Any, context: Any) -> None:
                with watched(self._service.counts, self._service.tracing, "grpc", method, metadata) as outcome:
                    outcome.refused(refused)
                    await _abort(context, refused, outcome.request_id)

            return grpc.stream_stream_rpc_method_handler(refuse)
        return handler
