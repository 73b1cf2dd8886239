"""Who is who: TeacherInfo <-> bytes, the fingerprint of a teacher and the one of a tokenizer.

A fingerprint is the hexadecimal BLAKE2b-128 of named parts; the parts of a tokenizer travel with it, so that a refusal
can say what differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from teacher_api.errors import CorruptResponse, Unsupported
from teacher_api.types import TeacherInfo
from teacher_api.v1 import teacher_pb2 as pb

API_VERSION = 1
DIGEST_BYTES = 16
UNVERIFIED = "unverified"
"""In place of a tokenizer's fingerprint: there is a tokenizer, and nobody could say which."""
_LIMITS = (
    "tokenizer_size",
    "logit_width",
    "max_sequence_tokens",
    "max_completions",
    "max_request_bytes",
    "max_response_bytes",
)


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).hexdigest()


def _digest_of_parts(parts: Mapping[str, str]) -> str:
    return digest(json.dumps(dict(parts), sort_keys=True, ensure_ascii=True, separators=(",", ":")))


def teacher_fingerprint(
    *,
    weights_digest: str,
    dtype: str,
    quantisation: str,
    head_dtype: str,
    scoring_path: str,
    engine: str,
    engine_version: str,
    tokenizer_size: int,
) -> str:
    """Digest over all that can change a number. `weights_digest` covers adapters as well; `tokenizer_size` says
    which ids may be among the top-k, and it is not in the weights."""
    return _digest_of_parts(
        {
            "weights": weights_digest,
            "dtype": dtype,
            "quantisation": quantisation,
            "head_dtype": head_dtype,
            "scoring_path": scoring_path,
            "engine": engine,
            "engine_version": engine_version,
            "tokenizer_size": str(tokenizer_size),
        }
    )


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def tokenizer_fingerprint(tokenizer: Any) -> tuple[str, dict[str, str]]:
    """Digest of what a tokenizer does to text and ids, and its parts.

    Args:
        tokenizer: a transformers tokenizer; of fast ones the normaliser and pre-tokenizer are compared as well.

    Returns:
        The overall digest, and its parts: `size`, `vocabulary` (sorted id -> token map), `special_ids`, `normaliser`,
        `pre_tokenizer`. The padding id is not in it: it never crosses the wire, and people change it.
    """
    vocabulary = sorted((int(i), str(token)) for token, i in tokenizer.get_vocab().items())
    roles = {role: getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "unk")}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        pipeline = {"normalizer": type(tokenizer).__name__, "pre_tokenizer": type(tokenizer).__name__}
    else:
        pipeline = json.loads(backend.to_str())
    parts = {
        "size": str(len(vocabulary)),
        "vocabulary": digest(json.dumps(vocabulary)),
        "special_ids": digest(json.dumps(roles, sort_keys=True)),
        "normaliser": digest(json.dumps(pipeline.get("normalizer"), sort_keys=True)),
        "pre_tokenizer": digest(json.dumps(pipeline.get("pre_tokenizer"), sort_keys=True)),
    }
    return _digest_of_parts(parts), parts


_PART_NAMES = {
    "size": "number of tokens",
    "vocabulary": "id -> token map",
    "special_ids": "beginning, end and unknown token ids",
    "normaliser": "normaliser settings",
    "pre_tokenizer": "pre-tokenizer settings",
}


def explain_difference(
    a_parts: Mapping[str, str], b_parts: Mapping[str, str], a_name: str = "student", b_name: str = "teacher"
) -> str:
    """Which parts of two tokenizers differ, in one line; empty if none does."""
    found = []
    for name in sorted(a_parts.keys() | b_parts.keys()):
        a, b = a_parts.get(name, "missing"), b_parts.get(name, "missing")
        if a != b:
            shown = f"{a_name} {a[:12]}, {b_name} {b[:12]}"
            found.append(f"{_PART_NAMES.get(name, name)} ({shown})")
    return "; ".join(found)


# ---- TeacherInfo -----------------------------------------------------------------------------------------------------


def to_proto(info: TeacherInfo) -> pb.TeacherInfo:
    values = {f.name: getattr(info, f.name) for f in dataclasses.fields(info)}
    return pb.TeacherInfo(**values)


def sealed(info: TeacherInfo) -> bytes:
    """As a message that begins with the checksum of the rest."""
    data = to_proto(info).SerializeToString()
    return _seal(data) + data


def check_seal(data: bytes, message: pb.TeacherInfo) -> None:
    """Raises CorruptResponse where `data`, which was read as `message`, has a checksum that is not of what follows."""
    if message.checksum and not data.startswith(_seal(data[len(_seal(b"")) :])):
        raise CorruptResponse("the teacher's description was damaged on its way: its checksum is of another one")


def _seal(data: bytes) -> bytes:
    return pb.TeacherInfo(checksum=hashlib.sha256(data).digest()[:DIGEST_BYTES]).SerializeToString()


def to_json(info: TeacherInfo) -> str:
    """For people; the field names are the contract's."""
    return json.dumps(dataclasses.asdict(info), indent=1, ensure_ascii=False)


def from_proto(message: pb.TeacherInfo) -> TeacherInfo:
    """What the teacher says of itself.

    Raises:
        Unsupported: it speaks another version of the contract.
        CorruptResponse: a field that every teacher has is missing.
    """
    if message.api_version != API_VERSION:
        raise Unsupported(
            f"the teacher speaks version {message.api_version} of the contract; this client speaks {API_VERSION}",
            field="api_version",
        )
    if not message.fingerprint:
        raise CorruptResponse("the teacher's description has no fingerprint; expected one", field="fingerprint")
    for name in _LIMITS:
        if getattr(message, name) <= 0:
            raise CorruptResponse(f"the teacher's description says {getattr(message, name)}; expected > 0", field=name)
    values: dict[str, Any] = {f.name: getattr(message, f.name) for f in dataclasses.fields(TeacherInfo)}
    values["features"] = tuple(message.features)
    values["teachers"] = tuple(message.teachers)
    values["tokenizer_parts"] = dict(message.tokenizer_parts)
    return TeacherInfo(**values)
