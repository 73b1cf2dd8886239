"""Parts of the pipeline by themselves: how samples travel to their teachers and come back, and how
far ahead they are made."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tinymodels import tiny_model

from student_trainer.distributed import Distributed
from student_trainer.guards import StopRequested
from student_trainer.microbatch import InOrder
from student_trainer.packing import Packing
from student_trainer.parallel.base import Replicated
from student_trainer.parallel.fsdp2 import Fsdp2
from student_trainer.pipeline.arrivals import Arrivals
from student_trainer.pipeline.copied import Copied, Ended
from student_trainer.pipeline.feed import Feed, Width
from student_trainer.pipeline.schedule import Draw, age, check, scheduled
from student_trainer.pipeline.timeline import Timeline
from student_trainer.rollout.base import RolloutError
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.torch_sampler import TorchSampler
from student_trainer.student import Student
from student_trainer.types import Metrics, Prompt, Rollout, ScoredRollout
from teacher_api import causal_lm
from teacher_api.types import Scores

NOTHING = np.zeros(0, dtype=np.float32)
WAIT_S = 30.0


def rollout(uid: int, prompt: int = 0, tokens: int = 2, version: int = 0) -> Rollout:
    versions = np.full(tokens, version, dtype=np.int32)
    ids = np.ones(tokens, dtype=np.int32)
    return Rollout(uid, Prompt(prompt, np.zeros(1, dtype=np.int32)), ids, "eos", NOTHING, NOTHING, versions=versions)


def scored(rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
    found = []
    for r in rollouts:
        values = np.zeros(r.num_tokens, dtype=np.float32)
        positions = np.arange(1, 1 + r.num_tokens, dtype=np.int32)
        found.append(ScoredRollout(r, Scores(str(r.uid), positions, values, values)))
    return found


class Gate:
    """A teacher that answers requests when it is told to, in any order."""

    def __init__(self, width: int = 2, most: int = 3, tokens: int = 0) -> None:
        self.width, self.most, self.tokens = width, most, tokens
        self.asked: list[list[int]] = []
        self.changed = threading.Condition()
        self.open: set[int] = set()
        self.failure: Exception | None = None

    def route(self, one: Rollout) -> str:
        return ""

    def widths(self) -> dict[str, Width]:
        return {"": Width(self.width, self.most, self.tokens)}

    def ask(self, name: str, rollouts: Sequence[Rollout]) -> Iterator[tuple[ScoredRollout, Metrics]]:
        with self.changed:
            self.asked.append([r.uid for r in rollouts])
            self.changed.notify_all()
        still = list(rollouts)
        while still:
            with self.changed:
                assert self.changed.wait_for(lambda: self.failure or any(r.uid in self.open for r in still), WAIT_S)
                ready = [r for r in still if r.uid in self.open]
            if self.failure:
                raise self.failure
            for rollout in ready:
                still.remove(rollout)
                yield scored([rollout])[0], {"tokens": float(rollout.num_tokens)}

    def let(self, *uids: int) -> None:
        with self.changed:
            self.open |= set(uids)
            self.changed.notify_all()

    def until_asked(self, requests: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) >= requests, WAIT_S)


# -- there and back


def test_full_requests_leave_at_once_and_others_while_two_are_in_flight_together() -> None:
    gate, timeline = Gate(width=4, most=3), Timeline()
    feed = Feed(gate, timeline)
    arrivals = Arrivals(0, range(9), feed, timeline)
    arrivals.send([rollout(0)])
    gate.until_asked(1)
    arrivals.send([rollout(1)])
    gate.until_asked(2)
    arrivals.send([rollout(2), rollout(3)])
    time.sleep(0.2)
    assert gate.asked == [[0], [1]]
    arrivals.send([rollout(4), rollout(5)])
    gate.until_asked(3)
    assert gate.asked[2] == [2, 3, 4]
    arrivals.send([rollout(6), rollout(7), rollout(8)])
    gate.until_asked(4)
    assert gate.asked[3] == [5, 6, 7]
    assert len(gate.asked) == 4, "8 waits for 0 or 1"
    gate.let(1)
    gate.until_asked(5)
    gate.let(*range(9))
    assert [s.rollout.uid for s in arrivals.all()] == list(range(9))
    feed.close()
    assert gate.asked[4:] == [[8]]


def test_no_more_is_in_flight_than_twice_what_the_teacher_computes_at_once() -> None:
    """Of a teacher of 5 tokens: two samples of 2 on a prompt of 1, which counts once, or one on each of two prompts.
    What waits is overtaken by a smaller number that comes later."""
    gate, timeline = Gate(width=8, most=8, tokens=5), Timeline()
    feed = Feed(gate, timeline)
    arrivals = Arrivals(0, range(10), feed, timeline)
    arrivals.send(
        [rollout(uid, prompt) for uid, prompt in [(2, 1), (3, 1), (4, 1), (5, 1), (6, 2), (7, 3), (8, 3), (9, 3)]]
    )
    gate.until_asked(2)
    arrivals.send([rollout(0)])
    time.sleep(0.2)
    assert gate.asked == [[2, 3], [4, 5]]
    gate.let(2, 3)
    gate.until_asked(3)
    time.sleep(0.2)
    assert gate.asked[2:] == [[0, 6]]
    arrivals.send([rollout(1)])
    gate.let(*range(10))
    assert [s.rollout.uid for s in arrivals.all()] == list(range(10))
    feed.close()
    assert [uid for asked in gate.asked[3:] for uid in asked] == [1, 7, 8, 9]


def test_small_requests_are_in_flight_until_they_are_what_the_teacher_computes_at_once() -> None:
    """Of a teacher of 9 tokens: three samples of 3 make a request, and two such requests are twice that."""
    gate, timeline = Gate(width=8, most=2, tokens=9), Timeline()
    feed = Feed(gate, timeline)
    arrivals = Arrivals(0, range(8), feed, timeline)
    arrivals.send([rollout(uid, uid) for uid in range(8)])
    gate.until_asked(3)
    time.sleep(0.2)
    assert gate.asked == [[0, 1], [2, 3], [4, 5]], "6 tokens each: 18 of twice 9"
    gate.let(*range(8))
    assert [s.rollout.uid for s in arrivals.all()] == list(range(8))
    feed.close()


def test_samples_leave_at_once_and_those_that_wait_leave_together() -> None:
    """Two requests in flight, up to three samples in one; a prompt's samples before others."""
    gate, timeline = Gate(), Timeline()
    feed = Feed(gate, timeline)
    arrivals = Arrivals(0, range(8), feed, timeline)
    arrivals.send([rollout(0)])
    gate.until_asked(1)
    arrivals.send([rollout(1)])
    gate.until_asked(2)
    arrivals.send([rollout(2, 1), rollout(3, 2), rollout(4, 1), rollout(5, 2), rollout(6, 1), rollout(7, 1)])
    gate.let(*range(8))
    assert [s.rollout.uid for s in arrivals.all()] == list(range(8))
    feed.close()
    assert gate.asked[:2] == [[0], [1]]
    assert [2, 4, 6] in gate.asked
    assert arrivals.sums() == {"tokens": 16.0}


