"""The client against small real servers of both transports: what arrives, from whom, and what is never asked."""

from __future__ import annotations

import asyncio
import inspect
import threading
from dataclasses import replace

import numpy as np
import pytest
from client_calls import a_request, check, ids, run
from fake_teacher import SERVE, FakeTeacher, Fault, V

from teacher_api import errors
from teacher_api.client import AsyncTeacherClient, TeacherClient
from teacher_api.types import CallMetadata, Candidates, Completion, ScoreOptions, ScoreRequest

pytestmark = [
    pytest.mark.usefixtures("quick_retries"),
    pytest.mark.filterwarnings("ignore::ResourceWarning:uvicorn.*"),
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 0},
        {"top_k": "all"},
        {"top_k": V, "temperature": 2.0, "value_type": "float16"},
        {"entropy": True, "rank": True, "hidden": True},
    ],
)
def test_arrives_unchanged(serve, options):
    request = a_request(**options)
    check(request, run(serve, FakeTeacher(), lambda c: c.score(request)))


def test_ranges_and_candidates(serve):
    asked = Candidates.from_rows([[3], [], [4, 5, 39]])
    completion = Completion("a", ids(5, 6, 7, 8), 0, ranges=((1, 2), (4, 6)), candidates=asked)
    request = ScoreRequest([completion], [ids(1, 2, 3)], ScoreOptions(top_k=2))
    check(request, run(serve, FakeTeacher(), lambda c: c.score(request)))


def test_another_teacher_is_refused(serve):
    async def work(client):
        await client.score(a_request(1))
        teacher.fingerprint = "other"
        with pytest.raises(errors.FingerprintMismatch, match="expected fp, this is other"):
            await client.score(a_request(1))
        with pytest.raises(errors.FingerprintMismatch, match=r"'fp'.*'other'"):
            await client.info()

    teacher = FakeTeacher()
    run(serve, teacher, work)


def test_expected_fingerprint(serve):
    with pytest.raises(errors.FingerprintMismatch, match=r"'mine'.*'fp'"):
        run(serve, FakeTeacher(), lambda c: c.score(a_request(1)), expect_fingerprint="mine")


def test_api_key_and_metadata(serve):
    teacher = FakeTeacher()
    run(serve, teacher, lambda c: c.score(a_request(1)), api_key="s3cret", metadata=CallMetadata("t", "e", "r"))
    assert set(teacher.keys) == {"Bearer s3cret"}
    sent = teacher.requests[0].metadata
    assert (sent.tenant, sent.experiment, sent.run) == ("t", "e", "r")


@pytest.mark.parametrize(
    ("completions", "field"),
    [
        ([], "completions"),
        ([Completion("a", ids(1, 2)), Completion("a", ids(1, 2))], "completions[1].id"),
        ([Completion("a", ids(1))], "completions[0].ranges"),
        ([Completion("a", ids())], "completions[0].token_ids"),
        ([Completion("a", np.zeros((2, 3), np.int32))], "completions[0].token_ids"),
        ([Completion(7, ids(1, 2))], "completions[0].id"),
        ([Completion("\ud800", ids(1, 2))], "completions[0].id"),
        ([Completion("a", ids(1, -2))], "completions[0].token_ids"),
        ([Completion("a", ids(1, 2), ranges=((0, 2),))], "completions[0].ranges"),
        ([Completion("a", ids(1, 2), 3)], "completions[0].prompt_index"),
        ([Completion("a", ids(1, 2), candidates=Candidates.from_rows([[1], [2]]))], "completions[0].candidates"),
    ],
)
def test_what_cannot_be_asked_is_refused_here(completions, field):
    teacher = FakeTeacher()
    with pytest.raises(errors.InvalidRequest) as caught:
        run(SERVE["grpc"], teacher, lambda c: c.score(ScoreRequest(completions)))
    assert caught.value.field == field
    assert not teacher.asked


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_time_that_is_none_is_refused_here(timeout_s):
    teacher = FakeTeacher()
    with pytest.raises(errors.InvalidRequest) as caught:
        run(SERVE["grpc"], teacher, lambda c: c.score(replace(a_request(1), timeout_s=timeout_s)))
    assert caught.value.field == "timeout_s"
    assert not teacher.asked


