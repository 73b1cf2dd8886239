"""A server of `vllm serve`'s API: it answers as vLLM 0.32 does (shapes and refusals read from its source) with the
float64 log-softmaxes of whatever model a test gives it. vLLM's own is started by benchmarks/processes.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
from ports import free_port

Model = Callable[[list[int]], np.ndarray]
"""Token ids [T] -> float64 [T, W]; row t is log p(· | tokens before t)."""


class Refusal(Exception):
    """An answer other than 200: status, body, headers."""

    def __init__(self, status: int, body: object, **headers: str) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers


class Cut(Exception):
    """The connection breaks."""


def refusal(status: int, message: str, kind: str = "BadRequestError", **headers: str) -> Refusal:
    return Refusal(status, {"error": {"message": message, "type": kind, "param": None, "code": status}}, **headers)


@dataclass
class FakeVllm:
    model: Model
    width: int
    max_logprobs: int = 20  # -1: all, as the flag has it
    max_model_len: int = 64
    name: str = "org/teacher"
    root: str = "/models/teacher"
    version: str = "0.32.0"
    adapters: tuple[str, ...] = ()
    key: str = ""
    tokenize: Callable[[str], list[int]] | None = None
    faults: list[Any] = field(default_factory=list)  # of scoring calls, in order: Refusal, Cut, "hang", or a change
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    traces: list[str] = field(default_factory=list)  # traceparent of each call that had one
    in_flight: int = 0
    most_in_flight: int = 0
    hold: asyncio.Event | None = None  # scoring calls wait for it

    async def answer(self, method: str, path: str, body: bytes, authorization: str) -> object:
        self.keys.add(authorization)
        if path.startswith("/v1") and self.key and authorization != f"Bearer {self.key}":
            raise Refusal(401, {"error": "Unauthorized"})
        match (method, path):
            case ("GET", "/v1/models"):
                return {
                    "object": "list",
                    "data": [self._card(self.name, self.root), *map(self._adapter, self.adapters)],
                }
            case ("GET", "/version"):
                return {"version": self.version}
            case ("POST", "/v1/completions"):
                return await self._completion(json.loads(body))
            case ("POST", "/tokenize") if self.tokenize is not None:
                ids = self.tokenize(json.loads(body)["prompt"])
                return {"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids, "token_strs": None}
        raise Refusal(404, {"detail": "Not Found"})

    def _card(self, name: str, root: str, parent: str | None = None) -> dict[str, Any]:
        permission = [{"id": f"modelperm-{id(object())}", "object": "model_permission", "allow_sampling": True}]
        card = {"id": name, "object": "model", "created": id(object()), "owned_by": "vllm", "root": root}
        return {**card, "parent": parent, "max_model_len": self.max_model_len, "permission": permission}

    def _adapter(self, name: str) -> dict[str, Any]:
        return self._card(name, f"/adapters/{name}", self.name)

    async def _completion(self, request: dict[str, Any]) -> object:
        tokens, count = request["prompt"], request["prompt_logprobs"]
        assert (request["max_tokens"], request["temperature"], request.get("stream", False)) == (1, 0, False)
        if request["model"] not in (self.name, *self.adapters):
            raise refusal(404, f"The model `{request['model']}` does not exist.", "NotFoundError")
        if len(tokens) >= self.max_model_len:
            raise refusal(
                400,
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{len(tokens)} input tokens.",
            )
        limit = self.width if self.max_logprobs == -1 else self.max_logprobs
        entries = self.width if count == -1 else count
        if entries > limit:
            text = f"Requested prompt logprobs of {entries}, which is greater than max allowed: {limit}"
            raise refusal(400, text)
        change = None
        if count != -1:
            self.asked.append(request)
            change = self.faults.pop(0) if self.faults else None
        if isinstance(change, Exception):
            raise change
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if change == "hang":
                await asyncio.sleep(30)
            if self.hold is not None and count != -1:
                await self.hold.wait()
        finally:
            self.in_flight -= 1
        answer = self._answered(request, entries)
        if callable(change):
            return change(answer)
        return answer

    def _answered(self, request: dict[str, Any], entries: int) -> dict[str, Any]:
        tokens = request["prompt"]
        choice = {
            "index": 0,
            "text": " x",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": None,
            "prompt_logprobs": [None, *(self._row(row, t, entries) for row, t in self._rows(tokens))],
            "prompt_token_ids": None,
        }
        usage = {"prompt_tokens": len(tokens), "total_tokens": len(tokens) + 1, "completion_tokens": 1}
        return {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": 1,
            "model": request["model"],
            "choices": [choice],
            "usage": {**usage, "prompt_tokens_details": None},
        }

    def _rows(self, tokens: list[int]) -> list[tuple[np.ndarray, int]]:
        return list(zip(self.model(tokens)[1:], tokens[1:], strict=True))

    def _row(self, logp: np.ndarray, token: int, entries: int) -> dict[str, Any]:
        """As vLLM fills it: the actual token, then the most likely; one that is there again takes the later rank."""
        logp = logp.astype(np.float32)
        best = np.argsort(-logp, kind="stable")[:entries].tolist()
        ranks = [int((logp >= logp[token]).sum()), *range(1, entries + 1)]
        row: dict[str, Any] = {}
        for i, rank in zip([token, *best], ranks, strict=True):
            value = float(logp[i])
            row[str(i)] = {
                "logprob": -9999.0 if value == -np.inf else value,
                "rank": rank,
                "decoded_token": f'"{i}"\n',
            }
        return row


@asynccontextmanager
async def serve_vllm(vllm: FakeVllm, port: int | None = None) -> AsyncIterator[str]:
    """The base URL that a user would give, such as http://127.0.0.1:8000/v1."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        vllm.traces += filter(None, [headers.get("traceparent")])
        body, more = b"", True
        while more:
            event = await receive()
            body += event.get("body", b"")
            more = event.get("more_body", False)
        status, extra = 200, {}
        try:
            answer = await vllm.answer(scope["method"], scope["path"], body, headers.get("authorization", ""))
        except Refusal as refused:
            status, answer, extra = refused.status, refused.body, refused.headers
        except Cut:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise  # uvicorn cuts the connection
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        kind = [(b"content-type", b"application/json")]
        more_headers = [(name.replace("_", "-").encode(), value.encode()) for name, value in extra.items()]
        await send({"type": "http.response.start", "status": status, "headers": kind + more_headers})
        await send({"type": "http.response.body", "body": content})

    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port or free_port()))
    config = uvicorn.Config(app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1, ws="none")
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server.serve(sockets=[sock]))
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}/v1"
    finally:
        server.should_exit = server.force_exit = True
        await task
        sock.close()


@contextlib.contextmanager
def in_thread(vllm: FakeVllm) -> Iterator[str]:
    """The fake on a loop of its own."""
    ready, box = threading.Event(), {}

    async def main() -> None:
        box["stop"], box["loop"] = asyncio.Event(), asyncio.get_running_loop()
        async with serve_vllm(vllm) as box["url"]:
            ready.set()
            await box["stop"].wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(10)
    try:
        yield box["url"]
    finally:
        box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(10)