def test_a_micro_batch_is_learned_from_while_the_rest_of_a_request_is_scored() -> None:
    gate, timeline = Gate(width=1, most=4), Timeline()
    feed = Feed(gate, timeline)
    arrivals = Arrivals(0, range(4), feed, timeline)
    arrivals.send([rollout(uid) for uid in range(4)])
    gate.until_asked(1)
    batches = arrivals.micro_batches(InOrder(10**6, 2, Packing(packed=True)))
    gate.let(1)
    gate.let(0)
    assert [s.rollout.uid for s in next(batches)] == [0, 1]
    gate.let(2, 3)
    assert [[s.rollout.uid for s in batch] for batch in batches] == [[2, 3]]
    feed.close()
    assert sorted(uid for asked in gate.asked for uid in asked) == [0, 1, 2, 3]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 0, 5, 3, 1, 4]])
def test_micro_batches_come_in_order_of_the_samples_whatever_arrives_first(order: list[int]) -> None:
    gate, timeline = Gate(width=6, most=1), Timeline()
    feed = Feed(gate, timeline)
    arrivals = Arrivals(0, range(6), feed, timeline)
    arrivals.send([rollout(uid) for uid in order])
    gate.until_asked(6)
    opener = threading.Thread(target=lambda: [gate.let(uid) for uid in order])
    opener.start()
    found = [
        [s.rollout.uid for s in batch] for batch in arrivals.micro_batches(InOrder(10**6, 2, Packing(packed=True)))
    ]
    opener.join()
    feed.close()
    assert found == [[0, 1], [2, 3], [4, 5]]


