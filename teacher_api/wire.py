"""Requests on the wire: ScoreRequest <-> bytes, with checks; and the face of the codec for both sides.

A request is refused whole for what is shared (prompts, options, ids that repeat), a completion alone for what is its
own. Limits of a particular server, and ids against its tokenizer, are the service's to check.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from teacher_api import arrays, compression
from teacher_api.compression import Compression
from teacher_api.errors import InvalidRequest, TeacherError, TooLarge, Unsupported
from teacher_api.frames import (
    HIDDEN_DTYPE,
    Assembler,
    Question,
    checksum,
    decode_error_message,
    decode_frame,
    encode_error,
    encode_error_message,
    encode_scores,
    error_key,
    seal_key,
)
from teacher_api.types import (
    CallMetadata,
    Candidates,
    Completion,
    IntArray,
    ScoreOptions,
    ScoreRequest,
    scored_positions,
)
from teacher_api.v1 import teacher_pb2 as pb
from teacher_api.validate import check_candidates, check_scores

__all__ = [
    "Assembler",
    "DecodedRequest",
    "Question",
    "check_candidates",
    "check_options",
    "check_scores",
    "checksum",
    "decode_error_message",
    "decode_frame",
    "decode_request",
    "encode_error",
    "encode_error_message",
    "encode_request",
    "encode_scores",
    "error_key",
    "question",
    "resolve",
    "seal_key",
]

MAX_METADATA_CHARS = 128
MAX_ID_CHARS = 256
MAX_PARTS = 1 << 16
"""Prompts, and completions, of one request."""
MAX_RANGES = 1 << 18
"""Of all completions of one request: as messages they take a hundred times their bytes once they are read."""
_HIDDEN_TYPES = {pb.DTYPE_UNSPECIFIED: "float32"} | {dtype: name for name, dtype in HIDDEN_DTYPE.items()}
_COMPRESSIONS: dict[int, Compression] = {pb.COMPRESSION_NONE: "none", pb.COMPRESSION_ZSTD: "zstd"}
_VALUE_TYPES = {pb.DTYPE_UNSPECIFIED: "float32", pb.DTYPE_FLOAT32: "float32", pb.DTYPE_FLOAT16: "float16"}


def resolve(request: ScoreRequest, completion: Completion, field: str = "") -> tuple[IntArray, IntArray]:
    """The whole sequence [T] and its scored positions [N] of one completion of `request`.

    Raises:
        InvalidRequest: its tokens are no sequence, or its prompt index, ranges or candidates are wrong; `field` is the
            prefix of the field it names.
    """
    _check_tokens(completion.token_ids, f"{field}.token_ids")
    prompt: IntArray = np.zeros(0, np.int32)
    if completion.prompt_index is not None:
        if not 0 <= completion.prompt_index < len(request.prompts):
            expected = f"expected 0…{len(request.prompts) - 1}" if request.prompts else "but there are no prompts"
            raise InvalidRequest(f"got {completion.prompt_index}, {expected}", field=f"{field}.prompt_index")
        prompt = request.prompts[completion.prompt_index]
        _check_tokens(prompt, f"prompts[{completion.prompt_index}]")
    try:
        positions = scored_positions(completion, len(prompt))
    except ValueError as error:
        raise InvalidRequest(str(error), field=f"{field}.ranges") from None
    if completion.candidates is not None:
        try:
            check_candidates(completion.candidates, len(positions))
        except ValueError as error:
            raise InvalidRequest(str(error), field=f"{field}.candidates") from None
    return np.concatenate([prompt, completion.token_ids]).astype(np.int32, copy=False), positions


def _check_tokens(tokens: IntArray, field: str) -> None:
    shape = np.shape(tokens)
    if len(shape) != 1:
        raise InvalidRequest(f"shape is {list(shape)}; expected one dimension", field=field)
    if shape[0] == 0:
        raise InvalidRequest("empty; expected at least one token", field=field)


def question(
    request: ScoreRequest, completion: Completion, *, fingerprint: str, tokenizer_size: int, field: str = ""
) -> Question:
    """What `completion` of `request` asks, ready to check its answer; raises as `resolve`."""
    token_ids, positions = resolve(request, completion, field)
    key = seal_key(token_ids, positions, completion.candidates, request.options, fingerprint)
    return Question(completion.id, positions, request.options, completion.candidates, tokenizer_size, fingerprint, key)


# ---- client side -----------------------------------------------------------------------------------------------------


def _unsigned(values: object, field: str, *, narrow: bool = True) -> pb.Array:
    array = np.asarray(values)
    if array.ndim != 1:
        raise InvalidRequest(f"shape is {list(array.shape)}; expected one dimension", field=field)
    if array.size == 0 and narrow:
        array = array.astype(np.int32)  # an empty list is float64 to numpy
    try:
        return arrays.encode_unsigned(array, narrow=narrow)
    except ValueError as error:
        raise InvalidRequest(str(error), field=field) from None


def encode_request(request: ScoreRequest) -> pb.ScoreRequest:
    """The message that asks for `request`. Ids travel in 2, 3 or 4 bytes, whichever holds the largest of an array.

    Raises:
        InvalidRequest: something that has no form on the wire (a negative id, a fractional one); names the field.
    """
    message = pb.ScoreRequest(
        prompts=[_unsigned(p, f"prompts[{i}]") for i, p in enumerate(request.prompts)],
        completions=[_encode_completion(c, f"completions[{i}]") for i, c in enumerate(request.completions)],
        options=_encode_options(request.options),
        expect_fingerprint=request.expect_fingerprint,
        teacher=request.teacher,
        metadata=pb.CallMetadata(
            tenant=request.metadata.tenant,
            experiment=request.metadata.experiment,
            run=request.metadata.run,
            priority=request.metadata.priority,
        ),
    )
    if request.timeout_s is not None:
        message.timeout_s = request.timeout_s
    return message


def _encode_completion(completion: Completion, field: str) -> pb.Completion:
    message = pb.Completion(id=completion.id, token_ids=_unsigned(completion.token_ids, f"{field}.token_ids"))
    if completion.prompt_index is not None:
        if completion.prompt_index < 0:
            raise InvalidRequest(f"{completion.prompt_index}; expected 0 or more", field=f"{field}.prompt_index")
        message.prompt_index = completion.prompt_index
    for i, (start, stop) in enumerate(completion.ranges):
        if min(start, stop) < 0:
            raise InvalidRequest(f"[{start}, {stop}) is negative", field=f"{field}.ranges[{i}]")
        message.ranges.append(pb.Range(start=start, stop=stop))
    if completion.candidates is not None:
        message.candidates.ids.CopyFrom(_unsigned(completion.candidates.ids, f"{field}.candidates.ids"))
        offsets = _unsigned(completion.candidates.row_offsets, f"{field}.candidates.row_offsets", narrow=False)
        message.candidates.row_offsets.CopyFrom(offsets)
    return message


def check_options(options: ScoreOptions) -> None:
    """Refuses options that have no form on the wire, or no meaning for any teacher.

    Raises:
        InvalidRequest: names the field.
    """
    top_k = options.top_k
    if top_k != "all" and not (isinstance(top_k, int | np.integer) and 0 <= top_k <= arrays.MAX_ID):
        raise InvalidRequest(f"{top_k!r:.80}; expected 0 to {arrays.MAX_ID}, or 'all'", field="options.top_k")
    if options.value_type not in _VALUE_TYPES.values():
        raise InvalidRequest(f"{options.value_type!r:.80}; expected float32 or float16", field="options.value_type")
    if options.hidden_type not in HIDDEN_DTYPE:
        raise InvalidRequest(f"{options.hidden_type!r:.80}; expected float32 or bfloat16", field="options.hidden_type")
    if not (math.isfinite(options.temperature) and options.temperature > 0):
        raise InvalidRequest(f"{options.temperature}; expected a finite number above 0", field="options.temperature")


def _encode_options(options: ScoreOptions) -> pb.ScoreOptions:
    check_options(options)
    return pb.ScoreOptions(
        top_k=0 if options.top_k == "all" else options.top_k,
        full_vocabulary=options.top_k == "all",
        temperature=options.temperature,
        value_type=pb.DTYPE_FLOAT16 if options.value_type == "float16" else pb.DTYPE_FLOAT32,
        entropy=options.entropy,
        rank=options.rank,
        hidden=options.hidden,
        hidden_type=None if options.hidden_type == "float32" else HIDDEN_DTYPE[options.hidden_type],
    )


# ---- server side -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DecodedRequest:
    """A request as it came: `request.completions` are the readable ones; `entries` has one per completion in the
    order asked, an error for those that can't be read; `ids` their ids in the same order."""

    request: ScoreRequest
    entries: Sequence[Completion | TeacherError]
    ids: Sequence[str]
    indices: Sequence[int] = field(default_factory=tuple)
    """Of each of `request.completions`, its place in `entries`."""
    compression: Compression = "none"
    """That the frames of the answer may have."""


