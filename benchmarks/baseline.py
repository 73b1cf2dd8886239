"""`python -m benchmarks.baseline`: scored tokens/s in process and through each transport, bytes per position, and where
the seconds of a training step go. Rounds alternate between the paths, so that a drifting machine hits all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np

from benchmarks import models, processes
from teacher_api.client import TeacherClient
from teacher_api.types import Completion, ScoreOptions, ScoreRequest
from teacher_server.backends import create
from teacher_server.backends.base import ScoreJob, ScoringBackend
from teacher_server.config import ServerConfig

VOCABULARY = 32_000
BATCH_TOKENS = 2048
GROUP_SIZE, GROUP_PROMPT_TOKENS, GROUP_TOKENS = 8, 512, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="of each sequence, all of them scored")
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="training steps; the first is left out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(Path(scratch), options)
    for name, value in figures.items():
        print(f"{name:32s} {value:12.4f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def measure(scratch: Path, options: argparse.Namespace) -> dict[str, float]:
    teacher = models.make(scratch / "teacher", vocabulary=VOCABULARY, hidden=256, layers=4)
    student = models.make(scratch / "student", vocabulary=VOCABULARY, hidden=128, layers=2, seed=1)
    random = np.random.Generator(np.random.Philox(0))
    sequences = [random.integers(2, VOCABULARY, options.tokens).astype(np.int32) for _ in range(options.sequences)]
    arguments = ("--dtype", "float32", "--batch-tokens", str(BATCH_TOKENS))
    with processes.teacher(teacher, scratch, *arguments) as announced:
        figures = scoring(teacher, announced, sequences, options)
        figures["group_shared_prompt_speedup"] = shared_prompt_speedup(scratch, options)
        figures |= training(scratch, student, announced["grpc_url"], options.steps)
    return figures


def scoring(
    model: Path, announced: dict[str, str], sequences: list[np.ndarray], options: argparse.Namespace
) -> dict[str, float]:
    config = ServerConfig(model=str(model), dtype="float32", batch_tokens=BATCH_TOKENS)
    backend = create(config)
    backend.load()
    request = ScoreRequest(
        completions=[Completion(str(i), tokens) for i, tokens in enumerate(sequences)],
        options=ScoreOptions(top_k=options.top_k),
    )
    body: dict[str, object] = {
        "completions": [{"token_ids": tokens.tolist()} for tokens in sequences],
        "options": {"top_k": options.top_k},
    }
    with (
        TeacherClient(announced["grpc_url"]) as grpc_client,
        TeacherClient(announced["http_url"]) as http_client,
        httpx.Client(base_url=announced["http_url"], timeout=600) as plain,
        asyncio.Runner() as loop,
    ):
        paths: dict[str, Callable[[], object]] = {
            "in_process": lambda: loop.run(in_process(backend, sequences, options.top_k)),
            "grpc": lambda: grpc_client.score(request),
            "http_protobuf": lambda: http_client.score(request),
            "http_json": lambda: plain.post("/v1/score", json=body).raise_for_status().json(),
        }
        seconds = alternate(paths, options.rounds)
        rows = options.sequences * (options.tokens - 1)
        figures = {f"tokens_per_s_{name}": rows / statistics.median(s) for name, s in seconds.items()}
        for name in ("grpc", "http_protobuf", "http_json"):
            ratios = [a / b for a, b in zip(seconds["in_process"], seconds[name], strict=True)]
            figures[f"{name}_vs_in_process"] = statistics.median(ratios)
        figures |= {f"bytes_per_position_{k}": v / rows for k, v in sizes(plain, request, body).items()}
        loop.run(backend.close())
    return figures


def shared_prompt_speedup(scratch: Path, options: argparse.Namespace) -> float:
    """Seconds of a group whose prompt is computed for each completion, over those of the same group that shares it."""
    model = models.make(scratch / "group", vocabulary=VOCABULARY, hidden=512, layers=8)
    backend = create(ServerConfig(model=str(model), dtype="float32"))
    backend.load()
    random = np.random.Generator(np.random.Philox(1))
    prompt = random.integers(2, VOCABULARY, GROUP_PROMPT_TOKENS)
    positions = np.arange(GROUP_PROMPT_TOKENS, GROUP_PROMPT_TOKENS + GROUP_TOKENS, dtype=np.int32)
    shared = [
        ScoreJob(
            str(i),
            np.concatenate([prompt, random.integers(2, VOCABULARY, GROUP_TOKENS)]).astype(np.int32),
            GROUP_PROMPT_TOKENS,
            positions,
            ScoreOptions(top_k=options.top_k),
            prompt_key=b"group",
        )
        for i in range(GROUP_SIZE)
    ]
    apart = [replace(job, prompt_key=b"") for job in shared]
    with asyncio.Runner() as loop:
        paths: dict[str, Callable[[], object]] = {
            "apart": lambda: loop.run(backend.score(apart)),
            "shared": lambda: loop.run(backend.score(shared)),
        }
        seconds = alternate(paths, options.rounds)
        loop.run(backend.close())
    return statistics.median(a / b for a, b in zip(seconds["apart"], seconds["shared"], strict=True))


def alternate(paths: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each path in each round, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for round_number in range(rounds + 1):
        for name, call in paths.items():
            started = time.perf_counter()
            call()
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


async def in_process(backend: ScoringBackend, sequences: list[np.ndarray], top_k: int) -> None:
    """The same work without server and wire, in the batches the policy allows."""
    per_batch = max(1, min(backend.policy.max_sequences, backend.policy.max_tokens // len(sequences[0])))
    jobs = [
        ScoreJob(str(i), tokens, 0, np.arange(1, len(tokens), dtype=np.int32), ScoreOptions(top_k=top_k))
        for i, tokens in enumerate(sequences)
    ]
    for start in range(0, len(jobs), per_batch):
        await backend.score(jobs[start : start + per_batch])


def sizes(plain: httpx.Client, request: ScoreRequest, body: dict[str, object]) -> dict[str, int]:
    """Bytes of the answer's body in both forms."""
    from teacher_api import wire

    content = wire.encode_request(request).SerializeToString()
    kind = "application/x-protobuf"
    protobuf = plain.post("/v1/score", content=content, headers={"content-type": kind, "accept": kind})
    return {
        "protobuf": len(protobuf.raise_for_status().content),
        "json": len(plain.post("/v1/score", json=body).raise_for_status().content),
    }


def training(scratch: Path, student: Path, url: str, steps: int) -> dict[str, float]:
    """Median seconds of a step's parts: 16 prompts, 64 new tokens, reverse KL on the teacher's top 64."""
    prompts = scratch / "prompts.txt"
    prompts.write_text("".join(f"count {i} and say what comes next, please\n" for i in range(256)))
    run = scratch / "run"
    command = [
        sys.executable, "-m", "student_trainer", "--teacher-url", url, "--student", str(student), "--prompts",
        str(prompts), "--output-dir", str(run), f"train.steps={steps}", "train.batch_size=16",
        "rollout.max_new_tokens=64", "checkpoint.save_every=0", "tracking.trackers=[]", "tracking.samples_every=0",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    parts = ("seconds", "seconds_sample", "seconds_score", "seconds_learn")
    return {f"step_{part}": statistics.median(line[part] for line in lines) for part in parts}


if __name__ == "__main__":
    main()