def test_learning_begins_before_the_last_sample_is_finished() -> None:
    gate, timeline = Gate(width=6, most=1), Timeline()
    feed = Feed(gate, timeline)
    arrivals = Arrivals(0, range(4), feed, timeline)
    arrivals.send([rollout(1), rollout(0)])
    gate.let(*range(4))
    batches = arrivals.micro_batches(InOrder(10**6, 2, Packing(packed=True)))
    assert [s.rollout.uid for s in next(batches)] == [0, 1]  # 2 and 3 are not even sampled
    arrivals.send([rollout(2), rollout(3)])
    assert [s.rollout.uid for s in next(batches)] == [2, 3]
    feed.close()


def test_a_failure_of_one_request_ends_the_wait_with_its_cause() -> None:
    gate, timeline = Gate(), Timeline()
    feed = Feed(gate, timeline)
    arrivals = Arrivals(0, range(4), feed, timeline)
    gate.failure = ConnectionError("gone")
    arrivals.send([rollout(uid) for uid in range(4)])
    with pytest.raises(ConnectionError, match="gone"):
        arrivals.all()
    feed.close()


# -- sampling ahead


@pytest.mark.parametrize(
    ("strategy", "world", "elsewhere", "said"),
    [
        (Fsdp2, 2, False, "train.strategy: got fsdp2 with train.schedule async"),
        (Replicated, 2, True, "train.schedule: got async with rollout.engine far and 2 training processes"),
        (Replicated, 2, False, ""),
        (Replicated, 1, True, ""),
    ],
)
def test_weights_that_can_not_be_handed_over_meanwhile_are_refused(strategy, world, elsewhere, said) -> None:
    train = SimpleNamespace(schedule="async", max_staleness=1)
    config: Any = SimpleNamespace(train=train, rollout=SimpleNamespace(engine="far", is_elsewhere=elsewhere))
    place = strategy(Distributed(0, world, 0, torch.device("cpu")))
    with pytest.raises(ValueError, match=re.escape(said)) if said else contextlib.nullcontext():
        check(config, place, world)


def test_a_copy_keeps_the_weights_of_its_last_take_and_shares_what_is_frozen() -> None:
    model = tiny_model(seed=3)
    model.get_input_embeddings().weight.requires_grad_(False)
    student: Any = Student(model, None, causal_lm.split(model), torch.device("cpu"), (1,), 0, 0, False)
    copied = Copied(student)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0 if p.requires_grad else 0.0)
    own = dict(copied.student.model.named_parameters())
    assert all(torch.equal(own[name], before[name]) for name in before)
    assert not any(p.requires_grad for p in own.values())
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name, p in model.named_parameters() if p is own[name]} == frozen
    copied.take()
    assert all(torch.equal(own[name], p) for name, p in model.named_parameters())
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(copied.student.parts.trunk(ids), student.parts.trunk(ids))
        copied.student.model(ids)
        copied.end()
        with pytest.raises(Ended):
            copied.student.model(ids)
        model(ids)


def test_a_completion_that_is_being_sampled_ends_with_the_run() -> None:
    model = tiny_model(seed=3)
    copied = Copied(Student(model, None, causal_lm.split(model), torch.device("cpu"), (1,), 0, 0, False))
    own, config = copied.student.model, RolloutConfig(max_new_tokens=32)
    sampler = TorchSampler(own, eos_token_ids=[], pad_token_id=0, vocabulary_size=64, config=config, seed=0)
    assert sampler.strategy == "continuous"
    prompt = Prompt(0, np.arange(4, dtype=np.int32))
    assert sampler.sample([prompt], [0])[0].num_tokens == 32
    copied.end()
    with pytest.raises(Ended):
        sampler.sample([prompt], [0])