def decode_request(message: pb.ScoreRequest) -> DecodedRequest:
    """Reads a request.

    Raises:
        InvalidRequest: what is shared by all completions is wrong; names the field.
        TooLarge: it has more parts than any server takes.
        Unsupported: a value type that has no meaning here, or a compression that is missing here.
    """
    if message.packed:
        raise InvalidRequest(
            "a request in an envelope; expected it as it is, over HTTP with Content-Encoding: zstd", field="packed"
        )
    if not message.completions:
        raise InvalidRequest("empty; expected at least one completion", field="completions")
    _check_counts(message)
    prompts = []
    for i, prompt in enumerate(message.prompts):
        try:
            prompts.append(arrays.decode_unsigned(prompt))
        except ValueError as error:
            raise InvalidRequest(str(error), field=f"prompts[{i}]") from None
    ids = [c.id for c in message.completions]
    _check_ids(ids)
    entries: list[Completion | TeacherError] = []
    for i, completion in enumerate(message.completions):
        try:
            entries.append(_decode_completion(completion, prompts, f"completions[{i}]"))
        except InvalidRequest as error:
            entries.append(error)
    good = [i for i, entry in enumerate(entries) if isinstance(entry, Completion)]
    request = ScoreRequest(
        completions=[entry for entry in entries if isinstance(entry, Completion)],
        prompts=prompts,
        options=_decode_options(message.options),
        expect_fingerprint=message.expect_fingerprint,
        teacher=message.teacher,
        metadata=_decode_metadata(message.metadata),
        timeout_s=_decode_timeout(message),
    )
    return DecodedRequest(request, entries, ids, good, _decode_compression(message))


