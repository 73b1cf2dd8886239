"""A soak of a sound teacher and, beside it, of one whose backend leaks, for the check to be seen failing (S23)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from reliability import holds
from soak import Report, Soak, Teacher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400), pytest.mark.usefixtures("quick_retries")]

LOAD, HURT = 0.8, 0.05
LEAK_BYTES = 1 << 18  # of a sequence; in 12 s at 16 a second 48 MiB
FLAT_BYTES = 8 << 20  # over the second half; what malloc and the collector do by themselves is below
COUNTED, SLACK = ("descriptors", "threads", "tasks"), 2


def faults_of(report: Report) -> list[str]:
    """What is wrong with a soak."""
    found = list(report.wrong)
    if report.answered != report.sent:
        found.append(f"{report.sent} asked, {report.answered} answered")
    if report.growth_bytes > FLAT_BYTES:
        found.append(f"memory grew by {report.growth_bytes / 2**20:.0f} MiB over the second half")
    for what in COUNTED:
        if abs(report.after[what] - report.before[what]) > SLACK:
            found.append(f"{report.before[what]} {what} before, {report.after[what]} after")
    return found


@pytest.mark.parametrize("seconds", [12, pytest.param(1800, marks=pytest.mark.long)])
def test_a_soak_leaves_nothing_behind_and_one_of_a_leaking_backend_fails(seconds: float, record_property: Any):
    teachers = [Teacher(), Teacher(LEAK_BYTES * 12 // int(seconds))]

    async def both() -> list[Report]:
        soaks = [Soak(one, seconds=seconds, load=LOAD, hurt=HURT, seed=23) for one in teachers]
        return await asyncio.gather(*(soak.run() for soak in soaks))

    try:
        sound, leaking = asyncio.run(both())
    finally:
        statuses = [one.close() for one in teachers]
    assert faults_of(sound) == []
    assert sum(sound.hurts.values()) > 0.02 * sound.sent, "hardly anything was hurt"
    assert any("memory grew" in fault for fault in faults_of(leaking)), "the leak went unnoticed"
    assert statuses == [0, 0]
    changes = ", ".join(f"{what} {sound.after[what] - sound.before[what]:+d}" for what in COUNTED)
    holds(
        record_property,
        "S23",
        f"{seconds} s at 80 %, {sum(sound.hurts.values())} faults: {sound.answered} of {sound.sent} answered, once; "
        f"memory {sound.growth_bytes / 2**20:+.1f} MiB over the second half, {changes}; a leaking backend: "
        f"{leaking.growth_bytes / 2**20:+.1f} MiB, noticed",
    )
