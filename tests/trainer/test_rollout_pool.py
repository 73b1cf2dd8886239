"""Which server samples what, and faults of servers: against fakes whose tokens say which weights made them."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fakerollouts import FakeLink, FakeServer, Fleet

from student_trainer.rollout.base import RolloutError, RolloutGone
from student_trainer.rollout.servers.pool import Batch, Job, Pool, Snapshot
from student_trainer.rollout.servers.remote import Info
from student_trainer.rollout.transfer import Packed
from student_trainer.rollout.vllm_side.request import Draws, Record, Weights

pytestmark = pytest.mark.slow

URLS = ("http://a:1", "http://b:2", "http://c:3")
TEXT = np.arange(4, dtype=np.int32)


def snapshot(seed: int = 0) -> Snapshot:
    packed = Packed.of([("w", torch.full((3,), float(seed)))])

    def compare(mine: Any, theirs: Any, url: str) -> float:
        gap = float(np.abs(mine - theirs).max())
        if gap > 0.002:
            raise RolloutError(f"{url} is {gap:.3g} off")
        return gap

    return Snapshot(packed, TEXT, np.full(3, -1.0, dtype=np.float32), compare)


def jobs(prompts: int, members: int = 1, new_tokens: int = 8, first: int = 0) -> list[list[Job]]:
    groups = []
    for p in range(prompts):
        uids = range(first + p * members, first + (p + 1) * members)
        draws = [Draws(seed=0, uid=uid, max_new_tokens=new_tokens, vocabulary_size=120) for uid in uids]
        groups.append([Job(d.uid - first, np.array([p, p + 1], dtype=np.int32), d) for d in draws])
    return groups


def collect(batch: Batch, count: int, timeout_s: float = 120) -> dict[int, Record]:
    """Every result once."""
    found: dict[int, Record] = {}
    for _ in range(count):
        result = batch.results.get(timeout=timeout_s)
        if isinstance(result, Exception):
            raise result
        assert result[0] not in found
        found[result[0]] = result[1]
    assert batch.results.empty()
    return found


def until(holds: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Setting:
    """A pool over fakes."""

    def __init__(self, *servers: FakeServer, main: bool = True, hold: threading.Event | None = None, **options: Any):
        self.fleet = Fleet(*servers)
        settings = {"most_running": 100, "timeout_s": 20.0, "attempt_timeout_s": 10.0, "api_key": "", **options}
        settings.setdefault("check", lambda url, info: None)

        def link(url: str, info: Info) -> FakeLink:
            return FakeLink(url, info, hold)

        urls = [server.url for server in servers]
        self.pool = Pool(urls, make_link=link if main else None, transport=self.fleet, **settings)

    def sample(self, groups: list[list[Job]], keep: int = 0) -> dict[int, Record]:
        return collect(self.pool.sample(groups, [1], keep), sum(map(len, groups)))


@pytest.fixture
def settings() -> Iterator[Any]:
    made: list[Setting] = []

    def make(*servers: FakeServer, **options: Any) -> Setting:
        made.append(Setting(*servers, **options))
        return made[-1]

    yield make
    for setting in made:
        setting.pool.close()


def servers(count: int, **options: Any) -> list[FakeServer]:
    return [FakeServer(url, **options) for url in URLS[:count]]


def test_samples_are_of_the_weights_in_use_after_each_update(settings: Any) -> None:
    fakes = servers(2)
    pool = settings(*fakes).pool
    pool.greet(5)
    for version in (0, 1, 7):
        given = snapshot(version)
        assert sorted(pool.use(Weights("run", version), given)) == sorted(URLS[:2])
        assert {fake.holds for fake in fakes} == {given.packed.digest}
        found = collect(pool.sample(jobs(6, first=version * 100), [1], 0), 6)
        assert sorted(found) == list(range(6))
        assert {int(t) for record in found.values() for t in record.token_ids} == {version}
        assert {int(v) for record in found.values() for v in record.versions} == {version}
    assert [fake.taken for fake in fakes] == [3, 3]
    assert pool.handed_over == 6
    assert pool.retried == 0


def test_a_link_is_opened_once_for_each_start_of_a_server(settings: Any) -> None:
    (fake,) = servers(1)
    pool = settings(fake).pool
    before = FakeLink.made[fake.url]
    pool.greet(5)
    for version in range(3):
        pool.use(Weights("run", version), snapshot())
    assert FakeLink.made[fake.url] - before == 1
    fake.start()
    pool.use(Weights("run", 3), snapshot())
    assert FakeLink.made[fake.url] - before == 2


def test_groups_stay_together_and_servers_get_alike_much(settings: Any) -> None:
    fakes = servers(3, pause_s=0.02)
    setting = settings(*fakes)
    setting.pool.use(Weights("run", 0), snapshot())
    setting.sample(jobs(12, members=4))
    seen = [Counter(fake.prompts) for fake in fakes]
    assert sum(seen, Counter()) == Counter({(p, p + 1): 4 for p in range(12)})
    assert not seen[0].keys() & seen[1].keys() | seen[1].keys() & seen[2].keys() | seen[0].keys() & seen[2].keys()
    assert [sum(c.values()) for c in seen] == [16, 16, 16]


def test_long_work_counts_for_more_than_short(settings: Any) -> None:
    fakes = servers(2, pause_s=0.05)
    setting = settings(*fakes)
    setting.pool.use(Weights("run", 0), snapshot())
    setting.sample([*jobs(1, new_tokens=800), *jobs(8, new_tokens=98, first=1)[0:8]][:1] + jobs(8, new_tokens=98)[1:])
    assert sorted(len(fake.sampled) for fake in fakes) == [1, 7]


def test_no_server_gets_more_at_once_than_it_should(settings: Any) -> None:
    fakes = servers(2, pause_s=0.01)
    setting = settings(*fakes, most_running=3)
    setting.pool.use(Weights("run", 0), snapshot())
    assert len(setting.sample(jobs(40))) == 40
    assert [fake.most_running for fake in fakes] == [3, 3]


def test_a_completion_is_there_as_soon_as_it_is_finished(settings: Any) -> None:
    quick, slow = servers(2)
    setting = settings(quick, slow)
    setting.pool.use(Weights("run", 0), snapshot())
    slow.gate = asyncio.Event()
    batch = setting.pool.sample(jobs(2), [1], 0)
    first = batch.results.get(timeout=5)
    assert not isinstance(first, Exception)
    assert batch.results.empty()
    setting.pool._loop.call_soon_threadsafe(slow.gate.set)
    collect(batch, 1)


@pytest.mark.parametrize("fault", ["reset", 500, 503, lambda a: {}, lambda a: {**a, "versions": a["versions"] + 1}])
def test_what_one_server_fails_at_is_sampled_again_once(settings: Any, fault: Any) -> None:
    """A broken connection, an error, an answer that can't be read, tokens of other weights."""
    fakes = servers(2)
    fakes[0].faults = [fault]
    setting = settings(*fakes)
    setting.pool.use(Weights("run", 4), snapshot())
    found = setting.sample(jobs(10))
    assert sorted(found) == list(range(10))
    assert {int(t) for record in found.values() for t in record.token_ids} == {4}
    assert setting.pool.retried >= 1


