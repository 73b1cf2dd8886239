"""zstd around messages, for whoever has it: the extra `zstd`, which the server's extra includes. The only importer of
the library: the standard one's from Python 3.14 on, its backport before.

What is read is never trusted: each call gives a bounded number of bytes, whatever the frame's header says, and a window
above 8 MiB, which the reader would have to hold, is refused. Compressed data is one frame and nothing after it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any, Literal

from google.protobuf.message import DecodeError

from teacher_api.errors import InvalidRequest, TooLarge, Unsupported
from teacher_api.v1 import teacher_pb2 as pb

Compression = Literal["none", "zstd"]
FEATURE = "zstd"
EXTRA = "pip install 'preceptor[zstd]'"
LEVEL = 3
"""Of zstd's effort: docs/decisions/0010-zstd.md."""
WINDOW_LOG = 23
"""2^23 bytes: what RFC 9659 allows the content coding."""
LEAST_BYTES = 1024
"""Of a message that is worth it."""
PIECE_BYTES = 1 << 20
"""Of what is read at a time."""


class TooMuch(ValueError):
    """More bytes come out than may."""


@functools.cache
def _library() -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        return None
    return zstd


def is_available() -> bool:
    return _library() is not None


def check_available(compression: Compression) -> None:
    """Raises ValueError where this installation can't do it, or nobody can."""
    if compression not in ("none", "zstd"):
        raise ValueError(f"compression is {compression!r}; expected 'none' or 'zstd'")
    if compression == "zstd" and not is_available():
        raise ValueError(f"compression is 'zstd', for which a package is missing: {EXTRA}")


def compress(data: bytes) -> bytes:
    compressed: bytes = _library().compress(data, LEVEL)
    return compressed


def decompress(data: bytes, max_bytes: int) -> bytes:
    """What one whole frame holds.

    Raises:
        TooMuch: more than `max_bytes`; nothing beyond them is made.
        ValueError: it is no such frame.
    """
    reader = Reader()
    whole = reader.read(data, max_bytes + 1)
    if len(whole) > max_bytes:
        raise TooMuch(f"more than {max_bytes} bytes when decompressed")
    reader.end()
    return whole


class Writer:
    """One frame, written in pieces: each call gives all there is so far, so that it can leave at once."""

    def __init__(self) -> None:
        self._writer = _library().ZstdCompressor(level=LEVEL)

    def write(self, data: bytes) -> bytes:
        written: bytes = self._writer.compress(data, self._writer.FLUSH_BLOCK)
        return written

    def end(self) -> bytes:
        last: bytes = self._writer.flush()
        return last


class Reader:
    """One frame, read in pieces. Every ValueError is one line."""

    def __init__(self) -> None:
        zstd = _library()
        if zstd is None:
            raise ValueError(f"zstd, for which a package is missing: {EXTRA}")
        options = {zstd.DecompressionParameter.window_log_max: WINDOW_LOG}
        self._error: type[Exception] = zstd.ZstdError
        self._reader = zstd.ZstdDecompressor(options=options)

    def read(self, data: bytes, max_bytes: int) -> bytes:
        """At most `max_bytes` of what `data` adds."""
        if self._reader.eof:
            if data:
                raise ValueError("bytes after the end of the zstd frame; expected one frame")
            return b""
        try:
            found: bytes = self._reader.decompress(data, max_bytes)
        except (self._error, MemoryError) as error:
            raise ValueError(f"no zstd frame that can be read: {' '.join(str(error).split())}") from None
        if self._reader.eof and self._reader.unused_data:
            raise ValueError("bytes after the end of the zstd frame; expected one frame")
        return found

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """All that `data` adds, PIECE_BYTES at a time."""
        while True:
            piece = self.read(data, PIECE_BYTES)
            if piece:
                yield piece
            if self._reader.eof or self._reader.needs_input:
                return
            data = b""

    def end(self) -> None:
        """Raises ValueError unless the frame has come whole."""
        if not self._reader.eof:
            raise ValueError("the zstd frame ends early")


# ---- requests in an envelope -----------------------------------------------------------------------------------------


def pack_request(message: pb.ScoreRequest) -> bytes:
    """`message` as bytes, in an envelope where that is smaller."""
    data = message.SerializeToString()
    if len(data) < LEAST_BYTES:
        return data
    packed = pb.ScoreRequest(packed=compress(data)).SerializeToString()
    return min(data, packed, key=len)


def unpack_request(message: pb.ScoreRequest, max_bytes: int) -> pb.ScoreRequest:
    """The request that `message` is, or is the envelope of.

    Raises:
        TooLarge: it has more than `max_bytes`.
        InvalidRequest: the envelope holds no request, or something is beside it. Unsupported: zstd is missing here.
    """
    if not message.packed:
        return message
    if len(message.ListFields()) > 1:
        beside = next(descriptor.name for descriptor, _ in message.ListFields() if descriptor.name != "packed")
        raise InvalidRequest(f"{beside} is set beside it; expected an envelope and nothing else", field="packed")
    if not is_available():
        raise Unsupported("this server has no zstd; send the request as it is", field="packed")
    try:
        inner = pb.ScoreRequest.FromString(decompress(message.packed, max_bytes))
    except TooMuch:
        text = f"the request has more than the {max_bytes} bytes that this server takes"
        raise TooLarge(text, field="packed") from None
    except ValueError as error:
        raise InvalidRequest(str(error), field="packed") from None
    except DecodeError:
        raise InvalidRequest("holds no teacher.v1.ScoreRequest", field="packed") from None
    if inner.packed:
        raise InvalidRequest("an envelope in an envelope; expected a request in it", field="packed")
    return inner
