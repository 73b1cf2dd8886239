"""A client of a teacher that writes text (`teacher-serve --generate`): a prompt at a time over `/v1/completions`, each
answer checked, retried as scores are (asking.py). HTTP only: the binary contract has no message for text.

Shape legend: T tokens of a prompt, N tokens of a completion.
"""

from __future__ import annotations

import asyncio
import json
import math
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from teacher_api import errors
from teacher_api.asking import Deadline, retrying
from teacher_api.endpoints import check_key
from teacher_api.errors import CorruptResponse, DeadlineExceeded, InvalidRequest, TeacherError, Unavailable, Unsupported
from teacher_api.info import from_proto
from teacher_api.tls import NO_TLS, ClientTls
from teacher_api.transport import MAX_MESSAGE_BYTES, REQUEST_ID, error_of_problem, seconds_of
from teacher_api.transport_http import HttpTransport, context_of
from teacher_api.types import TeacherInfo

MAX_ERROR_BYTES = 64 << 10
FEATURE = "generate"

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn; names and meanings are those of docs/openai.md."""

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Written:
    """One completion."""

    text: str
    token_ids: list[int]  # [N]; an id that ended the text is the last of them
    logprobs: list[float]  # [N] log p(token | everything before it) of the teacher, T = 1, natural log
    finish_reason: str  # "stop" or "length"
    stop_reason: int | str | None  # what ended it, where that is not the tokenizer's own end


@dataclass(frozen=True, slots=True)
class Answer:
    prompt_token_ids: list[int]  # [T]
    completions: list[Written]  # n


class AsyncGenerationClient:
    """Completions from one teacher. `async with AsyncGenerationClient(url) as teacher: …`

    Args:
        url: http://host:port or https://host.
        api_key: sent as a bearer token.
        timeout_s: of one prompt, retries included.
        attempt_timeout_s: after which one attempt is given up and the next one made.
        max_concurrency: connections at most.
        tls: certificate and authorities of this client's own, with an https:// URL.

    Raises:
        ValueError: the URL has another scheme or no host, a limit is not above 0, or no header can hold the key.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 3600.0,
        attempt_timeout_s: float = 900.0,
        max_concurrency: int = 8,
        tls: ClientTls = NO_TLS,
    ) -> None:
        split = urlsplit(url)
        if split.scheme not in ("http", "https") or not split.hostname:
            raise ValueError(f"teacher URL {url!r}: expected http://host:port or https://…; text comes over HTTP only")
        for name, value in (("timeout_s", timeout_s), ("attempt_timeout_s", attempt_timeout_s)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}; expected a finite number above 0")
        tls.check_url(url)
        check_key(api_key)
        self._url = url.rstrip("/")
        self._timeout_s, self._attempt_timeout_s = timeout_s, attempt_timeout_s
        self._info = HttpTransport(url, api_key=api_key, max_connections=1, tls=tls)
        headers = {"accept": "application/json", "user-agent": "preceptor-client"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        limits = httpx.Limits(max_connections=max_concurrency, max_keepalive_connections=max_concurrency)
        verify = context_of(tls)
        self._client = httpx.AsyncClient(headers=headers, verify=verify, timeout=httpx.Timeout(None), limits=limits)

    async def __aenter__(self) -> AsyncGenerationClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._info.close()
        await self._client.aclose()

    async def info(self) -> TeacherInfo:
        """What the teacher says of itself. Raises TeacherError; Unsupported where it does not write."""

        async def once() -> TeacherInfo:
            limit_s = self._limit_s(deadline)
            return from_proto(await self._info.info(timeout_s=limit_s, request_id=uuid.uuid4().hex))

        deadline = Deadline.after(self._timeout_s)
        info = await retrying(once, deadline)
        if FEATURE not in info.features:
            raise Unsupported(
                f"{info.model_name} at {self._url} only scores; expected a server that was started with --generate",
                field="url",
            )
        return info

    async def generate(self, prompt: Prompt, sampling: Sampling, fingerprint: str) -> Answer:
        """The completions of one prompt.

        Args:
            prompt: text, in the teacher's tokenizer, or token ids.
            fingerprint: of the teacher that is to write them.

        Raises:
            FingerprintMismatch: another teacher answered.
            TeacherError: there is no answer after all retries. Of a prompt that can't be written on, `field` begins
                with `prompt`.
        """
        deadline = Deadline.after(self._timeout_s)
        body = {
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            **asdict(sampling),
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        sent = json.dumps(body, separators=(",", ":")).encode()

        async def once() -> Answer:
            limit_s = self._limit_s(deadline)
            return answer_of(await self._post(sent, limit_s), sampling, fingerprint)

        return await retrying(once, deadline)

    def _limit_s(self, deadline: Deadline) -> float:
        return max(min(self._attempt_timeout_s, deadline.left_s()), 1e-3)

    async def _post(self, body: bytes, limit_s: float) -> Any:
        headers = {REQUEST_ID: uuid.uuid4().hex, "content-type": "application/json"}
        url = f"{self._url}/v1/completions"
        try:
            async with (
                asyncio.timeout(limit_s),
                self._client.stream("POST", url, content=body, headers=headers) as response,
            ):
                failed = response.status_code != 200
                answer, limit = bytearray(), MAX_ERROR_BYTES if failed else MAX_MESSAGE_BYTES
                async for chunk in response.aiter_bytes():
                    answer += chunk
                    if len(answer) > limit:
                        raise CorruptResponse(f"an answer of more than {limit} bytes")
                if failed:
                    raise _error_of(response, bytes(answer))
        except TeacherError:
            raise
        except TimeoutError:
            # Worth another attempt, as long as the prompt's own time is not over.
            raise Unavailable(f"{self._url}: no complete answer within {limit_s:.3g} s") from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise InvalidRequest(f"{self._url}: {error}", field="url") from error
        except (httpx.TransportError, httpx.StreamError) as error:
            raise Unavailable(f"{self._url}: {error or type(error).__name__}") from error
        try:
            return json.loads(answer)
        except ValueError:
            raise CorruptResponse("the answer is no JSON") from None


_BY_TYPE: dict[str, type[TeacherError]] = {
    "BadRequestError": errors.InvalidRequest,
    "AuthenticationError": errors.Unauthenticated,
    "PermissionDeniedError": errors.PermissionDenied,
    "NotFoundError": errors.NotFound,
    "RequestTooLargeError": errors.TooLarge,
    "RateLimitError": errors.Overloaded,
    "ServiceUnavailableError": errors.Unavailable,
    "GatewayTimeoutError": DeadlineExceeded,
    "InternalServerError": errors.InternalError,
}


def _error_of(response: httpx.Response, body: bytes) -> TeacherError:
    """The error that an answer other than 200 stands for, in the form of docs/openai.md or as a proxy wrote it."""
    after = response.headers.get("retry-after")
    try:
        told = json.loads(body)["error"]
        cls = _BY_TYPE[told["type"]]
        return cls(str(told["message"]), field=str(told["param"] or ""), retry_after_s=seconds_of(after))
    except (ValueError, TypeError, KeyError):
        return error_of_problem(response.status_code, response.headers.get("content-type", ""), body, after)


def answer_of(document: Any, sampling: Sampling, fingerprint: str) -> Answer:
    """A completions answer as it must be.

    Raises:
        FingerprintMismatch: it is from another teacher.
        CorruptResponse: a completion is missing, or something in one, or its parts don't fit each other.
    """
    try:
        found = document["system_fingerprint"]
        if found != fingerprint:
            raise errors.FingerprintMismatch(f"expected teacher {fingerprint!r:.80}, the answer is from {found!r:.80}")
        choices = document["choices"]
        prompt_ids = _ids(choices[0]["prompt_token_ids"])
        completions = [_written(choice, sampling) for choice in choices]
        indices = [choice["index"] for choice in choices]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise CorruptResponse(f"the answer is no completions answer: {type(error).__name__}: {error}") from None
    if indices != list(range(sampling.n)):
        raise CorruptResponse(f"completions {indices}; expected 0 to {sampling.n - 1}")
    return Answer(prompt_ids, completions)


def _written(choice: Any, sampling: Sampling) -> Written:
    ids, logprobs = _ids(choice["token_ids"]), [float(value) for value in choice["logprobs"]["token_logprobs"]]
    if not 1 <= len(ids) <= sampling.max_tokens or len(logprobs) != len(ids):
        raise CorruptResponse(
            f"{len(ids)} tokens and {len(logprobs)} logprobs; expected as many of each, 1 to {sampling.max_tokens}"
        )
    if not all(math.isfinite(value) and value < 1e-3 for value in logprobs):
        raise CorruptResponse("logprobs are not finite, or above 0")
    text, reason = choice["text"], choice["finish_reason"]
    if not isinstance(text, str) or reason not in ("stop", "length"):
        raise CorruptResponse(f"a completion without text, or ended by {reason!r:.40}; expected stop or length")
    return Written(text, ids, logprobs, reason, choice["stop_reason"])


def _ids(values: Any) -> list[int]:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError("token ids that are not whole numbers from 0 on")
    return values
