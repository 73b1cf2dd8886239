"""Arrays <-> numpy: widths, rounding, and values that are refused."""

from __future__ import annotations

import numpy as np
import pytest

from teacher_api import arrays
from teacher_api.v1 import teacher_pb2 as pb


@pytest.mark.parametrize(
    ("high", "width"), [(0, 2), (65535, 2), (65536, 3), (2**24 - 1, 3), (2**24, 4), (2**31 - 1, 4)]
)
def test_ids_are_as_narrow_as_they_can_be(high, width):
    values = np.array([[0, 1], [high, 258]], dtype=np.int64)
    message = arrays.encode_unsigned(values)
    assert len(message.data) == 4 * width
    assert int.from_bytes(message.data[2 * width : 3 * width], "little") == high
    np.testing.assert_array_equal(arrays.decode_unsigned(message, ndim=2), values)


@pytest.mark.parametrize("number", [0, 1, 7, 640])
def test_three_bytes_are_the_three_low_ones_of_each_id(number):
    values = np.random.default_rng(number).integers(0, 1 << 24, number)
    values[:1] = (1 << 24) - 1
    data = b"".join(int(value).to_bytes(3, "little") for value in values)
    got = arrays.decode_unsigned(pb.Array(dtype=pb.DTYPE_UINT24, shape=[number], data=data))
    assert got.dtype == np.int32
    assert got.flags.writeable
    np.testing.assert_array_equal(got, values)
    assert not number or arrays.encode_unsigned(values).data == data


def test_float16_rounds_by_at_most_half_a_step_of_its_eleven_bits():
    values = -np.geomspace(1e-3, 1e4, 5000).astype(np.float32)
    message = arrays.encode_float(values, pb.DTYPE_FLOAT16)
    got = arrays.decode_float(message, dtypes=(pb.DTYPE_FLOAT16,), ndim=1)
    step = np.exp2(np.floor(np.log2(-values)) - 10)
    assert (np.abs(got.astype(np.float64) - values) <= step / 2).all()


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_values_that_are_not_finite_are_refused_where_they_are(bad, kind):
    values = np.linspace(-9, 0, 7).astype(kind)
    values[5] = bad
    dtype = pb.DTYPE_FLOAT16 if kind == "float16" else pb.DTYPE_FLOAT32
    with pytest.raises(ValueError, match=r"at \[5\] is not finite"):
        arrays.decode_float(arrays.encode_float(values, dtype), dtypes=(dtype,), ndim=1)
    values[5] = 65504 if kind == "float16" else 3e38
    arrays.decode_float(arrays.encode_float(values, dtype), dtypes=(dtype,), ndim=1)


def test_hidden_states_of_a_bfloat16_model_travel_in_two_bytes():
    exact = np.array([[1.0, -2.5, 3.0e38, 1e-30]], np.float32).view(np.uint32) & 0xFFFF0000
    exact = exact.view(np.float32)
    assert arrays.fits_bfloat16(exact)
    assert not arrays.fits_bfloat16(np.array([[1.001]], np.float32))
    message = arrays.encode_float(exact, pb.DTYPE_BFLOAT16)
    assert len(message.data) == 8
    got = arrays.decode_float(message, dtypes=(pb.DTYPE_BFLOAT16,), ndim=2)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, exact)
