"""The contract over gRPC: the only importer of grpc in this package. gRPC's own retries are off, asking.py has ours.

Messages cross this file as bytes and are parsed here, so that a damaged one is a CorruptResponse, not gRPC's INTERNAL.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from teacher_api import errors, tracing
from teacher_api.compression import Compression, pack_request
from teacher_api.errors import TeacherError, error_of_kind
from teacher_api.tls import NO_TLS, ClientTls
from teacher_api.transport import MAX_MESSAGE_BYTES, REQUEST_ID, parse, parse_info
from teacher_api.v1 import teacher_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    # a restarted teacher should be found soon; the pace of the calls themselves is the client's
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
_BY_CODE: dict[str, type[TeacherError]] = {
    "UNAVAILABLE": errors.Unavailable,
    "RESOURCE_EXHAUSTED": errors.Overloaded,
    "DEADLINE_EXCEEDED": errors.DeadlineExceeded,
    "CANCELLED": errors.Unavailable,  # not by us, who would not read it: a server that stops cuts its calls so
    "UNAUTHENTICATED": errors.Unauthenticated,
    "PERMISSION_DENIED": errors.PermissionDenied,
    "INVALID_ARGUMENT": errors.InvalidRequest,
    "UNIMPLEMENTED": errors.Unsupported,
    "NOT_FOUND": errors.NotFound,
    "DATA_LOSS": errors.CorruptResponse,
}
"""What a status without our details means: gRPC itself or a proxy gave it. All others are errors we don't know."""


_WRITE_FAILED = "Internal error from Core"
"""What grpc.aio says in place of the call's own end where its request could not be written any more: a connection that
broke, mostly (github.com/grpc/grpc/issues/36066). Asked again, it shows what it was."""
_BROKEN = ("Stream removed", "No status received")
"""What gRPC says first where an answer is not HTTP/2, or does not come to its end: no word of the server's."""


class _Link:
    """One channel and its methods; retired, it is closed when its last call has ended."""

    def __init__(self, target: str, credentials: grpc.ChannelCredentials | None, address: str) -> None:
        options: tuple[tuple[str, int | str], ...] = _OPTIONS
        if address:  # the certificate is still held to the name
            name = target.rpartition(":")[0].strip("[]")
            options = (*_OPTIONS, ("grpc.default_authority", target), ("grpc.ssl_target_name_override", name))
        if credentials is not None:
            self.channel = grpc.aio.secure_channel(address or target, credentials, options=options)
        else:
            self.channel = grpc.aio.insecure_channel(address or target, options=options)
        self.info = self.channel.unary_unary(f"/{_SERVICE}/GetInfo")
        self.score = self.channel.unary_unary(f"/{_SERVICE}/Score")
        self.stream = self.channel.stream_stream(f"/{_SERVICE}/ScoreStream")
        self.head = self.channel.unary_stream(f"/{_SERVICE}/GetHead")
        self.calls = 0


