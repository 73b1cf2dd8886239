"""The way of finished samples to their teachers. A sample leaves at once where its teacher has a request free; of those
that have to wait, the one that is learned from next leaves first, and takes others with it, those of its prompt before
all. What a teacher says of a sample does not depend on it.

Nothing here waits in the caller's thread, and no lock of Python's is shared with it: a signal may end it anywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

from student_trainer.pipeline.timeline import Timeline
from student_trainer.types import Metrics, Rollout, ScoredRollout


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one request."""

    scored: Sequence[ScoredRollout]
    sums: Sequence[Metrics]  # what Panel.ask tells of each


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

    def ask(self, name: str, rollouts: Sequence[Rollout]) -> tuple[list[ScoredRollout], list[Metrics]]:
        """The scores of samples of the queue `name`, and sums to be added up; called from several threads at once."""
        ...


@dataclass(frozen=True, slots=True)
class Sent:
    """A sample on its way."""

    rollout: Rollout
    step: int
    arrivals: SimpleQueue[Event]


class Feed:
    """Carries samples of any number of steps, oldest first."""

    def __init__(self, panel: Asker, timeline: Timeline) -> None:
        self._panel = panel
        self._timeline = timeline
        self._queues: dict[str, SimpleQueue[Sent | None]] = {name: SimpleQueue() for name in panel.widths()}
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
        free = threading.Semaphore(width)
        waiting: list[Sent] = []
        while True:
            free.acquire()
            if not waiting:
                first = self._queues[name].get()
                if first is None:
                    return
                waiting.append(first)
            if _drain(self._queues[name], waiting):
                return
            request = _request(waiting, most)
            # Its own thread: a pool's would be waited for when the interpreter ends, whatever they wait for.
            threading.Thread(target=self._ask, args=(name, request, free.release), daemon=True).start()

    def _ask(self, name: str, request: list[Sent], done: Callable[[], None]) -> None:
        first, rollouts = request[0], [sent.rollout for sent in request]
        try:
            with self._timeline.span("score", first.step, samples=len(rollouts), teacher=name):
                answer = Answer(*self._panel.ask(name, rollouts))
            first.arrivals.put(answer)
        except BaseException as error:  # carried to the thread that waits
            first.arrivals.put(error)
        finally:
            done()


def _drain(queue: SimpleQueue[Sent | None], waiting: list[Sent]) -> bool:
    """Takes what is there already; whether that was the end."""
    while True:
        try:
            sent = queue.get_nowait()
        except Empty:
            return False
        if sent is None:
            return True
        waiting.append(sent)


def _request(waiting: list[Sent], most: int) -> list[Sent]:
    """Takes the next request out of those that wait: the first in order of step and number, others of its step and
    prompt, and then whoever is next of that step."""
    waiting.sort(key=lambda sent: (sent.step, sent.rollout.uid))
    first = waiting[0]
    like = [s for s in waiting if s.step == first.step and s.rollout.prompt.index == first.rollout.prompt.index]
    others = [s for s in waiting if s.step == first.step and s.rollout.prompt.index != first.rollout.prompt.index]
    request = [*like, *others][:most]
    chosen = {id(sent) for sent in request}
    waiting[:] = [sent for sent in waiting if id(sent) not in chosen]
    return request
