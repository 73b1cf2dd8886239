"""`python -m benchmarks.generation`: what a teacher that also writes costs one that only scores, and what each costs
the other while both work. What the keys mean is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks import models, processes
from teacher_api.client import TeacherClient
from teacher_api.types import Completion, ScoreOptions, ScoreRequest

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # the threads of an idle engine sleep
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, of each engine
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
VOCABULARY = 32_000
TOP_K = 16
TIMEOUT_S = 3600.0
MIB = 1 << 20
ENGINE = ["--vllm.max_num_batched_tokens", "4096", "--max-sequence-tokens", "1024"]
LAYOUTS = {
    "alone": ["--scoring-path", "fused"],
    "pair": ["--scoring-path", "fused", "--generate", "true", "--max-generations", "16"],
    "stock": ["--scoring-path", "prompt-logprobs"],
}


@dataclass(frozen=True)
class Sizes:
    scored: int = 16  # sequences of a round
    scored_tokens: int = 512
    texts: int = 16
    prompt: int = 128
    new_tokens: int = 64
    rounds: int = 5


QUICK = Sizes(scored=2, scored_tokens=64, texts=2, prompt=16, new_tokens=8, rounds=1)


@dataclass
class Teacher:
    """One running server, its client, and what it is asked; random tokens that no engine has seen."""

    url: str
    process: psutil.Process
    client: TeacherClient
    sizes: Sizes
    random: np.random.Generator

    def memory_mib(self) -> float:
        """Of the server and all its processes; what they share is counted once."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(each.memory_full_info().pss for each in family) / MIB

    def fresh(self, number: int, tokens: int) -> list[np.ndarray]:
        return list(self.random.integers(2, VOCABULARY, (number, tokens), dtype=np.int32))

    def score(self) -> float:
        """Positions per second."""
        sizes = self.sizes
        completions = [Completion(str(n), s) for n, s in enumerate(self.fresh(sizes.scored, sizes.scored_tokens))]
        started = time.perf_counter()
        answers = self.client.score(ScoreRequest(completions, options=ScoreOptions(top_k=TOP_K)))
        return sum(scores.num_rows for scores in answers) / (time.perf_counter() - started)

    def write(self) -> float:
        """Written tokens per second."""
        sizes = self.sizes
        body = {
            "prompt": [prompt.tolist() for prompt in self.fresh(sizes.texts, sizes.prompt)],
            "max_tokens": sizes.new_tokens,
            "ignore_eos": True,
        }
        started = time.perf_counter()
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=TIMEOUT_S).raise_for_status()
        return answer.json()["usage"]["completion_tokens"] / (time.perf_counter() - started)


@contextmanager
def beside(work: Callable[[], float]) -> Iterator[list[float]]:
    """Does `work` again and again until the block ends, and once at least; what it gave each time."""
    given: list[float] = []
    stop = threading.Event()

    def repeat() -> None:
        while not stop.is_set() or not given:
            given.append(work())

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield given
    finally:
        stop.set()
        thread.join()


def median(work: Callable[[], float], rounds: int) -> float:
    return float(np.median([work() for _ in range(rounds)]))


@contextmanager
def running(model: Path, scratch: Path, layout: str, sizes: Sizes, figures: dict[str, Any]) -> Iterator[Teacher]:
    started = time.perf_counter()
    with processes.teacher(model, scratch, "--backend", "vllm", *ENGINE, *LAYOUTS[layout]) as ready:
        figures[f"start_s_{layout}"] = round(time.perf_counter() - started, 1)
        with TeacherClient(ready["grpc_url"], timeout_s=TIMEOUT_S, attempt_timeout_s=TIMEOUT_S) as client:
            process = psutil.Process(ready["pid"])
            yield Teacher(ready["http_url"], process, client, sizes, np.random.default_rng(0))


def measure(model: Path, scratch: Path, sizes: Sizes) -> dict[str, Any]:
    figures: dict[str, Any] = {"rounds": sizes.rounds}
    for layout in LAYOUTS:
        with running(model, scratch, layout, sizes, figures) as teacher:
            teacher.score()  # to warm up
            score = median(teacher.score, sizes.rounds)
            figures[f"scored_per_s_{layout}"] = round(score)
            if layout == "pair":
                teacher.write()
                write = median(teacher.write, sizes.rounds)
                figures["written_per_s"] = round(write)
                with beside(teacher.write) as written:
                    busy = median(teacher.score, sizes.rounds)
                figures["scored_per_s_beside_writing"] = round(busy)
                figures["written_per_s_beside_scoring"] = round(float(np.median(written)))
                figures["scoring_share_beside_writing"] = round(busy / score, 3)
                figures["writing_share_beside_scoring"] = round(float(np.median(written)) / write, 3)
            figures[f"memory_mib_{layout}"] = round(teacher.memory_mib())
    figures["scoring_pair_vs_alone"] = round(figures["scored_per_s_pair"] / figures["scored_per_s_alone"], 3)
    figures["scoring_stock_vs_alone"] = round(figures["scored_per_s_stock"] / figures["scored_per_s_alone"], 3)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="shows that it works; the figures mean nothing")
    args = parser.parse_args()
    os.environ.update({name: value for name, value in ENVIRONMENT.items() if name not in os.environ})
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = models.make(scratch / "teacher", vocabulary=VOCABULARY, hidden=256, layers=4, logit_std=1.0)
        figures = measure(model, scratch, QUICK if args.quick else Sizes())
    for name, value in figures.items():
        print(f"{name:32} {value}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
