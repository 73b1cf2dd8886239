"""The contract over HTTP: the importer of httpx for it. httpx has no limit on a whole call, so each one
runs under asyncio's.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from urllib.parse import quote, urlencode, urlsplit, urlunsplit

import httpx

from teacher_api import tracing
from teacher_api.compression import LEAST_BYTES, Compression, Reader, compress
from teacher_api.errors import CorruptResponse, DeadlineExceeded, InvalidRequest, TeacherError, Unavailable
from teacher_api.tls import NO_TLS, ClientTls
from teacher_api.transport import MAX_MESSAGE_BYTES, PROTOBUF, REQUEST_ID, error_of_problem, parse, parse_info
from teacher_api.v1 import teacher_pb2 as pb

MAX_PROBLEM_BYTES = 64 << 10
DEADLINE = "grpc-timeout"
"""The header by which a teacher knows over HTTP, too, how long we wait."""


def context_of(tls: ClientTls) -> ssl.SSLContext:
    """For httpx. Authorities that `tls` names stand in for the system's."""
    return tls.apply(ssl.create_default_context(cafile=tls.ca) if tls.ca else httpx.create_ssl_context())


class HttpTransport:
    """`url` is http://host:port or https://…, perhaps with a path before /v1; `address`, if given, the one of its host
    to connect to. `compression` is HTTP's own: a content coding."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        max_connections: int,
        compression: Compression = "none",
        address: str = "",
        tls: ClientTls = NO_TLS,
    ) -> None:
        self._compression = compression
        coding = "identity" if compression == "none" else compression
        headers = {"accept": PROTOBUF, "accept-encoding": coding, "user-agent": "preceptor-client"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        self._url, self._extensions = url.rstrip("/"), {}
        if address:  # the certificate and the server's own routing still go by the name
            split = urlsplit(self._url)
            host = f"[{address}]" if ":" in address else address
            self._url = urlunsplit(split._replace(netloc=host if split.port is None else f"{host}:{split.port}"))
            headers["host"], self._extensions = split.netloc, {"sni_hostname": split.hostname or ""}
        self._client = httpx.AsyncClient(
            headers=headers,
            verify=context_of(tls),
            timeout=httpx.Timeout(None),
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
        )

    @asynccontextmanager
    async def _call(
        self, method: str, path: str, body: bytes | None, timeout_s: float, request_id: str
    ) -> AsyncIterator[httpx.Response]:
        """An answer of status 200, its body not read yet. Everything else raises a TeacherError."""
        headers = {REQUEST_ID: request_id, DEADLINE: _deadline(timeout_s), **tracing.headers()}
        headers |= {"content-type": PROTOBUF} if body is not None else {}
        if body is not None and self._compression == "zstd" and len(body) >= LEAST_BYTES:
            body = compress(body)
            headers["content-encoding"] = "zstd"
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._client.stream(
                    method, self._url + path, content=body, headers=headers, extensions=self._extensions
                ) as response,
            ):
                if response.status_code != 200:
                    raise error_of_problem(
                        response.status_code,
                        response.headers.get("content-type", ""),
                        await _read(response, MAX_PROBLEM_BYTES),
                        response.headers.get("retry-after"),
                    )
                yield response
        except TeacherError:
            raise
        except TimeoutError:
            raise DeadlineExceeded(f"{self._url}: no complete answer within {timeout_s:.3g} s") from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise InvalidRequest(f"{self._url}: {error}", field="url") from error
        except (httpx.TransportError, httpx.StreamError) as error:
            raise Unavailable(f"{self._url}: {error or type(error).__name__}") from error

    async def info(self, *, timeout_s: float, request_id: str, teacher: str = "") -> pb.TeacherInfo:
        path = "/v1/info" + (f"?teacher={quote(teacher, safe='')}" if teacher else "")
        async with self._call("GET", path, None, timeout_s, request_id) as response:
            return parse_info(await _read(response, MAX_MESSAGE_BYTES))

    async def score(self, request: pb.ScoreRequest, *, timeout_s: float, request_id: str) -> pb.ScoreResponse:
        body = request.SerializeToString()
        async with self._call("POST", "/v1/score", body, timeout_s, request_id) as response:
            return parse(pb.ScoreResponse, await _read(response, MAX_MESSAGE_BYTES))

    async def stream(
        self, request: pb.ScoreRequest, *, timeout_s: float, request_id: str
    ) -> AsyncIterator[pb.ScoreFrame]:
        body = request.SerializeToString()
        async with self._call("POST", "/v1/score/stream", body, timeout_s, request_id) as response:
            buffer = bytearray()
            async for chunk in _content(response):
                buffer += chunk
                for frame in _whole_frames(buffer):
                    yield parse(pb.ScoreFrame, frame)
            if buffer:
                raise CorruptResponse(f"the stream ends inside a frame, after {len(buffer)} bytes of it")

    async def head(
        self, request: pb.GetHeadRequest, *, timeout_s: float, request_id: str
    ) -> AsyncIterator[pb.HeadChunk]:
        path = f"/v1/head?{urlencode({'expect_fingerprint': request.expect_fingerprint})}"
        async with self._call("GET", path, None, timeout_s, request_id) as response:
            offset = 0
            async for data in response.aiter_raw():
                yield pb.HeadChunk(offset=offset, data=data)
                offset += len(data)

    async def close(self) -> None:
        await self._client.aclose()


def _deadline(timeout_s: float) -> str:
    """As gRPC writes it: at most 8 digits and a unit, never less than `timeout_s`."""
    for unit, seconds in (("m", 1e-3), ("S", 1.0)):
        if math.ceil(timeout_s / seconds) < 10**8:
            return f"{max(1, math.ceil(timeout_s / seconds))}{unit}"
    return f"{min(math.ceil(timeout_s / 3600), 10**8 - 1)}H"


def _whole_frames(buffer: bytearray) -> Iterator[bytes]:
    """Takes each frame out of `buffer` that has come whole."""
    while len(buffer) >= 4:
        (length,) = struct.unpack_from("<I", buffer)
        if length > MAX_MESSAGE_BYTES:
            raise CorruptResponse(f"a frame of {length} bytes; expected at most {MAX_MESSAGE_BYTES}")
        if len(buffer) < 4 + length:
            return
        frame = bytes(memoryview(buffer)[4 : 4 + length])
        del buffer[: 4 + length]
        yield frame


async def _content(response: httpx.Response) -> AsyncIterator[bytes]:
    """The body without its content coding, a bounded piece at a time."""
    coding = response.headers.get("content-encoding", "identity").strip().lower()
    if coding == "identity":
        async for chunk in response.aiter_raw():
            yield chunk
        return
    if coding != "zstd":
        raise CorruptResponse(f"an answer with the content coding {coding!r:.80}, which was not asked for")
    try:
        reader = Reader()
        async for chunk in response.aiter_raw():
            for piece in reader.pieces(chunk):
                yield piece
        reader.end()
    except ValueError as error:
        raise CorruptResponse(f"the answer's body: {error}") from error


async def _read(response: httpx.Response, limit: int) -> bytes:
    chunks, size = [], 0
    async for chunk in _content(response):
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            raise CorruptResponse(f"an answer of more than {limit} bytes")
    return b"".join(chunks)
