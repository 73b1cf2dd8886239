"""Answers on the wire: Scores <-> sealed frames, and the checks that an answer belongs to its question.

Owns the seal (docs/protocol.md, "The seal"). What the arrays may hold is checked by validate.py. Shape legend: N scored
rows, K top-k, M candidates over all rows, V tokenizer size.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from teacher_api import arrays
from teacher_api.compression import LEAST_BYTES, Compression, compress, decompress
from teacher_api.errors import CorruptResponse, TeacherError, error_of_kind
from teacher_api.types import Candidates, IntArray, ScoreOptions, Scores
from teacher_api.v1 import teacher_pb2 as pb
from teacher_api.validate import check_scores, num_candidates

CHECKSUM_BYTES = 16
HIDDEN_DTYPE = {"float32": pb.DTYPE_FLOAT32, "bfloat16": pb.DTYPE_BFLOAT16}
MAX_ROWS_BYTES = 1 << 30
"""Of the rows of a compressed frame: what a message may have that is not compressed."""
MAX_ERROR_BYTES = 4096
"""Of the rows of a frame that holds an error."""
_VALUE_DTYPE = {"float32": pb.DTYPE_FLOAT32, "float16": pb.DTYPE_FLOAT16}


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked for one completion: all that is needed to check its answer."""

    id: str
    positions: IntArray  # [N], over prompt + completion
    options: ScoreOptions
    candidates: Candidates | None
    tokenizer_size: int
    fingerprint: str
    key: bytes  # of the seal


def seal_key(
    token_ids: IntArray, positions: IntArray, candidates: Candidates | None, options: ScoreOptions, fingerprint: str
) -> bytes:
    """The 32-byte key that binds an answer to its question and its teacher. Layout: docs/protocol.md, "The seal".

    Args:
        token_ids: [T], prompt and completion together.
        positions: [N], the scored positions.
    """
    name = fingerprint.encode()
    digest = hashlib.blake2b(digest_size=32, person=b"teacher.v1.ask")
    digest.update(struct.pack("<I", len(name)) + name)
    for values in (token_ids, positions):
        digest.update(struct.pack("<I", len(values)))
        digest.update(np.ascontiguousarray(values, dtype="<u4").tobytes())
    digest.update(struct.pack("<B", candidates is not None))
    if candidates is not None:
        digest.update(struct.pack("<I", len(candidates.ids)))
        digest.update(np.ascontiguousarray(candidates.ids, dtype="<u4").tobytes())
        digest.update(np.ascontiguousarray(candidates.row_offsets, dtype="<u4").tobytes())
    whole = options.top_k == "all"
    digest.update(struct.pack("<IB", 0 if options.top_k == "all" else options.top_k, whole))
    digest.update(struct.pack("<dB", options.temperature, _VALUE_DTYPE[options.value_type]))
    digest.update(struct.pack("<BBB", options.entropy, options.rank, options.hidden))
    if options.hidden and options.hidden_type != "float32":
        digest.update(struct.pack("<B", HIDDEN_DTYPE[options.hidden_type]))
    return digest.digest()


def error_key(completion_id: str, fingerprint: str) -> bytes:
    """The 32-byte key of an error's seal: the question may be too broken to digest, so only its id is in it."""
    digest = hashlib.blake2b(digest_size=32, person=b"teacher.v1.error")
    for text in (fingerprint.encode(), completion_id.encode()):
        digest.update(struct.pack("<I", len(text)) + text)
    return digest.digest()


def checksum(rows: bytes, key: bytes) -> bytes:
    """The seal of the rows as they are before they are compressed: CPUs have instructions for SHA-256."""
    digest = hashlib.sha256(key, usedforsecurity=False)
    digest.update(rows)
    return digest.digest()[:CHECKSUM_BYTES]


