"""The loops of row_scan.py, for numba. Its subset of Python: no objects, no allocation inside loops. What is kept on
disk is known by this file's age alone, so everything that is compiled stands here.

A row's columns fall into blocks: those of whole groups of searched columns by lanes, the searched ones behind them and
the others, which no tokenizer has an id for, by neighbours. The k largest entries lie in blocks whose maxima are no
smaller than the k-th largest of all, and are no smaller than that themselves; any lower bound of it does as well.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES, DEPTH = 32, 32
"""A group is DEPTH times LANES neighbouring columns; a block is the columns of one lane, so that maxima and sums of
all lanes grow together, as vectors."""
GROUP = LANES * DEPTH
STEP_BIT, STEPS = 19, 320
FIRST_STEP = (127 - 10) << 4
"""Block maxima are told apart by how far they are below the largest when the k-th of them is looked for: from 2**-10 to
2**10 nats, in 16 steps a doubling. A step is the upper bits of a float32: its exponent, and four below."""
SHARE_LEFT = 0.05
"""Of the whole sum: where less is left outside the named ids, taking these from the sum would cost digits, and their
blocks are summed again without them."""

F = np.float32
LOG2_E, LN2_HIGH, LN2_LOW = F(1.4426950408889634), F(0.693359375), F(-2.12194440e-4)
ROUNDS = F(12582912.0)  # 1.5 · 2**23: what is added to it loses its fraction, and is in the low bits
LOWEST = F(-87.0)  # the exponential of anything lower is as good as 0 beside that of a largest above -FAR
# exp(r) for |r| <= ln(2)/2, degree 5, least largest relative error (7.5e-8), by iterated weighted least squares.
P0, P1, P2, P3, P4, P5 = (
    F(x) for x in (1.00000007, 0.99999969, 0.49998895, 0.16667575, 0.04191538, 0.00829765)
)  # fmt: skip


@intrinsic  # type: ignore[untyped-decorator]
def times_power_of_two(typing_context: Any, p: Any, t: Any) -> Any:
    """p · 2**i, where i is the integer in the low bits of t."""
    bits = ir.IntType(32)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        p_bits, t_bits = (builder.bitcast(x, bits) for x in arguments)
        exponent = builder.shl(t_bits, ir.Constant(bits, 23))
        return builder.bitcast(builder.add(p_bits, exponent), ir.FloatType())

    return types.float32(types.float32, types.float32), generate


@numba.njit(fastmath={"contract"})  # type: ignore[untyped-decorator]
def exponential(x: Any) -> Any:
    """e**x for x < 88 within 2e-7 of itself; NaN of NaN."""
    x = LOWEST if x < LOWEST else x
    t = x * LOG2_E + ROUNDS
    i = t - ROUNDS
    r = x - i * LN2_HIGH - i * LN2_LOW
    p = ((((P5 * r + P4) * r + P3) * r + P2) * r + P1) * r + P0
    return times_power_of_two(p, t)


@numba.njit(fastmath={"nsz", "contract"})  # type: ignore[untyped-decorator]
def scan_group(z: Any, base: Any, maxima: Any, sums: Any) -> None:
    """Of the LANES blocks of a group."""
    for lane in range(LANES):
        maxima[lane] = z[lane]
        sums[lane] = exponential(z[lane] - base)
    for deep in range(1, DEPTH):
        row = z[deep * LANES : (deep + 1) * LANES]
        for lane in range(LANES):
            maxima[lane] = maxima[lane] if maxima[lane] > row[lane] else row[lane]
            sums[lane] += exponential(row[lane] - base)


@numba.njit  # type: ignore[untyped-decorator]
def scan_neighbours(z: Any, base: Any, start: int, stop: int, maxima: Any, sums: Any, block: int) -> int:
    """Of blocks of DEPTH neighbours in [start, stop), the last maybe of fewer; the number of the next block."""
    number = block + (stop - start + DEPTH - 1) // DEPTH
    for first in range(start, stop, DEPTH):
        largest, total = z[first], F(0.0)
        for column in range(first, min(first + DEPTH, stop)):
            largest = max(largest, z[column])
            total += exponential(z[column] - base)
        maxima[block], sums[block] = largest, total
        block += 1
    return number


@numba.njit  # type: ignore[untyped-decorator]
def columns_of(block: int, known: int, width: int) -> tuple[int, int, int]:
    """The columns of a block as a range."""
    grouped = known // GROUP * LANES
    if block < grouped:
        first = block // LANES * GROUP + block % LANES
        return first, first + GROUP, LANES
    searched = grouped + (known % GROUP + DEPTH - 1) // DEPTH
    if block < searched:
        first = known // GROUP * GROUP + (block - grouped) * DEPTH
        return first, min(first + DEPTH, known), 1
    first = known + (block - searched) * DEPTH
    return first, min(first + DEPTH, width), 1


@numba.njit  # type: ignore[untyped-decorator]
def block_of(column: int, known: int) -> int:
    grouped = known // GROUP * LANES
    if column < known // GROUP * GROUP:
        return column // GROUP * LANES + column % LANES
    searched = grouped + (known % GROUP + DEPTH - 1) // DEPTH
    if column < known:
        return grouped + (column - known // GROUP * GROUP) // DEPTH
    return searched + (column - known) // DEPTH


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(typing_context: Any, x: Any) -> Any:
    """Those of a float32, as an integer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@numba.njit  # type: ignore[untyped-decorator]