def test_a_server_that_hangs_is_given_up_after_the_attempts_deadline(settings: Any) -> None:
    fakes = servers(2)
    fakes[0].faults = ["hang"]
    setting = settings(*fakes, attempt_timeout_s=0.3)
    setting.pool.use(Weights("run", 0), snapshot())
    began = time.monotonic()
    assert sorted(setting.sample(jobs(6))) == list(range(6))
    assert time.monotonic() - began < 5
    assert setting.pool.retried == 1


def test_one_that_comes_back_with_other_weights_gets_the_current_ones_before_it_samples(settings: Any) -> None:
    fakes = servers(2)
    setting = settings(*fakes)
    setting.pool.use(Weights("run", 2), snapshot())
    fakes[0].kill()
    assert len(setting.sample(jobs(4))) == 4
    fakes[0].start()  # its supervisor, with whatever it loads at first
    until(lambda: setting.pool.num_usable == 2)
    assert (fakes[0].session, fakes[0].version, fakes[0].taken) == ("run", 2, 2)
    found = setting.sample(jobs(10, first=100))
    assert {int(t) for record in found.values() for t in record.token_ids} == {2}
    assert any(uid >= 100 for uid in fakes[0].sampled)


def test_one_that_was_started_anew_unnoticed_is_found_out_by_the_weights_it_has(settings: Any) -> None:
    (fake,) = servers(1)
    setting = settings(fake)
    setting.pool.use(Weights("run", 1), snapshot())
    fake.start()
    found = setting.sample(jobs(5))
    assert {int(t) for record in found.values() for t in record.token_ids} == {1}
    assert fake.taken == 2


