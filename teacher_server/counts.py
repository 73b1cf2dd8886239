"""What the server has done since it started, as plain numbers: requests and sequences by how they ended, and tokens.

Owns the closed sets of labels. Knows no Prometheus (metrics.py) and no transport. Counted on the event loop only; other
threads may read.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from teacher_api.errors import KINDS, TeacherError
from teacher_api.types import Scores

TRANSPORTS = ("grpc", "http")
OK = "ok"
OUTCOMES = (OK, *KINDS)
"""Of a request or a sequence: answered, or the kind of its error."""


@dataclass(slots=True)
class Ended:
    """Things that came in, and how those that are over ended. `received` is the sum of `by_outcome` once all are."""

    received: int = 0
    by_outcome: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))

    def end(self, outcome: str) -> None:
        """Raises ValueError for an outcome that is not in the table of errors."""
        if outcome not in self.by_outcome:
            raise ValueError(f"outcome {outcome!r}; expected one of {', '.join(self.by_outcome)}")
        self.by_outcome[outcome] += 1


@dataclass(slots=True)
class Outcome:
    """How the request in work will be counted; whoever knows better says so before it ends."""

    name: str = OK


class Counts:
    def __init__(self) -> None:
        self.requests: dict[str, Ended] = {name: Ended() for name in TRANSPORTS}
        self.sequences = Ended()
        self.computed_tokens = 0
        self.cached_tokens = 0
        self.positions = 0

    @contextlib.contextmanager
    def request(self, transport: str) -> Iterator[Outcome]:
        """Around one request; however the block ends, it is counted once."""
        if transport not in self.requests:
            raise ValueError(f"transport {transport!r}; expected one of {', '.join(self.requests)}")
        counted, outcome = self.requests[transport], Outcome()
        counted.received += 1
        try:
            yield outcome
        finally:
            counted.end(outcome.name)

    def _answered(self, results: Iterable[Scores | TeacherError]) -> None:
        for result in results:
            if isinstance(result, TeacherError):
                self.sequences.end(result.kind)
                continue
            self.sequences.end(OK)
            self.computed_tokens += result.computed_tokens
            self.cached_tokens += result.cached_tokens
            self.positions += result.num_rows

    def refused(self, error: TeacherError) -> None:
        """A sequence that was answered with `error` and never scored."""
        self.sequences.received += 1
        self.sequences.end(error.kind)

    @contextlib.contextmanager
    def scoring(self, number: int) -> Iterator[list[Scores | TeacherError]]:
        """Around the scoring of `number` sequences. What the block puts into the list has been answered; the outcome of
        the rest is the TeacherError that ends the block, `cancelled` where it is cancelled, `internal` otherwise."""
        self.sequences.received += number
        done: list[Scores | TeacherError] = []
        rest = "internal"
        try:
            yield done
        except TeacherError as error:
            rest = error.kind
            raise
        except asyncio.CancelledError:
            rest = "cancelled"
            raise
        finally:
            self._answered(done)
            for _ in range(number - len(done)):
                self.sequences.end(rest)
