"""TeacherClient and AsyncTeacherClient: scores from a teacher over gRPC or HTTP, or from a stock `vllm serve`, by the
scheme of its URL.

The asynchronous client is the implementation; the synchronous one drives it on a private thread with an event loop of
its own, and so does not survive a fork: make it in the process that uses it. Retries live in asking.py.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

from teacher_api import info as info_api
from teacher_api.asking import Answers, Asker, Deadline, Part, Tell, parts_of
from teacher_api.compression import FEATURE, Compression
from teacher_api.endpoints import Endpoint, open_transport, urls_of
from teacher_api.errors import FingerprintMismatch, InvalidRequest, TeacherError, Unsupported, unknown_teacher
from teacher_api.head import Head
from teacher_api.head_download import Receive, head_of
from teacher_api.openai_info import OpenAIOptions
from teacher_api.replicas import Replicas
from teacher_api.tls import NO_TLS, ClientTls
from teacher_api.transport import Transport
from teacher_api.types import CallMetadata, ScoreRequest, Scores, TeacherInfo
from teacher_api.wire import check_options

T = TypeVar("T")


class ClientOptions(TypedDict, total=False):
    """What the clients take besides a URL; AsyncTeacherClient says what each means."""

    api_key: str | None
    timeout_s: float
    attempt_timeout_s: float
    max_concurrency: int
    expect_fingerprint: str
    metadata: CallMetadata | None
    teacher: str
    compression: Compression
    tls: ClientTls


class AsyncTeacherClient:
    """Scores from one teacher. `async with AsyncTeacherClient(url) as teacher: …`

    Args:
        url: grpc://host:port, grpcs://host:port, http://host:port or https://host; openai+http://host:port/v1 or
            openai+https://… for a stock `vllm serve` (see `openai`). Several, with commas between them or as a
            sequence, are replicas of one teacher, as are the addresses of a name that has several.
        api_key: sent as a bearer token.
        timeout_s: of one call, retries included, unless the request has its own.
        attempt_timeout_s: after which one attempt is given up and the next one made.
        max_concurrency: requests in flight at a time.
        expect_fingerprint: of the teacher; empty: of the one that answers first. Any other is refused from then on.
        metadata: of requests that have none.
        teacher: of requests that name none, and of `info` and `expect_fingerprint`; empty: the server's base.
        stock: what a stock server does not say of itself; only with an openai+ URL.
        compression: of large requests and of answers; "zstd" needs the extra of that name, and a teacher with the
            feature. It saves few bytes of logprobs (benchmarks/README.md, "compression"), and never changes them.
        tls: certificate and authorities of this client's own, with URLs that speak TLS.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        api_key: str | None = None,
        timeout_s: float = 300.0,
        attempt_timeout_s: float = 60.0,
        max_concurrency: int = 8,
        expect_fingerprint: str = "",
        metadata: CallMetadata | None = None,
        teacher: str = "",
        stock: OpenAIOptions | None = None,
        compression: Compression = "none",
        tls: ClientTls = NO_TLS,
    ) -> None:
        for name, value in (("timeout_s", timeout_s), ("attempt_timeout_s", attempt_timeout_s)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; expected a finite number above 0")
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency is {max_concurrency}; expected 1 or more")
        urls = urls_of(url)
        self.url = ",".join(urls)
        self._timeout_s = timeout_s
        self._max_concurrency = max_concurrency
        self._teacher_name = teacher
        self._expected = {teacher: expect_fingerprint}  # by teacher; empty or missing: any
        self._metadata = metadata or CallMetadata()
        self._known: dict[str, TeacherInfo] = {}
        self._handshake = asyncio.Lock()
        self._compression = compression

        def open_one(endpoint: Endpoint) -> Transport:
            return open_transport(
                endpoint,
                api_key=api_key,
                max_connections=max_concurrency,
                stock=stock,
                compression=compression,
                tls=tls,
            )

        is_stock = urls[0].startswith("openai+")
        self._transport = open_one(Endpoint(urls[0])) if is_stock else Replicas(urls, open_one)
        self._asker = Asker(self._transport, attempt_timeout_s=attempt_timeout_s, max_concurrency=max_concurrency)

    @classmethod
    def openai(
        cls,
        url: str,
        *,
        model: str = "",
        tokenizer: Any = None,
        assumed_tokenizer: Any = None,
        **options: Unpack[ClientOptions],
    ) -> AsyncTeacherClient:
        """A client of a stock `vllm serve`, which scores slower and offers less: docs/stock-vllm.md.

        Args:
            url: http://host:port/v1 or https://…
            model: the server's name for the teacher, where it has several.
            tokenizer: the teacher's, as a transformers tokenizer made from its own files.
            assumed_tokenizer: instead, one that the teacher's is taken to be equal to.
            options: as of the constructor.
        """
        return cls(_openai_url(url), stock=OpenAIOptions(model, tokenizer, assumed_tokenizer), **options)

    async def __aenter__(self) -> AsyncTeacherClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._transport.close()

    async def info(self) -> TeacherInfo:
        """What the teacher says of itself now.

        Raises:
            FingerprintMismatch: it is not the teacher that this client began with.
            TeacherError: it can't be reached within `timeout_s`, or refuses.
        """
        return await self._ask_info(Deadline.after(self._timeout_s), self._teacher_name)

    async def _ask_info(self, deadline: Deadline, name: str) -> TeacherInfo:
        found = info_api.from_proto(await self._asker.info(deadline, name))
        if name and name not in found.teachers:  # a server that knows of no adapters describes its base
            raise unknown_teacher(name, found.teachers)
        expected = self._expected.get(name)
        if expected and found.fingerprint != expected:
            raise FingerprintMismatch(
                f"expected teacher {expected!r:.80}, at {self.url} is {found.fingerprint!r:.80} "
                f"({found.model_name!r:.80})"
            )
        if self._compression == "zstd" and FEATURE not in found.features:
            raise Unsupported(
                f"the teacher at {self.url} does not offer zstd; it offers {', '.join(found.features)}",
                field="compression",
            )
        self._expected[name], self._known[name] = found.fingerprint, found
        return found

    async def _teacher(self, deadline: Deadline, name: str) -> TeacherInfo:
        async with self._handshake:
            return self._known.get(name) or await self._ask_info(deadline, name)

    async def head(self, *, cache_dir: str | Path | None = None) -> Head:
        """The teacher's output head, which makes its whole distribution out of hidden states (teacher_api.head). Within
        `timeout_s`, however large it is.

        Args:
            cache_dir: where to look for it and to leave it, under the teacher's fingerprint and the file's digest.

        Raises:
            PermissionDenied: the teacher does not share it, or not with this key.
            FingerprintMismatch: it is not the teacher that this client began with.
            TeacherError: it can't be had, whole and undamaged, within `timeout_s`.
        """
        deadline = Deadline.after(self._timeout_s)
        info = await self._ask_info(deadline, "")  # adapters have their base's

        async def ask(receive: Receive) -> None:
            await self._asker.head(receive, info.fingerprint, deadline)

        return await head_of(info, ask, None if cache_dir is None else Path(cache_dir))

    @overload
    async def score(self, request: ScoreRequest, *, return_errors: Literal[False] = False) -> list[Scores]: ...

    @overload
    async def score(self, request: ScoreRequest, *, return_errors: Literal[True]) -> list[Scores | TeacherError]: ...

    async def score(
        self, request: ScoreRequest, *, return_errors: bool = False
    ) -> list[Scores] | list[Scores | TeacherError]:
        """Scores of each completion, in the order asked. Requests above the teacher's limits are cut to them.

        Args:
            return_errors: put a completion's error in its place instead of raising the first one.

        Raises:
            InvalidRequest: the request can't be asked as it is; names the field.
            TeacherError: of the first completion that has no scores after all retries.
        """
        answers = await self._answers(request, streamed=False)
        return answers if return_errors else _scores_only(answers)

    async def score_many(self, requests: Iterable[ScoreRequest] | AsyncIterable[ScoreRequest]) -> AsyncIterator[Scores]:
        """Scores of any number of requests, over streams, each completion's as soon as it is scored. Completion ids
        should be unique over all of them: they are all that tells the answers apart.

        At most `max_concurrency` requests are taken from `requests` ahead of what has been consumed. Each has
        `timeout_s` of its own; the time that its answer waits to be consumed does not count.

        Raises:
            TeacherError: of the first completion that has no scores after all retries; the rest is cancelled.
        """
        source = _as_async(requests)
        running: set[asyncio.Task[Any]] = set()
        coming: asyncio.Task[ScoreRequest | None] | None = None  # the next request, while it is being waited for
        news: asyncio.Queue[Scores | TeacherError | asyncio.Task[Any]] = asyncio.Queue()
        exhausted = False
        try:
            while True:
                if coming is None and not exhausted and len(running) < self._max_concurrency:
                    coming = asyncio.create_task(_next(source))
                    coming.add_done_callback(news.put_nowait)
                if coming is None and not running:
                    break
                came = await news.get()
                if coming is not None and came is coming:
                    request, coming = coming.result(), None
                    if request is None:
                        exhausted = True
                        continue
                    task = asyncio.create_task(self._answers(request, streamed=True, tell=news.put_nowait))
                    # After its answers: they are consumed before its place is free.
                    task.add_done_callback(news.put_nowait)
                    running.add(task)
                elif isinstance(came, asyncio.Task):
                    running.discard(came)
                    came.result()
                elif isinstance(came, TeacherError):
                    raise came
                else:
                    yield came
        finally:
            tasks = [*running, *(() if coming is None else (coming,))]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answers(
        self, request: ScoreRequest, *, streamed: bool, tell: Tell | None = None
    ) -> list[Scores | TeacherError]:
        _check_shape(request)
        deadline = Deadline.after(self._timeout_s if request.timeout_s is None else request.timeout_s)
        request = replace(request, teacher=request.teacher or self._teacher_name)
        info = await self._teacher(deadline, request.teacher)
        if request.expect_fingerprint not in ("", info.fingerprint):
            raise FingerprintMismatch(
                f"the request expects teacher {request.expect_fingerprint!r:.80}, at {self.url} is "
                f"{info.fingerprint!r:.80}"
            )
        if request.metadata == CallMetadata():
            request = replace(request, metadata=self._metadata)

        async def ask(part: Part) -> Answers:
            return await self._asker.ask(request, part, info.fingerprint, deadline, tell)

        parts = list(parts_of(request, info, streamed=streamed))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(part)) for part in parts]
        answers = {name: answer for task in tasks for name, answer in task.result().items()}
        return [answers[completion.id] for completion in request.completions]


