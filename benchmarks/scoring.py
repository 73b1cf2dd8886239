"""`python -m benchmarks.scoring`: the fused path of backend vllm, asked over the network, against stock `vllm serve`
and against the limit of the same engine. One engine computes at a time, and they take turns within each round, so that
a drifting machine hits all alike. What the keys mean is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import exactness, models, processes
from benchmarks.scoring_figures import figures_of, figures_of_ways, show
from benchmarks.systems import Ask, Child, Limit, OurClient, StockClient, Taken, Work

ENGINE = {"max_num_batched_tokens": 4096, "max_num_seqs": 64, "enforce_eager": True}
"""Engine arguments of all three; everything else is vLLM's default, or the dtype."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # the threads of an idle engine sleep
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB: all of a round's sequences fit
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
SETTLE_S = 1.2  # a vLLM worker polls for a second after its last step
CONCURRENCY = (4, 16, 32)
TOP_K = (0, 1, 16, 64, 256)
STOCK_TOP_K = (0, 1, 16, 64)
HTTP_TOP_K = (16, 64)
LIMIT_TOP_K = 16
CANDIDATES = 64
WAYS = ("unary", "stream")
FASTER = 0.97  # a stream's time, as a share of a unary call's, from which on it is the way taken

Scenario = Literal["batch", "group"]


@dataclass(frozen=True)
class Model:
    suffix: str  # of its keys
    dtype: str
    vocabulary: int
    settings: dict[str, Any]
    repeats: int


MODELS = {
    "small": Model("", "float32", 32_000, {"hidden": 256, "layers": 4}, 5),
    "large": Model("_large", "bfloat16", 151_936, {"hidden": 512, "layers": 16, "intermediate": 2048}, 3),
}
LOGIT_STD = 1.0  # nats: between an untrained model's 0.3 and a trained one's; the engine's own error grows with it


@dataclass(frozen=True)
class Sizes:
    sequences: int = 32  # of a batch
    tokens: int = 512
    groups: int = 2
    members: int = 8  # completions of a group
    completion: int = 128
    prompt: int = 512

    def work(self, scenario: Scenario, random: np.random.Generator, vocabulary: int) -> Work:
        def fresh(number: int, tokens: int) -> list[np.ndarray]:
            return list(random.integers(2, vocabulary, (number, tokens), dtype=np.int32))

        if scenario == "batch":
            return Work(fresh(self.sequences, self.tokens))
        owners = np.repeat(np.arange(self.groups), self.members).tolist()
        return Work(fresh(len(owners), self.completion), fresh(self.groups, self.prompt), owners)


QUICK = Sizes(sequences=4, tokens=128, groups=1, members=4, completion=32, prompt=160)


@dataclass(frozen=True)
class Cell:
    """One measurement of a round."""

    system: Literal["grpc", "http", "stock", "limit"]
    scenario: Scenario
    top_k: int = 0
    candidates: int = 0

    @property
    def engine(self) -> str:
        return "ours" if self.system in ("grpc", "http") else self.system


def cells() -> list[Cell]:
    """In the order of a round: what is compared stands side by side."""
    found = []
    for scenario in ("batch", "group"):
        for k in TOP_K:
            if (scenario, k) == ("batch", LIMIT_TOP_K):
                found += [Cell("limit", scenario), Cell("grpc", scenario, k), Cell("grpc", scenario, k, CANDIDATES)]
            else:
                found.append(Cell("grpc", scenario, k))
            if k in HTTP_TOP_K:
                found.append(Cell("http", scenario, k))
            if k in STOCK_TOP_K:
                found.append(Cell("stock", scenario, k))
    return found


@dataclass
class Bench:
    """The systems at work on one model."""

    model: Model
    grpc: Child[OurClient]
    http: Child[OurClient]
    stock: Child[StockClient]
    limit: Child[Limit]
    streamed: bool = False
    concurrency: int = CONCURRENCY[0]
    _last: str = ""

    def take(self, cell: Cell, work: Work, random: np.random.Generator) -> Taken:
        if cell.engine != self._last:
            time.sleep(SETTLE_S)
            self._last = cell.engine
        if cell.system == "stock":
            return self._taken(self.stock, work, cell.top_k, self.concurrency)
        if cell.system == "limit":
            return Taken(self.limit.call("prefill_s", work) + self.limit.call("product_s", work.num_rows))
        request = Ask(cell.top_k, cell.candidates).of(work, random, self.model.vocabulary)
        return self._taken(self.grpc if cell.system == "grpc" else self.http, request, work.num_rows, self.streamed)

    def _taken(self, client: Child[Any], *arguments: Any) -> Taken:
        taken: Taken = client.call("take", *arguments)
        return taken

    def choose(self, sizes: Sizes, random: np.random.Generator) -> None:
        """Warms everything up; then our way in (unary or stream) and stock's concurrency, by the faster of each. A
        stream takes twice a unary call's CPU from its client, and must be faster by more than chance."""

        def work(scenario: Scenario = "batch") -> Work:
            return sizes.work(scenario, random, self.model.vocabulary)

        for cell in cells():
            if cell.scenario == "group" or cell.system == "limit":
                self.take(cell, work(cell.scenario), random)
        seconds: dict[Any, float] = {}
        for concurrency in CONCURRENCY:
            self.concurrency = concurrency
            seconds[concurrency] = self.take(Cell("stock", "batch", 16), work(), random).seconds
        self.concurrency = min(CONCURRENCY, key=lambda c: seconds[c])
        ways = self.both_ways(work, random)
        unary_s, stream_s = (min(taken.seconds for taken in ways[name]) for name in WAYS)
        self.streamed = stream_s < FASTER * unary_s

    def both_ways(
        self, work: Callable[[], Work], random: np.random.Generator, repeats: int = 3
    ) -> dict[str, list[Taken]]:
        """Our k = 64 over gRPC as one answer and as a stream, in turns."""
        found: dict[str, list[Taken]] = {name: [] for name in WAYS}
        chosen = self.streamed
        for _ in range(repeats):
            for streamed, name in enumerate(WAYS):
                self.streamed = bool(streamed)
                found[name].append(self.take(Cell("grpc", "batch", 64), work(), random))
        self.streamed = chosen
        return found

    def answer_bytes(self, sizes: Sizes, random: np.random.Generator) -> dict[tuple[str, str, int, str], int]:
        """By system, scenario, k and type of the values."""
        found: dict[tuple[str, str, int, str], int] = {}
        for scenario in ("batch", "group"):
            work = sizes.work(scenario, random, self.model.vocabulary)
            for k in TOP_K:
                for kind in ("float16", "float32"):
                    request = Ask(k, 0, kind).of(work, random, self.model.vocabulary)
                    found["grpc", scenario, k, kind] = self.grpc.call("answer_bytes", request)
                    if k in HTTP_TOP_K:
                        found["http", scenario, k, kind] = self.http.call("answer_bytes", request)
        return found