def _sealed(rows: pb.ScoreRows, key: bytes, compression: Compression = "none") -> pb.ScoreFrame:
    data = rows.SerializeToString(deterministic=True)
    frame = pb.ScoreFrame(completion_id=rows.completion_id, rows=data, checksum=checksum(data, key))
    if compression == "zstd" and len(data) >= LEAST_BYTES:
        compressed = compress(data)
        if len(compressed) < len(data):
            frame.rows, frame.compression = compressed, pb.COMPRESSION_ZSTD
    return frame


def _opened(frame: pb.ScoreFrame, where: str) -> bytes:
    """The rows of a frame as they were sealed."""
    if frame.compression == pb.COMPRESSION_NONE:
        return frame.rows
    if frame.compression != pb.COMPRESSION_ZSTD:
        raise CorruptResponse(f"{where}: compression {frame.compression}; expected none or zstd")
    try:
        return decompress(frame.rows, MAX_ROWS_BYTES)
    except ValueError as error:
        raise CorruptResponse(f"{where}: {error}") from error


# ---- errors ----------------------------------------------------------------------------------------------------------


def encode_error_message(error: TeacherError) -> pb.Error:
    message = pb.Error(
        kind=error.kind,
        message=error.message,
        field=error.field,
        retryable=error.retryable,
        request_id=error.request_id,
    )
    if error.retry_after_s is not None:
        message.retry_after_s = error.retry_after_s
    return message


def decode_error_message(message: pb.Error) -> TeacherError:
    return error_of_kind(
        message.kind,
        message.message,
        field=message.field,
        retry_after_s=message.retry_after_s if message.HasField("retry_after_s") else None,
        request_id=message.request_id,
    )


def encode_error(completion_id: str, error: TeacherError, fingerprint: str) -> pb.ScoreFrame:
    """The frame that answers one completion with an error."""
    rows = pb.ScoreRows(completion_id=completion_id, error=encode_error_message(error))
    return _sealed(rows, error_key(completion_id, fingerprint))


def error_in(frame: pb.ScoreFrame) -> pb.Error | None:
    """The error that a frame holds in place of rows, its seal unchecked: for whoever passes it on. Cheap: what is
    larger than an error is not looked into."""
    if frame.compression != pb.COMPRESSION_NONE or len(frame.rows) > MAX_ERROR_BYTES:
        return None
    try:
        rows = pb.ScoreRows.FromString(frame.rows)
    except DecodeError:
        return None
    return rows.error if rows.HasField("error") else None


# ---- answers ---------------------------------------------------------------------------------------------------------


def _row_bytes(scores: Scores, offsets: IntArray | None) -> npt.NDArray[np.int64]:
    """About how many bytes each row takes on the wire, [N]."""
    per_row = 16
    for array, width in ((scores.topk_ids, 4), (scores.topk_logprob, 4), (scores.hidden, 4)):
        if array is not None:
            per_row += width * array.shape[1]
    sizes = np.full(scores.num_rows, per_row, dtype=np.int64)
    if offsets is not None:
        sizes += 4 * np.diff(offsets)
    return sizes


def _spans(sizes: npt.NDArray[np.int64], max_bytes: int | None) -> Iterator[tuple[int, int]]:
    """Cuts the rows into [start, stop) of at most `max_bytes` each, but at least one row."""
    if max_bytes is None:
        yield 0, len(sizes)
        return
    ends = np.cumsum(sizes)
    start = 0
    while start < len(sizes):
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + max_bytes, side="right")))
        yield start, stop
        start = stop


