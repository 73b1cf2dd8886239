"""One pass over each row of logits, compiled for the CPU at hand: maxima, sum of exponentials, top-k, and what is left
of the sum outside the ids that an answer names. Torch would read the row once for each of them.

Needs numba, which vLLM brings along; `available()` says whether it is there. Compiled at the first call, and kept on
disk where numba finds a place to write.

Shape legend: n rows, W columns, V of them searched for the top-k, K entries, m candidates, B blocks.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FAR = 30.0
"""Nats: exponentials of logits whose largest is nearer to 0 than this can be summed as they are."""

I64 = npt.NDArray[np.int64]


@functools.cache
def available() -> bool:
    return importlib.util.find_spec("numba") is not None


@dataclass(frozen=True, slots=True)
class Scan:
    """Of n rows."""

    top: Tensor  # [n]: largest z
    base: Tensor  # [n]: taken from z before its exponential
    sum: Tensor  # [n]: Σ exp(z − base)
    rest: Tensor  # [n]: the same over columns outside top-k ∪ candidates ∪ {target}
    topk: Tensor  # [n, K], descending, equal ones by ascending id
    topk_ids: Tensor  # int64 [n, K]
    token: Tensor  # [n]: z of the actual token
    asked: Tensor  # [m]: z of the candidates


def scan(z_nW: Tensor, known: int, k: int, target_n: Tensor, ids_m: Tensor, offsets: I64) -> Scan:
    """Scans rows on as many threads as torch uses.

    Args:
        z_nW: float32, on the CPU, contiguous. A row with NaN or +inf gets a NaN sum.
        known: V, columns that may be among the top-k.
        target_n: int64, the column of each row's actual token.
        ids_m: int64, candidates of all rows, one after the other.
        offsets: [n + 1], where each row's begin.
    """
    n = len(z_nW)
    numbers = np.empty((4, n), np.float32)
    topk, ids = np.empty((n, k), np.float32), np.empty((n, k), np.int64)
    token, asked = np.empty(n, np.float32), np.empty(len(ids_m), np.float32)
    filled = (*numbers, topk, ids, token, asked)
    arguments = (z_nW.numpy(), known, FAR, target_n.numpy(), ids_m.numpy(), offsets)
    parts = min(torch.get_num_threads(), n)
    if parts == 1:
        _compiled()(*arguments, 0, n, *filled)
    else:
        edges = np.linspace(0, n, parts + 1).astype(int)
        tasks = [
            _pool(parts).submit(_compiled(), *arguments, start, stop, *filled)
            for start, stop in itertools.pairwise(edges.tolist())
        ]
        for task in tasks:
            task.result()
    return Scan(*map(torch.from_numpy, filled))


@functools.cache
def _pool(size: int) -> ThreadPoolExecutor:
    """Threads that may run wherever any thread of this process does: vLLM ties each of its own to one core."""
    cores: set[int] = set()
    if hasattr(os, "sched_getaffinity"):
        for thread in os.listdir("/proc/self/task"):
            try:
                cores |= os.sched_getaffinity(int(thread))
            except OSError:  # it has ended
                continue

    def free() -> None:
        if cores:
            os.sched_setaffinity(threading.get_native_id(), cores)

    return ThreadPoolExecutor(size, thread_name_prefix="row-scan", initializer=free)


@functools.cache
def _compiled() -> Callable[..., None]:
    from teacher_server.backends import row_scan_compiled

    function: Any = row_scan_compiled.scan_rows
    return function  # type: ignore[no-any-return]
