"""The client within bounds: requests cut to the teacher's limits, few in flight, little read ahead, little kept."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections import deque
from contextlib import suppress

import numpy as np
import pytest
from client_calls import a_request, check, ids, run, streamed
from fake_teacher import SERVE, FakeTeacher, Fault, V

from teacher_api import asking, errors
from teacher_api.endpoints import open_transport
from teacher_api.types import Completion, ScoreOptions, ScoreRequest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("quick_retries"),
    pytest.mark.filterwarnings("ignore::ResourceWarning:uvicorn.*"),
]


def test_large_requests_are_cut_to_the_limits(serve):
    teacher = FakeTeacher(max_completions=2)
    request = a_request(7)
    check(request, run(serve, teacher, lambda c: c.score(request)))
    assert sorted(map(len, teacher.asked)) == [1, 2, 2, 2]


def test_many_tokens_are_cut_into_parts(serve, monkeypatch):
    monkeypatch.setattr(asking, "PART_TOKENS", 12)
    teacher = FakeTeacher()
    request = ScoreRequest([Completion(name, ids(1, 2, 3), 0) for name in "abcde"], [ids(4, 5)])
    check(request, run(serve, teacher, lambda c: c.score(request)))
    assert sorted(map(len, teacher.asked)) == [1, 2, 2], "five tokens each, the prompt included"


def test_errors_name_the_callers_own_places(serve):
    """Whatever was cut off or left out of the message that failed."""
    bad = errors.InvalidRequest("bad id", field="completions[0].token_ids[3]")
    prompt = errors.InvalidRequest("bad prompt", field="prompts[0][1]")
    request = ScoreRequest(
        [Completion("a", ids(1, 2)), Completion("b", ids(1, 2), 1), Completion("c", ids(1, -2))], [ids(1), ids(2)]
    )
    teacher = FakeTeacher(Fault(of={"a": bad, "b": bad}), max_completions=1)
    answers = run(serve, teacher, lambda c: c.score(request, return_errors=True), max_concurrency=1)
    assert [a.field for a in answers if isinstance(a, errors.TeacherError)] == [
        "completions[0].token_ids[3]",
        "completions[2].token_ids",
    ]
    teacher = FakeTeacher(Fault(), Fault(of={"b": prompt}), max_completions=1)
    answers = run(serve, teacher, lambda c: c.score(request, return_errors=True), max_concurrency=1)
    assert answers[1].field == "prompts[1][1]"


def test_large_answers_go_over_the_stream(serve):
    teacher = FakeTeacher(max_response_bytes=4000, max_rows_bytes=400)
    big = Completion("big", np.arange(20, dtype=np.int32))
    request = ScoreRequest([Completion("small", ids(1, 2)), big], options=ScoreOptions(top_k="all"))
    check(request, run(serve, teacher, lambda c: c.score(request)))
    assert sorted(teacher.paths) == ["Score", "ScoreStream"]


@pytest.mark.slow
def test_a_long_stream_needs_bounded_memory(serve):
    """About 32 KiB a request, if any were kept (answer and question): 60 of them would show."""

    def peak_bytes(num_requests):
        async def work(client):
            tokens = np.arange(150, dtype=np.int32) % V
            options = ScoreOptions(top_k="all")
            source = (ScoreRequest([Completion(f"r{i}", tokens)], options=options) for i in range(num_requests))
            return len([None async for _ in client.score_many(source)])

        teacher = FakeTeacher()
        teacher.requests = teacher.asked = teacher.keys = teacher.paths = deque(maxlen=0)  # it remembers nothing
        tracemalloc.start()
        try:
            assert run(serve, teacher, work, max_concurrency=2) == num_requests
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_bytes(5)  # caches fill
    assert peak_bytes(60) < peak_bytes(10) + 500_000  # kept, the 50 further ones would add 1.2 MB and more


def test_bounded_concurrency_and_bounded_reading_ahead(serve):
    """A slow consumer: the source is read at most max_concurrency requests ahead, and no more are in flight."""
    taken = 0

    def source():
        nonlocal taken
        for i in range(60):
            taken += 1
            yield a_request(1, prefix=f"r{i}-")

    async def work(client):
        consumed = 0
        seen = set()
        async for scores in client.score_many(source()):
            assert taken - consumed <= 4
            consumed += 1
            seen.add(scores.id)
            if consumed % 10 == 0:
                await asyncio.sleep(0.01)
        return seen

    teacher = FakeTeacher()
    assert run(serve, teacher, work, max_concurrency=4) == {f"r{i}-0" for i in range(60)}
    assert teacher.most_in_flight <= 4


def test_score_many_stops_at_an_error_and_cancels_the_rest(serve):
    teacher = FakeTeacher(Fault(error=errors.InvalidRequest("no")), Fault(hang=True), Fault(hang=True))

    async def work(client):
        with pytest.raises(errors.InvalidRequest):
            await streamed(client, (a_request(1, prefix=str(i)) for i in range(3)))
        async with asyncio.timeout(5):
            while teacher.in_flight:  # the server sees the cancellation
                await asyncio.sleep(0.005)

    if serve is SERVE["http"]:
        pytest.skip("an ASGI application learns of a lost client only when it reads or writes")
    run(serve, teacher, work)


@pytest.mark.parametrize(
    ("timeout_s", "said"),
    [(2.5, "2500m"), (0.0001, "1m"), (0.3, "300m"), (99_999.999, "99999999m"), (1e5, "100000S"), (1e12, "99999999H")],
)
def test_an_http_request_says_how_long_it_is_waited_for(timeout_s, said):
    """In gRPC's own form, of at most eight digits, and never less than it is."""

    async def ask(teacher):
        async with SERVE["http"](teacher) as url:
            transport = open_transport(url, api_key=None, max_connections=1)
            with suppress(errors.DeadlineExceeded):
                await transport.info(timeout_s=timeout_s, request_id="a")
            while not teacher.timeouts and timeout_s > 0.1:
                await asyncio.sleep(0.01)
            await transport.close()

    teacher = FakeTeacher()
    asyncio.run(ask(teacher))
    assert teacher.timeouts == [said] or (timeout_s < 0.1 and not teacher.timeouts)


def test_each_attempt_says_its_own_limit_over_http():
    teacher = FakeTeacher()
    run(SERVE["http"], teacher, lambda c: c.score(a_request(2)), attempt_timeout_s=7.5)
    assert set(teacher.timeouts) == {"7500m"}
