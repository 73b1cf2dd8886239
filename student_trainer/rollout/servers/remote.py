"""One rollout server over HTTP: its routes as calls, its failures as types. Retries nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx
import numpy as np
import safetensors
import safetensors.numpy

from student_trainer.rollout.vllm_side.request import PROTOCOL, Draws, Record, Weights
from teacher_api.types import FloatArray, IntArray

PROBE_TIMEOUT_S = 5.0


class Unavailable(Exception):
    """It does not answer, or not with what was asked for; another may, or it later."""


class HasOtherWeights(Exception):
    """It answers, but with other weights than those that were named."""


class Refused(ValueError):
    """It takes no such request, now or later."""


@dataclass(frozen=True, slots=True)
class Info:
    """What a server says of itself."""

    instance: str  # another after each start
    weights: Weights
    model: str
    dtype: str
    logit_width: int
    max_model_len: int
    transport: str
    num_workers: int


class Remote:
    """Calls from one event loop.

    Args:
        api_key: sent as a bearer token; "": none.
    """

    def __init__(self, url: str, api_key: str, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.url = url
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        # Every await is under a deadline of its caller's; as many connections as there are samples in flight.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        self._client = httpx.AsyncClient(
            base_url=f"{url}/v1/rollout", headers=headers, timeout=None, limits=limits, transport=transport
        )

    async def info(self) -> Info:
        found = await self._call("GET", "/info", None, PROBE_TIMEOUT_S)
        try:
            answer = dict(found.json())
        except (TypeError, ValueError) as error:
            raise Refused(
                f"{self.url} answers {found.text!r:.80} to /info, expected a rollout server's JSON"
            ) from error
        if answer.get("protocol") != PROTOCOL:
            raise Refused(f"{self.url} speaks protocol {answer.get('protocol')}, expected {PROTOCOL}: not this version")
        try:
            weights = Weights(answer["session"], answer["version"])
            return Info(weights=weights, **{name: answer[name] for name in Info.__slots__ if name != "weights"})
        except KeyError as error:
            raise Refused(f"{self.url} does not say its {error} at /info: not this version") from error

    async def connect(self, parameters: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Has its workers join a sender."""
        await self._call("POST", "/connect", {"parameters": dict(parameters)}, timeout_s)
        return {}

    async def take(self, weights: Weights, update: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Has it load what a sender sends meanwhile; it answers when it samples from that."""
        asked = {**asdict(weights), "update": dict(update), "timeout_s": timeout_s}
        return dict((await self._call("POST", "/weights", asked, timeout_s)).json())

    async def logprobs(self, weights: Weights, ids: IntArray, timeout_s: float) -> FloatArray:
        """See RolloutService.logprobs."""
        asked = {**asdict(weights), "token_ids": ids.tolist()}
        answer = (await self._call("POST", "/logprobs", asked, timeout_s)).json()
        return np.array([float(text) for text in answer["logprobs"]], dtype=np.float32)

    async def sample(
        self,
        weights: Weights,
        prompt_ids: IntArray,
        draws: Draws,
        stop_ids: Sequence[int],
        keep_top_k: int,
        timeout_s: float,
    ) -> Record:
        """One completion."""
        asked = {
            **asdict(weights),
            "prompt_ids": prompt_ids.tolist(),
            "draws": asdict(draws),
            "stop_ids": list(stop_ids),
            "keep_top_k": keep_top_k,
        }
        content = (await self._call("POST", "/sample", asked, timeout_s)).content
        try:
            finish = _metadata(content)["finish"]
            return Record.from_arrays(safetensors.numpy.load(content), finish)
        except (safetensors.SafetensorError, TypeError, KeyError, ValueError) as error:
            raise Unavailable(f"{self.url}: an answer that can't be read: {_line(error)}") from error

    async def close(self) -> None:
        await self._client.aclose()

    async def _call(self, method: str, path: str, body: Any, timeout_s: float) -> httpx.Response:
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._client.request(method, path, json=body)
        except TimeoutError as error:
            raise Unavailable(f"{self.url}: no answer within {timeout_s:g} s") from error
        except httpx.TransportError as error:
            raise Unavailable(f"{self.url}: {_line(error)}") from error
        if answer.status_code == 409:
            raise HasOtherWeights(f"{self.url}: {_detail(answer)}")
        if answer.status_code >= 500:
            raise Unavailable(f"{self.url}: {answer.status_code} {_detail(answer)}")
        if answer.status_code >= 300:
            raise Refused(f"rollout server {self.url} answered {answer.status_code} to {path}: {_detail(answer)}")
        return answer


def _metadata(content: bytes) -> dict[str, str]:
    """Of a safetensors file, whose reader for bytes leaves it out."""
    import json

    size = int.from_bytes(content[:8], "little")
    return dict(json.loads(content[8 : 8 + size])["__metadata__"])


def _detail(answer: httpx.Response) -> str:
    try:
        return str(answer.json().get("detail", ""))[:300]
    except (ValueError, AttributeError):
        return " ".join(answer.text.split())[:200]


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
