"""The client when something fails: what is asked again, damaged answers, deadlines, teachers that vanish and return."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress

import grpc
import pytest
from client_calls import a_request, check, collect, run
from fake_teacher import SERVE, FakeTeacher, Fault
from reliability import holds

from teacher_api import errors
from teacher_api.client import AsyncTeacherClient, TeacherClient
from teacher_api.transport_grpc import GrpcTransport
from teacher_api.types import ScoreRequest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("quick_retries"),
    pytest.mark.filterwarnings("ignore::ResourceWarning:uvicorn.*"),
]


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
def test_retry_classification(serve, kind, record_property):
    """Every kind: retried exactly if the table says so."""
    error = errors.error_of_kind(kind, "injected", field="some.field")
    teacher = FakeTeacher(Fault(error=error, becomes="another" if kind == "fingerprint_mismatch" else ""))
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
    holds(record_property, "C1", f"{kind}: {'asked again' if len(teacher.asked) == 2 else 'not asked again'}")


def test_a_question_that_was_damaged_into_one_for_another_teacher_is_asked_again(serve):
    teacher = FakeTeacher(Fault(error=errors.FingerprintMismatch("this is fp, the caller expects f&")))
    request = a_request(2)
    check(request, run(serve, teacher, lambda c: c.score(request)))
    assert len(teacher.asked) == 2
    teacher = FakeTeacher(Fault(error=errors.FingerprintMismatch("this is fp, the caller expects f&")))
    check(request, run(serve, teacher, lambda c: collect(c, request)))


def test_unknown_kind_is_not_retried(serve, record_property):
    class Strange(errors.TeacherError):
        kind, http_status, grpc_code = "strange", 503, "UNAVAILABLE"

    teacher = FakeTeacher(Fault(error=Strange("?")))
    with pytest.raises(errors.InternalError, match="unknown error kind 'strange'"):
        run(serve, teacher, lambda c: c.score(a_request(1)))
    assert len(teacher.asked) == 1
    holds(record_property, "C1", "an unknown kind: not asked again")


@pytest.mark.parametrize(
    ("status", "calls", "error"),
    [
        (502, 2, None),
        (429, 2, None),
        (220, 2, None),  # one bit from 200
        (300, 2, None),
        (308, 1, errors.InternalError),
        (500, 1, errors.InternalError),
    ],
)
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


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        ("INTERNAL", "Internal error from Core", "unavailable"),  # github.com/grpc/grpc/issues/36066
        ("INTERNAL", "Stream removed (Illegal header key: grpc-Status)", "unavailable"),
        ("UNKNOWN", "Stream removed (Failed parsing HTTP/2 (invalid ping: length=0, flags=1))", "unavailable"),
        ("UNKNOWN", "No status received", "unavailable"),
        ("INTERNAL", "the server's own words", "internal"),
        ("UNKNOWN", "the server's own words", "internal"),
    ],
)
def test_what_grpc_says_of_a_broken_connection_is_asked_again_and_other_internal_errors_are_not(code, details, kind):
    metadata = grpc.aio.Metadata()
    ended = grpc.aio.AioRpcError(grpc.StatusCode[code], metadata, metadata, details)

    async def classified() -> errors.TeacherError:
        transport = GrpcTransport("127.0.0.1:1", secure=False, api_key=None)
        try:
            return transport._error(ended)
        finally:
            await transport.close()

    error = asyncio.run(classified())
    assert (error.kind, error.retryable) == (kind, kind == "unavailable")


def test_lasting_damage_is_an_error(serve):
    teacher = FakeTeacher(*[Fault(change=flip_rows)] * 1000)
    with pytest.raises(errors.CorruptResponse, match="checksum does not match"):
        run(serve, teacher, lambda c: c.score(a_request(1)), timeout_s=0.3)


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
        await reader.read()  # all that the client says until it hangs up
    finally:
        writer.close()


async def _dripping(reader, writer):
    """An HTTP answer that arrives a byte at a time and never ends."""
    try:
        with suppress(ConnectionError):  # the client hangs up
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.01)
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
