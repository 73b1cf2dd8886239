"""An output head in memory and as a file: the equation against float64 by the definition, the file's bytes, and the
refusal of files that are none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from teacher_api import head as head_module
from teacher_api.arrays import from_bfloat16, to_bfloat16
from teacher_api.head import METADATA_KEY, Head, digest_of, logprobs_from_hidden, metadata_of, read_head
from teacher_api.types import LOGPROB_FLOOR

N, H, W, V = 5, 16, 40, 37


def a_head(dtype: str = "float32", *, bias: bool = False, scale: float = 1.0, soft_cap: float | None = None) -> Head:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(W, H)).astype(np.float32)
    stored: Any = weight
    if dtype == "bfloat16":
        stored = to_bfloat16(weight)
    elif dtype == "float16":
        stored = weight.astype(np.float16)
    own_bias = rng.normal(size=W).astype(np.float32) if bias else None
    return Head(stored, dtype, own_bias, scale, soft_cap, V, "a teacher")


def by_definition(hidden: Any, head: Head, temperature: float) -> list[list[float]]:
    """Sums and exponentials one at a time, in Python's floats."""
    weight = head.weight_float32().astype(float).tolist()
    rows = []
    for state in hidden.astype(float).tolist():
        logits = []
        for column, weights in enumerate(weight):
            z = math.fsum(a * b for a, b in zip(state, weights, strict=True))
            z += 0.0 if head.bias is None else float(head.bias[column])
            z *= head.scale
            z = z if head.soft_cap is None else head.soft_cap * math.tanh(z / head.soft_cap)
            logits.append(z / temperature)
        total = math.log(math.fsum(math.exp(z) for z in logits))
        rows.append([z - total for z in logits[:V]])
    return rows


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "head",
    [
        a_head(),
        a_head("bfloat16"),
        a_head("float16", bias=True),
        a_head(bias=True, scale=0.25, soft_cap=3.0),
        a_head(scale=3.0, soft_cap=0.5),
    ],
)
def test_the_distribution_is_that_of_the_equation(
    head: Head, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "BLOCK_BYTES", 8 * H * 7)  # several blocks of columns
    hidden = np.random.default_rng(1).normal(size=(N, H)).astype(np.float32)
    expected = by_definition(hidden, head, temperature)
    exact = logprobs_from_hidden(hidden, head, temperature, np.float64)
    assert (exact.dtype, exact.shape) == (np.float64, (N, V))
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-12)
    single = logprobs_from_hidden(hidden, head, temperature)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-5)


def test_logprobs_have_a_floor() -> None:
    head = a_head(scale=1e5)
    hidden = np.random.default_rng(1).normal(size=(N, H)).astype(np.float32)
    assert float(logprobs_from_hidden(hidden, head).min()) == LOGPROB_FLOOR


@pytest.mark.parametrize(
    ("shape", "temperature", "message"),
    [
        ((N, H + 1), 1.0, r"hidden has shape \[5, 17\]; expected \[rows, 16\]"),
        ((H,), 1.0, "hidden has shape"),
        ((N, H), 0.0, "temperature is 0.0"),
        ((N, H), math.nan, "temperature is nan"),
    ],
)
def test_wrong_arguments_are_named(shape: tuple[int, ...], temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logprobs_from_hidden(np.zeros(shape, np.float32), a_head(), temperature)


def test_bfloat16_is_the_nearest_and_back_exact() -> None:
    """Against the definition: of the two neighbours on the grid of 8 significant bits the nearer, of equally near ones
    the even."""
    rng = np.random.default_rng(2)
    values = np.concatenate(
        [rng.normal(size=1000) * 10.0 ** rng.integers(-20, 20, 1000), [0.0, -0.0, 1.0, -2.5, 1 + 2**-8, 1 + 3 * 2**-8]]
    ).astype(np.float32)
    got = from_bfloat16(to_bfloat16(values))
    mantissa, exponent = np.frexp(values.astype(np.float64))
    expected = np.ldexp(np.round(mantissa * 2**8) / 2**8, exponent)  # numpy rounds ties to even
    np.testing.assert_array_equal(got.astype(np.float64), expected)
    np.testing.assert_array_equal(to_bfloat16(got), to_bfloat16(values))


# ---- the file --------------------------------------------------------------------------------------------------------


def saved(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    from safetensors.numpy import save_file

    known = metadata_of(fingerprint="a teacher", scale=0.5, soft_cap=30.0, tokenizer_size=V)
    save_file(tensors, path, known if metadata is None else metadata)
    return path


def test_a_file_read_back_is_the_head(tmp_path: Path) -> None:
    weight, bias = a_head().weight, np.arange(W, dtype=np.float32)
    head = read_head(saved(tmp_path / "head", {"weight": weight, "bias": bias}))
    np.testing.assert_array_equal(head.weight, weight)
    np.testing.assert_array_equal(head.bias, bias)  # type: ignore[arg-type]
    known = (head.dtype, head.scale, head.soft_cap, head.tokenizer_size, head.fingerprint)
    assert known == ("float32", 0.5, 30.0, V, "a teacher")
    assert (head.logit_width, head.hidden_size) == (W, H)


def test_the_digest_is_of_the_bytes_and_the_teacher(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", {"weight": a_head().weight})
    again = saved(tmp_path / "again", {"weight": a_head().weight})
    assert one.read_bytes() == again.read_bytes()
    assert digest_of(one, "a teacher") == digest_of(again, "a teacher")
    assert digest_of(one, "a teacher") != digest_of(one, "another")
    again.write_bytes(one.read_bytes()[:-1] + b"x")
    assert digest_of(one, "a teacher") != digest_of(again, "a teacher")


def described(**changes: Any) -> dict[str, str]:
    (text,) = metadata_of(fingerprint="a", scale=1.0, soft_cap=None, tokenizer_size=V).values()
    return {METADATA_KEY: json.dumps({**json.loads(text), **changes})}


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"weight": np.zeros((W, H), np.float32)}, {}, "does not describe an output head"),
        ({"weight": np.zeros((W, H), np.float32)}, {METADATA_KEY: "[]"}, "does not describe an output head"),
        ({"weight": np.zeros((W, H), np.float32)}, described(after_final_norm=False), "does not describe"),
        ({"weight": np.zeros((W, H), np.float32)}, described(scale="1"), "says scale is '1'"),
        ({"weight": np.zeros((W, H), np.float32)}, described(tokenizer_size=None), "says tokenizer_size is None"),
        ({"wait": np.zeros((W, H), np.float32)}, described(), "holds wait; expected weight"),
        ({"weight": np.zeros((W, H), np.int32)}, described(), "weight is I32; expected F32"),
        ({"weight": np.zeros(W, np.float32)}, described(), r"expected weight \[W, H\]"),
        (
            {"weight": np.zeros((W, H), np.float32), "bias": np.zeros(H, np.float32)},
            described(),
            r"expected weight \[W, H\] and bias \[W\]",
        ),
    ],
)
def test_another_file_is_refused(tmp_path: Path, tensors: Any, metadata: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_head(saved(tmp_path / "head", tensors, metadata))


def test_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "head"
    path.write_bytes(b"\x80\x04\x95 a pickle, say")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_head(path)
