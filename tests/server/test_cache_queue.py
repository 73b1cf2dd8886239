"""Who asks for what another has queued waits for no more than its own work, and it is computed once all the same."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from cachebench import A, B, Bench, assert_same_bits, job, run, settled

from teacher_api.errors import DeadlineExceeded
from teacher_api.types import Scores
from teacher_server.caller import Caller


@pytest.mark.parametrize("urgent", [replace(A, priority="interactive"), Caller("a", "other"), B], ids=str)
def test_who_asks_for_what_another_has_queued_does_not_wait_behind_the_others_work(urgent: Caller):
    async def scenario(bench: Bench) -> None:
        bench.backend.gate.clear()
        bulk = [await bench.begin(job(f"bulk{n}", 1, 2, n)) for n in range(30)]
        wanted = await bench.begin(job("wanted", 1, 2, 29), urgent)
        bench.backend.gate.set()
        scores = await wanted
        assert bench.computed < 5
        assert scores.id == "wanted"
        answers = await asyncio.gather(*bulk)
        assert [answer.id for answer in answers] == [f"bulk{n}" for n in range(30)]
        assert_same_bits(answers[29], scores)
        assert bench.computed == 30, "it was computed once"
        assert bench.admission.tokens == 0
        assert not bench.cache._flights
        assert not len(bench.scheduler._queue)

    run(scenario, share="server")


@pytest.mark.parametrize("leaver", [0, 1])
def test_of_several_that_queue_for_one_thing_who_leaves_takes_its_place_alone(leaver: int):
    async def scenario(bench: Bench) -> None:
        bench.backend.gate.clear()
        running = await bench.begin(job("running", 7, 8, 9))
        await settled()
        asked = [await bench.begin(job(f"w{n}"), caller) for n, caller in enumerate((A, Caller("a", "other")))]
        assert len(bench.scheduler._queue) == 2
        asked[leaver].cancel()
        await settled()
        assert len(bench.scheduler._queue) == 1
        bench.backend.gate.set()
        assert (await asked[1 - leaver]).id == f"w{1 - leaver}"
        await running
        assert bench.backend.scored_ids == ["running", f"w{1 - leaver}"]
        assert bench.admission.tokens == 0

    run(scenario)


def test_of_several_that_queue_for_one_thing_the_impatient_one_ends_alone():
    async def scenario(bench: Bench) -> None:
        bench.backend.gate.clear()
        running = await bench.begin(job("running", 7, 8, 9))
        await settled()
        impatient = await bench.begin(job("impatient"), A, timeout_s=0.05)
        patient = await bench.begin(job("patient"), B)
        assert isinstance(await impatient, DeadlineExceeded)
        await settled()
        (flight,) = [flight for flight in bench.cache._flights.values() if not flight.has_begun]
        assert (flight.first.caller, len(flight.works), len(bench.scheduler._queue)) == (B, 1, 1)
        bench.backend.gate.set()
        assert isinstance(await patient, Scores)
        await running
        assert bench.backend.scored_ids == ["running", "patient"]
        assert bench.admission.tokens == 0

    run(scenario, share="server")
