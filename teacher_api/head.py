"""The teacher's output head, as a file and in memory: what turns the hidden states of an answer into the teacher's
whole distribution.

Owns the file's layout (docs/protocol.md, "The output head"), its digest and the equation. Knows no transport and no
cache (head_download.py).

Shape legend: N rows, H hidden size, W logit width, V tokenizer size (V <= W).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from teacher_api.arrays import from_bfloat16
from teacher_api.types import LOGPROB_FLOOR, FloatArray

METADATA_KEY = "teacher.v1.head"
"""The file's one entry of metadata, a JSON object: with several, safetensors would write them in any order, and equal
heads would have different digests."""
DIGEST_BYTES = 16
BLOCK_BYTES = 64 << 20
_DTYPES = {"F32": ("float32", "<f4"), "F16": ("float16", "<f2"), "BF16": ("bfloat16", "<u2")}
_PARAMETERS = {"fingerprint": str, "scale": float, "soft_cap": float | None, "tokenizer_size": int}


@dataclass(frozen=True, slots=True)
class Head:
    """An output head. The teacher's logits are ``cap(scale · (W h + b))``, with ``cap(z) = soft_cap · tanh(z /
    soft_cap)`` where there is one; h is a hidden state as answers have it, after the final norm."""

    weight: npt.NDArray[Any]  # [W, H], as the teacher holds it; bfloat16 as its bits, uint16
    dtype: str  # of the weight: float32, float16 or bfloat16
    bias: FloatArray | None  # [W]
    scale: float
    soft_cap: float | None
    tokenizer_size: int
    fingerprint: str  # of the teacher whose head this is

    @property
    def logit_width(self) -> int:
        return len(self.weight)

    @property
    def hidden_size(self) -> int:
        return int(self.weight.shape[1])

    def weight_float32(self, start: int = 0, stop: int | None = None) -> FloatArray:
        """Rows [start, stop) of the weight as float32, exactly."""
        rows = self.weight[start:stop]
        return from_bfloat16(rows) if self.dtype == "bfloat16" else rows.astype(np.float32, copy=False)


def logprobs_from_hidden(
    hidden: npt.NDArray[np.floating],
    head: Head,
    temperature: float = 1.0,
    dtype: type[np.float32] | type[np.float64] = np.float32,
) -> npt.NDArray[Any]:
    """The teacher's distribution at each row, as `top_k="all"` gives it.

    log p(i | h) = z_i − logsumexp(z) over all W columns, with z = cap(scale · (W h + b)) / temperature; of which the
    columns i < tokenizer_size are returned, nothing below LOGPROB_FLOOR. A teacher in float32 gives the same values
    up to the rounding of a product of H terms; one in half precision may round its own logits, this does not.

    Args:
        hidden: [N, H], of `Scores.hidden`.
        temperature: > 0; divides the logits.
        dtype: of the arithmetic and the result.

    Returns:
        [N, V], in nats. The logits of all W columns are held meanwhile.

    Raises:
        ValueError: the states are not of this head's size, or the temperature is not above 0.
    """
    if hidden.ndim != 2 or hidden.shape[1] != head.hidden_size:
        raise ValueError(f"hidden has shape {list(hidden.shape)}; expected [rows, {head.hidden_size}]")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; expected a finite number above 0")
    hidden_NH: npt.NDArray[Any] = hidden.astype(dtype, copy=False)
    z_NW: npt.NDArray[Any] = np.empty((len(hidden), head.logit_width), dtype)
    step = max(1, BLOCK_BYTES // (np.dtype(dtype).itemsize * head.hidden_size))
    for start in range(0, head.logit_width, step):
        weight_wH: npt.NDArray[Any] = head.weight_float32(start, start + step).astype(dtype, copy=False)
        z_NW[:, start : start + step] = hidden_NH @ weight_wH.T
    if head.bias is not None:
        z_NW += head.bias
    if head.scale != 1.0:
        z_NW *= head.scale
    if head.soft_cap is not None:
        z_NW = np.tanh(z_NW / head.soft_cap) * head.soft_cap
    if temperature != 1.0:
        z_NW /= temperature
    z_NW -= z_NW.max(axis=1, keepdims=True)
    z_NW -= np.log(np.exp(z_NW).sum(axis=1, keepdims=True))
    logprob_NV: npt.NDArray[Any] = np.maximum(z_NW[:, : head.tokenizer_size], LOGPROB_FLOOR)
    return logprob_NV


def metadata_of(*, fingerprint: str, scale: float, soft_cap: float | None, tokenizer_size: int) -> dict[str, str]:
    """What a head's file says beside its tensors. The same head gives the same bytes."""
    values = {"fingerprint": fingerprint, "scale": scale, "soft_cap": soft_cap, "tokenizer_size": tokenizer_size}
    return {METADATA_KEY: json.dumps({**values, "after_final_norm": True}, sort_keys=True)}


def file_hash(fingerprint: str) -> hashlib.blake2b:
    """The running digest of a head's file: BLAKE2b of 16 bytes, keyed with the teacher's fingerprint, so that the head
    of another teacher fails like a flipped bit. docs/protocol.md, "The output head"."""
    key = hashlib.blake2b(fingerprint.encode(), digest_size=32, person=b"teacher.v1.head").digest()
    return hashlib.blake2b(digest_size=DIGEST_BYTES, key=key)


def digest_of(path: Path, fingerprint: str) -> str:
    """Hexadecimal, of a whole file."""
    digest = file_hash(fingerprint)
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def read_head(path: Path) -> Head:
    """A head from its file; its digest is the caller's to check.

    Raises:
        ValueError: it is not one.
    """
    from safetensors import SafetensorError, deserialize, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        tensors = dict(deserialize(path.read_bytes()))  # type: ignore[no-untyped-call]
        found = {name: (entry["dtype"], entry["shape"], entry["data"]) for name, entry in tensors.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error
    parameters = _parameters(metadata.get(METADATA_KEY, ""), path)
    if "weight" not in found or found.keys() - {"weight", "bias"}:
        raise ValueError(f"{path}: holds {', '.join(sorted(found)) or 'nothing'}; expected weight and perhaps bias")
    arrays = {name: _array(name, *entry, path) for name, entry in found.items()}
    (weight, dtype), (bias, bias_dtype) = arrays["weight"], arrays.get("bias", (None, ""))
    if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = {name: list(array.shape) for name, (array, _) in arrays.items()}
        raise ValueError(f"{path}: shapes are {shapes}; expected weight [W, H] and bias [W]")
    if bias is not None:
        bias = from_bfloat16(bias) if bias_dtype == "bfloat16" else bias.astype(np.float32, copy=False)
    return Head(weight=weight, dtype=dtype, bias=bias, **parameters)


def _array(name: str, dtype: str, shape: list[int], data: bytes, path: Path) -> tuple[npt.NDArray[Any], str]:
    if dtype not in _DTYPES:
        raise ValueError(f"{path}: {name} is {dtype}; expected {', '.join(_DTYPES)}")
    known, stored = _DTYPES[dtype]
    return np.frombuffer(data, stored).reshape(shape), known


def _parameters(text: str, path: Path) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("after_final_norm") is not True:
        raise ValueError(f"{path}: its metadata does not describe an output head of teacher.v1")
    values = {name: document.get(name) for name in _PARAMETERS}
    for name, kind in _PARAMETERS.items():
        if not isinstance(values[name], kind):
            raise ValueError(f"{path}: metadata says {name} is {values[name]!r:.80}; expected {kind}")
    return values
