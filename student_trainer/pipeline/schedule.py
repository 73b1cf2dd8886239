"""`train.schedule`: who waits for whom. All schedules give the learner the same micro-batches in the same order.

sequential: sample all, score all, learn.
strict: a finished sample goes to its teacher at once, and a micro-batch is learned from as soon as its samples are
    scored and those before it have been learned from. The results are those of sequential, bit for bit.
async: as strict, and while step t is learned from, a thread samples steps up to t + max_staleness.

An engine that computes where the student learns has the device to itself until it has sampled everything: what it has
finished earlier is scored earlier, and learning loses nothing by waiting. One that is elsewhere samples in a thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING

import torch

from student_trainer.pipeline.arrivals import Arrivals
from student_trainer.pipeline.copied import Ended
from student_trainer.pipeline.feed import Feed
from student_trainer.rollout.base import RolloutError
from student_trainer.types import Prompt, Rollout

if TYPE_CHECKING:
    from student_trainer.config import TrainConfig
    from student_trainer.parallel.base import Replicated
    from student_trainer.run import Run

END_S = 10.0
"""Longest wait for a sampling thread at the end of a run; it looks up after every completion."""
TRIES = 3
"""Times that a step is sampled because completions come back too old, before that is an error."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What a rank samples in a step."""

    step: int
    own: Mapping[int, Prompt]  # by sample number; the student completes these
    given: Sequence[Rollout] = ()  # fixed data

    @property
    def uids(self) -> list[int]:
        return sorted([*self.own, *(rollout.uid for rollout in self.given)])


Send = Callable[[Sequence[Rollout]], None]
Drawing = Callable[["Run", int], Draw]
Sampling = Callable[["Run", Draw, Send], None]


class Sequential:
    """One part after the other.

    Args:
        draw: what a step's samples are, of its number.
        sample: makes them, and hands each to its last argument when it is finished.
    """

    def __init__(self, run: Run, draw: Drawing, sample: Sampling) -> None:
        self._run = run
        self._draw = draw
        self._sample = sample
        self._feed = Feed(run.scorer, run.timeline)
        self._ended = False

    def begin(self) -> Arrivals:
        """The samples of the step that `run.step` counts, on their way. Called by all ranks in Replicated.whole."""
        run, (draw, arrivals) = self._run, self._drawn(self._run.step)
        run.sampler.update(run.step)
        finished: list[Rollout] = []
        with run.timeline.span("sample", run.step):
            self._sample(run, draw, finished.extend)
        arrivals.send(finished)
        arrivals.all()
        return arrivals

    @contextlib.contextmanager
    def weights_move(self) -> Iterator[None]:
        """Inside, the weights change and then `run.step`; nobody takes them over meanwhile."""
        with self._run.timeline.span("learn", self._run.step):
            yield

    def close(self) -> None:
        """Ends the threads."""
        self._ended = True
        self._feed.close()

    def _drawn(self, step: int) -> tuple[Draw, Arrivals]:
        draw = self._draw(self._run, step)
        return draw, Arrivals(step, draw.uids, self._feed, self._run.timeline)

    def _stream(self, draw: Draw, send: Send) -> None:
        """Samples, and hands on what is finished until the run ends."""

        def hand_on(rollouts: Sequence[Rollout]) -> None:
            if self._ended:
                raise Ended
            send(rollouts)

        with self._run.timeline.span("sample", draw.step):
            self._sample(self._run, draw, hand_on)


class Strict(Sequential):
    """All at once, within a step."""

    _thread: threading.Thread | None = None

    def begin(self) -> Arrivals:
        draw, arrivals = self._drawn(self._run.step)
        self._run.sampler.update(self._run.step)
        if self._run.config.rollout.is_elsewhere:
            thread = threading.Thread(target=self._carry, args=(draw, arrivals), name="sampler", daemon=True)
            thread.start()  # a signal may end this: what has not begun can't be joined
            self._thread = thread
        else:
            self._stream(draw, arrivals.send)
        return arrivals

    def close(self) -> None:
        super().close()
        if self._thread is not None:
            self._thread.join(END_S)

    def _carry(self, draw: Draw, arrivals: Arrivals) -> None:
        try:
            self._stream(draw, arrivals.send)
        except Ended:
            return
        except BaseException as error:  # carried to the thread that waits
            arrivals.fail(error)


