"""From a decoded request to jobs: every rule about what may be asked of this teacher, each refusal naming the field,
what was got and what was expected. Pure; knows no transport and no queue."""

from __future__ import annotations

import hashlib
import math

import numpy as np

from teacher_api.errors import FingerprintMismatch, InvalidRequest, TeacherError, TooLarge, Unsupported
from teacher_api.types import (
    Candidates,
    Completion,
    IntArray,
    ScoreOptions,
    ScoreRequest,
    TeacherInfo,
    scored_positions,
)
from teacher_api.wire import MAX_ID_CHARS, DecodedRequest, check_candidates
from teacher_server.backends.base import ScoreJob

TEMPERATURES = (1e-3, 1e3)  # outside, float32 logits divided by it overflow or vanish
ROW_OVERHEAD_BYTES = 256  # message framing, checksum and headers of one completion's answer


def jobs_of(decoded: DecodedRequest, info: TeacherInfo) -> list[ScoreJob | TeacherError]:
    """One job, or that completion's own error, per completion, in the order asked.

    Args:
        info: of the teacher that the request names.

    Raises:
        TeacherError: the request as a whole can't be served: another teacher is expected, an option is wrong or not
            honoured here, there are no completions or too many, ids repeat.
    """
    request = decoded.request
    _check_shared(request, len(decoded.entries), info)
    prompts = [_prompt(tokens, index, request.teacher, info) for index, tokens in enumerate(request.prompts)]
    return [
        entry if isinstance(entry, TeacherError) else _job(entry, f"completions[{n}]", prompts, request, info)
        for n, entry in enumerate(decoded.entries)
    ]


def decoded_of(request: ScoreRequest) -> DecodedRequest:
    """A request that did not come as protobuf, in the form that `jobs_of` takes. Raises InvalidRequest for bad ids."""
    seen: set[str] = set()
    for index, completion in enumerate(request.completions):
        path = f"completions[{index}].id"
        if not 0 < len(completion.id) <= MAX_ID_CHARS:
            raise InvalidRequest(f"{len(completion.id)} characters; expected 1 to {MAX_ID_CHARS}", field=path)
        if completion.id in seen:
            raise InvalidRequest("the id is used twice in this request; expected unique ids", field=path)
        seen.add(completion.id)
    ids = [completion.id for completion in request.completions]
    return DecodedRequest(request, list(request.completions), ids, range(len(ids)))


def _check_shared(request: ScoreRequest, num_completions: int, info: TeacherInfo) -> None:
    check_fingerprint(request.expect_fingerprint, info)
    if not num_completions:
        raise InvalidRequest("no completions; expected at least one", field="completions")
    if num_completions > info.max_completions:
        raise TooLarge(f"{num_completions} completions; expected at most {info.max_completions}", field="completions")
    if request.timeout_s is not None and not (math.isfinite(request.timeout_s) and request.timeout_s > 0):
        raise InvalidRequest(f"got {request.timeout_s}; expected a finite number > 0", field="timeout_s")
    check_options(request.options, info)


def check_fingerprint(expected: str, info: TeacherInfo) -> None:
    """Raises FingerprintMismatch unless `expected` is this teacher's fingerprint, or empty."""
    if expected and expected != info.fingerprint:
        raise FingerprintMismatch(
            f"this teacher is {info.fingerprint}, the caller expects {expected[:128]!r}: "
            "weights, adapter, dtype, engine or scoring path differ",
            field="expect_fingerprint",
        )


def check_options(options: ScoreOptions, info: TeacherInfo) -> None:
    """Raises TeacherError where an option has no value that this teacher can honour."""
    low, high = TEMPERATURES
    if not (math.isfinite(options.temperature) and low <= options.temperature <= high):
        raise InvalidRequest(
            f"got {options.temperature}; expected a number from {low} to {high}", field="options.temperature"
        )
    if options.value_type not in ("float32", "float16"):
        raise InvalidRequest("expected float32 or float16", field="options.value_type")
    if options.top_k != "all":
        if options.top_k < 0:
            raise InvalidRequest(f"got {options.top_k}; expected 0 or more", field="options.top_k")
        if options.top_k > info.max_top_k:
            raise TooLarge(f"got {options.top_k}; this teacher gives at most {info.max_top_k}", field="options.top_k")
    if options.hidden_type != "float32" and not options.hidden:
        raise InvalidRequest("got a type without hidden; expected hidden with it", field="options.hidden_type")
    needed = {
        "top_k": (options.top_k != "all" and options.top_k > 0, "top_k"),
        "full_vocabulary": (options.top_k == "all", "full_vocabulary"),
        "temperature": (options.temperature != 1.0, "temperature"),
        "float16": (options.value_type == "float16", "value_type"),
        "entropy": (options.entropy, "entropy"),
        "rank": (options.rank, "rank"),
        "hidden": (options.hidden, "hidden"),
        "hidden_bfloat16": (options.hidden_type == "bfloat16", "hidden_type"),
    }
    for feature, (asked, name) in needed.items():
        if asked and feature not in info.features:
            raise Unsupported(
                f"this teacher ({info.engine}) does not offer {feature}; it offers {', '.join(info.features)}",
                field=f"options.{name}",
            )


