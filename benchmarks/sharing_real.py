"""How a real teacher is shared: a `teacher-serve`, callers over gRPC in other processes, and the same cores for all of
them. What is compared takes turns, so that a drifting machine hits both sides alike. What the keys mean is in
benchmarks/README.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import models, processes
from benchmarks.sharing_figures import Call, jain, p95_ratio, percentile, share_error, tokens_within
from benchmarks.sharing_load import Callers, InProcess, Shape, Who
from benchmarks.systems import Child
from teacher_server.config import ServerConfig

NUM_EXPERIMENTS, NUM_TENANTS = 64, 8
WEIGHTS = {"one": 1.0, "two": 2.0, "four": 4.0}
WEIGHTED_CALLERS = 21  # of each: some of them always wait
GREEDY_IN_FLIGHT = (16, 64)
SETTLE_S = 1.2  # a vLLM worker polls for a second after its last step
SMALL_MODEL = {"vocabulary": 1000, "hidden": 64, "layers": 2}
"""So fast that each of 64 callers has many turns in the seconds of a round."""
LARGE_MODEL = {"vocabulary": 32_000, "hidden": 256, "layers": 4}
MIXED = Shape(sequences=2, tokens=(32, 256), top_k=8, vocabulary=1000)
SERIAL = {
    "": Shape(sequences=8, tokens=(512, 512), top_k=8, vocabulary=1000),
    "_small": Shape(sequences=1, tokens=(32, 32), top_k=8, vocabulary=1000),
}
"""Calls of the serial caller, by the suffix of their keys."""
LONG = Shape(sequences=8, tokens=(512, 512), top_k=16, vocabulary=32_000)
BATCH_TOKENS = 4096  # a call of LONG
TINY = Shape(sequences=1, tokens=(32, 32), top_k=0, vocabulary=512)
TINY_CALLERS, TINY_IN_FLIGHT = 8, 8
ENGINE = {"max_num_batched_tokens": 4096, "max_num_seqs": 64, "enforce_eager": True}


@dataclass(frozen=True)
class Sizes:
    rounds: int = 3
    starts: int = 3  # of both sides of what a server costs: one start of an engine is faster than the next
    warm_s: float = 1.5
    trial_s: float = 3.0
    fleet_s: float = 8.0
    serial_s: float = 5.0
    calls: int = 8  # of LONG, on each side of a round
    tiny_s: float = 6.0


QUICK = Sizes(rounds=1, starts=1, warm_s=0.3, trial_s=0.5, fleet_s=1.0, serial_s=0.5, calls=2, tiny_s=0.5)


@contextlib.contextmanager
def shared_teacher(model: Path, scratch: Path, weights: dict[str, float], *arguments: str) -> Iterator[str]:
    """A `teacher-serve` with a tenant for each of `weights`, whose key is `key_of` its name; yields its URL."""
    tenants = {name: {"keys": [_digest(key_of(name))], "weight": weight} for name, weight in weights.items()}
    file = scratch / "tenants.yaml"
    file.write_text(json.dumps({"tenants": tenants}))
    with processes.teacher(model, scratch, "--tenants-file", str(file), *arguments) as announced:
        yield announced["grpc_url"]


def key_of(tenant: str) -> str:
    return f"pk_{hashlib.sha256(tenant.encode()).hexdigest()}"


def _digest(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def _torch_arguments() -> list[str]:
    return ["--dtype", "float32", "--batch-tokens", str(BATCH_TOKENS), "--threads", str(len(processes.engine_cores()))]


def _got(callers: Child[Callers], sizes: Sizes, seconds: float) -> list[int]:
    """Tokens of each caller in `seconds` of all of them asking all the time."""
    calls: list[list[Call]] = callers.call("for_seconds", sizes.warm_s + seconds)
    start = min(own[0].began for own in calls) + sizes.warm_s
    return [tokens_within(own, start, start + seconds) for own in calls]


# ---- many, and shares ------------------------------------------------------------------------------------------------


def fleet(scratch: Path, sizes: Sizes) -> dict[str, float]:
    """64 experiments of 8 tenants next to one greedy client; then three tenants by their weights."""
    model = models.make(scratch / "small", **SMALL_MODEL)
    tenants = {f"tenant-{n}": 1.0 for n in range(NUM_TENANTS)} | {"greedy": 1.0} | WEIGHTS
    many = [Who(key_of(f"tenant-{n % NUM_TENANTS}"), f"experiment-{n}") for n in range(NUM_EXPERIMENTS)]
    weighted = [Who(key_of(name), f"experiment-{n}") for name in WEIGHTS for n in range(WEIGHTED_CALLERS)]
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(shared_teacher(model, scratch, tenants, *_torch_arguments()))

        def started(who: list[Who]) -> Child[Callers]:
            child = stack.enter_context(Child(Callers, url, who, MIXED))
            child.call("ready")
            return child

        sides = {"many": started(many), "greedy": _greediest(started, sizes)}
        rounds: list[dict[str, list[int]]] = []
        for _ in range(sizes.rounds):
            rounds.append({name: _got(child, sizes, sizes.fleet_s) for name, child in sides.items()})
        three = started(weighted)
        got = [
            sum(each)
            for each in zip(*(_got(three, sizes, sizes.fleet_s * 2) for _ in range(sizes.rounds)), strict=True)
        ]
        serial_figures = serial(stack, url, sizes)
    each = [sum(tokens) for tokens in zip(*(one["many"] for one in rounds), strict=True)]
    per_s = {name: statistics.median(sum(one[name]) / sizes.fleet_s for one in rounds) for name in sides}
    shares = {
        name: float(sum(got[n * WEIGHTED_CALLERS : (n + 1) * WEIGHTED_CALLERS])) for n, name in enumerate(WEIGHTS)
    }
    return {
        "throughput_ratio_64": statistics.median(sum(one["many"]) / sum(one["greedy"]) for one in rounds),
        "tokens_per_s_64": per_s["many"],
        "tokens_per_s_greedy": per_s["greedy"],
        "jain_index": jain(each),
        "least_over_mean": min(each) / statistics.mean(each),
        "weighted_share_error": share_error(shares, WEIGHTS),
    } | serial_figures


def _greediest(started: Callable[[list[Who]], Child[Callers]], sizes: Sizes) -> Child[Callers]:
    """One client, with as many calls in flight as a trial finds best."""
    tried = {n: started([Who(key_of("greedy"), "greedy", n)]) for n in GREEDY_IN_FLIGHT}
    tokens = {n: sum(_got(child, sizes, sizes.trial_s)) for n, child in tried.items()}
    return tried[max(tried, key=lambda n: tokens[n])]


def serial(stack: contextlib.ExitStack, url: str, sizes: Sizes) -> dict[str, float]:
    """A tenant that sends one call after another, alone and beside 64 callers of another tenant."""
    crowd_who = [Who(key_of("tenant-0"), f"experiment-{n}") for n in range(NUM_EXPERIMENTS)]
    crowd: Child[Callers] = stack.enter_context(Child(Callers, url, crowd_who, MIXED))
    crowd.call("ready")
    pool = stack.enter_context(ThreadPoolExecutor(1))
    figures: dict[str, float] = {}
    for suffix, shape in SERIAL.items():
        one: Child[Callers] = stack.enter_context(Child(Callers, url, [Who(key_of("tenant-1"), "serial")], shape))
        one.call("for_seconds", sizes.warm_s / 2)
        alone: list[Call] = []
        beside: list[Call] = []
        for _ in range(sizes.rounds):
            alone += one.call("for_seconds", sizes.serial_s)[0]
            crowded = pool.submit(crowd.call, "for_seconds", sizes.warm_s + sizes.serial_s + 1.0)
            time.sleep(sizes.warm_s)
            beside += one.call("for_seconds", sizes.serial_s)[0]
            crowded.result()
        figures[f"serial_p95_ratio{suffix}"] = p95_ratio(beside, alone)
        for name, calls in (("alone", alone), ("beside", beside)):
            figures[f"serial_p95_ms_{name}{suffix}"] = 1000 * percentile([call.seconds for call in calls], 0.95)
            figures[f"serial_calls_{name}{suffix}"] = len(calls)
    return figures


# ---- what the server costs -------------------------------------------------------------------------------------------


def overhead(scratch: Path, sizes: Sizes, backend: str) -> dict[str, float]:
    """Wall time of calls of 512-token sequences through gRPC, next to that of the backend alone."""
    model = models.make(scratch / "large", logit_std=1.0, **LARGE_MODEL)
    settings: dict[str, Any] = {"backend": backend, "dtype": "float32"}
    arguments = ["--backend", backend]
    if backend == "vllm":
        settings |= {"scoring_path": "fused", "vllm": ENGINE}
        arguments += ["--scoring-path", "fused", "--dtype", "float32"]
        for name, value in ENGINE.items():
            arguments += [f"--vllm.{name}", json.dumps(value)]
    else:
        settings |= {"batch_tokens": BATCH_TOKENS, "threads": len(processes.engine_cores())}
        arguments += _torch_arguments()
    config = ServerConfig(model=str(model), **settings)
    settle_s = SETTLE_S if backend == "vllm" else 0.0
    pairs: list[tuple[float, float]] = []
    for _ in range(sizes.starts):
        with contextlib.ExitStack() as stack:
            announced = stack.enter_context(processes.teacher(model, scratch, *arguments))
            callers: Child[Callers] = stack.enter_context(
                Child(Callers, announced["grpc_url"], [Who("", "overhead", 4)], LONG)
            )
            own: Child[InProcess] = stack.enter_context(Child(InProcess, config, log=scratch / "in_process.log"))
            found = [_pair(callers, own, sizes.calls, number, settle_s) for number in range(sizes.rounds + 1)]
            pairs += found[1:]  # the first warms both up
    suffix = "" if backend == "torch" else f"_{backend}"
    tokens = sizes.calls * LONG.sequences * LONG.tokens[1]
    ratios = [wire_s / own_s for own_s, wire_s in pairs]
    return {
        f"overhead{suffix}": statistics.median(ratios) - 1,
        f"overhead_least{suffix}": min(ratios) - 1,
        f"overhead_most{suffix}": max(ratios) - 1,
        f"overhead_tokens_per_s_grpc{suffix}": tokens / statistics.median(wire_s for _, wire_s in pairs),
        f"overhead_tokens_per_s_in_process{suffix}": tokens / statistics.median(own_s for own_s, _ in pairs),
    }


def _pair(
    callers: Child[Callers], own: Child[InProcess], num_calls: int, number: int, settle_s: float
) -> tuple[float, float]:
    """Seconds in process, and over the wire; each is first in every other round."""
    seconds = {}
    for side in ("own", "wire") if number % 2 else ("wire", "own"):
        time.sleep(settle_s)
        seconds[side] = _wire_s(callers, num_calls) if side == "wire" else _own_s(own, num_calls, number)
    return seconds["own"], seconds["wire"]


def _wire_s(callers: Child[Callers], num_calls: int) -> float:
    (calls,) = callers.call("calls", num_calls)
    return max(call.ended for call in calls) - min(call.began for call in calls)


def _own_s(own: Child[InProcess], num_calls: int, seed: int) -> float:
    seconds: float = own.call("seconds", num_calls, LONG, seed)
    return seconds


# ---- small requests --------------------------------------------------------------------------------------------------


def requests(scratch: Path, sizes: Sizes) -> dict[str, float]:
    """Calls of one short sequence a minute, answered by a server whose engine is the fake one."""
    who = [Who("", f"experiment-{n}", TINY_IN_FLIGHT) for n in range(TINY_CALLERS)]
    with contextlib.ExitStack() as stack:
        arguments = ("--backend", "fake", "--fake-vocabulary", str(TINY.vocabulary))
        announced = stack.enter_context(processes.teacher(Path("fake"), scratch, *arguments))
        callers: Child[Callers] = stack.enter_context(Child(Callers, announced["grpc_url"], who, TINY))
        callers.call("ready")
        tokens = [sum(_got(callers, sizes, sizes.tiny_s)) for _ in range(sizes.rounds)]
    return {"requests_per_minute": statistics.median(tokens) / TINY.tokens[1] / sizes.tiny_s * 60}


PARTS: dict[str, Callable[[Path, Sizes], dict[str, float]]] = {
    "fleet": fleet,
    "requests": requests,
    "overhead": lambda scratch, sizes: overhead(scratch, sizes, "torch"),
    "overhead_vllm": lambda scratch, sizes: overhead(scratch, sizes, "vllm"),
}
