"""The way of finished samples to their teachers. A full request leaves at once where its teacher may have one more; one
that is not full leaves while fewer than AHEAD such are in flight: a teacher always has work, and a slower one gets it
in larger pieces. Where a teacher says how much it computes at once, that much is a full request, and no more than AHEAD
times as much is in flight: what waits here can still be overtaken. Of samples that wait, the one that is learned from
next leaves first, and takes others with it, those of its prompt before all. What a teacher says of a sample does not
depend on it.

Nothing here waits in the caller's thread, and no lock of Python's is shared with it: a signal may end it anywhere.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import NamedTuple, Protocol

from student_trainer.pipeline.timeline import Timeline
from student_trainer.types import Metrics, Rollout, ScoredRollout


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one sample."""

    scored: ScoredRollout
    sums: Metrics  # what Panel.ask tells of it


Event = Rollout | Answer | BaseException
"""What arrives: a sample that is finished, what its teacher says, or why there will be nothing more."""


class Width(NamedTuple):
    """What a teacher is sent."""

    requests: int  # in flight at a time, at most
    samples: int  # of one, at most
    tokens: int = 0  # that it computes at once; 0: unknown


class Asker(Protocol):
    """Those who score: Panel."""

    def route(self, rollout: Rollout) -> str:
        """The name of the queue that a sample waits in."""
        ...

    def widths(self) -> dict[str, Width]:
        """Of each queue."""
        ...

    def ask(self, name: str, rollouts: Sequence[Rollout]) -> Iterator[tuple[ScoredRollout, Metrics]]:
        """The scores of samples of the queue `name`, each as soon as it is there, and sums to be added up; called from
        several threads at once."""
        ...


@dataclass(frozen=True, slots=True)
class Sent:
    """A sample on its way."""

    rollout: Rollout
    step: int
    arrivals: SimpleQueue[Event]


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    """The news of one is that it has been answered."""

    sent: list[Sent]
    tokens: int
    is_full: bool


_News = Sent | _Request | None  # None: closed
AHEAD = 2
"""What the teacher works on, and what waits for it there."""


class Feed:
    """Carries samples of any number of steps, oldest first."""

    def __init__(self, panel: Asker, timeline: Timeline) -> None:
        self._panel = panel
        self._timeline = timeline
        self._queues: dict[str, SimpleQueue[_News]] = {name: SimpleQueue() for name in panel.widths()}
        for name, width in panel.widths().items():
            threading.Thread(target=self._deliver, args=(name, width), name=f"feed-{name}", daemon=True).start()

    def send(self, sent: Sequence[Sent]) -> None:
        """Puts samples on their way; what comes of them arrives in their queues.

        Raises:
            ValueError: a sample that nobody scores.
        """
        for one in sent:
            self._queues[self._panel.route(one.rollout)].put(one)

    def close(self) -> None:
        """Nothing more is sent. Requests in flight end with their clients."""
        for queue in self._queues.values():
            queue.put(None)

    def _deliver(self, name: str, width: Width) -> None:
        queue, waiting, in_flight = self._queues[name], list[Sent](), list[_Request]()
        while True:
            for news in _news(queue):
                if news is None:
                    return
                if isinstance(news, Sent):
                    waiting.append(news)
                else:
                    in_flight.remove(news)
            while waiting:
                request = _request(waiting, width)
                if not _may_leave(request, in_flight, width):
                    break
                chosen = {id(sent) for sent in request.sent}
                waiting = [sent for sent in waiting if id(sent) not in chosen]
                in_flight.append(request)
                # Its own thread: a pool's would be waited for when the interpreter ends, whatever they wait for.
                threading.Thread(target=self._ask, args=(name, request), daemon=True).start()

    def _ask(self, name: str, request: _Request) -> None:
        first, rollouts = request.sent[0], [sent.rollout for sent in request.sent]
        try:
            with self._timeline.span("score", first.step, samples=len(rollouts), teacher=name):
                for scored, sums in self._panel.ask(name, rollouts):
                    first.arrivals.put(Answer(scored, sums))
        except BaseException as error:  # carried to the thread that waits
            first.arrivals.put(error)
        finally:
            self._queues[name].put(request)


def _news(queue: SimpleQueue[_News]) -> list[_News]:
    """What is there already; waits for the first."""
    found = [queue.get()]
    with contextlib.suppress(Empty):
        while True:
            found.append(queue.get_nowait())
    return found


def _request(waiting: Sequence[Sent], width: Width) -> _Request:
    """The next request out of those that wait: the first in order of step and number, others of its step and prompt,
    and then whoever is next of that step."""
    first, *rest = sorted(waiting, key=lambda sent: (sent.step, sent.rollout.uid))
    like = [s for s in rest if s.step == first.step and s.rollout.prompt.index == first.rollout.prompt.index]
    others = [s for s in rest if s.step == first.step and s.rollout.prompt.index != first.rollout.prompt.index]
    chosen, prompts, tokens = list[Sent](), set[int](), 0
    for sent in (first, *like, *others):
        chosen.append(sent)
        prompt = sent.rollout.prompt
        tokens += sent.rollout.num_tokens + (0 if prompt.index in prompts else len(prompt.token_ids))
        prompts.add(prompt.index)
        is_full = len(chosen) == width.samples or 0 < width.tokens <= tokens
        if is_full:
            break
    return _Request(chosen, tokens, is_full)


def _may_leave(request: _Request, in_flight: Sequence[_Request], width: Width) -> bool:
    if len(in_flight) < AHEAD:
        return len(in_flight) < width.requests
    if width.tokens and sum(other.tokens for other in in_flight) >= AHEAD * width.tokens:
        return False
    partial = sum(not other.is_full for other in in_flight)
    return len(in_flight) < width.requests and (request.is_full or partial < AHEAD)