class GrpcTransport:
    """`target` is host:port; `address`, if given, the address and port of it to connect to. Keys are sent in the clear
    unless `secure`. gRPC itself has no zstd in Python, so that `compression` is that of our own messages: frames, and
    requests in an envelope.

    A connection that may be half-open, for a call got no answer in its time, is not used again: gRPC would put one call
    after the other on it for as long as the system calls it open.
    """

    def __init__(
        self,
        target: str,
        *,
        secure: bool,
        api_key: str | None,
        compression: Compression = "none",
        address: str = "",
        tls: ClientTls = NO_TLS,
    ) -> None:
        self._compression = compression
        self._target = target
        self._address = address
        files = [tls.pem(name) for name in ("ca", "key", "cert")]
        self._credentials = grpc.ssl_channel_credentials(*files) if secure else None
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._link = _Link(target, self._credentials, address)
        self._retired: set[_Link] = set()

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[_Link]:
        """The link for one call. Raises what gRPC raised as a TeacherError."""
        link = self._link
        link.calls += 1
        try:
            yield link
        except grpc.aio.AioRpcError as error:
            found = self._error(error)
            if isinstance(found, errors.DeadlineExceeded) and not found.request_id and link is self._link:
                self._link = _Link(self._target, self._credentials, self._address)
                self._retired.add(link)
            raise found from error
        finally:
            link.calls -= 1
            if link in self._retired and not link.calls:
                self._retired.discard(link)
                await link.channel.close()

    def _call(self, timeout_s: float, request_id: str) -> dict[str, Any]:
        metadata = (*self._metadata, (REQUEST_ID, request_id), *tracing.headers().items())
        return {"timeout": timeout_s, "metadata": metadata}

    async def info(self, *, timeout_s: float, request_id: str, teacher: str = "") -> pb.TeacherInfo:
        asked = pb.GetInfoRequest(teacher=teacher).SerializeToString()
        async with self._calling() as link:
            data = await link.info(asked, **self._call(timeout_s, request_id))
        return parse_info(data)

    async def score(self, request: pb.ScoreRequest, *, timeout_s: float, request_id: str) -> pb.ScoreResponse:
        async with self._calling() as link:
            data = await link.score(self._packed(request), **self._call(timeout_s, request_id))
        return parse(pb.ScoreResponse, data)

    async def stream(
        self, request: pb.ScoreRequest, *, timeout_s: float, request_id: str
    ) -> AsyncIterator[pb.ScoreFrame]:
        async def once() -> AsyncIterator[bytes]:
            yield self._packed(request)

        async with self._calling() as link:
            call = link.stream(once(), **self._call(timeout_s, request_id))
            try:
                async for data in call:
                    yield parse(pb.ScoreFrame, data)
            finally:
                call.cancel()  # no effect on a call that has ended

    async def head(
        self, request: pb.GetHeadRequest, *, timeout_s: float, request_id: str
    ) -> AsyncIterator[pb.HeadChunk]:
        async with self._calling() as link:
            call = link.head(request.SerializeToString(), **self._call(timeout_s, request_id))
            try:
                async for data in call:
                    yield parse(pb.HeadChunk, data)
            finally:
                call.cancel()

    def _packed(self, request: pb.ScoreRequest) -> bytes:
        if self._compression == "none":
            return request.SerializeToString()
        request.compression = pb.COMPRESSION_ZSTD
        return pack_request(request)

    async def close(self) -> None:
        for link in (self._link, *self._retired):
            await link.channel.close()

    def _error(self, error: grpc.aio.AioRpcError) -> TeacherError:
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                found = error_of_status(value)
                if found is not None:
                    return found
        code, details = error.code().name, " ".join((error.details() or "").split())
        if code == "RESOURCE_EXHAUSTED" and "larger than max" in details:
            return errors.TooLarge(f"{self._target}: {details}")
        if code == "INTERNAL" and details == _WRITE_FAILED:
            return errors.Unavailable(f"{self._target}: the request could not be sent to its end")
        if code in ("INTERNAL", "UNKNOWN") and details.startswith(_BROKEN):
            return errors.Unavailable(f"{self._target}: {details}")
        cls = _BY_CODE.get(code)
        if cls is None:
            return errors.InternalError(f"{self._target}: gRPC {code}: {details}")
        return cls(f"{self._target}: {details}")


def error_of_status(data: bytes) -> TeacherError | None:
    """The error inside a google.rpc.Status, or None if it holds none of ours."""
    try:
        status = status_pb2.Status.FromString(data)
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        has_info = any(detail.Unpack(info) for detail in status.details)
        has_retry = any(detail.Unpack(retry) for detail in status.details)
    except DecodeError:
        return None
    if not has_info or info.domain != _SERVICE.rpartition(".")[0]:
        return None
    return error_of_kind(
        info.reason,
        status.message,
        field=info.metadata.get("field", ""),
        retry_after_s=retry.retry_delay.ToNanoseconds() / 1e9 if has_retry else None,
        request_id=info.metadata.get("request_id", ""),
    )
