"""From the service's answers to sealed frames, for both transports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

from teacher_api import wire
from teacher_api.compression import Compression
from teacher_api.errors import InternalError, TeacherError
from teacher_api.v1 import teacher_pb2 as pb
from teacher_server.service import Answer

FRAME_BYTES = 1 << 20  # of rows in one stream frame: large enough to be efficient, small enough to interleave
INLINE_BYTES = 1 << 18  # encoded on the event loop; larger answers are encoded in a thread
INLINE_COMPRESSED_BYTES = 1 << 15  # the same of answers that are compressed, which takes ten times as long


def frames_of(
    answer: Answer,
    request_id: str,
    *,
    max_rows_bytes: int | None,
    compression: Compression = "none",
) -> Iterator[pb.ScoreFrame]:
    """The frames of one answer: one where `max_rows_bytes` is None."""
    result, job, fingerprint = answer.result, answer.job, answer.fingerprint
    if isinstance(result, TeacherError):
        result.request_id = request_id
        yield wire.encode_error(answer.completion_id, result, fingerprint)
        return
    if job is None:
        raise InternalError("scores without the job they answer")
    key = wire.seal_key(job.token_ids, job.positions, job.candidates, job.options, fingerprint)
    yield from wire.encode_scores(
        result,
        options=job.options,
        candidates=job.candidates,
        key=key,
        max_rows_bytes=max_rows_bytes,
        compression=compression,
    )


async def streamed_frames(answer: Answer, request_id: str, compression: Compression) -> AsyncIterator[pb.ScoreFrame]:
    """`frames_of` of at most about FRAME_BYTES each; compressed off the event loop."""
    frames = frames_of(answer, request_id, max_rows_bytes=FRAME_BYTES, compression=compression)
    if compression == "none" or _is_small([answer], INLINE_COMPRESSED_BYTES):
        for frame in frames:
            yield frame
        return
    while (next_frame := await asyncio.to_thread(next, frames, None)) is not None:
        yield next_frame


def response_of(
    answers: list[Answer], fingerprint: str, request_id: str, compression: Compression = "none"
) -> pb.ScoreResponse:
    """All answers in one message, one frame each, in the order asked."""
    frames = [
        frame
        for answer in answers
        for frame in frames_of(answer, request_id, max_rows_bytes=None, compression=compression)
    ]
    return pb.ScoreResponse(fingerprint=fingerprint, request_id=request_id, frames=frames)


async def encoded(answers: list[Answer], fingerprint: str, request_id: str, compression: Compression = "none") -> bytes:
    """`response_of` as bytes; off the event loop where it takes long."""

    def encode() -> bytes:
        return response_of(answers, fingerprint, request_id, compression).SerializeToString()

    limit = INLINE_BYTES if compression == "none" else INLINE_COMPRESSED_BYTES
    return encode() if _is_small(answers, limit) else await asyncio.to_thread(encode)


def _is_small(answers: list[Answer], limit: int) -> bool:
    """Whether encoding `answers` takes so little time that the event loop may do it."""
    total = 0
    for answer in answers:
        result = answer.result
        if isinstance(result, TeacherError):
            continue
        for array in (result.topk_logprob, result.topk_ids, result.hidden, result.candidate_logprob):
            total += 0 if array is None else array.nbytes
        total += 16 * result.num_rows
    return total <= limit
