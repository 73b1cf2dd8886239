"""What is compared, each in a process of its own: our client, a client of stock `vllm serve`, and the limit that no
scorer can pass. The engines behind the two clients are other processes still (processes.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import httpx
import numpy as np

from teacher_api import wire
from teacher_api.client import TeacherClient
from teacher_api.types import Candidates, Completion, ScoreOptions, ScoreRequest, Scores
from teacher_api.v1 import teacher_pb2 as pb

T = TypeVar("T")
TIMEOUT_S = 3600.0
GRPC_PREFIX_BYTES = 5  # before each message: a flag and its length
LIMIT_ROWS = (128, 256, 512, 1024)  # of hidden states in one product of the limit: the number that is fastest
LIMIT_TRIES = 3


# ---- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Sequences to score: whole where they have no prompt, else what follows their prompt."""

    completions: list[np.ndarray]
    prompts: list[np.ndarray] = field(default_factory=list)
    of_prompt: list[int] = field(default_factory=list)
    """Of each completion, the index of its prompt; empty without prompts."""

    @property
    def sequences(self) -> list[np.ndarray]:
        if not self.prompts:
            return self.completions
        pairs = zip(self.of_prompt, self.completions, strict=True)
        return [np.concatenate([self.prompts[i], tokens]) for i, tokens in pairs]

    @property
    def num_tokens(self) -> int:
        """Submitted: a prompt counts once for each of its completions."""
        return sum(len(sequence) for sequence in self.sequences)

    @property
    def num_rows(self) -> int:
        """Scored positions."""
        return sum(len(tokens) - (not self.prompts) for tokens in self.completions)


@dataclass(frozen=True)
class Ask:
    """What is wanted of each scored position."""

    top_k: int
    candidates: int = 0
    value_type: Literal["float16", "float32"] = "float16"

    def of(self, work: Work, random: np.random.Generator, vocabulary: int) -> ScoreRequest:
        """As a request; its candidates are random ids."""
        completions = []
        for i, tokens in enumerate(work.completions):
            prompt = work.of_prompt[i] if work.prompts else None
            rows = len(tokens) - (prompt is None)
            candidates = None
            if self.candidates:
                ids = random.integers(0, vocabulary, rows * self.candidates, dtype=np.int32)
                candidates = Candidates(ids, np.arange(rows + 1, dtype=np.int32) * np.int32(self.candidates))
            completions.append(Completion(str(i), tokens, prompt, candidates=candidates))
        options = ScoreOptions(top_k=self.top_k, value_type=self.value_type)
        return ScoreRequest(completions, prompts=work.prompts, options=options)


@dataclass(frozen=True)
class Taken:
    """What one call cost its caller."""

    seconds: float
    cpu_seconds: float = 0.0  # of the client's process
    num_bytes: int = 0  # of the answers, where it is known at no cost


@contextlib.contextmanager
def _timed(taken: list[tuple[float, float]]) -> Iterator[None]:
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    taken.append((time.perf_counter() - wall, time.process_time() - cpu))


# ---- processes -------------------------------------------------------------------------------------------------------


class Child(Generic[T]):
    """An object in a process of its own: `child.call("method", …)` waits for the method's result. With `log`, what that
    process prints goes there."""

    def __init__(self, make: Callable[..., T], *arguments: Any, log: Path | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, make, arguments, log))
        self._process.start()
        other.close()

    def call(self, method: str, *arguments: Any) -> Any:
        """Raises RuntimeError where the method raised, or its process died."""
        try:
            self._pipe.send((method, arguments))
            failed, result = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the process of {method} died") from error
        if failed:
            raise RuntimeError(result)
        return result

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Child[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Any, make: Callable[..., Any], arguments: tuple[Any, ...], log: Path | None) -> None:
    """In the child: makes the object at the first call, so that its failure is that call's."""
    subject: Any = None
    if log is not None:
        with log.open("w") as stream:
            os.dup2(stream.fileno(), sys.stdout.fileno())
            os.dup2(stream.fileno(), sys.stderr.fileno())
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            method, given = pipe.recv()
            try:
                subject = subject or make(*arguments)
                pipe.send((False, getattr(subject, method)(*given)))
            except Exception as error:  # reported where the call was made
                pipe.send((True, f"{method}: {type(error).__name__}: {error}"))
    if hasattr(subject, "close"):
        subject.close()


# ---- ours ------------------------------------------------------------------------------------------------------------


