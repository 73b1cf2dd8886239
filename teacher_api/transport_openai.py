"""A stock `vllm serve` as a teacher: `/v1/completions` with token ids and `prompt_logprobs`, one sequence a request.
Answers are read, checked and sealed here, so that the client holds them against its questions as any other's. Nothing
in them says which teacher gave them: one that came over a new connection counts once the server has said again who it
is.

Imports httpx, as transport_http.py and generation.py do; no other module of this package does.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from teacher_api import info as info_api
from teacher_api import openai_info, tracing, wire
from teacher_api.errors import (
    CorruptResponse,
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidRequest,
    NotFound,
    TeacherError,
    TooLarge,
    Unavailable,
    Unsupported,
)
from teacher_api.openai_info import OpenAIOptions
from teacher_api.openai_rows import read_answer, scores_of, width_of_row
from teacher_api.tls import NO_TLS, ClientTls
from teacher_api.top_rows import TooFewIds
from teacher_api.transport import MAX_MESSAGE_BYTES, REQUEST_ID, seconds_of
from teacher_api.transport_http import context_of
from teacher_api.types import Completion, IntArray, ScoreRequest, Scores, TeacherInfo
from teacher_api.v1 import teacher_pb2 as pb

MAX_ERROR_BYTES = 64 << 10
FRAME_BYTES = 64 << 20
"""Of rows in one frame of a stream: far below what breaks protobuf (2 GiB)."""
PADDING_ALLOWANCE = 8
"""Entries asked beyond k where the logits have columns without a token. Trained models give those next to nothing; if
more of them than this are among a row's best, the sequence is asked again with room for all."""
ALL = -1  # of `prompt_logprobs`

_log = logging.getLogger("teacher_api")


@dataclass(frozen=True, slots=True)
class _Limits:
    logit_width: int
    max_logprobs: int


