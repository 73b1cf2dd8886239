"""What the server has done since it started, as plain numbers: requests and sequences by how they ended and how long
they took, and tokens; of all, and of each tenant.

Owns the closed sets of labels. Knows no Prometheus (metrics.py) and no transport. Counted on the event loop only; other
threads may read.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from teacher_api.errors import KINDS, TeacherError
from teacher_api.types import Scores
from teacher_server.caller import Caller
from teacher_server.histogram import Histogram

SCORING = ("score", "score_stream", "completions")
METHODS = {
    "grpc": ("score", "score_stream", "info", "head", "other"),
    "http": ("score", "score_stream", "completions", "info", "head", "models", "usage", "status", "other"),
}
"""What is asked for, by transport. `other`: pages for people, paths that are not there."""
TRANSPORTS = tuple(METHODS)
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
    """How the request in work will be counted; whoever knows better says so before it ends. `tenant` is empty until
    its key is known to be one's."""

    name: str = OK
    tenant: str = ""
    experiment: str = ""
    run: str = ""
    request_id: str = ""
    about: str = ""  # the field that an error names
    began: float = field(default_factory=time.monotonic)

    def called_by(self, caller: Caller) -> None:
        self.tenant, self.experiment, self.run = caller.tenant, caller.experiment, caller.run

    def refused(self, error: TeacherError) -> None:
        """It ends with `error`."""
        self.name, self.about = error.kind, error.field

    def seconds(self) -> float:
        """Since the request came."""
        return time.monotonic() - self.began


class Work:
    """Requests for scores, and what came of them."""

    def __init__(self) -> None:
        self.requests = Ended()
        self.took = Histogram()  # of the requests that were answered
        self.sequences = Ended()
        self.computed_tokens = 0
        self.cached_tokens = 0
        self.positions = 0

    def ended(self, outcome: Outcome, took_s: float) -> None:
        self.requests.end(outcome.name)
        if outcome.name == OK:
            self.took.add(took_s)

    def answered(self, results: Iterable[Scores | TeacherError]) -> None:
        for result in results:
            if isinstance(result, TeacherError):
                self.sequences.end(result.kind)
                continue
            self.sequences.end(OK)
            self.computed_tokens += result.computed_tokens
            self.cached_tokens += result.cached_tokens
            self.positions += result.num_rows


class Counts:
    def __init__(self) -> None:
        self.requests: dict[str, Ended] = {name: Ended() for name in TRANSPORTS}
        self.took = {(name, method): Histogram() for name, methods in METHODS.items() for method in methods}
        self.written_tokens = 0  # of texts, the teacher's own
        self.all = Work()
        self.tenants: dict[str, Work] = {}  # those that a key belongs to, so no more than were configured

    def of(self, tenant: str) -> Work:
        return self.tenants.setdefault(tenant, Work())

    def _both(self, tenant: str) -> tuple[Work, ...]:
        return (self.all, self.of(tenant)) if tenant else (self.all,)

    @contextlib.contextmanager
    def request(self, transport: str, method: str = "other") -> Iterator[Outcome]:
        """Around one request; however the block ends, it is counted once."""
        if method not in METHODS.get(transport, ()):
            known = "; ".join(f"{name}: {', '.join(methods)}" for name, methods in METHODS.items())
            raise ValueError(f"transport {transport!r}, method {method!r}; expected one of {known}")
        counted, outcome = self.requests[transport], Outcome()
        counted.received += 1
        try:
            yield outcome
        finally:
            took_s = outcome.seconds()
            counted.end(outcome.name)
            self.took[transport, method].add(took_s)
            if method in SCORING:
                for work in self._both(outcome.tenant):
                    work.requests.received += 1
                    work.ended(outcome, took_s)

    def refused(self, error: TeacherError, tenant: str = "") -> None:
        """A sequence that was answered with `error` and never scored."""
        for work in self._both(tenant):
            work.sequences.received += 1
            work.sequences.end(error.kind)

    @contextlib.contextmanager
    def scoring(self, number: int, tenant: str = "") -> Iterator[list[Scores | TeacherError]]:
        """Around the scoring of `number` sequences. What the block puts into the list has been answered; the outcome of
        the rest is the TeacherError that ends the block, `cancelled` where it is cancelled, `internal` otherwise."""
        works = self._both(tenant)
        for work in works:
            work.sequences.received += number
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
            for work in works:
                work.answered(done)
                for _ in range(number - len(done)):
                    work.sequences.end(rest)
