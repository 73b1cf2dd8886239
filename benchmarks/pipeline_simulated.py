"""`python -m benchmarks.pipeline_simulated`: the trainer's own schedules (threads, queues, division into micro-batches)
around an engine, teachers and a learner that only take time. Real threads that sleep. Keys: benchmarks/README.md.

The engine has SLOTS that decode one token in a fixed time each; the teacher takes some requests at a time, each of some
samples, and works on one sample, the learner on one micro-batch. Score and learn costs go by length.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from student_trainer.microbatch import InOrder
from student_trainer.packing import Packing
from student_trainer.pipeline.feed import Width
from student_trainer.pipeline.schedule import Draw, Send, scheduled
from student_trainer.pipeline.timeline import Timeline
from student_trainer.types import Metrics, Prompt, Rollout, ScoredRollout
from teacher_api.types import Scores

SAMPLES, SLOTS, MEMBERS = 32, 8, 2
"""Samples of a step; decoded at once; samples of a micro-batch."""
WIDTH = Width(requests=8, samples=8, tokens=1)
"""Of the teacher: the trainer's defaults (teacher.max_concurrency, teacher.request_sequences), and that it says of
itself that it works on one sample at a time."""
UNIT_S = 1.0
"""Seconds that a part of ratio 1 takes for a whole step, working alone."""
RATIOS = {
    "sample 4": (4, 1, 1), "score 4": (1, 4, 1), "learn 4": (1, 1, 4), "sample 2": (2, 1, 1), "score 2": (1, 2, 1),
    "learn 2": (1, 1, 2), "sample idle": (1, 2, 2), "score idle": (2, 1, 2), "learn idle": (2, 2, 1), "all": (1, 1, 1),
}  # fmt: skip
"""Of sampling, scoring and learning."""
MEAN = 100
LENGTHS = ("equal", "uniform", "lognormal", "bimodal")
ASYNC_STEPS, WARM_STEPS = 12, 2
TRIES = 3
"""Of which the fastest counts: what else the machine does only ever adds."""
AT_ONCE = 40
PACKED = Packing(packed=True)
NOTHING = np.zeros(0, dtype=np.float32)


def lengths(kind: str, step: int, count: int = SAMPLES) -> np.ndarray:
    """Tokens of a step's completions, with a mean of about MEAN."""
    generator = np.random.Generator(np.random.Philox(key=[LENGTHS.index(kind), step]))
    drawn = {
        "equal": np.full(count, MEAN),
        "uniform": generator.uniform(1, 2 * MEAN, count),
        "lognormal": np.minimum(generator.lognormal(np.log(MEAN) - 0.5 * 0.7**2, 0.7, count), 5 * MEAN),
        "bimodal": np.where(generator.random(count) < 0.8, MEAN / 2, 3 * MEAN),
    }[kind]
    return np.maximum(drawn.astype(np.int64), 1)


@dataclass(frozen=True)
class Costs:
    """Seconds per token of each part, so that a step of mean lengths takes `ratio` × UNIT_S in each, working alone."""

    sample: float
    score: float
    learn: float

    @classmethod
    def of(cls, ratio: Sequence[float]) -> Costs:
        sample, score, learn = (r * UNIT_S / (SAMPLES * MEAN) for r in ratio)
        return cls(sample * SLOTS, score, learn)


def finish_times(tokens: Sequence[int], per_token: float) -> list[float]:
    """When each completion is finished, begun in order as slots become free."""
    free = [0.0] * SLOTS
    found = []
    for count in tokens:
        found.append(heapq.heappop(free) + count * per_token)
        heapq.heappush(free, found[-1])
    return found


def until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


