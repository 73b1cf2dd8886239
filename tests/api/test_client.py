"""The client against small real servers of both transports: retries, deadlines, damaged and foreign answers, limits."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import tracemalloc

import numpy as np
import pytest
import stamina
from fake_teacher import SERVE, FakeTeacher, Fault, V, assert_same, expected_scores

from teacher_api import asking, errors
from teacher_api.client import AsyncTeacherClient, TeacherClient
from teacher_api.types import CallMetadata, Candidates, Completion, ScoreOptions, ScoreRequest

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning:uvicorn.*")


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr(asking, "WAIT_INITIAL_S", 0.005)
    monkeypatch.setattr(asking, "WAIT_JITTER_S", 0.005)
    before = stamina.instrumentation.get_on_retry_hooks()
    stamina.instrumentation.set_on_retry_hooks([])
    yield
    stamina.instrumentation.set_on_retry_hooks(before)


@pytest.fixture(params=["grpc", "http"])
def serve(request):
    return SERVE[request.param]


def ids(*values):
    return np.array(values, dtype=np.int32)


def a_request(n=3, *, prefix="c", **options):
    options = {"top_k": 5, **options}
    rng = np.random.default_rng(0)
    completions = [
        Completion(f"{prefix}{i}", rng.integers(0, V, 4 + i).astype(np.int32), i % 2 if i else None) for i in range(n)
    ]
    return ScoreRequest(completions, [ids(1, 2, 3), ids(9, 8)], ScoreOptions(**options))


def check(request, scores):
    assert [s.id for s in scores] == [c.id for c in request.completions]
    for completion, got in zip(request.completions, scores, strict=True):
        prompt = [] if completion.prompt_index is None else request.prompts[completion.prompt_index].tolist()
        tokens = [*prompt, *completion.token_ids.tolist()]
        positions = np.arange(max(len(prompt), 1), len(tokens))
        if completion.ranges:
            positions = np.concatenate([np.arange(a, b) for a, b in completion.ranges])
        assert_same(got, expected_scores(tokens, positions, request.options, completion.candidates))


def run(serve, teacher, work, **options):
    async def main():
        async with serve(teacher) as url, AsyncTeacherClient(url, **{"timeout_s": 20, **options}) as client:
            return await work(client)

    return asyncio.run(main())


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


def test_only_failed_completions_are_asked_again(serve):
    teacher = FakeTeacher(
        Fault(of={"c1": errors.BackendFailed("once")}), Fault(of={"c1": errors.Overloaded("twice", retry_after_s=0.01)})
    )
    request = a_request()
    check(request, run(serve, teacher, lambda c: c.score(request)))
    assert teacher.asked == [["c0", "c1", "c2"], ["c1"], ["c1"]]
    assert len(teacher.requests[1].prompts) == 1, "only the prompt in use travels again"


def test_final_errors_stay_with_their_completion(serve):
    teacher = FakeTeacher(Fault(of={"c1": errors.InvalidRequest("bad id", field="completions[1].token_ids[0]")}))
    request = a_request()
    answers = run(serve, teacher, lambda c: c.score(request, return_errors=True))
    assert isinstance(answers[1], errors.InvalidRequest)
    assert answers[1].field == "completions[1].token_ids[0]"
    assert answers[0].id == "c0"
    assert answers[2].id == "c2"
    assert len(teacher.asked) == 1


@pytest.mark.parametrize("kind", sorted(errors.KINDS))
def test_retry_classification(serve, kind):
    """Every kind: retried exactly if the table says so."""
    error = errors.error_of_kind(kind, "injected", field="some.field")
    teacher = FakeTeacher(Fault(error=error))
    request = a_request(1)
    if error.retryable or kind == "deadline_exceeded":  # the server's deadline was the attempt's, not the call's
        check(request, run(serve, teacher, lambda c: c.score(request)))
        assert len(teacher.asked) == 2
    else:
        with pytest.raises(type(error)) as caught:
            run(serve, teacher, lambda c: c.score(request))
        assert type(caught.value) is type(error)
        assert caught.value.field == "some.field"
        assert len(teacher.asked) == 1


def test_unknown_kind_is_not_retried(serve):
    class Strange(errors.TeacherError):
        kind, http_status, grpc_code = "strange", 503, "UNAVAILABLE"

    teacher = FakeTeacher(Fault(error=Strange("?")))
    with pytest.raises(errors.InternalError, match="unknown error kind 'strange'"):
        run(serve, teacher, lambda c: c.score(a_request(1)))
    assert len(teacher.asked) == 1


@pytest.mark.parametrize(("status", "calls", "error"), [(502, 2, None), (429, 2, None), (500, 1, errors.InternalError)])
def test_http_errors_of_a_proxy(status, calls, error):
    teacher = FakeTeacher(Fault(raw=(status, b"<html>bad gateway</html>")))
    request = a_request(1)
    if error is None:
        check(request, run(SERVE["http"], teacher, lambda c: c.score(request)))
    else:
        with pytest.raises(error, match="bad gateway"):
            run(SERVE["http"], teacher, lambda c: c.score(request))
    assert len(teacher.asked) == calls


def flip_rows(frame):
    data = bytearray(frame.rows)
    data[len(data) // 2] ^= 4
    frame.rows = bytes(data)


def flip_checksum(frame):
    frame.checksum = bytes([frame.checksum[0] ^ 1]) + frame.checksum[1:]


def misroute(frame):
    frame.completion_id = {"c0": "c1", "c1": "c0"}.get(frame.completion_id, "nobody")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("damage", [flip_rows, flip_checksum, misroute])
def test_damage_is_caught_and_asked_again(serve, damage, streamed):
    teacher = FakeTeacher(Fault(change=damage), max_rows_bytes=64)
    request = a_request()
    check(request, run(serve, teacher, lambda c: collect(c, request) if streamed else c.score(request)))
    assert teacher.asked[1] == ["c0", "c1", "c2"]


def test_lasting_damage_is_an_error(serve):
    teacher = FakeTeacher(*[Fault(change=flip_rows)] * 1000)
    with pytest.raises(errors.CorruptResponse, match="checksum does not match"):
        run(serve, teacher, lambda c: c.score(a_request(1)), timeout_s=0.3)


async def collect(client, request):
    found = [s async for s in client.score_many([request])]
    by_id = {s.id: s for s in found}
    assert len(by_id) == len(found), "none is delivered twice"
    return [by_id[c.id] for c in request.completions]


def test_a_broken_stream_goes_on_where_it_was(serve):
    teacher = FakeTeacher(Fault(break_after=1), Fault(break_after=0))
    request = a_request()
    check(request, run(serve, teacher, lambda c: collect(c, request)))
    assert teacher.asked == [["c0", "c1", "c2"], ["c1", "c2"], ["c1", "c2"]]


def test_a_stream_broken_inside_a_completion(serve):
    teacher = FakeTeacher(Fault(break_after=3), max_rows_bytes=64)  # one row a frame
    request = a_request(2)
    check(request, run(serve, teacher, lambda c: collect(c, request)))
    assert len(teacher.asked) == 2


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


def test_deadline_of_the_call(serve):
    async def work(client):
        await client.info()
        start = time.monotonic()
        with pytest.raises(errors.DeadlineExceeded, match=r"0\.3 s"):
            await client.score(ScoreRequest(a_request(1).completions, timeout_s=0.3))
        assert time.monotonic() - start < 5

    run(serve, FakeTeacher(*[Fault(hang=True)] * 9), work)


def test_an_attempt_that_hangs_is_given_up(serve):
    teacher = FakeTeacher(Fault(hang=True))
    request = a_request(1)
    check(request, run(serve, teacher, lambda c: c.score(request), attempt_timeout_s=0.3))
    assert len(teacher.asked) == 2
    assert 0 < teacher.requests[0].timeout_s <= 0.3


def test_a_long_retry_after_is_not_waited_for(serve):
    teacher = FakeTeacher(Fault(error=errors.Overloaded("full", retry_after_s=60)))
    start = time.monotonic()
    with pytest.raises(errors.Overloaded) as caught:
        run(serve, teacher, lambda c: c.score(a_request(1)), timeout_s=5)
    assert caught.value.retry_after_s == 60
    assert time.monotonic() - start < 4


def test_retry_after_is_kept(serve):
    teacher = FakeTeacher(Fault(error=errors.Overloaded("full", retry_after_s=0.2)))
    start = time.monotonic()
    run(serve, teacher, lambda c: c.score(a_request(1)))
    assert time.monotonic() - start >= 0.2


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_nobody_there(scheme):
    with socket.socket() as taken:  # bound, not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"{scheme}://127.0.0.1:{taken.getsockname()[1]}"
        with TeacherClient(url, timeout_s=0.4) as client, pytest.raises(errors.Unavailable, match="gave up after"):
            client.info()


async def _silent(reader, writer):
    """Takes the connection and never answers."""
    try:
        while await reader.read(1000):
            pass
    finally:
        writer.close()


async def _dripping(reader, writer):
    """An HTTP answer that arrives a byte at a time and never ends."""
    try:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)
    except ConnectionError:
        pass
    finally:
        writer.close()


@pytest.mark.parametrize(("scheme", "behave"), [("grpc", _silent), ("http", _silent), ("http", _dripping)])
def test_half_dead_connections_end_at_the_deadline(scheme, behave):
    async def main():
        server = await asyncio.start_server(behave, "127.0.0.1", 0)
        url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        start = time.monotonic()
        async with AsyncTeacherClient(url, timeout_s=0.5) as client:
            with pytest.raises((errors.DeadlineExceeded, errors.Unavailable)):
                await client.info()
        assert time.monotonic() - start < 4
        server.close()
        await asyncio.sleep(0.05)

    asyncio.run(main())


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
        teacher.requests = teacher.asked = teacher.keys = teacher.paths = _Forgetful()
        tracemalloc.start()
        try:
            assert run(serve, teacher, work, max_concurrency=2) == num_requests
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak_bytes(5)  # caches fill
    assert peak_bytes(60) < peak_bytes(10) + 500_000  # kept, the 50 further ones would add 1.2 MB and more


class _Forgetful(list):
    def append(self, _):
        pass


def test_a_teacher_that_comes_back(serve):
    """Down for a while in the middle of a client's life: the call waits and succeeds."""

    async def main():
        teacher = FakeTeacher()
        async with serve(teacher) as url:
            port = int(url.rsplit(":", 1)[1])
            client = AsyncTeacherClient(url, timeout_s=20)
            await client.info()
        request = a_request()
        call = asyncio.create_task(client.score(request))
        await asyncio.sleep(0.2)
        assert not call.done()
        async with serve(teacher, port):
            check(request, await call)
            await client.close()

    asyncio.run(main())


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
            async for _ in client.score_many(a_request(1, prefix=str(i)) for i in range(3)):
                pass
        async with asyncio.timeout(5):
            while teacher.in_flight:  # the server sees the cancellation
                await asyncio.sleep(0.005)

    if serve is SERVE["http"]:
        pytest.skip("an ASGI application learns of a lost client only when it reads or writes")
    run(serve, teacher, work)


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
    threads = threading.active_count()
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
    assert threading.active_count() == threads
