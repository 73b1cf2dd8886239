"""A simulated fleet of a thousand clients, with the server's own admission, queue and scheduler: nobody starves, the
engine stays busy, and what is remembered is bounded. `python -m benchmarks.sharing` runs larger ones."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks import sharing_fleet
from teacher_server.caller import Caller
from tests.reliability import holds

pytestmark = pytest.mark.slow


@pytest.mark.slow
def test_a_thousand_clients_share_a_teacher_and_none_starves(record_property):
    figures = sharing_fleet.fleet(num_clients=1000, num_tenants=50, seconds=40.0)
    assert figures["throughput_ratio"] >= 0.95
    assert figures["jain_index_tenants"] >= 0.99
    assert figures["least_tokens"] > 0, "everybody was served"
    assert figures["most_queued_tokens"] <= sharing_fleet.QUEUE_TOKENS
    assert figures["most_flows"] <= 1050
    holds(
        record_property, "S9", f"1,000 simulated clients: throughput {figures['throughput_ratio']:.3f} of one's alone"
    )


@pytest.mark.slow
def test_where_the_queue_is_full_the_refused_come_back_in_their_turn(monkeypatch, record_property):
    monkeypatch.setattr(sharing_fleet, "QUEUE_TOKENS", 100_000)  # of 230,000 that are wanted
    figures = sharing_fleet.fleet(num_clients=200, num_tenants=10, seconds=40.0)
    assert figures["refused"] > 500
    assert figures["most_queued_tokens"] <= 100_000
    assert figures["jain_index_experiments"] >= 0.98
    assert figures["throughput_ratio"] >= 0.9


def test_shares_are_by_weight(record_property):
    (error,) = sharing_fleet.weighted(num_clients=90, seconds=30.0).values()
    assert error <= 0.05
    holds(record_property, "S9", f"simulated shares of weights 1:2:4 within {error:.1%} (≤ 5 %)")


def test_a_serial_caller_next_to_hundreds_waits_little_longer_than_alone(record_property):
    (ratio,) = sharing_fleet.serial(num_clients=300, calls=40).values()
    assert ratio <= 3.0
    holds(record_property, "S9", f"simulated serial caller next to 300: p95 {ratio:.2f} of its solo p95 (≤ 3)")


def test_batches_are_short_for_a_caller_that_uses_less_than_its_share_and_whole_where_none_does(monkeypatch):
    batches: list[int] = []
    score = sharing_fleet.Engine.score

    async def noted(engine, jobs):
        batches.append(sum(job.num_tokens for job in jobs))
        return await score(engine, jobs)

    async def largest(serial: bool) -> int:
        teacher = sharing_fleet.Teacher()
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(teacher.scheduler.run())]
            for n in range(64):
                caller = Caller(f"tenant-{n % 8}", f"experiment-{n}")
                tasks.append(group.create_task(teacher.client(caller, n, sharing_fleet.drawn)))
            if serial:
                tasks.append(group.create_task(teacher.client(Caller("serial"), -1, lambda _: [32])))
            await asyncio.sleep(5.0)
            batches.clear()
            await asyncio.sleep(10.0)
            for task in tasks:
                task.cancel()
        return max(batches)

    monkeypatch.setattr(sharing_fleet.Engine, "score", noted)
    short = sharing_fleet.CONTENDED_S * sharing_fleet.TOKENS_PER_S
    assert sharing_fleet.simulated(lambda: largest(serial=True)) <= short
    assert sharing_fleet.simulated(lambda: largest(serial=False)) > 1.5 * short


def test_two_simulations_give_the_same_figures():
    assert sharing_fleet.weighted(30, 5.0) == sharing_fleet.weighted(30, 5.0)