class OurClient:
    """TeacherClient over gRPC or HTTP, by the URL."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._teacher = TeacherClient(url, timeout_s=TIMEOUT_S, attempt_timeout_s=TIMEOUT_S)
        self._teacher.info()

    def close(self) -> None:
        self._teacher.close()

    def take(self, request: ScoreRequest, num_rows: int, streamed: bool) -> Taken:
        costs: list[tuple[float, float]] = []
        with _timed(costs):
            answers = list(self._teacher.score_many([request])) if streamed else self._teacher.score(request)
        found = sum(scores.num_rows for scores in answers)
        if found != num_rows:
            raise ValueError(f"got {found} rows, expected {num_rows}")
        return Taken(*costs[0])

    def scores(self, request: ScoreRequest) -> list[Scores]:
        return self._teacher.score(request)

    def answer_bytes(self, request: ScoreRequest) -> int:
        """Of the answer as it arrives, before anything is decoded."""
        message = wire.encode_request(request).SerializeToString()
        if self._url.startswith("http"):
            kind = "application/x-protobuf"
            headers = {"content-type": kind, "accept": kind}
            answer = httpx.post(f"{self._url}/v1/score", content=message, headers=headers, timeout=TIMEOUT_S)
            return len(answer.raise_for_status().content)
        import grpc

        service = pb.DESCRIPTOR.services_by_name["TeacherService"].full_name
        options = [("grpc.max_receive_message_length", -1)]
        with grpc.insecure_channel(self._url.removeprefix("grpc://"), options=options) as channel:
            return len(channel.unary_unary(f"/{service}/Score")(message, timeout=TIMEOUT_S)) + GRPC_PREFIX_BYTES


# ---- stock -----------------------------------------------------------------------------------------------------------


class StockClient:
    """`/v1/completions` with token ids and `prompt_logprobs`, one request a sequence. Parsing is the standard
    library's; nothing is made of the parsed lists and dicts."""

    def __init__(self, url: str, model: str) -> None:
        self._model = model
        self._loop = asyncio.Runner()
        self._http = httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None))
        self._max_tokens = 0
        if self._loop.run(self._post([2, 3], 0)).status_code != 200:
            self._max_tokens = 1  # vLLM 0.32 refuses 0

    def close(self) -> None:
        self._loop.run(self._http.aclose())
        self._loop.close()

    def take(self, work: Work, top_k: int, concurrency: int) -> Taken:
        sequences = [sequence.tolist() for sequence in work.sequences]
        costs: list[tuple[float, float]] = []
        with _timed(costs):
            answers = self._loop.run(self._all(sequences, top_k, concurrency))
        for sequence, (_, answer) in zip(sequences, answers, strict=True):
            found = len(answer["choices"][0]["prompt_logprobs"])
            if found != len(sequence):
                raise ValueError(f"got {found} positions, expected {len(sequence)}")
        return Taken(*costs[0], sum(size for size, _ in answers))

    def logprobs(self, sequences: list[np.ndarray], top_k: int) -> list[list[dict[str, dict[str, float]]]]:
        """Of each sequence, of each position but the first: by id, its logprob and rank."""
        answers = self._loop.run(self._all([s.tolist() for s in sequences], top_k, 4))
        return [answer["choices"][0]["prompt_logprobs"][1:] for _, answer in answers]

    async def _all(self, sequences: list[list[int]], top_k: int, concurrency: int) -> list[tuple[int, Any]]:
        room = asyncio.Semaphore(concurrency)

        async def one(tokens: list[int]) -> tuple[int, Any]:
            async with room:
                answer = (await self._post(tokens, top_k)).raise_for_status()
                return len(answer.content), answer.json()

        return await asyncio.gather(*(one(tokens) for tokens in sequences))

    async def _post(self, tokens: list[int], top_k: int) -> httpx.Response:
        body = {
            "model": self._model,
            "prompt": tokens,
            "max_tokens": self._max_tokens,
            "temperature": 0,
            "prompt_logprobs": top_k,
        }
        return await self._http.post("/v1/completions", json=body)


# ---- the limit -------------------------------------------------------------------------------------------------------


class HeadProduct:
    """Joins vLLM's worker class in the limit's engine: the product runs on the engine's own threads."""

    model_runner: Any  # the worker's
    _chosen: Any = None

    def head_product_s(self, rows: int, hidden: int, vocabulary: int, dtype: str) -> float:
        """Seconds of [rows, hidden] x [hidden, vocabulary], as torch or the engine's own head computes it, and so many
        rows at a time as is fastest: found out at the first call."""
        import torch

        if self._chosen is None:
            kind, most = getattr(torch, dtype), max(LIMIT_ROWS)
            head = torch.randn(vocabulary, hidden).to(kind).t()
            product = torch.zeros(most, vocabulary, dtype=kind)
            states = torch.randn(most, hidden).to(kind)
            ways = (lambda x: torch.mm(x, head, out=product[: len(x)]), self.model_runner.model.compute_logits)
            tried = {
                (way, count): min(_product_s(way, states[:count], 2 * most) for _ in range(LIMIT_TRIES))
                for way in ways
                for count in LIMIT_ROWS
            }
            way, count = min(tried, key=lambda each: tried[each])
            self._chosen = way, states[:count]
        return _product_s(*self._chosen, rows)


def _product_s(way: Callable[[Any], Any], states: Any, rows: int) -> float:
    """Seconds until `way` has had all rows, as many at a time as there are states."""
    started = time.perf_counter()
    for start in range(0, rows, len(states)):
        way(states[: rows - start])
    return time.perf_counter() - started


class Limit:
    """vLLM's prefill without logprobs, and a bare product of the scored rows with the head: what any scorer of this
    engine has to compute."""

    def __init__(self, model: Path, dtype: str, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self._dtype = dtype
        self._llm = LLM(
            str(model),
            dtype=dtype,
            enable_prefix_caching=False,
            worker_extension_cls="benchmarks.systems.HeadProduct",
            **arguments,
        )
        config = self._llm.llm_engine.model_config
        self._shape = (config.get_hidden_size(), config.get_vocab_size())

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown(timeout=10)

    def prefill_s(self, work: Work) -> float:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": sequence.tolist()} for sequence in work.sequences]
        parameters = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        started = time.perf_counter()
        self._llm.generate(prompts, parameters, use_tqdm=False)
        return time.perf_counter() - started

    def product_s(self, rows: int) -> float:
        (seconds,) = self._llm.collective_rpc("head_product_s", args=(rows, *self._shape, self._dtype))
        return float(seconds)
