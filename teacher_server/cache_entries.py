"""Answers as the cache keeps them: the key of a question, and an answer as bytes that say when they are damaged.

Invariants: the key is over all that can change a number of the answer, and over whose it is; an entry opens only under
the key that it was sealed with, as the arrays that it was made of, bit for bit.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from collections.abc import Iterator
from dataclasses import fields

import numpy as np
import numpy.typing as npt

from teacher_api.types import ScoreOptions, Scores
from teacher_server.backends.base import ScoreJob

KEY_BYTES = 32
CHECKSUM_BYTES = 16
LAYOUT = 1
"""Of the bytes of an entry; another number is another layout, and such an entry is damaged to us."""
_HEAD = struct.Struct("<4sI")  # magic, length of the table of arrays
_MAGIC = b"psc" + bytes([LAYOUT])
_ALIGN = 8
NOT_KEPT = ("id", "positions", "computed_tokens", "cached_tokens", "fingerprint")
"""Of Scores: what belongs to the question, or to how it was answered this time."""
KEPT = tuple(field.name for field in fields(Scores) if field.name not in NOT_KEPT)
_OPTIONS = tuple(sorted(field.name for field in fields(ScoreOptions)))


class Damaged(ValueError):
    """These bytes are not what was kept under this key."""


def key_of(job: ScoreJob, fingerprint: str, owner: str) -> bytes:
    """The key of an answer: BLAKE2b over teacher, owner, options, tokens, scored positions and candidates.

    Args:
        fingerprint: of the teacher that `job` names, adapter and engine included.
        owner: whose answers are kept apart from others'; empty: nobody's.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES, person=b"preceptor.cache")
    named = {name: _canonical(getattr(job.options, name)) for name in _OPTIONS}
    text = json.dumps([LAYOUT, fingerprint, owner, named], separators=(",", ":")).encode()
    arrays: list[npt.NDArray[np.int32]] = [job.token_ids, job.positions]
    if job.candidates is not None:
        arrays += [job.candidates.ids, job.candidates.row_offsets]
    digest.update(struct.pack(f"<{2 + len(arrays)}Q", len(text), len(arrays), *(len(array) for array in arrays)))
    digest.update(text)
    for array in arrays:
        digest.update(np.ascontiguousarray(array, dtype="<i4").tobytes())
    return digest.digest()


def _canonical(value: object) -> str:
    """One text for equal values, whatever number type they came in."""
    return value if isinstance(value, str) else float(value).hex()  # type: ignore[arg-type]


def sealed(scores: Scores, key: bytes) -> bytes:
    """The arrays of `scores` in one piece."""
    arrays = [(name, np.ascontiguousarray(array)) for name, array in _arrays(scores)]
    table = json.dumps([[name, array.dtype.str, list(array.shape)] for name, array in arrays]).encode()
    pieces = [_HEAD.pack(_MAGIC, len(table)), table]
    for _, array in arrays:
        pieces += [b"\0" * (-sum(map(len, pieces)) % _ALIGN), array.tobytes()]
    body = b"".join(pieces)
    return body + _checksum(body, key)


def opened(entry: object, key: bytes, job: ScoreJob, fingerprint: str) -> Scores:
    """The answer to `job` that `entry` holds. Raises Damaged where it is not, byte for byte, what `sealed` made under
    this key."""
    if not isinstance(entry, bytes) or len(entry) < _HEAD.size + CHECKSUM_BYTES:
        raise Damaged("no entry")
    body = memoryview(entry)[:-CHECKSUM_BYTES]
    if not hmac.compare_digest(_checksum(body, key), entry[-CHECKSUM_BYTES:]):
        raise Damaged("the checksum does not match")
    magic, length = _HEAD.unpack_from(body)
    if magic != _MAGIC:
        raise Damaged("another layout")
    found: dict[str, npt.NDArray[np.generic]] = {}
    at = _HEAD.size + length
    for name, dtype, shape in json.loads(bytes(body[_HEAD.size : at])):
        at += -at % _ALIGN
        count = int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(body, np.dtype(dtype), count, at)
        found[name] = array.reshape(shape)
        at += array.nbytes
    return Scores(
        id=job.id,
        positions=job.positions,
        cached_tokens=job.num_tokens,
        fingerprint=fingerprint,
        **found,  # type: ignore[arg-type]
    )


def num_bytes(scores: Scores) -> int:
    """About how many `sealed` makes."""
    return 512 + sum(array.nbytes for _, array in _arrays(scores))


def _arrays(scores: Scores) -> Iterator[tuple[str, npt.NDArray[np.generic]]]:
    for name in KEPT:
        array = getattr(scores, name)
        if array is not None:
            yield name, array


def _checksum(body: bytes | memoryview, key: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=CHECKSUM_BYTES, key=key).digest()
