"""The way of finished samples to their teachers. A full request leaves at once where its teacher may have one more; one
that is not full leaves while fewer than PARTIAL such are in flight: a teacher always has work, and a slower one gets it
in larger pieces. Of samples that wait, the one that is learned from next leaves first, and takes others with it, those
of its prompt before all. What a teacher says of a sample does not depend on it.

Nothing here waits in the caller's thread, and no lock of Python's is shared with it: a signal may end it anywhere.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from student_trainer.pipeline.timeline import Timeline
from student_trainer.types import Metrics, Rollout, ScoredRollout


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one sample."""

    scored: ScoredRollout
    sums: Metrics  # what Panel.ask tells of it


Event = Rollout | Answer | BaseException
"""What arrives: a sample that is finished, what its teacher says, or why there will be nothing more."""


class Asker(Protocol):
    """Those who score: Panel."""

    def route(self, rollout: Rollout) -> str:
        """The name of the queue that a sample waits in."""
        ...

    def widths(self) -> dict[str, tuple[int, int]]:
        """Of each queue: requests in flight at a time, and samples in one."""
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


@dataclass(frozen=True, slots=True)
class _Answered:
    was_full: bool


_News = Sent | _Answered | None  # None: closed
PARTIAL = 2
"""One that the teacher works on, and one that waits for it there."""


class Feed:
    """Carries samples of any number of steps, oldest first."""

    def __init__(self, panel: Asker, timeline: Timeline) -> None:
        self._panel = panel
        self._timeline = timeline
        self._queues: dict[str, SimpleQueue[_News]] = {name: SimpleQueue() for name in panel.widths()}
        for name, (width, most) in panel.widths().items():
            threading.Thread(target=self._deliver, args=(name, width, most), name=f"feed-{name}", daemon=True).start()

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

    def _deliver(self, name: str, width: int, most: int) -> None:
        queue, waiting = self._queues[name], list[Sent]()
        in_flight = {True: 0, False: 0}  # full ones, others
        while True:
            for news in _news(queue):
                if news is None:
                    return
                if isinstance(news, Sent):
                    waiting.append(news)
                else:
                    in_flight[news.was_full] -= 1
            while waiting and sum(in_flight.values()) < width:
                request = _request(waiting, most)
                is_full = len(request) == most
                if not is_full and in_flight[False] >= PARTIAL:
                    break
                chosen = {id(sent) for sent in request}
                waiting = [sent for sent in waiting if id(sent) not in chosen]
                in_flight[is_full] += 1
                # Its own thread: a pool's would be waited for when the interpreter ends, whatever they wait for.
                threading.Thread(target=self._ask, args=(name, request, _Answered(is_full)), daemon=True).start()

    def _ask(self, name: str, request: list[Sent], news: _Answered) -> None:
        first, rollouts = request[0], [sent.rollout for sent in request]
        try:
            with self._timeline.span("score", first.step, samples=len(rollouts), teacher=name):
                for scored, sums in self._panel.ask(name, rollouts):
                    first.arrivals.put(Answer(scored, sums))
        except BaseException as error:  # carried to the thread that waits
            first.arrivals.put(error)
        finally:
            self._queues[name].put(news)


def _news(queue: SimpleQueue[_News]) -> list[_News]:
    """What is there already; waits for the first."""
    found = [queue.get()]
    with contextlib.suppress(Empty):
        while True:
            found.append(queue.get_nowait())
    return found


def _request(waiting: Sequence[Sent], most: int) -> list[Sent]:
    """The next request out of those that wait: the first in order of step and number, others of its step and prompt,
    and then whoever is next of that step."""
    first, *rest = sorted(waiting, key=lambda sent: (sent.step, sent.rollout.uid))
    like = [s for s in rest if s.step == first.step and s.rollout.prompt.index == first.rollout.prompt.index]
    others = [s for s in rest if s.step == first.step and s.rollout.prompt.index != first.rollout.prompt.index]
    return [first, *like, *others][:most]