def test_weights_of_the_same_number_of_another_run_are_other_weights(settings: Any) -> None:
    (fake,) = servers(1)
    setting = settings(fake)
    fake.session, fake.version = "an earlier run", 3
    setting.pool.use(Weights("run", 3), snapshot())
    assert (fake.session, fake.taken) == ("run", 1)


def test_killed_again_and_again_nothing_is_lost_or_used_twice(settings: Any) -> None:
    fakes = servers(3, pause_s=0.004)
    setting = settings(*fakes)
    stop = threading.Event()

    def supervise() -> None:
        turn = 0
        while not stop.wait(0.03):
            fakes[turn % 3].kill()
            stop.wait(0.02)
            fakes[turn % 3].start()
            turn += 1

    thread = threading.Thread(target=supervise)
    thread.start()
    try:
        for version in range(8):
            setting.pool.use(Weights("run", version), snapshot(version))
            found = setting.sample(jobs(40, members=2, first=version * 1000))
            assert sorted(found) == list(range(80))
            assert {int(t) for record in found.values() for t in record.token_ids} == {version}
            assert [len(found[n].token_ids) for n in range(80)] == [1 + (version * 1000 + n) % 8 for n in range(80)]
    finally:
        stop.set()
        thread.join()
    assert setting.pool.retried > 0


def test_all_gone_past_the_budget_says_where_and_for_how_long(settings: Any) -> None:
    fakes = servers(2)
    setting = settings(*fakes, timeout_s=0.6)
    setting.pool.use(Weights("run", 0), snapshot())
    for fake in fakes:
        fake.kill()
    with pytest.raises(RolloutGone, match=r"no rollout server at http://a:1, http://b:2 for 1 s \(.*refused"):
        setting.sample(jobs(3))
    with pytest.raises(RolloutGone):
        setting.pool.use(Weights("run", 1), snapshot())


def test_none_there_at_the_start(settings: Any) -> None:
    (fake,) = servers(1)
    fake.kill()
    with pytest.raises(RolloutGone, match="http://a:1"):
        settings(fake).pool.greet(0.3)


def test_a_server_that_is_late_joins(settings: Any) -> None:
    fakes = servers(2)
    fakes[1].kill()
    setting = settings(*fakes)
    setting.pool.greet(5)
    assert setting.pool.use(Weights("run", 0), snapshot()) == [URLS[0]]
    fakes[1].start()
    until(lambda: setting.pool.num_usable == 2)
    assert fakes[1].version == 0


@pytest.mark.parametrize("status", [400, 422])
def test_a_refusal_is_not_tried_elsewhere(settings: Any, status: int) -> None:
    fakes = servers(2)
    fakes[0].faults, fakes[1].faults = [status], [status]
    setting = settings(*fakes)
    setting.pool.use(Weights("run", 0), snapshot())
    with pytest.raises(ValueError, match=rf"answered {status} to /sample: a fault"):
        setting.sample(jobs(1))
    assert setting.fleet.calls["/v1/rollout/sample"] == 1


def test_the_key_is_sent_and_a_wrong_one_is_said_at_once(settings: Any) -> None:
    (fake,) = servers(1, key="sesame")
    setting = settings(fake, api_key="sesame")
    setting.pool.use(Weights("run", 0), snapshot())
    assert len(setting.sample(jobs(2))) == 2
    with pytest.raises(ValueError, match="answered 401") as refused:
        settings(fake, api_key="mellon").pool.greet(5)
    assert "mellon" not in str(refused.value)


