"""`python -m benchmarks.rollout`: how fast the student samples, next to transformers' generate on the same weights and
prompts. What the keys mean is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import models
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.torch_sampler import TorchSampler
from student_trainer.types import Prompt

VOCABULARY = 32_000
STOP_IDS = tuple(range(2, 2 + VOCABULARY // 64))  # about one token in 64 ends a completion
FULL = {"sequences": 16, "prompt": 98, "new_tokens": 128}  # of the step in benchmarks.pipeline


@dataclass(frozen=True)
class Sizes:
    sequences: int = 32
    shortest: int = 16  # prompt
    longest: int = 240
    new_tokens: int = 128
    at_once: tuple[int, ...] = (16, 8)  # sequences; ours: the first
    rounds: int = 3


QUICK = Sizes(sequences=6, longest=32, new_tokens=16, at_once=(4, 2), rounds=1)


@dataclass(frozen=True)
class Task:
    """Completions of `prompts`, until a stop id or `new_tokens`."""

    model: Any
    prompts: list[Prompt]
    new_tokens: int
    stop_ids: tuple[int, ...]

    def sampler(self, at_once: int) -> TorchSampler:
        return TorchSampler(
            self.model,
            eos_token_ids=self.stop_ids,
            pad_token_id=0,
            vocabulary_size=VOCABULARY,
            config=RolloutConfig(max_new_tokens=self.new_tokens, batch_sequences=at_once),
            seed=0,
        )

    def ours(self, sampler: TorchSampler, number: int) -> int:
        """Samples all of them; tokens that were sampled."""
        uids = range(number * len(self.prompts), (number + 1) * len(self.prompts))
        return sum(r.num_tokens for r in sampler.sample(self.prompts, uids))

    def generate(self, at_once: int, number: int) -> int:
        """The same with transformers: batches of like length, padded on the left."""
        torch.manual_seed(number)
        ordered = sorted(self.prompts, key=lambda prompt: len(prompt.token_ids))
        tokens = 0
        for start in range(0, len(ordered), at_once):
            batch = [torch.from_numpy(p.token_ids).long() for p in ordered[start : start + at_once]]
            width = max(len(ids) for ids in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(batch):
                ids[row, width - len(prompt) :] = prompt
                mask[row, width - len(prompt) :] = 1
            out = self.model.generate(
                ids,
                attention_mask=mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self.new_tokens,
                eos_token_id=list(self.stop_ids) or None,
                pad_token_id=0,
                use_cache=True,
            )
            is_stop = np.isin(out[:, width:].numpy(), self.stop_ids)
            tokens += sum(int(row.argmax()) + 1 if row.any() else len(row) for row in is_stop)
        return tokens


@dataclass
class Rates:
    """Tokens per second of each round, by the clock on the wall and by CPU seconds of this process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def of(self, work: Callable[[int], int], number: int) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        tokens = work(number)
        self.wall.append(tokens / (time.perf_counter() - wall))
        self.cpu.append(tokens / (time.process_time() - cpu))


def taking_turns(ways: dict[str, Callable[[int], int]], rounds: int) -> dict[str, Rates]:
    rates = {name: Rates() for name in ways}
    for number in range(rounds):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            rates[name].of(ways[name], number)
    return rates


def task(model: Any, *, sequences: int, lengths: Sequence[int], new_tokens: int, stop_ids: tuple[int, ...]) -> Task:
    rng = np.random.default_rng(0)
    sizes = rng.permutation(np.linspace(lengths[0], lengths[-1], sequences).astype(np.int64))
    prompts = [
        Prompt(i, rng.integers(VOCABULARY // 2, VOCABULARY, size=n).astype(np.int32)) for i, n in enumerate(sizes)
    ]
    model.generation_config.eos_token_id = None
    return Task(model, prompts, new_tokens, stop_ids)


def mixed_lengths(model: Any, sizes: Sizes) -> dict[str, Any]:
    lengths = (sizes.shortest, sizes.longest)
    mixed = task(model, sequences=sizes.sequences, lengths=lengths, new_tokens=sizes.new_tokens, stop_ids=STOP_IDS)
    ways: dict[str, Callable[[int], int]] = {}
    for name, at_once in (("", sizes.at_once[0]), ("_all", sizes.sequences)):
        ways[f"ours{name}"] = partial(mixed.ours, mixed.sampler(at_once))
    for name, at_once in (*((f"_{n}", n) for n in sizes.at_once), ("_all", sizes.sequences)):
        ways[f"generate{name}"] = partial(mixed.generate, at_once)
    rates = taking_turns(ways, sizes.rounds)
    figures: dict[str, Any] = {f"tokens_per_s_{name}": round(float(np.median(rates[name].wall))) for name in ways}
    best = max((f"generate_{n}" for n in sizes.at_once), key=lambda name: float(np.median(rates[name].wall)))
    figures |= speedups("speedup_vs_generate", rates["ours"], rates[best])
    return figures | speedups("speedup_vs_generate_all", rates["ours_all"], rates["generate_all"])


def full_length(model: Any, rounds: int, *, sequences: int, prompt: int, new_tokens: int) -> dict[str, Any]:
    even = task(model, sequences=sequences, lengths=(prompt,), new_tokens=new_tokens, stop_ids=())
    ours, theirs = partial(even.ours, even.sampler(sequences)), partial(even.generate, sequences)
    ours(rounds)  # to warm up
    theirs(rounds)
    rates = taking_turns({"ours": ours, "generate": theirs}, rounds)
    seconds = {name: sequences * new_tokens / float(np.median(rates[name].wall)) for name in rates}
    figures: dict[str, Any] = {f"full_length_s_{name}": round(taken, 3) for name, taken in seconds.items()}
    return figures | speedups("full_length_speedup", rates["ours"], rates["generate"])


def speedups(name: str, ours: Rates, theirs: Rates) -> dict[str, float]:
    """Medians over the rounds."""
    wall, cpu = np.array(ours.wall) / np.array(theirs.wall), np.array(ours.cpu) / np.array(theirs.cpu)
    return {name: round(float(np.median(wall)), 2), f"{name}_cpu": round(float(np.median(cpu)), 2)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollout", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--rounds", type=int, default=Sizes.rounds)
    parser.add_argument("--quick", action="store_true", help="shows that it works; the figures mean nothing")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        path = models.make(Path(folder) / "student", vocabulary=VOCABULARY, hidden=128, layers=2, logit_std=1.0)
        model = AutoModelForCausalLM.from_pretrained(path).eval()
    full = {"sequences": 2, "prompt": 8, "new_tokens": 8} if args.quick else FULL
    sizes = QUICK if args.quick else Sizes(rounds=args.rounds)
    figures: dict[str, Any] = {"threads": torch.get_num_threads()}
    for part in (partial(full_length, model, sizes.rounds, **full), partial(mixed_lengths, model, sizes)):
        found = part()
        figures |= found
        print("\n".join(f"{name:32} {value}" for name, value in found.items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