def _decode_compression(message: pb.ScoreRequest) -> Compression:
    found = _COMPRESSIONS.get(message.compression)
    if found is None:
        raise Unsupported(
            f"compression {message.compression}; expected COMPRESSION_NONE or COMPRESSION_ZSTD", field="compression"
        )
    if found != "none" and not compression.is_available():
        raise Unsupported(f"this server has no {found}; expected COMPRESSION_NONE", field="compression")
    return found


def _check_counts(message: pb.ScoreRequest) -> None:
    for name in ("prompts", "completions"):
        if len(getattr(message, name)) > MAX_PARTS:
            raise TooLarge(f"{len(getattr(message, name))}; expected at most {MAX_PARTS}", field=name)
    num_ranges = sum(len(completion.ranges) for completion in message.completions)
    if num_ranges > MAX_RANGES:
        raise TooLarge(f"{num_ranges} ranges; expected at most {MAX_RANGES} in one request", field="completions")


def _check_ids(ids: Sequence[str]) -> None:
    seen: dict[str, int] = {}
    for i, name in enumerate(ids):
        if not 0 < len(name) <= MAX_ID_CHARS:
            raise InvalidRequest(f"{len(name)} characters; expected 1 to {MAX_ID_CHARS}", field=f"completions[{i}].id")
        if seen.setdefault(name, i) != i:
            raise InvalidRequest(f"the same id as completions[{seen[name]}]", field=f"completions[{i}].id")