def encode_scores(
    scores: Scores,
    *,
    options: ScoreOptions,
    candidates: Candidates | None,
    key: bytes,
    max_rows_bytes: int | None = None,
    compression: Compression = "none",
) -> Iterator[pb.ScoreFrame]:
    """The sealed frames of one answer, in ascending row order: one, or several of about `max_rows_bytes` each; with
    `compression`, compressed after they were sealed, where that makes them smaller.

    `scores` must have passed `check_scores`. Hidden states go as bfloat16 where they were asked for so, or that loses
    nothing.
    """
    offsets = candidates.row_offsets if candidates is not None else None
    hidden_type = HIDDEN_DTYPE[options.hidden_type]
    if scores.hidden is not None and hidden_type == pb.DTYPE_FLOAT32 and arrays.fits_bfloat16(scores.hidden):
        hidden_type = pb.DTYPE_BFLOAT16
    for start, stop in _spans(_row_bytes(scores, offsets), max_rows_bytes):
        rows = pb.ScoreRows(
            completion_id=scores.id, row_offset=start, num_rows=stop - start, total_rows=scores.num_rows
        )
        cut = slice(start, stop)
        rows.token_logprob.CopyFrom(arrays.encode_float(scores.token_logprob[cut], pb.DTYPE_FLOAT32))
        rows.log_tail.CopyFrom(arrays.encode_float(scores.log_tail[cut], pb.DTYPE_FLOAT32))
        if scores.topk_ids is not None:
            rows.topk_ids.CopyFrom(arrays.encode_unsigned(scores.topk_ids[cut]))
        if scores.topk_logprob is not None:
            values = arrays.encode_float(scores.topk_logprob[cut], _VALUE_DTYPE[options.value_type])
            rows.topk_logprob.CopyFrom(values)
        if scores.candidate_logprob is not None and offsets is not None:
            asked = slice(int(offsets[start]), int(offsets[stop]))
            rows.candidate_logprob.CopyFrom(arrays.encode_float(scores.candidate_logprob[asked], pb.DTYPE_FLOAT32))
        if scores.entropy is not None:
            rows.entropy.CopyFrom(arrays.encode_float(scores.entropy[cut], pb.DTYPE_FLOAT32))
        if scores.rank is not None:
            rows.rank.CopyFrom(arrays.encode_unsigned(scores.rank[cut], narrow=False))
        if scores.hidden is not None:
            rows.hidden.CopyFrom(arrays.encode_float(scores.hidden[cut], hidden_type))
        if stop == scores.num_rows:
            rows.computed_tokens, rows.cached_tokens = scores.computed_tokens, scores.cached_tokens
        yield _sealed(rows, key, compression)


def decode_frame(frame: pb.ScoreFrame, question: Question) -> pb.ScoreRows | TeacherError:
    """The rows of a frame whose seal holds, or the completion's error.

    Raises:
        CorruptResponse: the seal does not hold, or what is inside does not belong to this question.
    """
    where = f"frame of completion {question.id!r:.80}"
    if len(frame.checksum) != CHECKSUM_BYTES:
        raise CorruptResponse(f"{where}: checksum of {len(frame.checksum)} bytes; expected {CHECKSUM_BYTES}")
    data = _opened(frame, where)
    is_rows = hmac.compare_digest(checksum(data, question.key), frame.checksum)
    if not is_rows:
        expected = checksum(data, error_key(question.id, question.fingerprint))
        if not hmac.compare_digest(expected, frame.checksum):
            raise CorruptResponse(
                f"{where}: the checksum does not match: damaged on the way, the answer to another question, or from "
                f"another teacher than {question.fingerprint!r:.80}"
            )
    try:
        rows = pb.ScoreRows.FromString(data)
    except DecodeError as error:
        raise CorruptResponse(f"{where}: the rows can't be parsed: {error}") from error
    if rows.completion_id != question.id or frame.completion_id != question.id:
        raise CorruptResponse(
            f"{where}: holds completion {rows.completion_id!r:.80}, routed {frame.completion_id!r:.80}"
        )
    if rows.HasField("error") == is_rows:
        raise CorruptResponse(f"{where}: sealed as {'rows' if is_rows else 'an error'}, but holds the other")
    return rows if is_rows else decode_error_message(rows.error)