def _openai_url(url: str) -> str:
    return url if url.startswith("openai+") else f"openai+{url}"


def _check_shape(request: ScoreRequest) -> None:
    """What would make answers ambiguous, and is wrong for every teacher."""
    if not request.completions:
        raise InvalidRequest("empty; expected at least one completion", field="completions")
    check_options(request.options)
    if request.timeout_s is not None and not 0 < request.timeout_s < float("inf"):
        raise InvalidRequest(f"{request.timeout_s}; expected a finite number above 0", field="timeout_s")
    if not _is_text(request.teacher):
        raise InvalidRequest(f"{request.teacher!r:.80}; expected text", field="teacher")
    seen: set[str] = set()
    for i, completion in enumerate(request.completions):
        if not _is_text(completion.id):
            raise InvalidRequest(f"{completion.id!r:.80}; expected text", field=f"completions[{i}].id")
        if completion.id in seen:
            raise InvalidRequest(f"{completion.id!r:.80} is there twice", field=f"completions[{i}].id")
        seen.add(completion.id)


def _is_text(value: object) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _scores_only(answers: list[Scores | TeacherError]) -> list[Scores]:
    scores = []
    for answer in answers:
        if isinstance(answer, TeacherError):
            raise answer
        scores.append(answer)
    return scores