def step_below(top: Any, value: Any) -> Any:
    """How many steps `value` is below `top`: from 0, of what is as good as equal, to STEPS - 1, of what is far."""
    return max(0, min((bits_of(top - value) >> STEP_BIT) - FIRST_STEP, STEPS - 1))


@numba.njit  # type: ignore[untyped-decorator]
def least_of_largest(values: Any, k: int, top: Any, counts: Any) -> Any:
    """One of `values` that at least k of them reach, and few more: those of the same step below `top`, which none is
    above."""
    counts[:] = 0
    for value in values:
        counts[step_below(top, value)] += 1
    step, reached = 0, counts[0]
    while reached < k:
        step += 1
        reached += counts[step]
    least = top
    for value in values:
        if step_below(top, value) <= step:
            least = value if value < least else least
    return least


@numba.njit  # type: ignore[untyped-decorator]
def order_key(value: Any, column: int) -> Any:
    """An integer that orders as (value ascending, column descending)."""
    bits = np.int64(bits_of(value + F(0.0)))  # of -0 those of 0
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 32) | (0x7FFFFFFF - column)


@numba.njit  # type: ignore[untyped-decorator]
def column_of(key: int) -> int:
    return 0x7FFFFFFF - (key & 0xFFFFFFFF)


@numba.njit  # type: ignore[untyped-decorator]
def top_k(z: Any, known: int, top: Any, maxima: Any, counts: Any, keys: Any, values: Any, ids: Any) -> None:
    """The len(values) first by (value descending, id ascending) of the columns below `known`.

    Args:
        top: at least as large as the largest of them.
        maxima: of their blocks.
        counts, keys: integers to work with; of keys more than twice as many as values.
    """
    k, size = len(values), 0
    if k == 0:
        return
    least = least_of_largest(maxima, k, top, counts) if len(maxima) > k else F(-np.inf)
    last = np.int64(np.iinfo(np.int64).min)  # of the k first so far
    for block in range(len(maxima)):
        if maxima[block] >= least:
            first, stop, stride = columns_of(block, known, known)
            for column in range(first, stop, stride):
                if z[column] >= least:
                    key = order_key(z[column], column)
                    if key > last:
                        keys[size] = key
                        size += 1
                        if size == len(keys):
                            keys.sort()
                            keys[:k] = keys[size - k :]
                            last, size = keys[0], k
                            least = z[column_of(last)]
    found = keys[:size]
    found.sort()
    for place in range(min(k, size)):
        column = column_of(found[size - 1 - place])
        values[place], ids[place] = z[column], column
    for place in range(size, k):  # a row with NaN: its answer is no numbers anyway
        values[place], ids[place] = F(np.nan), place