def test_a_server_that_can_not_sample_for_this_run_ends_it(settings: Any) -> None:
    def check(url: str, info: Info) -> None:
        raise ValueError(f"{url}: {info.logit_width} columns")

    with pytest.raises(ValueError, match="http://a:1: 128 columns"):
        settings(*servers(1), check=check).pool.greet(5)


def test_a_server_of_another_protocol_is_refused(settings: Any) -> None:
    with pytest.raises(ValueError, match="speaks protocol 9, expected 1"):
        settings(*servers(1, info={"protocol": 9})).pool.greet(5)


def test_a_server_that_computes_something_else_ends_the_run(settings: Any) -> None:
    with pytest.raises(RolloutError, match=r"http://b:2 is 0.01 off"):
        settings(FakeServer(URLS[0]), FakeServer(URLS[1], gap=0.01)).pool.use(Weights("run", 0), snapshot())
    setting = settings(FakeServer(URLS[0], gap=0.001))
    setting.pool.use(Weights("run", 0), snapshot())
    assert setting.pool.gap == pytest.approx(0.001, rel=1e-3)


def test_a_server_that_got_other_bytes_is_not_used(settings: Any) -> None:
    good, bad = FakeServer(URLS[0]), FakeServer(URLS[1], wrong_bytes=True)
    setting = settings(good, bad)
    setting.pool.greet(5)
    assert setting.pool.use(Weights("run", 0), snapshot()) == [URLS[0]]
    setting.sample(jobs(6))
    assert not bad.sampled


def test_ranks_that_hand_nothing_over_use_what_rank_0_did(settings: Any) -> None:
    fakes = servers(2)
    main = settings(*fakes)
    other = settings(*fakes, main=False)
    usable = main.pool.use(Weights("run", 5), snapshot())
    other.pool.adopt(Weights("run", 5), usable)
    found = other.sample(jobs(8))
    assert {int(t) for record in found.values() for t in record.token_ids} == {5}
    fakes[0].start()  # it waits for rank 0 to hand the weights over again
    assert len(other.sample(jobs(8, first=50))) == 8
    main.sample(jobs(4, first=90))
    until(lambda: other.pool.num_usable == 2)


def test_a_batch_that_is_given_up_leaves_nothing_running(settings: Any) -> None:
    (fake,) = servers(1, pause_s=5.0)
    setting = settings(fake)
    setting.pool.use(Weights("run", 0), snapshot())
    batch = setting.pool.sample(jobs(3), [1], 0)
    until(lambda: fake.running == 3)
    batch.cancel()
    until(lambda: not fake.running)
    fake.pause_s = 0.0
    assert sorted(setting.sample(jobs(3, first=10))) == [0, 1, 2]


def test_a_server_that_got_other_bytes_is_not_used_later_either(settings: Any) -> None:
    """It says that it has the weights."""
    good, bad = FakeServer(URLS[0]), FakeServer(URLS[1], wrong_bytes=True)
    setting = settings(good, bad)
    setting.pool.greet(5)
    setting.pool.use(Weights("run", 0), snapshot())
    until(lambda: bad.taken >= 3)
    assert setting.pool.num_usable == 1
    setting.sample(jobs(6))
    assert not bad.sampled


def test_a_server_that_failed_after_it_had_the_weights_is_checked_before_it_samples(settings: Any) -> None:
    good, bad = FakeServer(URLS[0]), FakeServer(URLS[1], gap=0.5)
    answer, asked = bad.answer, Counter[str]()

    async def lost_once(path: str, body: dict[str, Any], key: str) -> Any:
        asked[path] += 1
        if path.endswith("/logprobs") and asked[path] == 1:
            raise httpx.ReadError("connection reset by peer")
        return await answer(path, body, key)

    bad.answer = lost_once  # type: ignore[method-assign]
    setting = settings(good, bad)
    setting.pool.greet(5)
    setting.pool.use(Weights("run", 0), snapshot())
    until(lambda: setting.pool._fatal is not None)
    with pytest.raises(RolloutError, match=r"http://b:2 is 0.5 off"):
        setting.sample(jobs(6))
    assert not bad.sampled


