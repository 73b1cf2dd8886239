"""Shares of the engine: by weight between tenants, equal between their experiments, whatever anybody sends. The
reference is arithmetic on what was served; sizes and arrivals are drawn."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_api.types import ScoreOptions
from teacher_server.backends.base import BatchPolicy, ScoreJob
from teacher_server.batching import Entry, tokens_to_compute
from teacher_server.caller import Caller
from teacher_server.fair import MAX_IDLE_EXPERIMENTS, FairQueue

pytestmark = pytest.mark.slow

ONE_BY_ONE = BatchPolicy(1, 1)


@pytest.fixture(scope="module")
def loop():
    made = asyncio.new_event_loop()
    yield made
    made.close()


def job(num_tokens: int, prompt_tokens: int = 0, key: bytes = b"") -> ScoreJob:
    positions = np.arange(1, num_tokens, dtype=np.int32)
    return ScoreJob("x", np.zeros(num_tokens, np.int32), prompt_tokens, positions, ScoreOptions(), None, key)


def put(queue: FairQueue, loop, caller: Caller, num_tokens: int, call_tokens: int = 0) -> Entry:
    entry = Entry(job(num_tokens), loop.create_future(), caller, call_tokens=call_tokens)
    queue.put(entry)
    return entry


def served(
    queue: FairQueue, loop, sizes, callers, tokens: int, policy: BatchPolicy = ONE_BY_ONE, depth: int = 8
) -> Counter[Caller]:
    """Tokens that each of `callers` gets of `tokens`, all of them having work all the time."""
    got: Counter[Caller] = Counter()
    for caller in callers:
        for _ in range(depth):
            put(queue, loop, caller, next(sizes))
    while sum(got.values()) < tokens:
        for entry in queue.take(policy):
            got[entry.caller] += entry.tokens
            put(queue, loop, entry.caller, next(sizes))
    return got


def drawn(seed: int, low: int, high: int):
    chance = random.Random(seed)
    while True:
        yield chance.randint(low, high)


@settings(deadline=None, max_examples=25)
@given(weights=st.lists(st.sampled_from([0.5, 1, 2, 4, 7]), min_size=2, max_size=6), seed=st.integers(0, 999))
def test_tenants_are_served_by_weight_whatever_the_sizes_of_their_sequences(loop, weights, seed):
    tenants = [Caller(str(n)) for n in range(len(weights))]
    queue = FairQueue(lambda name: weights[int(name)])
    got = served(queue, loop, drawn(seed, 2, 500), tenants, 400_000)
    for caller, weight in zip(tenants, weights, strict=True):
        # Start-time fair queueing: no further from its share than a largest sequence or so of each.
        share = sum(got.values()) * weight / sum(weights)
        assert abs(got[caller] - share) <= 500 * (len(weights) + 1) * max(weight, 1)


@pytest.mark.parametrize(("concurrent", "most"), [(1, 1), (3, 3), (1000, 8192 // 48 + 1)])
def test_a_turn_is_no_longer_than_what_the_engine_holds(loop, concurrent, most):
    """Of a huge call, beside small ones that wait: as many sequences, or as many tokens, as are in the engine."""
    queue, policy = FairQueue(), BatchPolicy(8192, 1, concurrent)
    huge, small = Caller("huge"), Caller("small")
    for _ in range(500):
        put(queue, loop, huge, 48, 500 * 48)
    queue.take(policy)  # in service
    for _ in range(180):
        put(queue, loop, small, 48, 48)
    order = [queue.take(policy)[0].caller for _ in range(300)]
    assert order.index(small) == most - 1, "after the turn that had begun"
    ahead = np.cumsum([1 if caller is huge else -1 for caller in order])
    assert ahead.max() <= most
    assert ahead.min() >= -most


def test_batches_of_many_keep_to_the_weights_too(loop):
    tenants = [Caller(name) for name in "abc"]
    queue = FairQueue({"a": 1.0, "b": 2.0, "c": 4.0}.__getitem__)
    got = served(queue, loop, drawn(1, 100, 140), tenants, 2_000_000, BatchPolicy(2048, 64), depth=32)
    shares = [got[caller] / sum(got.values()) for caller in tenants]
    assert shares == pytest.approx([1 / 7, 2 / 7, 4 / 7], rel=0.01)


def test_sequences_of_one_prompt_stay_together_among_many_experiments(loop):
    queue, policy = FairQueue(), BatchPolicy(400, 64, shares_prompts=True)
    for n in range(20):
        key = str(n).encode()
        for tokens in tokens_to_compute([job(100, 80, key)] * 8, shares_prompts=True):
            queue.put(
                Entry(job(100, 80, key), loop.create_future(), Caller("a", str(n)), tokens=tokens, call_tokens=240)
            )
    prompts = [len({entry.job.prompt_key for entry in queue.take(policy)}) for _ in range(5)]
    assert max(prompts) <= 3


def test_experiments_of_a_tenant_share_what_is_its_and_take_nothing_from_others(loop):
    many, alone = [Caller("a", str(n)) for n in range(9)], Caller("b")
    got = served(FairQueue(), loop, drawn(2, 50, 150), [*many, alone], 500_000)
    assert got[alone] == pytest.approx(250_000, rel=0.01)
    assert [got[caller] for caller in many] == pytest.approx([250_000 / 9] * 9, rel=0.02)


def test_who_comes_late_is_next_and_has_saved_nothing_up(loop):
    queue, greedy, late = FairQueue(), Caller("greedy"), Caller("late")
    for _ in range(2000):
        put(queue, loop, greedy, 100)
    for _ in range(1000):
        queue.take(ONE_BY_ONE)
    for _ in range(200):
        put(queue, loop, late, 100)
    first = [queue.take(ONE_BY_ONE)[0].caller for _ in range(200)]
    assert late in first[:2]
    assert 99 <= first.count(late) <= 101


def test_who_uses_less_than_its_share_goes_alone_and_who_had_its_turn_does_not(loop):
    queue, wide = FairQueue(), BatchPolicy(1000, 64)
    crowd = [Caller("many", f"experiment-{n}") for n in range(8)]
    for caller in crowd:
        put(queue, loop, caller, 100)
    assert len(queue.take(wide)) == 8
    for caller in crowd * 4:
        put(queue, loop, caller, 100)
    queue.take(wide)
    queue.take(wide)
    small = Entry(job(100), loop.create_future(), Caller("few"))
    assert queue.put(small), "the others have had 2,000"
    assert queue.take(wide) == [small], "though there is company of its length"
    again = Entry(job(100), loop.create_future(), Caller("few"))
    assert not queue.put(again), "it comes back before the others had as much"
    assert len(queue.take(wide)) > 1


def test_interactive_goes_before_its_own_tenants_bulk_and_before_nobody_elses(loop):
    queue = FairQueue()
    urgent, bulk, other = Caller("a", "eval", priority="interactive"), Caller("a", "train"), Caller("b")
    for caller in (bulk, other, urgent):
        for _ in range(10):
            put(queue, loop, caller, 100)
    order = [queue.take(ONE_BY_ONE)[0].caller for _ in range(30)]
    assert [caller for caller in order if caller.tenant == "a"] == [urgent] * 10 + [bulk] * 10
    assert order[:20].count(other) == 10


def test_a_small_call_overtakes_a_huge_one_and_only_until_they_add_up_to_it(loop):
    queue, caller = FairQueue(), Caller("a")
    huge = [put(queue, loop, caller, 100, call_tokens=1000) for _ in range(10)]
    small = put(queue, loop, caller, 100)
    assert queue.take(ONE_BY_ONE) == [small]
    overtaken = 0
    while True:
        put(queue, loop, caller, 100)
        if queue.take(ONE_BY_ONE)[0] in huge:
            break
        overtaken += 100
    assert overtaken <= 1000


def test_cancelled_work_costs_nothing(loop):
    queue, leaving, other = FairQueue(), Caller("a"), Caller("b")
    gone = [put(queue, loop, leaving, 500) for _ in range(50)]
    for _ in range(20):
        put(queue, loop, other, 100)
    for entry in gone:
        queue.discard(entry)
    assert queue.tokens_of() == {"b": 2000}
    for _ in range(20):
        put(queue, loop, leaving, 100)
    assert [queue.take(ONE_BY_ONE)[0].caller for _ in range(20)].count(leaving) in (10, 11)


def test_what_was_not_computed_after_all_is_not_charged(loop):
    queue, cached, other = FairQueue(), Caller("a"), Caller("b")
    got: Counter[Caller] = Counter()
    for caller in (cached, other):
        for _ in range(600):
            put(queue, loop, caller, 100)
    for _ in range(900):
        (entry,) = queue.take(ONE_BY_ONE)
        computed = 50 if entry.caller == cached else 100
        queue.settle(entry, computed)
        got[entry.caller] += computed
    assert got[cached] == pytest.approx(got[other], rel=0.01)


def test_names_made_up_by_a_caller_do_not_fill_the_memory(loop):
    queue = FairQueue()
    put(queue, loop, Caller("a", "stays", priority="bulk"), 10**6, call_tokens=10**9)
    for n in range(5 * MAX_IDLE_EXPERIMENTS):
        put(queue, loop, Caller("a", f"made-up-{n}"), 2)
        queue.take(ONE_BY_ONE)
    assert queue.num_remembered <= MAX_IDLE_EXPERIMENTS + 4


def test_a_prompt_that_is_computed_once_counts_once_per_call():
    jobs = [job(30, 20, b"p"), job(25, 20, b"p"), job(30, 20, b"q"), job(9), job(9)]
    assert tokens_to_compute(jobs, shares_prompts=True) == [30, 5, 30, 9, 9]
    assert tokens_to_compute(jobs, shares_prompts=False) == [30, 25, 30, 9, 9]