@numba.njit  # type: ignore[untyped-decorator]
def rest_of(z: Any, base: Any, total: float, known: int, sums: Any, named: Any, stamps: Any, stamp: int) -> float:
    """Σ exp(z − base) outside the named columns. `stamps` tells columns apart that are named twice."""
    rest = total
    for column in named:
        if stamps[column] != stamp:
            stamps[column] = stamp
            rest -= exponential(z[column] - base)
    if rest > SHARE_LEFT * total or not total > 0.0:
        return rest
    rest = 0.0
    for column in named:  # sums of their blocks are not counted, but once each taken anew
        sums[block_of(column, known)] = F(-1.0)
    for block in range(len(sums)):
        if sums[block] >= 0.0:
            rest += sums[block]
        else:
            first, stop, stride = columns_of(block, known, len(z))
            for column in range(first, stop, stride):
                if stamps[column] != stamp:
                    rest += exponential(z[column] - base)
    return rest


@numba.njit  # type: ignore[untyped-decorator]
def scan_row(z: Any, base: Any, known: int, maxima: Any, sums: Any) -> int:
    """Fills in all blocks; how many of them are searched."""
    for group in range(known // GROUP):
        blocks = slice(group * LANES, (group + 1) * LANES)
        scan_group(z[group * GROUP : (group + 1) * GROUP], base, maxima[blocks], sums[blocks])
    block = known // GROUP * LANES
    searched: int = scan_neighbours(z, base, known // GROUP * GROUP, known, maxima, sums, block)
    scan_neighbours(z, base, known, len(z), maxima, sums, searched)
    return searched


def kept_on_disk(function: Any) -> Any:
    """Compiled without Python's lock; once for all processes, where there is a place to write."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither beside the file, nor in the user's cache
        return numba.njit(nogil=True)(function)


@kept_on_disk  # type: ignore[untyped-decorator]
def scan_rows(
    z_nW: Any,
    known: int,
    far: float,
    target_n: Any,
    ids_m: Any,
    offsets: Any,
    start: int,
    stop: int,
    top_n: Any,
    base_n: Any,
    sum_n: Any,
    rest_n: Any,
    topk_nK: Any,
    ids_nK: Any,
    token_n: Any,
    asked_m: Any,
) -> None:
    """Rows [start, stop) of row_scan.scan; fills in the last eight."""
    width, k = z_nW.shape[1], topk_nK.shape[1]
    number = known // GROUP * LANES + (known % GROUP + DEPTH - 1) // DEPTH + (width - known + DEPTH - 1) // DEPTH
    maxima, sums = np.empty(number, np.float32), np.empty(number, np.float32)
    counts, keys = np.empty(STEPS, np.int32), np.empty(2 * k + 64, np.int64)
    stamps = np.zeros(width, np.int64)
    most = 0
    for row in range(start, stop):
        most = max(most, offsets[row + 1] - offsets[row])
    named = np.empty(1 + k + most, np.int64)
    for row in range(start, stop):
        z, base = z_nW[row], F(0.0)
        searched = scan_row(z, base, known, maxima, sums)
        top = maxima.max()
        if not abs(top) < far:
            base = top
            searched = scan_row(z, base, known, maxima, sums)
        total = 0.0
        for block in range(number):
            total += sums[block]
        top_k(z, known, top, maxima[:searched], counts, keys, topk_nK[row], ids_nK[row])
        first, last = offsets[row], offsets[row + 1]
        token_n[row] = z[target_n[row]]
        for place in range(first, last):  # now: the row is in the cache
            asked_m[place] = z[ids_m[place]]
        named[0] = target_n[row]
        named[1 : 1 + k] = ids_nK[row]
        named[1 + k : 1 + k + last - first] = ids_m[first:last]
        asked = named[: 1 + k + last - first]
        rest = rest_of(z, base, total, known, sums, asked, stamps, row + 1)
        top_n[row], base_n[row], sum_n[row], rest_n[row] = top, base, total, rest