class Engine:
    """See RolloutEngine: completions of given lengths, finished when they would be."""

    def __init__(self, kind: str, costs: Costs) -> None:
        self._kind, self._costs, self._version = kind, costs, 0

    def stream(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> Iterator[Rollout]:
        begun = time.perf_counter()
        tokens = lengths(self._kind, uids[0] // SAMPLES)
        finished = finish_times(tokens.tolist(), self._costs.sample)
        for place in np.argsort(finished, kind="stable"):
            until(begun + finished[place])
            count = int(tokens[place])
            yield Rollout(
                uids[place], prompts[place], np.ones(count, dtype=np.int32), "eos", NOTHING, NOTHING,
                versions=np.full(count, self._version, dtype=np.int32),
            )  # fmt: skip

    def update(self, version: int) -> None:
        self._version = version


class Still:
    """Stands for a copy of weights: taking it costs nothing."""

    def take(self) -> None: ...

    def end(self) -> None: ...

    def beside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class Teacher:
    """See feed.Asker: answers when the work would be done."""

    def __init__(self, costs: Costs, width: Width = WIDTH) -> None:
        self._costs, self._width = costs, width
        self._taking = threading.Lock()
        self._free_at = 0.0

    def route(self, rollout: Rollout) -> str:
        return ""

    def widths(self) -> dict[str, Width]:
        return {"": self._width}

    def ask(self, name: str, rollouts: Sequence[Rollout]) -> Iterator[tuple[ScoredRollout, Metrics]]:
        with self._taking:  # first come, first served
            done = max(time.perf_counter(), self._free_at)
            self._free_at = done + sum(r.num_tokens for r in rollouts) * self._costs.score
        for rollout in rollouts:
            done += rollout.num_tokens * self._costs.score
            until(done)
            yield ScoredRollout(rollout, _scores(rollout)), {}


def _scores(rollout: Rollout) -> Scores:
    nothing = np.zeros(rollout.num_tokens, dtype=np.float32)
    positions = np.arange(1, 1 + rollout.num_tokens, dtype=np.int32)
    return Scores(id=str(rollout.uid), positions=positions, token_logprob=nothing, log_tail=nothing)


def draw(run: Any, step: int) -> Draw:
    first = step * SAMPLES
    return Draw(step, {first + i: Prompt(i, np.zeros(1, dtype=np.int32)) for i in range(SAMPLES)})


def sample(run: Any, draw: Draw, send: Send) -> None:
    for rollout in run.sampler.stream(list(draw.own.values()), list(draw.own)):
        send([rollout])


def seconds(
    schedule: str, kind: str, costs: Costs, steps: int, *, staleness: int = 0, width: Width = WIDTH
) -> list[float]:
    """Wall clock of each step of a run that does nothing but wait."""
    run = SimpleNamespace(
        config=SimpleNamespace(
            train=SimpleNamespace(schedule=schedule, max_staleness=staleness, steps=steps),
            rollout=SimpleNamespace(is_elsewhere=True),
        ),
        scorer=Teacher(costs, width), sampler=Engine(kind, costs), timeline=Timeline(), copied=Still(), step=0,
    )  # fmt: skip
    taken = []
    with scheduled(run, draw, sample) as scheduler:  # type: ignore[arg-type]
        began = time.perf_counter()
        while run.step < steps:
            samples = scheduler.begin()
            for members in samples.micro_batches(InOrder(10**9, MEMBERS, PACKED)):
                until(time.perf_counter() + sum(s.rollout.num_tokens for s in members) * costs.learn)
            with scheduler.weights_move():
                run.step += 1
            taken.append(time.perf_counter() - began)
            began = time.perf_counter()
            run.timeline.figures()  # forgets what it has
    return taken


def bounds(kind: str, costs: Costs) -> tuple[float, float]:
    """Seconds that step 0 takes at the least: with micro-batches and their order as strict has them, and in any order.

    Whoever is finished at t or later is scored after t, one after the other. A micro-batch waits for its samples and,
    in order, for those of all before it; so the teacher that serves it best scores these alone.
    """
    tokens = lengths(kind, 0)
    finished = np.array(finish_times(tokens.tolist(), costs.sample))
    ready = finished + tokens * costs.score
    end = 0.0
    for stop in range(MEMBERS, SAMPLES + 1, MEMBERS):
        first, counts = finished[:stop], tokens[:stop]
        scored = max(t + counts[first >= t].sum() * costs.score for t in first)
        end = max(end, scored) + counts[-MEMBERS:].sum() * costs.learn
    teacher = max(t + tokens[finished >= t].sum() * costs.score for t in finished) + tokens.min() * costs.learn
    learner = max(t + tokens[ready >= t].sum() * costs.learn for t in ready)
    return end, max(learner, teacher)


def strict_point(ratio: str, kind: str, width: Width = WIDTH) -> dict[str, float]:
    costs = Costs.of(RATIOS[ratio])
    least = min(seconds("strict", kind, costs, 1, width=width)[0] for _ in range(TRIES))
    in_order, any_order = bounds(kind, costs)
    (sequential,) = seconds("sequential", kind, costs, 1, width=width)
    return {"bound": least / in_order, "any_order": least / any_order, "sequential": sequential / least}


def utilisation(ratio: str, kind: str, width: Width = WIDTH) -> float:
    """Share of the time in which the slowest part works, over the steps that neither begin nor end the run."""
    costs = Costs.of(RATIOS[ratio])
    taken = seconds("async", kind, costs, ASYNC_STEPS, staleness=1, width=width)[WARM_STEPS:-1]
    work = np.zeros(3)
    for step in range(WARM_STEPS, ASYNC_STEPS - 1):
        tokens = lengths(kind, step)
        alone = (max(finish_times(tokens.tolist(), costs.sample)), costs.score, costs.learn)
        work += [alone[0], alone[1] * tokens.sum(), alone[2] * tokens.sum()]
    return float(work.max() / sum(taken))


def simulated(width: Width = WIDTH) -> dict[str, float]:
    """`strict_vs_bound`, `utilisation_async` and what belongs to them."""
    points = [(ratio, kind) for ratio in RATIOS for kind in LENGTHS]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        strict = list(pool.map(lambda point: strict_point(*point, width), points))
        used = list(pool.map(lambda point: utilisation(*point, width), points))
    for point, figures, share in zip(points, strict, used, strict=True):
        print(
            f"{point[0]:12} {point[1]:10} " + "  ".join(f"{k} {v:.3f}" for k, v in figures.items()),
            f"async {share:.3f}",
        )
    return {
        "strict_vs_bound": max(p["bound"] for p in strict),
        "strict_vs_any_order": max(p["any_order"] for p in strict),
        "sequential_vs_strict": statistics.median(p["sequential"] for p in strict),
        "utilisation_async": min(used),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--requests", type=int, default=WIDTH.requests, help="at the teacher at once, at most")
    parser.add_argument("--sequences", type=int, default=WIDTH.samples, help="of a request, at most")
    parser.add_argument("--tokens", type=int, default=WIDTH.tokens, help="that the teacher says it computes at once")
    options = parser.parse_args()
    figures = simulated(Width(options.requests, options.sequences, options.tokens))
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
