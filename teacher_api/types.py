"""What is asked of a teacher and what comes back, as plain numpy: the Python face of protos/teacher/v1/teacher.proto.

Owns no bytes (wire.py), no sockets (transport_*.py), no limits of a particular server (teacher_server/service.py).

Shape legend: T tokens of a sequence, N scored positions (rows), K top-k, M candidates over all rows, V tokenizer size,
H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int32]
FloatArray = npt.NDArray[np.float32]

LOGPROB_FLOOR = -1e4
"""Nats. Values below (masked columns, an empty tail) are sent as this, so that only finite numbers cross the wire."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """Ids the client wants scored, ragged over the rows: row n asks for ``ids[row_offsets[n]:row_offsets[n + 1]]``."""

    ids: IntArray  # [M]
    row_offsets: IntArray  # [N+1]; starts with 0, never descends, ends with M

    @classmethod
    def from_rows(cls, rows: Sequence[npt.ArrayLike]) -> Candidates:
        """From one sequence of ids per scored position."""
        arrays = [np.asarray(row, dtype=np.int32).reshape(-1) for row in rows]
        offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
        np.cumsum([len(a) for a in arrays], out=offsets[1:])
        return cls(np.concatenate(arrays) if arrays else np.zeros(0, np.int32), offsets)


@dataclass(frozen=True, slots=True)
class Completion:
    """One sequence to score: an optional shared prompt followed by these tokens."""

    id: str
    token_ids: IntArray  # [T]
    prompt_index: int | None = None
    ranges: tuple[tuple[int, int], ...] = ()
    """Half-open intervals of positions over prompt + completion; empty: every position of the completion that has a
    score (all of it after a prompt, all but the first token without one)."""
    candidates: Candidates | None = None


@dataclass(frozen=True, slots=True)
class ScoreOptions:
    top_k: int | Literal["all"] = 0
    """The k most likely ids of each row; "all": the whole vocabulary in id order, without ids on the wire."""
    temperature: float = 1.0
    """Divides the teacher's logits before its softmax; > 0."""
    value_type: Literal["float32", "float16"] = "float32"
    entropy: bool = False
    rank: bool = False
    hidden: bool = False
    """The last hidden state of each row, as the output head takes it."""
    hidden_type: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: rounded to it by the server, half the bytes; they arrive as float32, with the same values."""


@dataclass(frozen=True, slots=True)
class CallMetadata:
    tenant: str = ""
    experiment: str = ""
    run: str = ""
    priority: str = ""
    """interactive: before the bulk work of the same tenant; empty: bulk."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    completions: Sequence[Completion]
    prompts: Sequence[IntArray] = ()
    options: ScoreOptions = field(default_factory=ScoreOptions)
    expect_fingerprint: str = ""
    metadata: CallMetadata = field(default_factory=CallMetadata)
    timeout_s: float | None = None
    teacher: str = ""
    """One of TeacherInfo.teachers; empty: the base, or what the client names for all of its requests."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The teacher's answer for one completion. All logprobs are natural logarithms of float32 precision."""

    id: str
    positions: IntArray  # [N], ascending, over prompt + completion
    token_logprob: FloatArray  # [N]
    log_tail: FloatArray  # [N]: log mass outside (top-k, candidates, actual token); LOGPROB_FLOOR if none
    topk_ids: IntArray | None = None  # [N, K], most likely first; None for top_k 0 and "all"
    topk_logprob: npt.NDArray[np.float32] | npt.NDArray[np.float16] | None = None  # [N, K], or [N, V] for "all"
    candidate_logprob: FloatArray | None = None  # [M], aligned with Candidates.ids
    entropy: FloatArray | None = None  # [N]
    rank: npt.NDArray[np.uint32] | None = None  # [N]
    hidden: FloatArray | None = None  # [N, H]
    computed_tokens: int = 0
    cached_tokens: int = 0
    fingerprint: str = ""

    @property
    def num_rows(self) -> int:
        return len(self.positions)


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """Who is there. `fingerprint` digests all that can change a number; see the proto for each field."""

    fingerprint: str
    model_name: str
    tokenizer_fingerprint: str
    tokenizer_size: int
    logit_width: int
    max_sequence_tokens: int
    max_top_k: int
    max_candidates: int
    max_completions: int
    max_request_bytes: int
    max_response_bytes: int
    features: tuple[str, ...] = ()
    api_version: int = 1
    server_version: str = ""
    model_revision: str = ""
    weights_digest: str = ""
    tokenizer_parts: dict[str, str] = field(default_factory=dict)
    dtype: str = ""
    quantisation: str = ""
    head_dtype: str = ""
    engine: str = ""
    engine_version: str = ""
    scoring_path: str = ""
    hidden_size: int = 0
    teachers: tuple[str, ...] = ()
    head_digest: str = ""
    head_bytes: int = 0
    scoring_path_note: str = ""
    """Why it is not the path that was to be used first; empty where it is."""
    batch_tokens: int = 0
    """Computed at once, prompts included; 0: unknown."""


def scored_positions(completion: Completion, prompt_tokens: int) -> IntArray:
    """Positions [N] that `completion` asks for, in ascending order, given its prompt's length.

    Raises:
        ValueError: a range is empty, descends, overlaps, starts at 0, or ends past the sequence; or nothing is left.
    """
    num_tokens = prompt_tokens + len(completion.token_ids)
    if num_tokens == 1 and not completion.ranges:
        raise ValueError("a sequence of one token has no position with a score; expected two tokens or more")
    ranges = completion.ranges or ((max(prompt_tokens, 1), num_tokens),)
    previous_stop = 1
    for start, stop in ranges:
        if start == 0:
            raise ValueError("position 0 has no score: its token follows nothing; start the range at 1")
        if not start < stop:
            raise ValueError(f"range [{start}, {stop}) is empty; expected start < stop")
        if start < previous_stop:
            raise ValueError(
                f"range [{start}, {stop}) is not after the one before it; expected ascending, disjoint ranges"
            )
        if stop > num_tokens:
            raise ValueError(f"range [{start}, {stop}) ends past the sequence of {num_tokens} tokens")
        previous_stop = stop
    return np.concatenate([np.arange(a, b, dtype=np.int32) for a, b in ranges])