def _decode_completion(message: pb.Completion, prompts: Sequence[IntArray], field: str) -> Completion:
    def unsigned(array: pb.Array, name: str) -> IntArray:
        try:
            return arrays.decode_unsigned(array)
        except ValueError as error:
            raise InvalidRequest(str(error), field=f"{field}.{name}") from None

    token_ids = unsigned(message.token_ids, "token_ids")
    if len(token_ids) == 0:
        raise InvalidRequest("empty; expected at least one token", field=f"{field}.token_ids")
    candidates = None
    if message.HasField("candidates"):
        if message.candidates.row_offsets.dtype != pb.DTYPE_UINT32:
            raise InvalidRequest("dtype must be DTYPE_UINT32", field=f"{field}.candidates.row_offsets")
        candidates = Candidates(
            unsigned(message.candidates.ids, "candidates.ids"),
            unsigned(message.candidates.row_offsets, "candidates.row_offsets"),
        )
    prompt_index = message.prompt_index if message.HasField("prompt_index") else None
    ranges = tuple((r.start, r.stop) for r in message.ranges)
    completion = Completion(message.id, token_ids, prompt_index, ranges, candidates)
    resolve(ScoreRequest([completion], prompts), completion, field)
    return completion


def _decode_options(message: pb.ScoreOptions) -> ScoreOptions:
    if message.value_type not in _VALUE_TYPES:
        raise Unsupported(
            f"value type {message.value_type}; expected DTYPE_FLOAT32 or DTYPE_FLOAT16", field="options.value_type"
        )
    if message.hidden_type not in _HIDDEN_TYPES:
        raise Unsupported(
            f"hidden type {message.hidden_type}; expected DTYPE_FLOAT32 or DTYPE_BFLOAT16", field="options.hidden_type"
        )
    if message.full_vocabulary and message.top_k:
        raise InvalidRequest(f"{message.top_k} with full_vocabulary; expected 0", field="options.top_k")
    temperature = message.temperature if message.HasField("temperature") else 1.0
    if not (math.isfinite(temperature) and temperature > 0):
        raise InvalidRequest(f"{temperature}; expected a finite number above 0", field="options.temperature")
    return ScoreOptions(
        top_k="all" if message.full_vocabulary else message.top_k,
        temperature=temperature,
        value_type="float16" if message.value_type == pb.DTYPE_FLOAT16 else "float32",
        entropy=message.entropy,
        rank=message.rank,
        hidden=message.hidden,
        hidden_type="bfloat16" if message.hidden_type == pb.DTYPE_BFLOAT16 else "float32",
    )


def _decode_metadata(message: pb.CallMetadata) -> CallMetadata:
    for name in ("tenant", "experiment", "run", "priority"):
        if len(getattr(message, name)) > MAX_METADATA_CHARS:
            raise InvalidRequest(
                f"{len(getattr(message, name))} characters; expected at most {MAX_METADATA_CHARS}",
                field=f"metadata.{name}",
            )
    return CallMetadata(message.tenant, message.experiment, message.run, message.priority)


def _decode_timeout(message: pb.ScoreRequest) -> float | None:
    if not message.HasField("timeout_s"):
        return None
    if not (math.isfinite(message.timeout_s) and message.timeout_s > 0):
        raise InvalidRequest(f"{message.timeout_s}; expected a finite number above 0", field="timeout_s")
    return message.timeout_s
