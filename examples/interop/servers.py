"""Who answers: this server with either backend, or stock `vllm serve`, of one float32 checkpoint on a free port."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import httpx

from benchmarks import processes
from examples.interop.environment import InteropError
from examples.interop.parts import VOCABULARY

MAX_TOKENS = 1024
KINDS = ("torch", "vllm", "stock")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


@contextlib.contextmanager
def server(kind: str, model: Path, scratch: Path) -> Iterator[str]:
    """Its URL, without /v1, until the block ends.

    Args:
        kind: one of KINDS: `teacher-serve` with that backend, or `vllm serve`.
        scratch: for its log.

    Raises:
        InteropError: it did not start.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with contextlib.ExitStack() as stack:
        try:
            url = stack.enter_context(_started(kind, model, scratch))
        except RuntimeError as error:
            raise InteropError(str(error)) from None
        yield url


@contextlib.contextmanager
def _started(kind: str, model: Path, scratch: Path) -> Iterator[str]:
    if kind == "stock":
        arguments = ["--dtype", "float32", "--max-model-len", str(MAX_TOKENS), "--enforce-eager"]
        with processes.stock_vllm(model, scratch, *arguments) as url:
            yield url
        return
    ours = ["--backend", kind, "--dtype", "float32"]
    ours += ["--max-top-k", str(VOCABULARY), "--max-sequence-tokens", str(MAX_TOKENS)]
    if kind == "vllm":
        ours += ["--scoring-path", "fused", "--vllm.enforce_eager", "true"]
    with processes.teacher(model, scratch, *ours) as announced:
        yield announced["http_url"]


def model_of(url: str) -> str:
    """The name of the one model that a server lists.

    Raises:
        InteropError: nobody answers there in vLLM's way.
    """
    try:
        answer = httpx.get(f"{url.rstrip('/')}/v1/models", headers=_key())
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError) as error:
        raise InteropError(f"--url {url}: expected a server that lists its model at /v1/models; {error}") from None


def _key() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY", "")
    return {"authorization": f"Bearer {key}"} if key else {}
