"""Several servers with one teacher behind one client: C1 with two of them, C2, C6, balance, and names with several
addresses."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from client_calls import a_request, check, ids, streamed
from fake_teacher import SERVE, FakeTeacher, Fault
from reliability import holds

from teacher_api import errors, replica, replicas
from teacher_api.client import AsyncTeacherClient, TeacherClient
from teacher_api.endpoints import Endpoint
from teacher_api.types import Completion, ScoreRequest
from teacher_api.v1 import teacher_pb2 as pb

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_retries")]


@asynccontextmanager
async def behind_one_client(serve: Any, *teachers: FakeTeacher, **options: Any) -> AsyncIterator[AsyncTeacherClient]:
    async with contextlib.AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(serve(teacher)) for teacher in teachers]
        client = AsyncTeacherClient(urls, **{"timeout_s": 20, **options})
        yield await stack.enter_async_context(client)


def requests(number: int, begin: int = 0) -> list[ScoreRequest]:
    """Of one completion each, all after prompts of their own."""
    return [
        ScoreRequest([Completion(f"r{n}", ids(1, 2, 3, 4, 5), 0)], [ids(n % 40, n // 40 % 40, 7)])
        for n in range(begin, begin + number)
    ]


async def until(found: Callable[[], object], work: Callable[[int], Awaitable[object]] = asyncio.sleep) -> None:
    """Repeats `work`, with a number that grows by 100, until something is found."""
    async with asyncio.timeout(15):
        for n in itertools.count():
            if found():
                return
            await work(100 * n if work is not asyncio.sleep else 0)


async def all_of(client: AsyncTeacherClient, asked: list[ScoreRequest]) -> None:
    for request, scores in zip(asked, await asyncio.gather(*(client.score(one) for one in asked)), strict=True):
        check(request, scores)


def test_requests_are_divided_and_a_prompt_stays_on_one_server(serve: Any):
    async def main() -> None:
        teachers = [FakeTeacher(), FakeTeacher(), FakeTeacher()]
        async with behind_one_client(serve, *teachers) as client:
            await all_of(client, requests(60) * 2)
            assert all(len(teacher.asked) >= 20 for teacher in teachers), [len(t.asked) for t in teachers]
            homes = [{name for (name,) in teacher.asked} for teacher in teachers]
            for one, other in itertools.combinations(homes, 2):
                assert not one & other, "a prompt was on two servers"

    asyncio.run(main())


def test_a_slow_server_gets_less(serve: Any):
    async def main() -> None:
        slow, fast = FakeTeacher(), FakeTeacher()
        slow.delay_s = 0.5
        async with behind_one_client(serve, slow, fast) as client:
            await all_of(client, requests(80))
            assert len(fast.asked) > 2 * len(slow.asked) > 0

    asyncio.run(main())


@pytest.mark.parametrize("kind", sorted(errors.KINDS))
def test_c1_the_table_of_retries_holds_with_two_servers(serve: Any, kind: str, record_property: Any):
    """A kind that is not retryable is told at once, after one attempt at one server; any other is asked again."""

    async def main() -> None:
        error = errors.error_of_kind(kind, "injected", field="some.field")
        becomes = "another" if kind == "fingerprint_mismatch" else ""
        teachers = [FakeTeacher(Fault(error=error, becomes=becomes)) for _ in range(2)]
        request = a_request(1)
        async with behind_one_client(serve, *teachers) as client:
            again = error.retryable or kind == "deadline_exceeded"  # of the attempt, not of the call
            if again:
                check(request, await client.score(request))
            else:
                with pytest.raises(type(error)) as caught:
                    await client.score(request)
                assert caught.value.field == "some.field"
            attempts = sum(len(teacher.asked) for teacher in teachers)
            each_once = kind == "fingerprint_mismatch"  # one server with another teacher is left out, two are told
            assert attempts in ((2, 3) if again else (2,) if each_once else (1,))

    asyncio.run(main())
    holds(record_property, "C1", f"{len(errors.KINDS)} kinds over gRPC and HTTP, one server and two: as the table says")


def test_c1_an_unknown_kind_is_not_retried_with_two_servers(serve: Any):
    class Strange(errors.TeacherError):
        kind, http_status, grpc_code = "strange", 503, "UNAVAILABLE"

    async def main() -> None:
        teachers = [FakeTeacher(Fault(error=Strange("?"))), FakeTeacher(Fault(error=Strange("?")))]
        async with behind_one_client(serve, *teachers) as client:
            with pytest.raises(errors.InternalError, match="unknown error kind 'strange'"):
                await client.score(a_request(1))
            assert sum(len(teacher.asked) for teacher in teachers) == 1

    asyncio.run(main())


@pytest.mark.parametrize("streams", [False, True], ids=["unary", "stream"])
def test_a_server_whose_engine_fails_is_not_asked_again_while_another_is_well(serve: Any, streams: bool):
    """Its server still answers, with an error in the place of each completion."""

    async def main() -> None:
        failed = {f"r{n}": errors.BackendFailed("the engine died") for n in range(20)}
        dead, well = FakeTeacher(*(Fault(of=failed) for _ in range(1000))), FakeTeacher()
        async with behind_one_client(serve, dead, well) as client:
            for request in requests(20):
                check(request, await streamed(client, [request]) if streams else await client.score(request))
        assert 1 <= len(dead.asked) <= 20

    asyncio.run(main())


def test_who_is_full_is_not_waited_for_while_another_is_not(serve: Any):
    async def main() -> None:
        full = [Fault(error=errors.Overloaded("full", retry_after_s=30)) for _ in range(50)]
        teachers = [FakeTeacher(*full), FakeTeacher()]
        async with behind_one_client(serve, *teachers) as client:
            began = asyncio.get_running_loop().time()
            await all_of(client, requests(30))
            assert asyncio.get_running_loop().time() - began < 10
            assert len(teachers[1].asked) == 30
            assert len(teachers[0].asked) <= 16, "once it has said so it is left alone"

    asyncio.run(main())


def test_where_all_are_full_the_client_comes_back_when_it_was_told_to():
    async def main() -> None:
        teachers = [FakeTeacher(Fault(error=errors.Overloaded("full", retry_after_s=0.4))) for _ in range(2)]
        async with behind_one_client(SERVE["grpc"], *teachers) as client:
            await client.info()
            began = asyncio.get_running_loop().time()
            check(a_request(1), await client.score(a_request(1)))
            assert [len(teacher.asked) for teacher in teachers] in ([1, 2], [2, 1])
            assert asyncio.get_running_loop().time() - began >= 0.4

    asyncio.run(main())


def test_a_server_that_hangs_is_given_up_for_another():
    async def main() -> None:
        teachers = [FakeTeacher(*[Fault(hang=True)] * 2), FakeTeacher()]
        async with behind_one_client(SERVE["grpc"], *teachers, attempt_timeout_s=0.3) as client:
            await all_of(client, requests(12))

    asyncio.run(main())


# ---- C6 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over_streams", [False, True])
def test_c6_two_of_three_die_nothing_is_lost_and_both_get_work_again_when_they_are_back(
    serve: Any, over_streams: bool, record_property: Any
):
    async def main() -> tuple[int, float]:
        teachers = [FakeTeacher() for _ in range(3)]
        servers = [serve(teacher) for teacher in teachers]
        urls = [await server.__aenter__() for server in servers]
        ports = [int(url.rsplit(":", 1)[1]) for url in urls]
        stopped, answered = asyncio.Event(), 0
        async with AsyncTeacherClient(",".join(urls), timeout_s=20) as client:

            async def asks(worker: int) -> None:
                nonlocal answered
                for n in itertools.count():
                    request = a_request(2, prefix=f"w{worker}-{n}-")
                    if over_streams:
                        found = {scores.id: scores for scores in await streamed(client, [request])}
                        check(request, [found[completion.id] for completion in request.completions])
                    else:
                        check(request, await client.score(request))
                    answered += 1
                    if stopped.is_set():
                        return

            async def more(number: int) -> None:
                until = answered + number
                async with asyncio.timeout(20):
                    while answered < until:
                        await asyncio.sleep(0.005)

            workers = [asyncio.create_task(asks(n)) for n in range(6)]
            await more(60)
            for server in servers[1:]:
                await server.__aexit__(None, None, None)
            await more(60)
            alone = len(teachers[0].asked)
            await more(30)
            assert len(teachers[0].asked) >= alone + 30 - len(workers), "as many may have been on their way"
            back = [serve(teacher, port) for teacher, port in zip(teachers[1:], ports[1:], strict=True)]
            for server in back:
                await server.__aenter__()
            began, before = asyncio.get_running_loop().time(), [len(teacher.asked) for teacher in teachers[1:]]
            async with asyncio.timeout(15):
                while any(len(t.asked) < n + 20 for t, n in zip(teachers[1:], before, strict=True)):
                    await asyncio.sleep(0.01)
                    for worker in workers:
                        if worker.done():
                            worker.result()
            took_s = asyncio.get_running_loop().time() - began
            stopped.set()
            await asyncio.gather(*workers)
        for server in (servers[0], *back):
            await server.__aexit__(None, None, None)
        return answered, took_s

    answered, took_s = asyncio.run(main())
    holds(
        record_property, "C6", f"{answered} requests, none lost; work on both again {took_s:.1f} s after their return"
    )


def test_c6_a_replica_with_another_fingerprint_is_refused_naming_both(serve: Any):
    async def main() -> None:
        async with behind_one_client(serve, FakeTeacher(), FakeTeacher(fingerprint="other")) as client:
            with pytest.raises(errors.FingerprintMismatch) as caught:
                await client.info()
            message = str(caught.value)
            for url in client.url.split(","):
                assert url in message
            assert "'fp'" in message
            assert "'other'" in message

    asyncio.run(main())


def test_c6_a_replica_that_comes_back_as_another_teacher_stays_left_out(serve: Any, caplog: Any):
    async def main() -> None:
        teachers = [FakeTeacher(), FakeTeacher()]
        async with contextlib.AsyncExitStack() as stack:
            url = await stack.enter_async_context(serve(teachers[0]))
            async with serve(teachers[1]) as second:
                client = await stack.enter_async_context(AsyncTeacherClient([url, second], timeout_s=20))
                await all_of(client, requests(20))
                assert teachers[1].asked
            await all_of(client, requests(20))
            teachers[1].fingerprint = "other"
            before = len(teachers[1].asked)
            async with serve(teachers[1], int(second.rsplit(":", 1)[1])):
                await until(lambda: "stays left out" in caplog.text)
                await all_of(client, requests(40, 100))
            assert len(teachers[1].asked) == before
            assert (await client.info()).fingerprint == "fp"

    asyncio.run(main())


def test_a_run_begins_without_a_replica_that_is_away_and_uses_it_later(serve: Any):
    async def main() -> None:
        teachers = [FakeTeacher(), FakeTeacher()]
        teachers[1].down = True
        async with behind_one_client(serve, *teachers) as client:
            await all_of(client, requests(20))
            assert not teachers[1].asked
            teachers[1].down = False
            await until(lambda: teachers[1].asked, lambda n: all_of(client, requests(20, n)))

    asyncio.run(main())


def test_limits_and_features_are_what_all_replicas_have():
    class Smaller(FakeTeacher):
        @property
        def info(self) -> Any:
            return replace(super().info, max_completions=2, features=("exact_tail", "entropy"), batch_tokens=30)

    async def main() -> None:
        teachers = [FakeTeacher(batch_tokens=50), Smaller()]
        async with behind_one_client(SERVE["grpc"], *teachers) as client:
            info = await client.info()
            assert (info.max_completions, info.features) == (2, ("exact_tail",))
            assert info.batch_tokens == 80, "both work at the same time"
            check(a_request(5), await client.score(a_request(5)))
            assert max(len(asked) for teacher in teachers for asked in teacher.asked) == 2
        async with behind_one_client(SERVE["grpc"], FakeTeacher(), Smaller()) as client:
            assert (await client.info()).batch_tokens == 0, "one doesn't say"

    asyncio.run(main())


# ---- C2 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outage_s", [3.0, pytest.param(10.0, marks=pytest.mark.long)])
@pytest.mark.parametrize("how", ["gone", "refusing"])
def test_c2_after_an_outage_32_clients_come_back_one_by_one(outage_s: float, how: str, record_property: Any):
    async def main() -> tuple[float, int, float]:
        teacher, loop = FakeTeacher(), asyncio.get_running_loop()
        server = SERVE["grpc"](teacher)
        url = await server.__aenter__()
        clients = [AsyncTeacherClient(url, timeout_s=60, max_concurrency=2) for _ in range(32)]
        returned: dict[int, float] = {}
        sent = 0

        def counting(transport: Any) -> None:
            score = transport.score

            async def counted(*args: Any, **kwargs: Any) -> Any:
                nonlocal sent
                sent += 1
                return await score(*args, **kwargs)

            transport.score = counted

        for client in clients:
            counting(client._transport._replicas[0].transport)

        async def asks(n: int, number: int, *, note: bool = False) -> None:
            for k in range(number):
                request = a_request(1, prefix=f"{n}-{k}-")
                check(request, await clients[n].score(request))
                if note:
                    returned.setdefault(n, loop.time())
                await asyncio.sleep(0.01)

        await asyncio.gather(*(asks(n, 5) for n in range(32)))
        if how == "gone":
            await server.__aexit__(None, None, None)
        teacher.down = True
        going = [asyncio.create_task(asks(n, 5, note=True)) for n in range(32)]
        await asyncio.sleep(outage_s)
        assert not returned
        teacher.down = False
        if how == "gone":
            server = SERVE["grpc"](teacher, int(url.rsplit(":", 1)[1]))
            await server.__aenter__()
        await asyncio.gather(*going)
        for client in clients:
            await client.close()
        await server.__aexit__(None, None, None)
        times = sorted(returned.values())
        crowd = max(sum(one <= other < one + 0.1 for other in times) for one in times)
        return sent / (32 * 10), crowd, times[-1] - times[0]

    attempts, crowd, spread_s = asyncio.run(main())
    assert attempts <= 1.2
    assert crowd <= 16, "half of them came back within a tenth of a second"
    assert spread_s > 1
    holds(
        record_property,
        "C2",
        f"{attempts:.2f} attempts a request (≤ 1.2) over {outage_s:g} s; at most {crowd} of 32 return within 0.1 s",
    )


def test_one_broken_connection_is_no_outage(serve: Any):
    """The server is looked at once, and all go on: no slow start."""

    async def main() -> None:
        teacher = FakeTeacher(Fault(error=errors.Unavailable("this connection broke")))
        async with behind_one_client(serve, teacher) as client:
            await all_of(client, requests(8))
            (one,) = client._transport._replicas
            assert (one.down, one.window) == ("", None)

    asyncio.run(main())


# ---- names -----------------------------------------------------------------------------------------------------------


def named(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> None:
    """teacher.test has these addresses now; none: it can't be looked up."""

    async def getaddrinfo(self: Any, host: str, port: Any, *, family: int = 0, **_: Any) -> Any:
        assert host == "teacher.test"
        if family != socket.AF_INET or not addresses:
            raise socket.gaierror("no such name")
        return [(family, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_each_address_of_a_name_is_a_replica_and_new_ones_are_found(scheme: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replicas, "LOOK_UP_S", 0.05)
    addresses = ["127.0.0.1", "127.0.0.2"]

    async def main() -> None:
        teachers = [FakeTeacher() for _ in range(3)]
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(SERVE[scheme](teachers[0]))
            port = int(first.rsplit(":", 1)[1])
            for n in (1, 2):
                await stack.enter_async_context(SERVE[scheme](teachers[n], port, f"127.0.0.{n + 1}"))
            named(monkeypatch, addresses)
            client = await stack.enter_async_context(
                AsyncTeacherClient(f"{scheme}://teacher.test:{port}", timeout_s=20)
            )
            await all_of(client, requests(40))
            assert [len(teacher.asked) > 5 for teacher in teachers] == [True, True, False]
            addresses[:] = ["127.0.0.2", "127.0.0.3"]
            await until(lambda: teachers[2].asked, lambda n: all_of(client, requests(20, n)))
            before = len(teachers[0].asked)
            addresses.clear()  # the name server is away: nothing changes
            await asyncio.sleep(0.3)
            await all_of(client, requests(40))
            assert len(teachers[0].asked) == before
            assert len(teachers[2].asked) > 5

    asyncio.run(main())


def test_the_synchronous_client_takes_several_too(serve: Any):
    async def main() -> None:
        teachers = [FakeTeacher(), FakeTeacher()]
        async with serve(teachers[0]) as first, serve(teachers[1]) as second:

            def work() -> None:
                with TeacherClient([first, second], timeout_s=20) as client:
                    assert client.url == f"{first},{second}"
                    for request in requests(20):
                        check(request, client.score(request))

            await asyncio.to_thread(work)
        assert all(teacher.asked for teacher in teachers)

    asyncio.run(main())


def test_pauses_are_in_proportion_to_what_they_wait_for():
    assert replica.PROBE_FIRST_S < replica.PROBE_MAX_S <= replicas.PROBE_TIMEOUT_S


def test_a_name_is_looked_up_by_one_task_for_callers_that_come_together(monkeypatch: pytest.MonkeyPatch):
    class Known:
        async def info(self, **_: Any) -> pb.TeacherInfo:
            return pb.TeacherInfo(fingerprint="f")

        async def close(self) -> None: ...

    async def slowly(url: str) -> list[Endpoint]:
        await asyncio.sleep(0)
        return [Endpoint(url)]

    monkeypatch.setattr(replicas, "endpoints_of", slowly)

    async def main() -> None:
        before = asyncio.all_tasks()
        several = replicas.Replicas(["grpc://teacher.test:1"], lambda endpoint: Known())
        await asyncio.gather(*(several.info(timeout_s=5, request_id="") for _ in range(3)))
        await several.close()
        assert asyncio.all_tasks() == before, "closed, it goes on looking up"

    asyncio.run(main())