class OpenAITransport:
    """`url` is openai+http://host:port/v1 or openai+https://…; `?model=` and options.model mean the same."""

    def __init__(
        self, url: str, *, api_key: str | None, max_connections: int, options: OpenAIOptions, tls: ClientTls = NO_TLS
    ) -> None:
        place = openai_info.place_of(url)
        if place.model and options.model not in ("", place.model):
            raise ValueError(f"teacher URL {url!r}: names model {place.model!r}; expected {options.model!r}")
        self._root, self._wanted, self._options = place.root, options.model or place.model, options
        self._info: TeacherInfo | None = None
        self._opened = self._confirmed = 0  # connections that gave answers; those of them before the last handshake
        self._shaking = asyncio.Lock()
        self._limits: dict[str, _Limits] = {}  # by what the server says of itself
        self._max_logprobs = 0
        headers = {"accept": "application/json", "accept-encoding": "identity", "user-agent": "preceptor-client"}
        if api_key:
            headers["authorization"] = f"Bearer {api_key}"
        self._client = httpx.AsyncClient(
            headers=headers,
            verify=context_of(tls),
            timeout=httpx.Timeout(None),
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
        )

    async def close(self) -> None:
        await self._client.aclose()

    # ---- calls -------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _within(self, timeout_s: float) -> AsyncIterator[None]:
        """Holds all calls inside to one limit, and turns their failures into TeacherErrors."""
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TeacherError as error:
            self._opened += isinstance(error, Unavailable)
            raise
        except TimeoutError:
            raise DeadlineExceeded(f"{self._root}: no complete answer within {timeout_s:.3g} s") from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise InvalidRequest(f"{self._root}: {error}", field="url") from error
        except (httpx.TransportError, httpx.StreamError) as error:
            self._opened += 1
            raise Unavailable(f"{self._root}: {error or type(error).__name__}") from error

    async def _call(
        self, method: str, path: str, request_id: str, content: object = None, extensions: Any = None
    ) -> bytes:
        """The body of an answer of status 200; every other is raised."""
        headers = {REQUEST_ID: request_id, **tracing.headers()}
        body = None
        if content is not None:
            headers["content-type"] = "application/json"
            body = json.dumps(content, separators=(",", ":")).encode()
        url = self._root + path
        async with self._client.stream(method, url, content=body, headers=headers, extensions=extensions) as response:
            failed = response.status_code != 200
            limit = MAX_ERROR_BYTES if failed else MAX_MESSAGE_BYTES
            answer = bytearray()
            async for chunk in response.aiter_raw():
                answer += chunk
                if len(answer) > limit:
                    raise CorruptResponse(f"an answer of more than {limit} bytes")
            if failed:
                after_s = seconds_of(response.headers.get("retry-after"))
                raise openai_info.error_of(response.status_code, bytes(answer), after_s)
            return bytes(answer)

    async def _json(self, method: str, path: str, request_id: str, content: object = None) -> Any:
        body = await self._call(method, path, request_id, content)
        try:
            return json.loads(body)
        except ValueError as error:
            raise Unsupported(f"{path} answers no JSON; expected the base URL of a `vllm serve`") from error

    async def _complete(self, model: str, tokens: list[int], num_entries: int, request_id: str) -> bytes:
        question = {
            "model": model,
            "prompt": tokens,
            "max_tokens": 1,  # the least that vLLM takes
            "temperature": 0,
            "prompt_logprobs": num_entries,
        }
        return await self._call("POST", "/v1/completions", request_id, question, {"trace": self._trace})

    async def _trace(self, event: str, _details: object) -> None:
        self._opened += event == "connection.connect_tcp.complete"

    # ---- who is there ------------------------------------------------------------------------------------------------

    async def info(self, *, timeout_s: float, request_id: str, teacher: str = "") -> pb.TeacherInfo:
        if teacher:
            raise Unsupported(
                f"a stock server has models, got teacher {teacher!r:.80}; name it as ?model= in the URL",
                field="teacher",
            )
        async with self._within(timeout_s), self._shaking:
            return info_api.to_proto(await self._shake(request_id))

    async def _shake(self, request_id: str) -> TeacherInfo:
        opened = self._opened
        self._info = await self._handshake(request_id)
        self._confirmed = opened
        return self._info

    async def _handshake(self, request_id: str) -> TeacherInfo:
        card = openai_info.chosen_card(await self._json("GET", "/v1/models", request_id), self._wanted)
        try:
            version = str((await self._json("GET", "/version", request_id))["version"])
        except (NotFound, Unsupported, KeyError, TypeError):  # a gateway that passes /v1 on alone
            version = ""
        who = f"{card['id']} {card.get('root')} {card['max_model_len']} {version}"
        if who not in self._limits:
            await self._check_tokenizer(card["id"], request_id)
            self._limits[who] = await self._ask_limits(card["id"], request_id)
        limits = self._limits[who]
        self._max_logprobs = limits.max_logprobs
        return openai_info.info_of(
            card,
            version,
            logit_width=limits.logit_width,
            max_logprobs=limits.max_logprobs,
            options=self._options,
        )

    async def _ask_limits(self, model: str, request_id: str) -> _Limits:
        """From the answer to a request for all logprobs: the refusal names the limit, else one row has all columns."""
        try:
            body = await self._complete(model, [0, 0], ALL, request_id)
        except InvalidRequest as error:
            return _Limits(*openai_info.limits_of_refusal(error))
        width = width_of_row(body)
        return _Limits(width, width)

    async def _check_tokenizer(self, model: str, request_id: str) -> None:
        tokenizer = self._options.any_tokenizer
        if tokenizer is None:
            return
        question = {"model": model, "prompt": openai_info.KNOWN_TEXT, "add_special_tokens": False}
        try:
            answer = await self._json("POST", "/tokenize", request_id, question)
        except (NotFound, Unsupported):
            _log.warning("%s has no /tokenize: its tokenizer could not be held against the given one", self._root)
            return
        openai_info.check_known_text(tokenizer, answer.get("tokens") if isinstance(answer, dict) else None)

    async def _teacher(self, request: ScoreRequest, request_id: str) -> TeacherInfo:
        """Who answers: asked again where connections were made or lost, since a restart may have brought another."""
        async with self._shaking:
            info = self._info
            if info is None or self._confirmed < self._opened:
                info = await self._shake(request_id)
        if request.expect_fingerprint not in ("", info.fingerprint):
            raise FingerprintMismatch(
                f"expected teacher {request.expect_fingerprint!r:.80}, at {self._root} is {info.fingerprint!r:.80} "
                f"({info.model_name!r:.80})"
            )
        return info

    # ---- scores ------------------------------------------------------------------------------------------------------

    async def score(self, request: pb.ScoreRequest, *, timeout_s: float, request_id: str) -> pb.ScoreResponse:
        frames = await self._frames(request, timeout_s, request_id, max_rows_bytes=None)
        return pb.ScoreResponse(fingerprint=request.expect_fingerprint, request_id=request_id, frames=frames)

    async def stream(
        self, request: pb.ScoreRequest, *, timeout_s: float, request_id: str
    ) -> AsyncIterator[pb.ScoreFrame]:
        for frame in await self._frames(request, timeout_s, request_id, max_rows_bytes=FRAME_BYTES):
            yield frame

    async def head(
        self, request: pb.GetHeadRequest, *, timeout_s: float, request_id: str
    ) -> AsyncIterator[pb.HeadChunk]:
        raise Unsupported("a stock vllm serve gives no output head")
        yield  # what makes this a stream, as every transport's is

    async def _frames(
        self, message: pb.ScoreRequest, timeout_s: float, request_id: str, *, max_rows_bytes: int | None
    ) -> list[pb.ScoreFrame]:
        decoded = wire.decode_request(message)
        request = decoded.request
        frames: list[pb.ScoreFrame] = []
        async with self._within(timeout_s):
            info = await self._teacher(request, request_id)
            openai_info.check_request(request, info)
            for i, entry in enumerate(decoded.entries):  # one, as info.max_completions says
                if isinstance(entry, TeacherError):
                    raise entry
                token_ids, positions = self._sequence(request, entry, f"completions[{i}]", info)
                scores = await self._scores(request, entry.id, token_ids, positions, info, request_id)
                await self._teacher(request, request_id)  # before they count
                key = wire.seal_key(token_ids, positions, None, request.options, info.fingerprint)
                frames.extend(
                    wire.encode_scores(
                        scores, options=request.options, candidates=None, key=key, max_rows_bytes=max_rows_bytes
                    )
                )
        return frames

    def _sequence(
        self, request: ScoreRequest, completion: Completion, field: str, info: TeacherInfo
    ) -> tuple[IntArray, IntArray]:
        """The whole sequence and its scored positions. Raises InvalidRequest or TooLarge, as a server of ours would."""
        token_ids, positions = wire.resolve(request, completion, field)
        if len(token_ids) > info.max_sequence_tokens:
            raise TooLarge(
                f"prompt and completion have {len(token_ids)} tokens; this server scores {info.max_sequence_tokens}",
                field=f"{field}.token_ids",
            )
        if int(token_ids.max()) >= info.tokenizer_size:
            raise InvalidRequest(
                f"id {token_ids.max()} in the sequence; expected ids below {info.tokenizer_size}",
                field=f"{field}.token_ids",
            )
        return token_ids, positions

    async def _scores(
        self,
        request: ScoreRequest,
        completion_id: str,
        token_ids: IntArray,
        positions: IntArray,
        info: TeacherInfo,
        request_id: str,
    ) -> Scores:
        top_k, padding = request.options.top_k, info.logit_width - info.tokenizer_size
        most = min(self._max_logprobs, info.logit_width)
        if top_k in ("all", 0):
            attempts = [info.logit_width if top_k == "all" else 0]
        else:
            attempts = sorted({min(int(top_k) + extra, most) for extra in (min(padding, PADDING_ALLOWANCE), padding)})
        asked = token_ids[: int(positions[-1]) + 1]  # what follows the last scored position changes nothing
        for num_entries in attempts:
            body = await self._complete(info.model_name, asked.tolist(), num_entries, request_id)
            rows = read_answer(body, asked, positions, num_entries)
            try:
                return scores_of(rows, completion_id, positions, request.options, info)
            except TooFewIds:
                continue
        raise TooLarge(
            f"the {most} entries that the server gives of a row hold fewer than {top_k} ids with a token: its logits "
            f"have {padding} columns without one; start it with --max-logprobs that many higher",
            field="options.top_k",
        )