@pytest.mark.parametrize(
    "option",
    [{"top_k": -1}, {"top_k": 1 << 40}, {"top_k": "ALL"}, {"value_type": "bfloat16"}, {"temperature": float("nan")}],
)
def test_options_that_no_teacher_has_are_refused_here(option):
    teacher = FakeTeacher()
    request = ScoreRequest([Completion("a", ids(1, 2))], options=ScoreOptions(**option))
    with pytest.raises(errors.InvalidRequest) as caught:
        run(SERVE["grpc"], teacher, lambda c: c.score(request))
    assert caught.value.field == f"options.{next(iter(option))}"
    assert not teacher.asked


@pytest.mark.parametrize("url", ["ftp://a:1", "grpc://", "grpc://host", "grpc://h:1/path", "localhost:8301", "http://"])
def test_bad_urls(url):
    with pytest.raises(ValueError, match="expected"):
        TeacherClient(url)


@pytest.mark.parametrize("option", [{"timeout_s": 0}, {"attempt_timeout_s": float("nan")}, {"max_concurrency": 0}])
def test_bad_options(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        TeacherClient("grpc://127.0.0.1:1", **option)


def test_both_clients_take_the_same_arguments_with_the_same_defaults():
    assert inspect.signature(TeacherClient) == inspect.signature(AsyncTeacherClient)


class _InThread:
    """A fake teacher on a loop of its own, for the synchronous client."""

    def __init__(self, teacher, serve):
        self._ready, self._stop = threading.Event(), None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(teacher, serve)))

    async def _main(self, teacher, serve):
        self._stop, self._loop = asyncio.Event(), asyncio.get_running_loop()
        async with serve(teacher) as self.url:
            self._ready.set()
            await self._stop.wait()

    def __enter__(self):
        self._thread.start()
        assert self._ready.wait(10)
        return self.url

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)


def test_the_synchronous_client():
    teacher = FakeTeacher(Fault(of={"c1": errors.BackendFailed("once")}))
    request = a_request()
    threads = set(threading.enumerate())
    with _InThread(teacher, SERVE["http"]) as url:
        with TeacherClient(url, timeout_s=20, max_concurrency=2) as client:
            assert client.info().model_name == "fake"
            check(request, client.score(request))
            many = [a_request(2, prefix=f"m{i}-") for i in range(9)]
            found = {s.id: s for s in client.score_many(iter(many))}
            for each in many:
                check(each, [found[c.id] for c in each.completions])
            assert teacher.most_in_flight <= 2
        client.close()
        with pytest.raises(RuntimeError, match="closed"):
            client.info()
    assert set(threading.enumerate()) <= threads  # an earlier test's may have ended meanwhile


def test_completions_are_delivered_while_the_rest_of_their_request_is_scored(serve):
    """By both clients: each is let out only when the one before it has been handed on."""
    teacher, request = FakeTeacher(), a_request(3)

    async def work(client):
        return [(scores, release(scores)) async for scores in client.score_many([request])]

    def release(scores):
        for later in request.completions[int(scores.id[1:]) + 1 :][:1]:
            teacher.held[later.id].set()

    teacher.held = {c.id: threading.Event() for c in request.completions[1:]}
    check(request, [scores for scores, _ in run(serve, teacher, work)])
    teacher.held = {c.id: threading.Event() for c in request.completions[1:]}
    with _InThread(teacher, serve) as url, TeacherClient(url, timeout_s=20) as client:
        check(request, [(scores, release(scores))[0] for scores in client.score_many([request])])


def test_an_answer_does_not_wait_for_the_next_request(serve):
    """Of a source that asks for more only when it has seen what came of the last."""
    teacher, requests = FakeTeacher(), [a_request(1, prefix=f"{n}-") for n in range(4)]

    async def work(client):
        seen = asyncio.Semaphore(1)

        async def one_by_one():
            for request in requests:
                await seen.acquire()
                yield request

        answers = []
        async with asyncio.timeout(20):
            async for scores in client.score_many(one_by_one()):
                answers.append(scores)
                seen.release()
        return answers

    for request, scores in zip(requests, run(serve, teacher, work), strict=True):
        check(request, [scores])


def test_a_source_that_fails_is_heard_of(serve):
    async def work(client):
        async def failing():
            yield a_request(1)
            raise RuntimeError("no more prompts")

        return [scores async for scores in client.score_many(failing())]

    with pytest.raises(RuntimeError, match="no more prompts"):
        run(serve, FakeTeacher(), work)


def test_a_server_that_knows_no_adapters_is_not_asked_for_one(serve):
    """It would ignore the field and answer as its base."""
    teacher = FakeTeacher()
    with pytest.raises(errors.NotFound, match="'math'; there is only the base"):
        run(serve, teacher, lambda c: c.score(replace(a_request(1), teacher="math")))
    assert teacher.asked == []
