"""Array messages <-> numpy: little-endian bytes with a declared dtype and shape, never trusted.

Every refusal is a ValueError of one line; the caller knows whether it means a bad request or a corrupt answer.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from teacher_api.types import FloatArray, IntArray
from teacher_api.v1 import teacher_pb2 as pb

MAX_ID = 2**31 - 1
"""Ids are int32 in memory; no vocabulary comes near."""

_ITEM_BYTES = {
    pb.DTYPE_UINT16: 2,
    pb.DTYPE_UINT24: 3,
    pb.DTYPE_UINT32: 4,
    pb.DTYPE_FLOAT16: 2,
    pb.DTYPE_BFLOAT16: 2,
    pb.DTYPE_FLOAT32: 4,
}
_FLOAT16_EXPONENT = np.uint16(0x7C00)
UNSIGNED = (pb.DTYPE_UINT16, pb.DTYPE_UINT24, pb.DTYPE_UINT32)


def encode_unsigned(values: npt.ArrayLike, *, narrow: bool = True) -> pb.Array:
    """Non-negative integers of any shape in the narrowest of 2, 3 or 4 bytes that holds the largest of them.

    Raises:
        ValueError: not integers, or one is negative or above 2**31 - 1.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "iu":
        raise ValueError(f"dtype is {array.dtype}; expected integers")
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < 0 or high > MAX_ID:
        where = int(np.argmax((array < 0) | (array > MAX_ID)))
        raise ValueError(f"value {array.flat[where]} at [{where}] is outside 0…{MAX_ID}")
    if narrow and high < 1 << 16:
        return pb.Array(dtype=pb.DTYPE_UINT16, shape=array.shape, data=array.astype("<u2").tobytes())
    wide = np.ascontiguousarray(array, dtype="<u4")
    if narrow and high < 1 << 24:
        four, three = wide.reshape(-1).view(np.uint8).reshape(-1, 4), np.empty((wide.size, 3), np.uint8)
        for byte in range(3):  # a whole column at a time: numpy copies rows of three bytes at a fifth of the speed
            three[:, byte] = four[:, byte]
        return pb.Array(dtype=pb.DTYPE_UINT24, shape=array.shape, data=three.tobytes())
    return pb.Array(dtype=pb.DTYPE_UINT32, shape=array.shape, data=wide.tobytes())


def encode_float(values: npt.NDArray[np.floating], dtype: pb.DType) -> pb.Array:
    """Finite floats as `dtype`, rounded to the nearest, ties to even."""
    if dtype == pb.DTYPE_FLOAT16:
        data = np.ascontiguousarray(values, dtype="<f2").tobytes()
    elif dtype == pb.DTYPE_BFLOAT16:
        data = to_bfloat16(values).tobytes()
    else:
        data = np.ascontiguousarray(values, dtype="<f4").tobytes()
    return pb.Array(dtype=dtype, shape=values.shape, data=data)


def to_bfloat16(values: npt.NDArray[np.floating]) -> npt.NDArray[np.uint16]:
    """The bits of finite values as bfloat16, the upper half of a float32: to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    upper: npt.NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return upper


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> FloatArray:
    """The values of bfloat16 bits, exactly."""
    return (bits.astype("<u4") << 16).view("<f4").astype(np.float32, copy=False)


def fits_bfloat16(values: FloatArray) -> bool:
    """Whether every value survives bfloat16 unchanged (as the states of a bfloat16 model do)."""
    bits = np.ascontiguousarray(values, dtype="<f4").reshape(-1).view("<u4")
    return not bool((bits & 0xFFFF).any())


def _checked_shape(message: pb.Array, dtypes: Collection[int], ndim: int) -> tuple[int, ...]:
    if message.dtype not in dtypes:
        got = pb.DType.Name(message.dtype) if message.dtype in pb.DType.values() else str(message.dtype)
        raise ValueError(f"dtype is {got}; expected {' or '.join(pb.DType.Name(d) for d in dtypes)}")
    if len(message.shape) != ndim:
        raise ValueError(f"shape is {list(message.shape[:8])}; expected {ndim} dimension{'s'[: ndim != 1]}")
    shape = tuple(message.shape)
    expected = math.prod(shape) * _ITEM_BYTES[message.dtype]
    if len(message.data) != expected:
        raise ValueError(f"{len(message.data)} bytes of data; expected {expected} for the shape {list(shape)}")
    return shape


def decode_unsigned(message: pb.Array, *, ndim: int = 1) -> IntArray:
    """Ids or offsets as int32, writable.

    Raises:
        ValueError: dtype, number of dimensions or byte length is wrong, or a value is above 2**31 - 1.
    """
    shape = _checked_shape(message, UNSIGNED, ndim)
    if message.dtype == pb.DTYPE_UINT16:
        return np.frombuffer(message.data, "<u2").astype(np.int32).reshape(shape)
    if message.dtype == pb.DTYPE_UINT32:
        values = np.frombuffer(message.data, "<u4")
        if values.size and int(values.max()) > MAX_ID:
            where = int(np.argmax(values > MAX_ID))
            raise ValueError(f"value {values[where]} at [{where}] is above {MAX_ID}")
        return values.astype(np.int32).reshape(shape)
    overlapping = np.ndarray((math.prod(shape),), "<u4", message.data + b"\0", strides=(3,))  # each with one byte more
    return (overlapping & np.uint32(0xFFFFFF)).astype(np.int32, copy=False).reshape(shape)


def decode_float(message: pb.Array, *, dtypes: Collection[int], ndim: int) -> npt.NDArray[np.float32 | np.float16]:
    """Finite floats: float16 stays float16, bfloat16 and float32 become float32. May be a read-only view.

    Raises:
        ValueError: dtype, number of dimensions or byte length is wrong, or a value is not finite.
    """
    shape = _checked_shape(message, dtypes, ndim)
    values: npt.NDArray[np.float32 | np.float16]
    if message.dtype == pb.DTYPE_FLOAT16:
        values = np.frombuffer(message.data, "<f2").astype(np.float16, copy=False)
    elif message.dtype == pb.DTYPE_BFLOAT16:
        values = from_bfloat16(np.frombuffer(message.data, "<u2"))
    else:
        values = np.frombuffer(message.data, "<f4").astype(np.float32, copy=False)
    if not all_finite(values):
        where = int(np.argmin(np.isfinite(values)))
        raise ValueError(f"value {values[where]} at [{where}] is not finite")
    return values.reshape(shape)


def all_finite(values: npt.NDArray[np.floating]) -> bool:
    """Whether no value is NaN or infinite. float16 is judged by its bits: numpy has no fast arithmetic on it."""
    if values.dtype == np.float16:
        return not bool(((values.view(np.uint16) & _FLOAT16_EXPONENT) == _FLOAT16_EXPONENT).any())
    return bool(np.isfinite(values).all())
