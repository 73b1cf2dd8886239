"""How a head gets to a client: received piece by piece into a file that becomes visible whole and checked, and found
again there. Owns files and checks; retries are asking.py's.

Invariant: nothing is handed out whose digest is not the one that the teacher stated, whether it came over the wire or
from the cache.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from teacher_api.errors import CorruptResponse
from teacher_api.head import Head, digest_of, file_hash, read_head
from teacher_api.types import TeacherInfo
from teacher_api.v1 import teacher_pb2 as pb

Receive = Callable[[AsyncIterator[pb.HeadChunk]], Awaitable[None]]

_log = logging.getLogger("teacher_api")


async def head_of(info: TeacherInfo, ask: Callable[[Receive], Awaitable[None]], cache_dir: Path | None) -> Head:
    """The head of the teacher that `info` describes, from `cache_dir` if it is there.

    Args:
        ask: opens the download, perhaps several times, and hands each to the receiver.

    Raises:
        CorruptResponse: what came is not the file that the teacher stated.
        TeacherError: of `ask`.
    """
    if cache_dir is None:
        with tempfile.TemporaryDirectory(prefix="teacher-head-") as scratch:
            return await _downloaded(info, ask, Path(scratch) / "head.safetensors")
    cache_dir.mkdir(parents=True, exist_ok=True)
    path = cache_dir / f"{info.fingerprint}-{info.head_digest}.safetensors"
    if info.head_digest and path.is_file():
        if await asyncio.to_thread(digest_of, path, info.fingerprint) == info.head_digest:
            return await asyncio.to_thread(_read, path, info)
        _log.warning("%s is damaged and is downloaded again", path)
    return await _downloaded(info, ask, path)


async def _downloaded(info: TeacherInfo, ask: Callable[[Receive], Awaitable[None]], path: Path) -> Head:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".partial-", suffix=".safetensors")
    os.close(descriptor)
    partial = Path(name)

    async def receive(chunks: AsyncIterator[pb.HeadChunk]) -> None:
        await _received(chunks, partial, info)

    try:
        await ask(receive)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return await asyncio.to_thread(_read, path, info)


async def _received(chunks: AsyncIterator[pb.HeadChunk], path: Path, info: TeacherInfo) -> None:
    digest, size = file_hash(info.fingerprint), 0
    with path.open("wb") as file:
        async for chunk in chunks:
            if chunk.offset != size:
                raise CorruptResponse(f"a piece of the output head at byte {chunk.offset}; expected {size}")
            size += len(chunk.data)
            if size > info.head_bytes:
                raise CorruptResponse(f"an output head of more than the {info.head_bytes} bytes that it has")
            digest.update(chunk.data)
            file.write(chunk.data)
    if size != info.head_bytes:
        raise CorruptResponse(f"the output head ends after {size} of {info.head_bytes} bytes")
    if digest.hexdigest() != info.head_digest:
        raise CorruptResponse(
            "the output head's digest does not match: damaged on the way, or of another teacher than "
            f"{info.fingerprint!r:.80}"
        )


def _read(path: Path, info: TeacherInfo) -> Head:
    try:
        head = read_head(path)
    except ValueError as error:
        raise CorruptResponse(str(error)) from error
    if head.fingerprint != info.fingerprint or head.tokenizer_size != info.tokenizer_size:
        raise CorruptResponse(
            f"the output head is of {head.fingerprint!r:.80} with {head.tokenizer_size} ids; expected "
            f"{info.fingerprint!r:.80} with {info.tokenizer_size}"
        )
    return head