def _prompt(tokens: IntArray, index: int, teacher: str, info: TeacherInfo) -> tuple[IntArray, bytes] | TeacherError:
    path = f"prompts[{index}]"
    try:
        check_ids(tokens, path, info)
    except TeacherError as error:
        return error
    key = hashlib.blake2b(np.ascontiguousarray(tokens).tobytes(), digest_size=16)
    key.update(teacher.encode())
    return tokens, key.digest()


def _job(
    completion: Completion,
    path: str,
    prompts: list[tuple[IntArray, bytes] | TeacherError],
    request: ScoreRequest,
    info: TeacherInfo,
) -> ScoreJob | TeacherError:
    try:
        check_ids(completion.token_ids, f"{path}.token_ids", info)
        prompt, key = _prompt_of(completion, path, prompts)
        num_tokens = len(prompt) + len(completion.token_ids)
        if num_tokens > info.max_sequence_tokens:
            raise TooLarge(
                f"prompt and completion have {num_tokens} tokens; this teacher takes {info.max_sequence_tokens}",
                field=f"{path}.token_ids",
            )
        if num_tokens == 1:
            raise InvalidRequest(
                "a sequence of one token has no position with a score; expected two or more", field=f"{path}.token_ids"
            )
        try:
            positions = scored_positions(completion, len(prompt))
        except ValueError as error:
            raise InvalidRequest(str(error), field=f"{path}.ranges") from None
        if completion.candidates is not None:
            _check_candidates(completion.candidates, len(positions), f"{path}.candidates", info)
    except TeacherError as error:
        return error
    return ScoreJob(
        id=completion.id,
        token_ids=np.concatenate([prompt, completion.token_ids]).astype(np.int32, copy=False),
        prompt_tokens=len(prompt),
        positions=positions,
        options=request.options,
        candidates=completion.candidates,
        prompt_key=key,
        teacher=request.teacher,
    )


def _prompt_of(
    completion: Completion, path: str, prompts: list[tuple[IntArray, bytes] | TeacherError]
) -> tuple[IntArray, bytes]:
    index = completion.prompt_index
    if index is None:
        return np.zeros(0, np.int32), b""
    if not 0 <= index < len(prompts):
        raise InvalidRequest(f"got {index}; the request has {len(prompts)} prompts", field=f"{path}.prompt_index")
    prompt = prompts[index]
    if isinstance(prompt, TeacherError):
        raise prompt
    return prompt


def check_ids(ids: IntArray, path: str, info: TeacherInfo) -> None:
    """Raises InvalidRequest unless `ids` are some, and this teacher's."""
    if ids.ndim != 1:
        raise InvalidRequest(f"an array of shape {list(ids.shape)}; expected one dimension", field=path)
    if not len(ids):
        raise InvalidRequest("empty; expected at least one token id", field=path)
    _check_range(ids, path, info)


def _check_range(ids: IntArray, path: str, info: TeacherInfo) -> None:
    wrong = np.flatnonzero((ids < 0) | (ids >= info.tokenizer_size))
    if len(wrong):
        at = int(wrong[0])
        raise InvalidRequest(
            f"token id {int(ids[at])}; expected 0 to {info.tokenizer_size - 1}, this teacher's tokenizer",
            field=f"{path}[{at}]",
        )


def _check_candidates(candidates: Candidates, num_rows: int, path: str, info: TeacherInfo) -> None:
    if "candidates" not in info.features:
        raise Unsupported(f"this teacher ({info.engine}) does not offer candidates", field=path)
    try:
        check_candidates(candidates, num_rows)
    except ValueError as error:
        raise InvalidRequest(str(error), field=f"{path}.row_offsets") from None
    counts = np.diff(candidates.row_offsets)
    if len(counts) and counts.max() > info.max_candidates:
        raise TooLarge(
            f"row {int(counts.argmax())} has {int(counts.max())} candidates; expected at most {info.max_candidates}",
            field=f"{path}.row_offsets",
        )
    _check_range(candidates.ids, f"{path}.ids", info)


def answer_bytes(job: ScoreJob, info: TeacherInfo) -> int:
    """Upper estimate of the bytes that the answer to `job` takes, in memory and on the wire."""
    options = job.options
    columns = info.tokenizer_size if options.top_k == "all" else options.top_k
    per_value = 2 if options.value_type == "float16" else 4
    per_id = 0 if options.top_k == "all" else 4
    per_row = 8 + columns * (per_value + per_id) + 4 * options.entropy + 4 * options.rank
    per_row += 4 * info.hidden_size * options.hidden
    candidates = 0 if job.candidates is None else len(job.candidates.ids)
    return ROW_OVERHEAD_BYTES + len(job.id) + per_row * len(job.positions) + 4 * candidates