class Assembler:
    """Puts the frames of one completion together and checks the whole against its question.

    Holds the completion's arrays once; a failed assembler is thrown away, and so are its partial rows.
    """

    def __init__(self, question: Question) -> None:
        self.question = question
        self._filled = 0
        self._filled_candidates = 0
        self._arrays: dict[str, npt.NDArray[Any]] = {}

    def add(self, frame: pb.ScoreFrame) -> Scores | TeacherError | None:
        """Takes the next frame: None while rows are missing, else the checked answer or the completion's error.

        Raises:
            CorruptResponse: the frame, its place, or the finished answer is wrong.
        """
        rows = decode_frame(frame, self.question)
        if isinstance(rows, TeacherError):
            return rows
        question, total = self.question, len(self.question.positions)
        try:
            if (
                rows.total_rows != total
                or rows.row_offset != self._filled
                or not 0 < rows.num_rows <= total - self._filled
            ):
                raise ValueError(
                    f"rows [{rows.row_offset}, +{rows.num_rows}) of {rows.total_rows}; expected them to start at "
                    f"{self._filled} of {total}"
                )
            self._take(rows)
            if self._filled < total:
                return None
            scores = Scores(
                id=question.id,
                positions=question.positions,
                computed_tokens=rows.computed_tokens,
                cached_tokens=rows.cached_tokens,
                fingerprint=question.fingerprint,
                **self._arrays,
            )
            check_scores(scores, question.options, question.candidates, question.positions, question.tokenizer_size)
        except ValueError as error:
            raise CorruptResponse(f"answer for completion {question.id!r:.80}: {error}") from error
        return scores

    def _take(self, rows: pb.ScoreRows) -> None:
        start, stop = self._filled, self._filled + rows.num_rows
        total = len(self.question.positions)
        for name, values in decode_rows(rows).items():
            if name == "candidate_logprob":
                at, length = self._filled_candidates, num_candidates(self.question.candidates)
                self._filled_candidates = until = at + len(values)
            else:
                at, until, length = start, stop, total
                if len(values) != rows.num_rows:
                    raise ValueError(f"{name} has {len(values)} rows; expected {rows.num_rows}")
            if until > length:
                raise ValueError(f"{name} has {until} values; expected {length}")
            if start == 0:
                if until == length and values.flags.writeable:  # all there is, and nobody else's
                    self._arrays[name] = values
                    continue
                self._arrays[name] = np.empty((length, *values.shape[1:]), values.dtype)
            whole = self._arrays.get(name)
            if whole is None or whole.shape[1:] != values.shape[1:] or whole.dtype != values.dtype:
                raise ValueError(f"{name} changes its shape or type between frames")
            whole[at:until] = values
        self._filled = stop
        if stop == total and self._filled_candidates != num_candidates(self.question.candidates):
            raise ValueError(
                f"candidate_logprob has {self._filled_candidates} values; expected "
                f"{num_candidates(self.question.candidates)}"
            )


def decode_rows(rows: pb.ScoreRows) -> dict[str, npt.NDArray[Any]]:
    """The arrays that are there, by their name in Scores.

    Raises:
        ValueError: an array's dtype, shape, length or values can't be right; names the array.
    """
    f32, values = (pb.DTYPE_FLOAT32,), (pb.DTYPE_FLOAT32, pb.DTYPE_FLOAT16)
    floats = {
        "token_logprob": (f32, 1),
        "log_tail": (f32, 1),
        "topk_logprob": (values, 2),
        "candidate_logprob": (f32, 1),
        "entropy": (f32, 1),
        "hidden": (tuple(HIDDEN_DTYPE.values()), 2),
    }
    found: dict[str, npt.NDArray[Any]] = {}
    for descriptor, _ in rows.ListFields():
        name = descriptor.name
        try:
            if name in floats:
                dtypes, ndim = floats[name]
                found[name] = arrays.decode_float(getattr(rows, name), dtypes=dtypes, ndim=ndim)
            elif name == "topk_ids":
                found[name] = arrays.decode_unsigned(rows.topk_ids, ndim=2)
            elif name == "rank":
                found[name] = arrays.decode_unsigned(rows.rank).astype(np.uint32)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return found