def test_a_transport_that_fails_by_a_runtime_error_is_tried_again(settings: Any) -> None:
    """As torch's stores and NCCL fail."""
    (fake,) = servers(1)
    setting = settings(fake, timeout_s=5.0)
    faults = ["the server socket has failed to listen"]

    class Failing(FakeLink):
        def open(self, connect: Any) -> None:
            if faults:
                raise RuntimeError(faults.pop())

    setting.pool._make_link = Failing
    assert setting.pool.use(Weights("run", 0), snapshot()) == [fake.url]


def test_a_transport_that_goes_on_failing_is_the_cause_that_is_told(settings: Any) -> None:
    class Failing(FakeLink):
        def open(self, connect: Any) -> None:
            raise RuntimeError("the server socket has failed to listen")

    setting = settings(*servers(1), timeout_s=0.5)
    setting.pool._make_link = Failing
    with pytest.raises(RolloutGone, match="http://a:1: the server socket has failed to listen"):
        setting.pool.use(Weights("run", 0), snapshot())


@pytest.mark.parametrize(
    ("says", "told"),
    [
        (lambda: {"protocol": 1}, "http://a:1 does not say its 'session' at /info"),
        (lambda: "an index page", "http://a:1 answers '\"an index page\"' to /info, expected a rollout server's JSON"),
    ],
)
def test_what_is_no_rollout_server_is_refused_with_its_address(settings: Any, says: Any, told: str) -> None:
    (fake,) = servers(1)

    async def answer(path: str, body: dict[str, Any], key: str) -> httpx.Response:
        return httpx.Response(200, json=says())

    fake.answer = answer  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=re.escape(told)):
        settings(fake).pool.greet(2)


def test_servers_that_answer_every_look_and_fail_every_completion_are_given_up(settings: Any) -> None:
    (fake,) = servers(1, faults=[500] * 10_000)
    setting = settings(fake, timeout_s=0.5)
    setting.pool.use(Weights("run", 0), snapshot())
    with pytest.raises(RolloutGone, match=r"http://a:1 for 1 s .*500 a fault"):
        collect(setting.pool.sample(jobs(1), [1], 0), 1, timeout_s=10)
    assert len(fake.prompts) < 20  # not asked again and again without a pause


def test_the_budget_of_failures_begins_anew_with_each_completion_that_works(settings: Any) -> None:
    faults: list[Any] = [500, 500, 500, 500, None]  # within 0.8 s of the first
    (fake,) = servers(1, faults=3 * faults)
    setting = settings(fake, timeout_s=1.0)
    setting.pool.use(Weights("run", 0), snapshot())
    for first in range(3):
        assert len(setting.sample(jobs(1, first=first))) == 1
    assert setting.pool.retried == 12


def test_one_that_is_slow_to_take_the_weights_does_not_end_a_run_that_others_sample_for(settings: Any) -> None:
    hold, fakes = threading.Event(), servers(2)
    setting = settings(*fakes, timeout_s=0.5)
    setting.pool._make_link = lambda url, info: FakeLink(url, info, hold if url == URLS[1] else None)
    setting.pool.greet(5)
    try:
        assert setting.pool.use(Weights("run", 0), snapshot()) == [URLS[0]]
        assert len(setting.sample(jobs(4))) == 4
    finally:
        hold.set()


def test_one_that_answers_is_enough_at_the_start(settings: Any) -> None:
    fakes = servers(2)

    async def slow(path: str, body: dict[str, Any], key: str) -> httpx.Response:
        await asyncio.sleep(1.0)
        raise httpx.ConnectError("connection refused")

    fakes[1].answer = slow  # type: ignore[method-assign]
    setting = settings(*fakes)
    setting.pool.greet(0.3)
    assert setting.pool.use(Weights("run", 0), snapshot()) == [URLS[0]]


def test_who_waits_for_a_sample_hears_that_the_pool_has_ended(settings: Any) -> None:
    (fake,) = servers(1, pause_s=60.0)
    setting = settings(fake)
    setting.pool.use(Weights("run", 0), snapshot())
    batch = setting.pool.sample(jobs(2), [1], 0)
    setting.pool.close()
    assert isinstance(batch.results.get(timeout=5), RolloutError)