@contextlib.contextmanager
def systems(model: Model, directory: Path, scratch: Path) -> Iterator[Bench]:
    ours = ["--backend", "vllm", "--scoring-path", "fused", "--dtype", model.dtype]
    stock = ["--dtype", model.dtype]
    for name, value in ENGINE.items():
        ours += [f"--vllm.{name}", json.dumps(value)]
        flag = f"--{name.replace('_', '-')}"
        stock += [flag] if value is True else [flag, str(value)]
    with contextlib.ExitStack() as stack:
        teacher = stack.enter_context(processes.teacher(directory, scratch, *ours))
        url = stack.enter_context(processes.stock_vllm(directory, scratch, *stock))
        yield Bench(
            model,
            grpc=stack.enter_context(Child(OurClient, teacher["grpc_url"])),
            http=stack.enter_context(Child(OurClient, teacher["http_url"])),
            stock=stack.enter_context(Child(StockClient, url, str(directory))),
            limit=stack.enter_context(Child(Limit, directory, model.dtype, ENGINE, log=scratch / "limit.log")),
        )


def measure(model: Model, sizes: Sizes, repeats: int, scratch: Path) -> dict[str, float]:
    directory = models.make(
        scratch / "model", vocabulary=model.vocabulary, dtype=model.dtype, logit_std=LOGIT_STD, **model.settings
    )
    taken: dict[Cell, list[Taken]] = defaultdict(list)
    with systems(model, directory, scratch) as bench:
        print("started", file=sys.stderr)
        random = np.random.Generator(np.random.Philox(1))
        bench.choose(replace(sizes, sequences=max(2, sizes.sequences // 2)), random)
        for number in range(repeats):
            started = time.perf_counter()
            for cell in cells():
                taken[cell].append(bench.take(cell, sizes.work(cell.scenario, random, model.vocabulary), random))
            print(f"round {number + 1} of {repeats}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
        ways = bench.both_ways(lambda: sizes.work("batch", random, model.vocabulary), random)
        sizes_of_answers = bench.answer_bytes(sizes, random)
        work, requests = exactness.questions(random, model.vocabulary)
        answers = {name: bench.grpc.call("scores", request) for name, request in requests.items()}
        stock_answers = bench.stock.call("logprobs", work.sequences, 16)
    reference = exactness.Reference(directory)
    found = exactness.errors(reference, work, requests, answers)
    found["stock_max_abs_error"] = exactness.stock_error(reference, work.sequences, stock_answers)
    works = {name: sizes.work(name, random, model.vocabulary) for name in ("batch", "group")}
    found |= figures_of({(c.system, c.scenario, c.top_k, c.candidates): t for c, t in taken.items()}, works)
    found |= figures_of_ways(ways, taken[Cell("stock", "batch", 64)], works["batch"])
    for (system, scenario, k, kind), num_bytes in sizes_of_answers.items():
        place = "" if scenario == "batch" else "group_"
        name = f"{place}{'http_' if system == 'http' else ''}bytes_per_position_k{k}"
        found[name if kind == "float16" else f"{name}_{kind}"] = num_bytes / works[scenario].num_rows
    found |= {"stock_concurrency": bench.concurrency, "streamed": float(bench.streamed), "rounds": repeats}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--model", choices=("small", "large", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=0, help="rounds; 0: 5 of the small model, 3 of the large one")
    parser.add_argument("--quick", action="store_true", help="a few short sequences, one round: does it work at all")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all that was started is stopped
    cores = processes.engine_cores()
    os.environ.update(
        ENVIRONMENT,
        VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)),
        OMP_NUM_THREADS=str(len(cores)),
    )
    figures: dict[str, float] = {"engine_threads": len(cores)}
    for name, model in MODELS.items():
        if options.model not in (name, "both"):
            continue
        repeats = options.repeats or (1 if options.quick else model.repeats)
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(model, QUICK if options.quick else Sizes(), repeats, Path(scratch))
        show(name, found)
        figures |= {f"{key}{model.suffix}": value for key, value in found.items()}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
