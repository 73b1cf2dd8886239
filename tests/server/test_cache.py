"""What is asked again is answered with the same bits and without the engine; what is asked twice at a time is computed
once, and whoever leaves leaves alone; only tokens to be computed count against the queue."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cachebench import A, B, Bench, assert_same_bits, job, run, settled

from teacher_api.errors import BackendFailed, DeadlineExceeded
from teacher_api.types import Scores
from teacher_server import cache as cache_module
from teacher_server.admission import Cost
from teacher_server.backends.fake import FakeBackend
from teacher_server.cache_config import CacheConfig
from teacher_server.cache_disk import FILE
from teacher_server.caller import Caller


def test_the_same_question_is_answered_from_memory_with_the_same_bits():
    async def scenario(bench: Bench) -> None:
        first = await bench.ask(job("one"))
        again = await bench.ask(job("two"))
        assert_same_bits(again, first)
        assert (first.computed_tokens, first.cached_tokens) == (4, 0)
        assert (again.id, again.computed_tokens, again.cached_tokens) == ("two", 0, 4)
        assert bench.backend.scored_ids == ["one"]
        tally = bench.cache.tallies["a"]
        assert (dict(tally.sequences), dict(tally.tokens)) == ({"engine": 1, "memory": 1}, {"engine": 4, "memory": 4})
        assert tally.hit_rate == 0.5
        assert bench.spared == [("a", 4)]

    run(scenario)


@pytest.mark.parametrize("change", [{"top_k": 4}, {"temperature": 2.0}, {"value_type": "float16"}, {"rank": False}])
def test_another_option_is_computed(change: dict[str, Any]):
    async def scenario(bench: Bench) -> None:
        await bench.ask(job("one"))
        other = await bench.ask(job("two", **change))
        assert bench.backend.scored_ids == ["one", "two"]
        (alone,) = await FakeBackend().score([job("two", **change)])
        assert_same_bits(other, alone)

    run(scenario)


def test_another_teacher_is_computed():
    async def scenario(bench: Bench) -> None:
        await bench.ask(job("base"))
        await bench.ask(replace(job("adapter"), teacher="math"))
        bench.fingerprint = "reloaded"
        await bench.ask(job("other weights"))
        assert bench.computed == 3

    run(scenario)


@pytest.mark.parametrize(("share", "computed"), [("tenant", 2), ("server", 1)])
def test_tenants_share_only_where_the_server_says_so(share: str, computed: int):
    async def scenario(bench: Bench) -> None:
        first = await bench.ask(job("one"), A)
        second = await bench.ask(job("two"), B)
        assert_same_bits(second, first)
        bench.backend.gate.clear()
        waiting = [await bench.begin(job(name, 5, 6, 7), caller) for name, caller in (("three", A), ("four", B))]
        await settled()
        bench.backend.gate.set()
        await asyncio.gather(*waiting)
        assert bench.computed == 2 * computed
        assert bench.cache.tallies["b"].hit_rate == (0.0 if share == "tenant" else 1.0)

    run(scenario, share=share)


def test_switched_off_everything_is_computed():
    async def scenario(bench: Bench) -> None:
        bench.backend.gate.clear()
        both = [await bench.begin(job("one")), await bench.begin(job("two"))]
        await settled()
        bench.backend.gate.set()
        await asyncio.gather(*both)
        await bench.ask(job("three"))
        assert bench.backend.scored_ids == ["one", "two", "three"]
        assert len(bench.cache.memory) == 0

    run(scenario, enabled=False)


def test_failures_are_not_kept():
    async def scenario(bench: Bench) -> None:
        bench.backend.fails = 1
        assert isinstance(await bench.ask(job("one")), BackendFailed)
        assert isinstance(await bench.ask(job("two")), Scores)
        assert bench.backend.scored_ids == ["two"]

    run(scenario)


# ---- in flight -------------------------------------------------------------------------------------------------------


def test_duplicates_in_flight_are_computed_once_and_bitwise_equal():
    async def scenario(bench: Bench) -> None:
        bench.backend.gate.clear()
        waiting = [await bench.begin(job(f"c{n}")) for n in range(20)]
        await settled()
        bench.backend.gate.set()
        answers = await asyncio.gather(*waiting)
        assert bench.backend.scored_ids == ["c0"]
        (alone,) = await FakeBackend().score([job("x")])
        for n, answer in enumerate(answers):
            assert answer.id == f"c{n}"
            assert_same_bits(answer, alone)
        assert sum(answer.computed_tokens for answer in answers) == 4
        assert bench.cache.tallies["a"].sequences == {"engine": 1, "flight": 19}

    run(scenario, memory_bytes=0)


def test_a_failure_in_flight_is_each_callers_own():
    """An error gets the request id of whoever it is sent to."""

    async def scenario(bench: Bench) -> None:
        bench.backend.fails = 1
        bench.backend.gate.clear()
        waiting = [await bench.begin(job(f"c{n}")) for n in range(3)]
        await settled()
        bench.backend.gate.set()
        errors = await asyncio.gather(*waiting)
        assert [(type(error), error.message) for error in errors] == [(BackendFailed, "injected")] * 3
        assert len({id(error) for error in errors}) == 3

    run(scenario)


@pytest.mark.parametrize("leaver", [0, 1, 2])
@pytest.mark.parametrize("running", [False, True])
def test_a_caller_that_leaves_takes_nobodys_answer_away(leaver: int, running: bool):
    async def scenario(bench: Bench) -> None:
        bench.backend.gate.clear()
        if not running:
            blocker = await bench.begin(job("blocker", 9, 9))
        waiting = [await bench.begin(job(f"c{n}")) for n in range(3)]
        await settled()
        waiting.pop(leaver).cancel()
        await settled()
        bench.backend.gate.set()
        answers = await asyncio.gather(*waiting)
        assert all(isinstance(answer, Scores) for answer in answers)
        assert bench.computed == (1 if running else 2)
        assert sorted(answer.computed_tokens for answer in answers) == [0, 4], "one of those who stayed pays"
        assert [answer.id for answer in answers] == [f"c{n}" for n in range(3) if n != leaver]
        if not running:
            await blocker

    run(scenario)


def test_the_last_caller_that_leaves_takes_the_work_out_of_the_queue():
    async def scenario(bench: Bench) -> None:
        bench.backend.gate.clear()
        blocker = await bench.begin(job("blocker", 9, 9))
        waiting = [await bench.begin(job(f"c{n}")) for n in range(3)]
        await settled()
        for future in waiting:
            future.cancel()
        await settled()
        assert len(bench.scheduler._queue) == 0
        assert len(bench.cache._flights) == 1
        bench.backend.gate.set()
        await blocker
        assert bench.backend.scored_ids == ["blocker"]
        await bench.ask(job("later"))
        assert bench.backend.scored_ids == ["blocker", "later"]

    run(scenario)


@pytest.mark.parametrize("impatient", [0, 1])
def test_each_caller_has_its_own_deadline(impatient: int):
    async def scenario(bench: Bench) -> None:
        bench.backend.gate.clear()
        blocker = await bench.begin(job("blocker", 9, 9))
        timeouts = [60.0, 60.0]
        timeouts[impatient] = 0.05
        waiting = [await bench.begin(job(f"c{n}"), A, timeout_s) for n, timeout_s in enumerate(timeouts)]
        began = asyncio.get_running_loop().time()
        assert isinstance(await waiting[impatient], DeadlineExceeded)
        assert asyncio.get_running_loop().time() - began < 1
        assert not waiting[1 - impatient].done()
        bench.backend.gate.set()
        assert isinstance(await waiting[1 - impatient], Scores)
        await blocker
        assert bench.computed == 2

    run(scenario)


# ---- what counts against the queue -----------------------------------------------------------------------------------


def test_only_tokens_to_be_computed_count():
    async def scenario(bench: Bench) -> None:
        await bench.ask(job("kept"))
        bench.backend.gate.clear()
        flying = await bench.begin(job("flying", 5, 6, 7))
        asked = [
            job("kept"),
            job("flying", 5, 6, 7),
            job("new", 1, 1, 1, 1, 1),
            job("new again", 1, 1, 1, 1, 1),
            job("other", 8, 8),
        ]
        lookups = await bench.cache.look(asked, A)
        assert [lookup.source for lookup in lookups] == ["memory", "flight", "engine", "flight", "engine"]
        assert [lookup.tokens for lookup in lookups] == [0, 0, 5, 0, 2]
        bench.backend.gate.set()
        await flying

    run(scenario)


def test_work_counts_until_it_is_done_though_the_caller_it_was_counted_for_has_left():
    async def scenario(bench: Bench) -> None:
        bench.backend.gate.clear()
        (lookup,) = await bench.cache.look([job("first")], A)
        cost = Cost(lookup.tokens, 0, A)
        bench.admission.take(cost)
        first = bench.cache.start(lookup, asyncio.get_running_loop().time() + 60)
        second = await bench.begin(job("second"))
        first.cancel()
        bench.admission.give(cost)
        await settled()
        assert bench.admission.tokens == 4
        bench.backend.gate.set()
        await second
        await settled()
        assert bench.admission.tokens == 0

    run(scenario)


def test_what_was_given_up_between_looking_and_asking_is_computed_and_counts():
    async def scenario(bench: Bench) -> None:
        await bench.ask(job("one"))
        (lookup,) = await bench.cache.look([job("two")], A)
        assert lookup.source == "memory"
        bench.cache.memory.drop(lookup.key)
        bench.backend.gate.clear()
        waiting = bench.cache.start(lookup, asyncio.get_running_loop().time() + 60)
        await settled()
        assert bench.admission.tokens == 4
        bench.backend.gate.set()
        assert isinstance(await waiting, Scores)
        await settled()
        assert bench.admission.tokens == 0
        assert bench.computed == 2

    run(scenario)


# ---- tiers -----------------------------------------------------------------------------------------------------------


def test_the_disk_tier_survives_a_restart_with_the_same_bits(tmp_path: Path):
    wanted = run(lambda bench: bench.ask(job("one")), dir=str(tmp_path))

    async def later(bench: Bench) -> None:
        (lookup,) = await bench.cache.look([job("two")], A)
        assert (lookup.source, lookup.tokens) == ("disk", 0)
        assert_same_bits(await bench.ask(job("two")), wanted)
        assert_same_bits(await bench.ask(job("three")), wanted)
        assert bench.computed == 0
        assert bench.cache.tallies["a"].sequences == {"disk": 1, "memory": 1}

    run(later, dir=str(tmp_path))


def damage(directory: Path) -> None:
    """Flips a bit in the middle of every kept answer, past what SQLite itself looks at."""
    import sqlite3

    store = sqlite3.connect(directory / FILE)
    for key, entry in store.execute("SELECT key, entry FROM entries").fetchall():
        changed = bytearray(entry)
        changed[len(changed) // 2] ^= 1
        store.execute("UPDATE entries SET entry = ? WHERE key = ?", (bytes(changed), key))
    store.commit()
    store.close()


def test_a_damaged_entry_on_disk_is_dropped_and_computed_again(tmp_path: Path):
    wanted = run(lambda bench: bench.ask(job("one")), dir=str(tmp_path))
    damage(tmp_path)

    async def later(bench: Bench) -> None:
        assert_same_bits(await bench.ask(job("two")), wanted)
        assert bench.backend.scored_ids == ["two"]
        assert bench.cache.damaged == 1
        assert bench.admission.tokens == 0

    run(later, dir=str(tmp_path))

    async def last(bench: Bench) -> None:
        assert_same_bits(await bench.ask(job("three")), wanted)
        assert (bench.computed, bench.cache.damaged) == (0, 0)

    run(last, dir=str(tmp_path))


def test_a_damaged_entry_in_memory_is_dropped_and_computed_again():
    async def scenario(bench: Bench) -> None:
        wanted = await bench.ask(job("one"))
        entries = bench.cache.memory._entries["a"]
        (key,) = entries
        entries[key] = entries[key][:-1] + bytes([entries[key][-1] ^ 1])
        assert_same_bits(await bench.ask(job("two")), wanted)
        assert (bench.computed, bench.cache.damaged) == (2, 1)
        await bench.ask(job("three"))
        assert bench.computed == 2

    run(scenario)


def test_large_answers_go_off_the_event_loop_and_are_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "INLINE_BYTES", 100)

    async def scenario(bench: Bench) -> None:
        wanted = await bench.ask(job("one"))
        while bench.cache._tasks:
            await asyncio.sleep(0)
        assert bench.cache._sealing_bytes == 0
        assert_same_bits(await bench.ask(job("two")), wanted)
        assert bench.computed == 1

    run(scenario, dir=str(tmp_path))


def test_large_answers_beyond_the_bound_are_not_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "INLINE_BYTES", 100)
    monkeypatch.setattr(cache_module, "SEALING_BYTES", 100)

    async def scenario(bench: Bench) -> None:
        assert isinstance(await bench.ask(job("one")), Scores)
        await bench.ask(job("two"))
        assert bench.computed == 2

    run(scenario)


def test_memory_is_bounded_whatever_is_asked():
    async def scenario(bench: Bench) -> None:
        for n in range(300):
            await bench.ask(job("x", 1, n, n, 2))
            assert bench.cache.memory.num_bytes <= 20_000
        assert bench.cache.memory.evicted > 0
        assert not bench.cache._flights
        assert not bench.cache._tasks

    run(scenario, memory_bytes=20_000)


def test_tenants_that_are_counted_apart_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "MAX_TENANTS", 3)

    async def scenario(bench: Bench) -> None:
        for n in range(6):
            await bench.ask(job("x"), Caller(f"t{n}"))
        assert set(bench.cache.tallies) == {"t0", "t1", "t2", cache_module.OTHERS}
        assert bench.cache.tallies[cache_module.OTHERS].sequences["engine"] == 3

    run(scenario)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"enabled": False, "share": "server"}, "share: given with enabled false"),
        ({"disk_bytes": 1 << 30}, "disk_bytes: got 1073741824 without dir"),
        ({"memory_bytes": -1}, "memory_bytes"),
        ({"share": "all"}, "share"),
        ({"size": 1}, "size"),
    ],
)
def test_idle_and_wrong_options_are_refused(settings: dict[str, Any], complaint: str):
    with pytest.raises(ValueError, match=complaint):
        CacheConfig(**settings)
