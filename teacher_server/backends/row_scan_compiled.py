"""The loops of row_scan.py, for numba. Its subset of Python: no objects, no allocation inside loops. What is kept on
disk is known by this file's age alone, so everything that is compiled stands here.

A row's columns fall into blocks: those of whole groups of searched columns by lanes, the searched ones behind them and
the others, which no tokenizer has an id for, by neighbours. The k largest entries lie in blocks whose maxima are no
smaller than the k-th largest of all.
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


@numba.njit  # type: ignore[untyped-decorator]
def sift(values: Any, ids: Any, place: int, size: int) -> None:
    """Moves the entry at `place` down a heap whose root is the last by (value descending, id ascending)."""
    value, entry = values[place], ids[place]
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (
            values[other] < values[child] or (values[other] == values[child] and ids[other] > ids[child])
        ):
            child = other
        if values[child] < value or (values[child] == value and ids[child] > entry):
            values[place], ids[place] = values[child], ids[child]
            place = child
        else:
            break
    values[place], ids[place] = value, entry


@numba.njit  # type: ignore[untyped-decorator]
def keep_largest(value: Any, entry: int, values: Any, ids: Any, size: int) -> int:
    """Offers one more entry to the heap of the len(values) first; its size after that."""
    k = len(values)
    if size < k:
        values[size], ids[size] = value, entry
        if size + 1 == k:
            for place in range(k // 2 - 1, -1, -1):
                sift(values, ids, place, k)
        return size + 1
    if value > values[0] or (value == values[0] and entry < ids[0]):
        values[0], ids[0] = value, entry
        sift(values, ids, 0, k)
    return size


@numba.njit  # type: ignore[untyped-decorator]
def top_k(z: Any, known: int, maxima: Any, searched: int, values: Any, ids: Any) -> None:
    """The len(values) first by (value descending, id ascending) of the columns below `known`."""
    k, size = len(values), 0
    if k == 0:
        return
    least = F(-np.inf)
    if searched > k:
        for block in range(searched):
            if size < k or maxima[block] > values[0]:
                size = keep_largest(maxima[block], block, values, ids, size)
        least, size = values[0], 0
    for block in range(searched):
        if maxima[block] >= least:
            first, stop, stride = columns_of(block, known, known)
            for column in range(first, stop, stride):
                if z[column] >= least:
                    size = keep_largest(z[column], column, values, ids, size)
    for place in range(size, k):  # a row with NaN: its answer is no numbers anyway
        values[place], ids[place] = F(np.nan), place
    for last in range(size - 1, 0, -1):
        values[0], values[last] = values[last], values[0]
        ids[0], ids[last] = ids[last], ids[0]
        sift(values, ids, 0, last)


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
        top_k(z, known, maxima, searched, topk_nK[row], ids_nK[row])
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
