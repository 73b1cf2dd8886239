"""The JSON face of the contract, for people with curl: the same fields as the protobuf messages, lists instead of
byte arrays, small k only. Strict: no coercion, no unknown keys, no NaN."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from teacher_api.errors import InvalidRequest, TeacherError, TooLarge, Unsupported
from teacher_api.types import CallMetadata, Candidates, Completion, IntArray, ScoreOptions, ScoreRequest, Scores
from teacher_server.service import Answer

MAX_JSON_TOP_K = 64  # above it, lists of numbers cost more than the scoring
MAX_JSON_BODY_BYTES = 4 << 20  # read, it takes up to a hundred times as much
MAX_JSON_ANSWER_BYTES = 4 << 20  # in binary; as JSON about five times that
TokenId = int
_TOKENS = Field(max_length=1 << 22)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class JsonCompletion(_Strict):
    token_ids: list[TokenId] = _TOKENS
    """The completion, or the whole sequence where there is no prompt."""
    id: str | None = None
    """Chosen by the caller, unique in the request; its index when left out."""
    prompt_index: int | None = Field(default=None, ge=0)
    """Which of `prompts` comes before it."""
    ranges: list[tuple[int, int]] = Field(default_factory=list, max_length=1 << 16)
    """Half-open intervals of positions over prompt and completion; none: the whole completion."""
    candidates: list[list[TokenId]] | None = None
    """Ids to score at each scored position."""


class JsonOptions(_Strict):
    top_k: int = Field(default=0, ge=0)
    temperature: FiniteFloat = 1.0
    entropy: bool = False
    rank: bool = False


class JsonMetadata(_Strict):
    tenant: str = ""
    experiment: str = ""
    run: str = ""
    priority: Literal["", "interactive", "bulk"] = ""
    """interactive: before the bulk work of the same tenant; empty: bulk."""


class JsonScoreRequest(_Strict):
    completions: list[JsonCompletion] = Field(max_length=1 << 16)
    prompts: list[list[TokenId]] = Field(default_factory=list, max_length=1 << 16)
    options: JsonOptions = Field(default_factory=JsonOptions)
    expect_fingerprint: str = ""
    metadata: JsonMetadata = Field(default_factory=JsonMetadata)
    timeout_s: FiniteFloat | None = None
    teacher: str = ""
    """One of `teachers` in /v1/info; empty: the base."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "prompts": [[1, 2, 3]],
                "completions": [{"prompt_index": 0, "token_ids": [4, 5, 6]}],
                "options": {"top_k": 3},
            }
        }
    )


class JsonError(BaseModel):
    kind: str
    message: str
    field: str = ""
    retryable: bool = False
    retry_after_s: float | None = None


class JsonResult(BaseModel):
    id: str
    error: JsonError | None = None
    positions: list[int] | None = None
    token_logprob: list[float] | None = None
    log_tail: list[float] | None = None
    topk_ids: list[list[int]] | None = None
    topk_logprob: list[list[float]] | None = None
    candidate_logprob: list[list[float]] | None = None
    entropy: list[float] | None = None
    rank: list[int] | None = None
    computed_tokens: int = 0
    cached_tokens: int = 0


class JsonScoreResponse(BaseModel):
    fingerprint: str
    request_id: str
    results: list[JsonResult]


def request_from_json(body: bytes) -> ScoreRequest:
    """Raises InvalidRequest that names the first wrong field; never repeats what was sent."""
    if len(body) > MAX_JSON_BODY_BYTES:
        raise TooLarge(
            f"{len(body)} bytes of JSON; expected at most {MAX_JSON_BODY_BYTES}: send application/x-protobuf for more"
        )
    try:
        asked = JsonScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise InvalidRequest(f"{first['msg']}", field=_path(first["loc"])) from None
    if asked.options.top_k > MAX_JSON_TOP_K:
        raise Unsupported(
            f"got {asked.options.top_k}; JSON carries at most {MAX_JSON_TOP_K}: send application/x-protobuf for more",
            field="options.top_k",
        )
    return ScoreRequest(
        completions=[_completion(c, n) for n, c in enumerate(asked.completions)],
        prompts=[_ids(tokens, f"prompts[{n}]") for n, tokens in enumerate(asked.prompts)],
        options=ScoreOptions(**asked.options.model_dump()),
        expect_fingerprint=asked.expect_fingerprint,
        metadata=CallMetadata(**asked.metadata.model_dump()),
        timeout_s=asked.timeout_s,
        teacher=asked.teacher,
    )


def _completion(asked: JsonCompletion, index: int) -> Completion:
    path = f"completions[{index}]"
    candidates = None
    if asked.candidates is not None:
        flat = [np.zeros(0, np.int32)]
        flat += [_ids(row, f"{path}.candidates[{n}]") for n, row in enumerate(asked.candidates) if row]
        offsets = np.zeros(len(asked.candidates) + 1, np.int32)
        np.cumsum([len(row) for row in asked.candidates], out=offsets[1:])
        candidates = Candidates(np.concatenate(flat), offsets)
    for n, (start, stop) in enumerate(asked.ranges):
        if not (0 <= start <= 2**31 - 1 and 0 <= stop <= 2**31 - 1):
            raise InvalidRequest("expected positions from 0 to 2147483647", field=f"{path}.ranges[{n}]")
    return Completion(
        id=str(index) if asked.id is None else asked.id,
        token_ids=_ids(asked.token_ids, f"{path}.token_ids"),
        prompt_index=asked.prompt_index,
        ranges=tuple(asked.ranges),
        candidates=candidates,
    )


def _ids(values: list[int], path: str) -> IntArray:
    for at, value in enumerate(values):
        if not 0 <= value <= 2**31 - 1:
            raise InvalidRequest("expected a token id from 0 to 2147483647", field=f"{path}[{at}]")
    return np.asarray(values, dtype=np.int32).reshape(-1)


def _path(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")


def response_to_json(answers: list[Answer], fingerprint: str, request_id: str) -> bytes:
    results = [
        _failed(answer.completion_id, answer.result)
        if isinstance(answer.result, TeacherError)
        else _result(answer, answer.result)
        for answer in answers
    ]
    response = JsonScoreResponse(fingerprint=fingerprint, request_id=request_id, results=results)
    return response.model_dump_json(exclude_none=True).encode()


def _failed(completion_id: str, error: TeacherError) -> JsonResult:
    return JsonResult(
        id=completion_id,
        error=JsonError(
            kind=error.kind,
            message=error.message,
            field=error.field,
            retryable=error.retryable,
            retry_after_s=error.retry_after_s,
        ),
    )


def _result(answer: Answer, scores: Scores) -> JsonResult:
    values: dict[str, Any] = {
        name: None if array is None else array.tolist()
        for name, array in (
            ("positions", scores.positions),
            ("token_logprob", scores.token_logprob),
            ("log_tail", scores.log_tail),
            ("topk_ids", scores.topk_ids),
            ("topk_logprob", scores.topk_logprob),
            ("entropy", scores.entropy),
            ("rank", scores.rank),
        )
    }
    if scores.candidate_logprob is not None and answer.job is not None and answer.job.candidates is not None:
        rows = np.split(scores.candidate_logprob, answer.job.candidates.row_offsets[1:-1])
        values["candidate_logprob"] = [row.tolist() for row in rows]
    return JsonResult(
        id=scores.id, computed_tokens=scores.computed_tokens, cached_tokens=scores.cached_tokens, **values
    )
