"""What the scheduler tells of each batch it has run: as distributions (how long its sequences had waited, how long the
engine took, how many there were) and as spans of the requests they belong to. Counted on the event loop only; other
threads may read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from teacher_api.tracing import Tracing
from teacher_server.histogram import SECONDS, SEQUENCES, Histogram

NANO = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Mark:
    """When a sequence was put into the queue, by the monotonic clock, and the context of the request that sent it."""

    at: float
    context: Any


UNMARKED = Mark(0.0, None)


class Forwards:
    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing
        self.waited = Histogram(SECONDS)  # of each sequence
        self.took = Histogram(SECONDS)  # of each batch
        self.sequences = Histogram(SEQUENCES)  # of each batch
        self.tokens = 0
        self.running = 0  # batches

    def queued(self) -> Mark:
        return Mark(time.monotonic(), self._tracing.current())

    def began(self) -> None:
        self.running += 1

    def ended(self, marks: Sequence[Mark], began_at: float, tokens: int) -> None:
        """Of one batch that began at `began_at` by the monotonic clock, whatever became of it."""
        now = time.monotonic()
        self.running -= 1
        for mark in marks:
            self.waited.add(began_at - mark.at)
        self.took.add(now - began_at)
        self.sequences.add(len(marks))
        self.tokens += tokens
        if self._tracing.is_on:
            self._trace(marks, began_at, now, tokens)

    def _trace(self, marks: Sequence[Mark], began_at: float, ended_at: float, tokens: int) -> None:
        """Two spans for each request that has sequences in the batch: the longest wait of them, and the forward."""
        first: dict[int, Mark] = {}
        own: dict[int, int] = {}
        for mark in marks:
            if mark.context is not None:
                key = id(mark.context)
                first.setdefault(key, mark)
                own[key] = own.get(key, 0) + 1
        offset_ns = time.time_ns() - int(ended_at * NANO)
        begun_ns = offset_ns + int(began_at * NANO)
        for key, mark in first.items():
            sizes = {"sequences": own[key], "batch_sequences": len(marks), "batch_tokens": tokens}
            told = {f"preceptor.{name}": value for name, value in sizes.items()}
            self._tracing.past("queue", {}, mark.context, offset_ns + int(mark.at * NANO), begun_ns)
            self._tracing.past("forward", told, mark.context, begun_ns, offset_ns + int(ended_at * NANO))
