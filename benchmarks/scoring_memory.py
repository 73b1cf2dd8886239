"""`python -m benchmarks.scoring_memory`: how far memory rises while sequences are scored, against the formula of
docs/operations.md: once for the scoring step alone, once for a whole server with vLLM's engine behind it.

Each figure is a peak of resident memory (VmHWM, set back before the work), so that what libraries allocate by
themselves counts, too. Linux only. What the keys mean is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from benchmarks import models, processes
from benchmarks.systems import Child
from teacher_api.client import TeacherClient
from teacher_api.types import Completion, ScoreOptions, ScoreRequest

VOCABULARIES = (32_000, 151_936)
LENGTHS = (512, 2048, 8192)
HIDDEN, LAYERS, TOP_K = 256, 2, 64
STEP_TOKENS = 2048  # of one forward of the engine: its activations are the same from that length on
KV_CACHE_BYTES = 128 << 20
SLICES = 6  # of the formula: of a chunk, in other forms; each of 1 MiB, or of four rows where those are more
ANSWER_COPIES = 3  # of the formula: of the step, of the sequence, and packed
MIB = 1 << 20
CALL_TIMEOUT_S = 600.0


def answer_bytes(num_rows: int) -> int:
    """Of the arrays of an answer: token, tail, and an id and a value of each of the top k."""
    return num_rows * (8 + 8 * TOP_K)


def step_bytes(vocabulary: int) -> int:
    """The formula for the step, above its inputs and its answer: no length in it, and at most 128 MiB of logits however
    large the vocabulary is."""
    row_bytes = 4 * vocabulary
    chunk_rows = max(1, (32 << 20) // row_bytes // 64 * 64, min(128, (128 << 20) // row_bytes))
    return chunk_rows * row_bytes + SLICES * max(1 << 20, 4 * row_bytes)


def formula_bytes(vocabulary: int, num_rows: int) -> int:
    """For the engine, above model, cache and what a forward without scores takes."""
    return step_bytes(vocabulary) + ANSWER_COPIES * answer_bytes(num_rows)


def resident_bytes(process: int, field: str) -> int:
    """`VmRSS` or, for the highest since it was set back, `VmHWM`."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {process} has no {field}")


