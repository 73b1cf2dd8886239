"""What comes back of one step, put in order of the samples' numbers: whichever arrives first, the micro-batches and
their order are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from queue import SimpleQueue

from student_trainer import metrics
from student_trainer.microbatch import InOrder
from student_trainer.pipeline.feed import Answer, Event, Feed, Sent
from student_trainer.pipeline.timeline import Part, Timeline
from student_trainer.types import Metrics, Rollout, ScoredRollout


class Arrivals:
    """One step's samples on this rank, from the moment they are begun. The learner's thread reads, any other adds.

    Args:
        uids: of all samples that will come, ascending.
    """

    def __init__(self, step: int, uids: Sequence[int], feed: Feed, timeline: Timeline) -> None:
        self.step = step
        self._uids = list(uids)
        self._feed = feed
        self._timeline = timeline
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._sampled: set[int] = set()
        self._scored: dict[int, ScoredRollout] = {}
        self._sums: dict[int, Metrics] = {}
        self.dropped = 0  # samples that were made again, for their age

    def send(self, rollouts: Sequence[Rollout]) -> None:
        """Finished samples: to their teachers."""
        for rollout in rollouts:
            self._events.put(rollout)
        self._feed.send([Sent(rollout, self.step, self._events) for rollout in rollouts])

    def fail(self, error: BaseException) -> None:
        """Nothing more will come; whoever waits hears why."""
        self._events.put(error)

    def micro_batches(self, division: InOrder) -> Iterator[list[ScoredRollout]]:
        """Each as soon as it is complete and those before it have been. What the consumer does in between is learning.

        Raises: what sampling or scoring failed of.
        """
        for index, scored in enumerate(self._in_order()):
            for batch in division.add(index, scored):
                yield from self._timed(batch)
        for batch in division.rest():
            yield from self._timed(batch)

    def all(self) -> list[ScoredRollout]:
        """All of them, in order of their numbers, when the last has come. Raises as `micro_batches`."""
        return list(self._in_order())

    def sums(self) -> Metrics:
        """What was told of the answers, added up in order of the samples' numbers: the sum's bits depend on it."""
        total: Metrics = {}
        for uid in self._uids:
            metrics.add(total, self._sums[uid])
        return total

    def _timed(self, batch: Sequence[int]) -> Iterator[list[ScoredRollout]]:
        members = [self._scored[self._uids[index]] for index in batch]
        with self._timeline.span("learn", self.step, samples=len(members)):
            yield members

    def _in_order(self) -> Iterator[ScoredRollout]:
        for uid in self._uids:
            while uid not in self._scored:
                part: Part = "waiting_for_scores" if uid in self._sampled else "waiting_for_samples"
                if self._events.empty():
                    with self._timeline.span(part, self.step):
                        self._take(self._events.get())
                else:
                    self._take(self._events.get())
            yield self._scored[uid]

    def _take(self, event: Event) -> None:
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, Answer):
            uid = event.scored.rollout.uid
            self._scored[uid], self._sums[uid] = event.scored, event.sums
        else:
            self._sampled.add(event.uid)
