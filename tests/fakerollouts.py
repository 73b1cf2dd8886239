"""Rollout servers without vLLM or sockets: what httpx sends is answered here, as the routes of student_trainer.rollout.
vllm_side.routes do. A token says which weights it is from: sample n of version v is all tokens of value v.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httpx
import numpy as np
import safetensors.numpy

from student_trainer.rollout.servers.remote import Info
from student_trainer.rollout.transfer import Packed

STARTS = iter(range(10**9))


@dataclass
class FakeServer:
    url: str
    session: str = ""
    version: int = -1
    holds: str = ""  # digest of its weights
    instance: str = ""
    alive: bool = True
    key: str = ""
    gap: float = 0.0  # of its logprobs from the trainer's
    faults: list[Any] = field(default_factory=list)  # of samples, in order: "reset", "hang", a status, or a function
    sampled: list[int] = field(default_factory=list)  # uids it answered
    prompts: list[tuple[int, ...]] = field(default_factory=list)  # it was asked about
    running: int = 0
    most_running: int = 0
    taken: int = 0  # hand-overs
    pause_s: float = 0.0
    gate: asyncio.Event | None = None  # samples wait for it
    wrong_bytes: bool = False
    info: dict[str, Any] = field(default_factory=dict)  # in place of what it says of itself

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Anew, with weights that nobody named."""
        self.alive, self.instance, self.session, self.version = True, f"start-{next(STARTS)}", "", -1

    def kill(self) -> None:
        self.alive = False

    async def answer(self, path: str, body: dict[str, Any], key: str) -> httpx.Response:
        if not self.alive:
            raise httpx.ConnectError("connection refused")
        if self.key and key != f"Bearer {self.key}":
            return httpx.Response(401, json={"detail": "Unauthorized"})
        match path:
            case "/v1/rollout/info":
                return httpx.Response(200, json={**self._says(), **self.info})
            case "/v1/rollout/weights":
                self.session, self.version = body["session"], body["version"]
                self.holds = "other" if self.wrong_bytes else body["update"]["digest"]
                self.taken += 1
                return httpx.Response(200, json={"digest": self.holds})
            case "/v1/rollout/logprobs":
                return httpx.Response(200, json={"logprobs": [repr(-1.0 + self.gap)] * (len(body["token_ids"]) - 1)})
            case "/v1/rollout/sample":
                return await self._sample(body)
        return httpx.Response(404, json={"detail": "Not Found"})

    def _says(self) -> dict[str, Any]:
        return {
            "protocol": 1, "instance": self.instance, "session": self.session, "version": self.version, "model": "m",
            "dtype": "float32", "logit_width": 128, "max_model_len": 128, "transport": "gloo", "num_workers": 1,
        }  # fmt: skip

    async def _sample(self, body: dict[str, Any]) -> httpx.Response:
        if (body["session"], body["version"]) != (self.session, self.version):
            return httpx.Response(409, json={"detail": f"has {self.session}/{self.version}"})
        self.prompts.append(tuple(body["prompt_ids"]))
        fault = self.faults.pop(0) if self.faults else None
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if fault == "hang":
                await asyncio.sleep(60)
            if self.gate is not None:
                await self.gate.wait()
            await asyncio.sleep(self.pause_s)
        finally:
            self.running -= 1
        if not self.alive or fault == "reset":
            raise httpx.ReadError("connection reset by peer")
        if isinstance(fault, int):
            return httpx.Response(fault, json={"detail": "a fault"})
        draws = body["draws"]
        n = 1 + draws["uid"] % draws["max_new_tokens"]
        arrays = {
            "token_ids": np.full(n, self.version, dtype=np.int32),
            "behaviour_logprob": np.full(n, -0.5, dtype=np.float32),
            "full_logprob": np.full(n, -1.0, dtype=np.float32),
            "versions": np.full(n, self.version, dtype=np.int32),
            "topk_ids": np.zeros((n, min(body["keep_top_k"], draws["vocabulary_size"])), dtype=np.int32),
        }
        if callable(fault):
            arrays = fault(arrays)
        self.sampled.append(draws["uid"])
        return httpx.Response(200, content=safetensors.numpy.save(arrays, {"finish": "length"}))


class Fleet(httpx.AsyncBaseTransport):
    """All that answer, by URL."""

    def __init__(self, *servers: FakeServer) -> None:
        self.servers = {server.url: server for server in servers}
        self.calls: Counter[str] = Counter()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = f"{request.url.scheme}://{request.url.host}:{request.url.port}"
        self.calls[request.url.path] += 1
        body = json.loads(request.content) if request.content else {}
        return await self.servers[url].answer(request.url.path, body, request.headers.get("authorization", ""))


class FakeLink:
    """Tells the server the digest instead of sending bytes; counts links and hand-overs."""

    made: ClassVar[Counter[str]] = Counter()

    def __init__(self, url: str, info: Info, hold: threading.Event | None = None) -> None:
        FakeLink.made[url] += 1
        self._hold = hold

    def open(self, connect: Callable[..., Future[Any]]) -> None:
        return

    def send(self, packed: Packed, take: Callable[..., Future[Any]]) -> str:
        if self._hold is not None:
            assert self._hold.wait(20)
        return str(take({"digest": packed.digest}).result(20)["digest"])