def set_back(process: int) -> None:
    """Sets VmHWM to VmRSS."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


class Step:
    """score_rows with a head of this vocabulary, in a process of its own."""

    def __init__(self, vocabulary: int, num_rows: int) -> None:
        import torch

        from teacher_server.backends.rows import auto_chunk_rows, score_rows

        random = torch.Generator().manual_seed(0)
        weight = torch.randn(vocabulary, HIDDEN, generator=random)
        self._hidden_NH = torch.randn(num_rows, HIDDEN, generator=random)
        self._targets_N = torch.randint(0, vocabulary, (num_rows,), generator=random)

        def score(rows: int) -> None:
            self._scores = score_rows(
                lambda hidden_nH: hidden_nH @ weight.T,
                self._hidden_NH[:rows],
                self._targets_N[:rows],
                ScoreOptions(top_k=TOP_K),
                tokenizer_size=vocabulary,
                chunk_rows=auto_chunk_rows(vocabulary),
            )

        self._score = score
        score(2)  # so that what is loaded at the first call is there

    def peak_bytes(self) -> int:
        """Above what was there before, the answer included."""
        me = os.getpid()
        set_back(me)
        before = resident_bytes(me, "VmRSS")
        self._score(len(self._targets_N))
        return resident_bytes(me, "VmHWM") - before


class Served:
    """A running teacher-serve: the processes that hold its memory, and one request at a time."""

    def __init__(self, pid: int, url: str, vocabulary: int) -> None:
        server = psutil.Process(pid)
        self._processes = {"server": [pid], "engine": [child.pid for child in server.children(recursive=True)]}
        self._random = np.random.Generator(np.random.Philox(0))
        self._vocabulary = vocabulary
        self._client = TeacherClient(url, timeout_s=CALL_TIMEOUT_S, attempt_timeout_s=CALL_TIMEOUT_S)

    def close(self) -> None:
        self._client.close()

    def idle_bytes(self) -> dict[str, int]:
        return self._sums("VmRSS")

    def peak_bytes(self, num_tokens: int, *, all_rows: bool) -> dict[str, int]:
        """While one sequence is scored: every position, or only its last one without top-k."""
        tokens = self._random.integers(2, self._vocabulary, num_tokens).astype(np.int32)
        ranges = () if all_rows else ((num_tokens - 1, num_tokens),)
        request = ScoreRequest(
            [Completion("0", tokens, ranges=ranges)], options=ScoreOptions(top_k=TOP_K if all_rows else 0)
        )
        for process in self._all():
            set_back(process)
        (scores,) = self._client.score(request)
        assert scores.num_rows == (num_tokens - 1 if all_rows else 1)
        return self._sums("VmHWM")

    def _all(self) -> Iterator[int]:
        for processes_ in self._processes.values():
            yield from processes_

    def _sums(self, field: str) -> dict[str, int]:
        return {name: sum(resident_bytes(p, field) for p in found) for name, found in self._processes.items()}


def of_the_step(vocabulary: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    for length in LENGTHS:
        with Child(Step, vocabulary, length) as child:
            peak = child.call("peak_bytes")
        above = peak - answer_bytes(length)
        figures[f"step_above_answer_mib_{length}_v{vocabulary}"] = above / MIB
        figures[f"step_over_formula_{length}_v{vocabulary}"] = above / step_bytes(vocabulary)
    return figures


def of_the_server(vocabulary: int, scratch: Path) -> dict[str, float]:
    model = models.make(scratch / "model", vocabulary=vocabulary, hidden=HIDDEN, layers=LAYERS, positions=max(LENGTHS))
    arguments = ["--backend", "vllm", "--scoring-path", "fused", "--dtype", "float32"]
    arguments += ["--vllm.max_num_batched_tokens", str(STEP_TOKENS)]
    arguments += ["--vllm.kv_cache_memory_bytes", str(KV_CACHE_BYTES)]
    figures: dict[str, float] = {}
    with processes.teacher(model, scratch, *arguments) as announced:
        served = Served(announced["pid"], announced["grpc_url"], vocabulary)
        for all_rows in (False, True):
            served.peak_bytes(min(LENGTHS), all_rows=all_rows)  # so that what is loaded at the first call is there
        idle = served.idle_bytes()
        for length in LENGTHS:
            prefill, scored = (served.peak_bytes(length, all_rows=all_rows) for all_rows in (False, True))
            place = f"{length}_v{vocabulary}"
            for name in ("server", "engine"):
                figures[f"{name}_prefill_mib_{place}"] = (prefill[name] - idle[name]) / MIB
                figures[f"{name}_scored_mib_{place}"] = (scored[name] - idle[name]) / MIB
            above = scored["engine"] - prefill["engine"]
            figures[f"engine_scoring_mib_{place}"] = above / MIB
            figures[f"engine_over_formula_{place}"] = above / formula_bytes(vocabulary, length)
        served.close()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring_memory", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--part", choices=("step", "server", "both"), default="both")
    parser.add_argument("--vocabulary", type=int, action="append", help=f"repeatable; {VOCABULARIES} if not given")
    options = parser.parse_args()
    figures: dict[str, float] = {}
    for part in ("step", "server"):
        if options.part not in (part, "both"):
            continue
        for vocabulary in options.vocabulary or VOCABULARIES:
            with tempfile.TemporaryDirectory() as scratch:
                found = of_the_step(vocabulary) if part == "step" else of_the_server(vocabulary, Path(scratch))
            for name, value in found.items():
                print(f"{name:44s} {value:10.2f}", flush=True)
            figures |= found
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