class Ahead:
    """An engine that says of each sample which version made it, and waits in between until it may go on."""

    def __init__(self, stuck: int | None = None) -> None:
        self.version = -1
        self.stuck = stuck  # the version that it keeps
        self.updates: list[int] = []
        self.sampled: list[int] = []

    def stream(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> Any:
        for prompt, uid in zip(prompts, uids, strict=True):
            self.sampled.append(uid)
            yield rollout(uid, prompt.index, version=self.version)

    def update(self, version: int) -> None:
        self.updates.append(version)
        self.version = version if self.stuck is None else min(version, self.stuck)


class Still:
    """Stands for a copy of weights where there are none."""

    def take(self) -> None: ...

    def end(self) -> None: ...

    def beside(self) -> Any:
        return contextlib.nullcontext()


def bare(engine: Ahead, gate: Gate, staleness: int = 1, steps: int = 6) -> Any:
    train = SimpleNamespace(schedule="async", max_staleness=staleness, steps=steps)
    config = SimpleNamespace(train=train, rollout=SimpleNamespace(is_elsewhere=True))
    return SimpleNamespace(config=config, scorer=gate, sampler=engine, timeline=Timeline(), copied=Still(), step=0)


def drawn(run: Any, step: int) -> Draw:
    return Draw(step, {2 * step + i: Prompt(i, np.zeros(1, dtype=np.int32)) for i in range(2)})


def sampled(run: Any, draw: Draw, send: Any) -> None:
    for one in run.sampler.stream(list(draw.own.values()), list(draw.own)):
        send([one])


@pytest.mark.parametrize("staleness", [1, 2])
def test_no_more_steps_are_on_their_way_than_the_staleness_allows(staleness: int) -> None:
    """However long the learner takes: nothing is sampled for a step before the weights it may come from are there."""
    engine, gate = Ahead(), Gate(width=4)
    gate.let(*range(100))
    run = bare(engine, gate, staleness)
    learned: list[int] = []
    with scheduled(run, drawn, sampled) as schedule:
        while run.step < 6:
            samples = schedule.begin()
            found = samples.all()
            assert [s.rollout.uid for s in found] == [2 * run.step, 2 * run.step + 1]
            assert all(0 <= age(s.rollout, run.step) <= staleness for s in found)
            assert max(engine.sampled) <= 2 * (run.step + staleness) + 1
            learned += [s.rollout.uid for s in found]
            with schedule.weights_move():
                run.step += 1
    assert learned == engine.sampled == list(range(12))
    assert samples.dropped == 0


def through(run: Any) -> tuple[list[int], int]:
    """Numbers of the samples that were learned from, and how many were made again."""
    uids, dropped = [], 0
    with scheduled(run, drawn, sampled) as schedule:
        while run.step < run.config.train.steps:
            samples = schedule.begin()
            uids += [s.rollout.uid for s in samples.all()]
            dropped += samples.dropped
            with schedule.weights_move():
                run.step += 1
    return uids, dropped


def test_an_engine_that_keeps_its_weights_is_found_out() -> None:
    engine, gate = Ahead(stuck=0), Gate(width=4)
    gate.let(*range(100))
    run = bare(engine, gate)
    with pytest.raises(RolloutError, match=r"sample 4 is older than train.max_staleness 1"):
        through(run)
    assert run.step == 2


def test_samples_that_come_back_too_old_are_made_again_and_counted() -> None:
    class Late(Ahead):
        """Samples with the first weights once more, although it has newer ones."""

        def update(self, version: int) -> None:
            super().update(version)
            self.version = 0 if len(self.updates) == 3 else version

    engine, gate = Late(), Gate(width=4)
    gate.let(*range(100))
    assert through(bare(engine, gate, steps=3)) == (list(range(6)), 2)
    assert engine.sampled == [0, 1, 2, 3, 4, 5, 4, 5]


def test_a_stop_while_the_sampling_thread_is_started_is_what_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run = bare(Ahead(), Gate(width=4))
    run.config.train.schedule = "strict"
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name == "sampler":
            raise StopRequested
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(StopRequested), scheduled(run, drawn, sampled) as schedule:
        schedule.begin()


def test_a_failure_while_sampling_ahead_reaches_the_learner() -> None:
    class Broken(Ahead):
        def stream(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> Any:
            if uids[0] >= 4:
                raise RolloutError("the weights are NaN")
            yield from super().stream(prompts, uids)

    engine, gate = Broken(), Gate(width=4)
    gate.let(*range(100))
    run = bare(engine, gate)
    with pytest.raises(RolloutError, match="NaN"):
        through(run)
    assert run.step == 2
    assert not [t for t in threading.enumerate() if t.name == "sampler" and t.is_alive()]
