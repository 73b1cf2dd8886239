"""What the server asks of the pooler inside the engine, and the bytes that come back: both ends of that road.

A request rides in PoolingParams.extra_kwargs as plain values and bytes. Its answer is one array of bytes: the fields
of RowScores one after another, four-byte values before two-byte ones, so that each is a view of it.

Shape legend: N rows, K top-k, V tokenizer size, M candidates over all rows, H hidden size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from teacher_api.types import Candidates, ScoreOptions
from teacher_server.backends.base import ScoreJob

TASK = "token_embed"
"""Of vLLM's pooling tasks the one whose answer is an array per sequence; both of its model runners accept it."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Asked:
    """The part of a job that the pooler needs; row i, at token i of the sequence, predicts token i + 1."""

    rows: npt.NDArray[np.int64]  # [N], ascending
    options: ScoreOptions
    candidates: Candidates | None

    @classmethod
    def of(cls, job: ScoreJob) -> Asked:
        return cls(job.positions.astype(np.int64) - 1, job.options, job.candidates)

    def to_extra(self) -> dict[str, Any]:
        """As plain values, for PoolingParams.extra_kwargs."""
        extra: dict[str, Any] = {"first": int(self.rows[0]), "rows": self.rows.astype("<i4").tobytes()}
        if len(self.rows) == self.rows[-1] - self.rows[0] + 1:
            extra["rows"] = len(self.rows)
        plain = asdict(ScoreOptions())
        extra["options"] = {name: value for name, value in asdict(self.options).items() if value != plain[name]}
        if self.candidates is not None:
            extra["ids"] = self.candidates.ids.astype("<i4").tobytes()
            extra["offsets"] = self.candidates.row_offsets.astype("<i4").tobytes()
        return extra

    @classmethod
    def from_extra(cls, extra: dict[str, Any]) -> Asked:
        rows, first = extra["rows"], extra["first"]
        rows_N = first + np.arange(rows) if isinstance(rows, int) else np.frombuffer(rows, "<i4").astype(np.int64)
        candidates = None
        if "ids" in extra:
            candidates = Candidates(*(np.frombuffer(extra[key], "<i4").astype(np.int32) for key in ("ids", "offsets")))
        return cls(rows_N, ScoreOptions(**extra["options"]), candidates)

    @cached_property
    def group(self) -> tuple[ScoreOptions, bool]:
        """Rows of equal groups can go through the head together."""
        return self.options, self.candidates is not None

    def between(self, start: int, stop: int) -> tuple[slice, slice]:
        """Which of its rows, and of its candidates, belong to tokens [start, stop) of the sequence."""
        low, high = (int(i) for i in np.searchsorted(self.rows, (start, stop)))
        if self.candidates is None:
            return slice(low, high), slice(0, 0)
        offsets = self.candidates.row_offsets
        return slice(low, high), slice(int(offsets[low]), int(offsets[high]))


@dataclass(frozen=True, slots=True)
class Field:
    """One array of the answer."""

    name: str  # of RowScores, or "hidden"
    dtype: str
    shape: tuple[int, ...]


def fields_of(asked: Asked, tokenizer_size: int, hidden_size: int, hidden_dtype: str) -> list[Field]:
    """The answer's arrays in their order."""
    n, options = len(asked.rows), asked.options
    columns = tokenizer_size if options.top_k == "all" else options.top_k
    found = [Field("token_logprob", "float32", (n,)), Field("log_tail", "float32", (n,))]
    if options.entropy:
        found.append(Field("entropy", "float32", (n,)))
    if options.rank:
        found.append(Field("rank", "int32", (n,)))
    if asked.candidates is not None:
        found.append(Field("candidate_logprob", "float32", (len(asked.candidates.ids),)))
    if options.top_k not in (0, "all"):
        found.append(Field("topk_ids", "int32", (n, columns)))
    if options.top_k:
        found.append(Field("topk_logprob", options.value_type, (n, columns)))
    if options.hidden:
        found.append(Field("hidden", hidden_dtype, (n, hidden_size)))
    return sorted(found, key=lambda field: field.dtype in ("float16", "bfloat16"))


def unpack(data: Bytes, fields: list[Field]) -> dict[str, np.ndarray]:
    """Views of the answer by name; bfloat16 as its uint16 bits.

    Raises:
        ValueError: not the number of bytes that the fields have.
    """
    arrays: dict[str, np.ndarray] = {}
    at = 0
    sizes = [np.dtype("uint16" if f.dtype == "bfloat16" else f.dtype) for f in fields]
    expected = sum(dtype.itemsize * int(np.prod(f.shape)) for f, dtype in zip(fields, sizes, strict=True))
    if data.ndim != 1 or data.nbytes != expected:
        raise ValueError(f"got {data.shape} bytes, expected {expected}")
    for field, dtype in zip(fields, sizes, strict=True):
        stop = at + dtype.itemsize * int(np.prod(field.shape))
        arrays[field.name] = data[at:stop].view(dtype).reshape(field.shape)
        at = stop
    return arrays