class Async(Sequential):
    """All at once, over several steps. Samples of step t come from the weights after t − max_staleness steps or later.

    At most max_staleness + 1 steps are on their way at a time: a part that is slower than the others is waited for.
    """

    def __init__(self, run: Run, draw: Drawing, sample: Sampling) -> None:
        super().__init__(run, draw, sample)
        self._limit = run.config.train.max_staleness
        assert run.copied is not None, "prepare makes it"
        self._copied = run.copied
        self._weights = threading.Lock()
        self._next = run.step
        self._begun: dict[int, Arrivals] = {}
        self._jobs: SimpleQueue[tuple[Draw, Arrivals] | None] = SimpleQueue()
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._work, name="sampler", daemon=True)
        self._thread.start()

    def begin(self) -> Arrivals:
        last = min(self._run.step + self._limit, self._run.config.train.steps - 1)
        while self._next <= last:  # prompts are read here, by one thread
            draw, arrivals = self._drawn(self._next)
            self._begun[self._next] = arrivals
            self._jobs.put((draw, arrivals))
            self._next += 1
        return self._begun.pop(self._run.step)

    @contextlib.contextmanager
    def weights_move(self) -> Iterator[None]:
        with self._weights, super().weights_move():
            yield

    def close(self) -> None:
        super().close()
        self._copied.end()
        self._jobs.put(None)
        self._thread.join(END_S)

    def _work(self) -> None:
        torch.set_num_threads(self._num_threads)  # of each thread
        with self._copied.beside():
            while (job := self._job()) is not None:
                draw, arrivals = job
                try:
                    self._fresh(draw, arrivals)
                except Ended:
                    return
                except BaseException as error:  # carried to the thread that waits
                    arrivals.fail(error)
                    return

    def _job(self) -> tuple[Draw, Arrivals] | None:
        if not self._jobs.empty():
            return self._jobs.get()
        with self._run.timeline.span("waiting_for_learning", self._next):
            return self._jobs.get()

    def _take_over(self) -> None:
        """The engine gets the weights as they are now. What it does with them may take long, and learning goes on."""
        with self._weights:
            self._copied.take()
            version = self._run.step
        self._run.sampler.update(version)

    def _fresh(self, draw: Draw, arrivals: Arrivals) -> None:
        """Samples until nothing is older than allowed: an engine may have kept weights that it was to give up."""
        left = draw
        for _ in range(TRIES):
            self._take_over()
            old: list[int] = []

            def keep_fresh(rollouts: Sequence[Rollout], old: list[int] = old) -> None:
                stale = [r.uid for r in rollouts if age(r, draw.step) > self._limit]
                old += stale
                arrivals.send([r for r in rollouts if r.uid not in stale])

            self._stream(left, keep_fresh)
            if not old:
                return
            arrivals.dropped += len(old)
            left = replace(draw, own={uid: draw.own[uid] for uid in sorted(old)}, given=())
        raise RolloutError(
            f"sample {min(left.own)} is older than train.max_staleness {self._limit} steps, {TRIES} times: the engine "
            "doesn't take over new weights"
        )


SCHEDULES = {"sequential": Sequential, "strict": Strict, "async": Async}


def check(config: TrainConfig, strategy: Replicated, world: int) -> None:
    """Raises ValueError where weights can't be handed over while others learn."""
    if config.train.schedule != "async":
        return
    if strategy.collective_passes:
        raise ValueError(
            f"train.strategy: got {strategy.name} with train.schedule async, expected ddp or ddp_sharded: no process "
            "has whole weights to sample from while they learn"
        )
    if world > 1 and config.rollout.is_elsewhere:
        raise ValueError(
            f"train.schedule: got async with rollout.engine {config.rollout.engine} and {world} training processes, "
            "expected strict, or one process: servers that all of them sample from get new weights between steps"
        )


def age(rollout: Rollout, step: int) -> int:
    """Optimizer steps between the oldest weights that sampled a token of it and those that learn it in `step`."""
    if rollout.versions is None:
        return 0
    known = rollout.versions[rollout.versions >= 0]
    return step - int(known.min()) if len(known) else 0


@contextlib.contextmanager
def scheduled(run: Run, draw: Drawing, sample: Sampling) -> Iterator[Sequential]:
    """The schedule that train.schedule names, for as long as this is open."""
    schedule = SCHEDULES[run.config.train.schedule](run, draw, sample)
    try:
        yield schedule
    finally:
        schedule.close()