async def _next(source: AsyncIterator[T]) -> T | None:
    """None at the end."""
    return await anext(source, None)


async def _as_async(items: Iterable[T] | AsyncIterable[T]) -> AsyncIterator[T]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


class TeacherClient:
    """The synchronous face of AsyncTeacherClient, with the same arguments. Threads may share it; a fork may not.

    `with TeacherClient(url) as teacher: …`, or `close()`.
    """

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        api_key: str | None = None,
        timeout_s: float = 300.0,
        attempt_timeout_s: float = 60.0,
        max_concurrency: int = 8,
        expect_fingerprint: str = "",
        metadata: CallMetadata | None = None,
        teacher: str = "",
        stock: OpenAIOptions | None = None,
        compression: Compression = "none",
        tls: ClientTls = NO_TLS,
    ) -> None:
        async def made() -> AsyncTeacherClient:
            return AsyncTeacherClient(
                url,
                api_key=api_key,
                timeout_s=timeout_s,
                attempt_timeout_s=attempt_timeout_s,
                max_concurrency=max_concurrency,
                expect_fingerprint=expect_fingerprint,
                metadata=metadata,
                teacher=teacher,
                stock=stock,
                compression=compression,
                tls=tls,
            )

        self.url = ",".join(urls_of(url))
        self._max_concurrency = max_concurrency
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher-client", daemon=True)
        self._thread.start()
        try:
            self._client = self._run(made())
        except BaseException:
            self._stop()
            raise

    @classmethod
    def openai(
        cls,
        url: str,
        *,
        model: str = "",
        tokenizer: Any = None,
        assumed_tokenizer: Any = None,
        **options: Unpack[ClientOptions],
    ) -> TeacherClient:
        """As AsyncTeacherClient.openai."""
        return cls(_openai_url(url), stock=OpenAIOptions(model, tokenizer, assumed_tokenizer), **options)

    def _submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("this TeacherClient is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:  # such as Ctrl-C in the waiting thread: nothing goes on behind it
            future.cancel()
            raise

    def __enter__(self) -> TeacherClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is in flight and the private thread. Idempotent."""
        if self._loop.is_closed():
            return
        with suppress(TeacherError):
            self._run(self._ended())
        self._stop()

    async def _ended(self) -> None:
        """What is in flight gives its connections back before they are closed."""
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        pending = asyncio.all_tasks(self._loop)
        for task in pending:
            task.cancel()
        if pending:
            self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def info(self) -> TeacherInfo:
        """As AsyncTeacherClient.info."""
        return self._run(self._client.info())

    def head(self, *, cache_dir: str | Path | None = None) -> Head:
        """As AsyncTeacherClient.head."""
        return self._run(self._client.head(cache_dir=cache_dir))

    @overload
    def score(self, request: ScoreRequest, *, return_errors: Literal[False] = False) -> list[Scores]: ...

    @overload
    def score(self, request: ScoreRequest, *, return_errors: Literal[True]) -> list[Scores | TeacherError]: ...

    def score(
        self, request: ScoreRequest, *, return_errors: bool = False
    ) -> list[Scores] | list[Scores | TeacherError]:
        """As AsyncTeacherClient.score."""
        answers = self._run(self._client._answers(request, streamed=False))
        return answers if return_errors else _scores_only(answers)

    def score_many(self, requests: Iterable[ScoreRequest]) -> Iterator[Scores]:
        """As AsyncTeacherClient.score_many; `requests` is iterated in the calling thread."""
        source = iter(requests)
        running: set[concurrent.futures.Future[list[Scores | TeacherError]]] = set()
        news: SimpleQueue[Scores | TeacherError | concurrent.futures.Future[Any]] = SimpleQueue()
        exhausted = False
        try:
            while running or not exhausted:
                while not exhausted and len(running) < self._max_concurrency:
                    request = next(source, None)
                    if request is None:
                        exhausted = True
                    else:
                        future = self._submit(self._client._answers(request, streamed=True, tell=news.put))
                        future.add_done_callback(news.put)
                        running.add(future)
                if not running:
                    break
                came = news.get()
                if isinstance(came, concurrent.futures.Future):
                    running.discard(came)
                    came.result()
                elif isinstance(came, TeacherError):
                    raise came
                else:
                    yield came
        finally:
            for future in running:
                future.cancel()
