"""Content codings of HTTP: what a request's body is packed in, and what an answer's may be. zstd is the one there is.
Knows neither routes nor what a body means.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

from fastapi import Request

from teacher_api import compression
from teacher_api.errors import InvalidRequest, TooLarge, Unsupported

INLINE_BYTES = 1 << 15  # compressed on the event loop; more is compressed in a thread


def accepts_zstd(request: Request) -> bool:
    """Whether the answer may be compressed: `Accept-Encoding` names zstd with a weight above 0 (RFC 9110, 12.5.3)."""
    if not compression.is_available():
        return False
    for item in request.headers.get("accept-encoding", "").split(","):
        coding, _, parameter = item.partition(";")
        if coding.strip().lower() == "zstd":
            name, _, weight = parameter.partition("=")
            return name.strip().lower() != "q" or weight.strip().strip("0.") != ""
    return False


def coding_headers(zstd: bool) -> dict[str, str]:
    """Of an answer that may have been either."""
    return {"vary": "accept-encoding"} | ({"content-encoding": "zstd"} if zstd else {})


async def coded(content: Awaitable[bytes], zstd: bool) -> bytes:
    """A whole body as it is sent."""
    data = await content
    if not zstd:
        return data
    return await _compressed(compression.compress, data)


async def coded_pieces(content: AsyncGenerator[bytes, None], zstd: bool) -> AsyncGenerator[bytes, None]:
    """A body in pieces, each of which can be read as soon as it has come. Closes `content`."""
    try:
        if not zstd:
            async for data in content:
                yield data
            return
        writer = compression.Writer()
        async for data in content:
            yield await _compressed(writer.write, data)
        yield writer.end()
    finally:
        await content.aclose()


async def _compressed(compress: Callable[[bytes], bytes], data: bytes) -> bytes:
    return compress(data) if len(data) <= INLINE_BYTES else await asyncio.to_thread(compress, data)


async def without_coding(request: Request, body: bytes, limit: int, came: Callable[[int], None]) -> bytes:
    """What is in a body of at most `limit` bytes. `came` is told of each piece, before there is another one.

    Raises:
        TooLarge: more than `limit` come out. InvalidRequest: the body is no zstd frame.
        Unsupported: another coding, or zstd is missing here.
    """
    coding = request.headers.get("content-encoding", "identity").strip().lower()
    if coding in ("identity", ""):
        return body
    if coding != "zstd" or not compression.is_available():
        known = "zstd or none" if compression.is_available() else "none"
        raise Unsupported(f"got {coding!r:.80}; expected {known}", field="content-encoding")
    try:
        reader = compression.Reader()
        pieces, size = reader.pieces(body), 0
        found: list[bytes] = []
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            size += len(piece)
            if size > limit:
                raise TooLarge(
                    f"the body has more than the {limit} bytes that this server takes", field="content-encoding"
                )
            came(len(piece))
            found.append(piece)
        reader.end()
    except TooLarge:  # a ValueError, too
        raise
    except ValueError as error:
        raise InvalidRequest(f"the body: {error}", field="content-encoding") from None
    return b"".join(found)
