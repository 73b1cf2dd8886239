"""`python -m benchmarks.compression`: what zstd saves on answers, and what it costs. No model: the rows are drawn so
that ids and values are as unevenly spread as a language model's. What the keys mean is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from teacher_api import compression, wire
from teacher_api.types import Completion, ScoreOptions, ScoreRequest, Scores
from teacher_api.v1 import teacher_pb2 as pb

VOCABULARIES = (32_000, 151_936)
ZIPF_EXPONENT = 1.0
CONTEXT_STD = 2.5  # nats by which a context moves each logit from the unigram's
SHARPNESS = (2.0, 0.6)  # mean and standard deviation, over rows, of the factor on all logits
ValueType = Literal["float16", "float32"]
VALUE_TYPES: tuple[ValueType, ...] = ("float16", "float32")


def rows(vocabulary: int, num_rows: int, top_k: int, seed: int = 0) -> tuple[Completion, Scores]:
    """A sequence and its answer, in float32. Logits are a Zipf unigram over shuffled ids plus noise of the context,
    times the row's sharpness; the actual token is drawn from them."""
    random = np.random.Generator(np.random.Philox(seed))
    unigram = random.permutation(-ZIPF_EXPONENT * np.log(np.arange(1, vocabulary + 1)))
    tokens = np.zeros(num_rows + 1, np.int32)
    ids = np.empty((num_rows, top_k), np.int32)
    values = np.empty((num_rows, top_k), np.float32)
    token, tail, entropy = (np.empty(num_rows, np.float32) for _ in range(3))
    for n in range(num_rows):
        sharpness = max(0.4, random.normal(*SHARPNESS))
        logits = sharpness * (unigram + CONTEXT_STD * random.standard_normal(vocabulary))
        top = logits.max()
        mass = np.exp(logits - top)
        logsumexp = top + np.log(mass.sum())
        actual = int(np.searchsorted(np.cumsum(mass), random.random() * mass.sum()))
        best = np.argpartition(-logits, top_k)[:top_k]
        ids[n] = best[np.argsort(-logits[best], kind="stable")]
        values[n], tokens[n + 1], token[n] = logits[ids[n]] - logsumexp, actual, logits[actual] - logsumexp
        entropy[n] = logsumexp - (mass @ logits) / mass.sum()
        mass[ids[n]] = mass[actual] = 0.0
        tail[n] = top + np.log(mass.sum()) - logsumexp
    print(
        f"{vocabulary}: entropy {entropy.mean():.2f} nats a row, {np.exp(values).sum(1).mean():.1%} in the top {top_k}"
    )
    positions = np.arange(1, num_rows + 1, dtype=np.int32)
    return Completion("0", tokens), Scores("0", positions, token, tail, ids, values)


def frames_of(
    request: ScoreRequest, scores: Scores, kind: compression.Compression, vocabulary: int
) -> list[pb.ScoreFrame]:
    question = wire.question(request, request.completions[0], fingerprint="f", tokenizer_size=vocabulary)
    encoded = wire.encode_scores(scores, options=request.options, candidates=None, key=question.key, compression=kind)
    return list(encoded)


def decode(request: ScoreRequest, frames: list[pb.ScoreFrame], vocabulary: int) -> Scores:
    question = wire.question(request, request.completions[0], fingerprint="f", tokenizer_size=vocabulary)
    (scores,) = map(wire.Assembler(question).add, frames)
    assert isinstance(scores, Scores)
    return scores


def taking_turns(paths: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for number in range(rounds + 1):
        for name, call in paths.items():
            started = time.process_time()
            call()
            if number:
                seconds[name].append(time.process_time() - started)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def measure(
    completion: Completion, scores: Scores, vocabulary: int, value_type: ValueType, options: argparse.Namespace
) -> dict[str, float]:
    request = ScoreRequest([completion], options=ScoreOptions(top_k=options.top_k, value_type=value_type))
    assert scores.topk_logprob is not None
    scores = replace(scores, topk_logprob=scores.topk_logprob.astype(value_type))
    none, zstd = (frames_of(request, scores, kind, vocabulary) for kind in ("none", "zstd"))
    for name in ("token_logprob", "log_tail", "topk_ids", "topk_logprob"):
        a, b = (getattr(decode(request, frames, vocabulary), name) for frames in (none, zstd))
        assert a.tobytes() == b.tobytes(), name
    seconds = taking_turns(
        {
            "encode_none": lambda: frames_of(request, scores, "none", vocabulary),
            "encode_zstd": lambda: frames_of(request, scores, "zstd", vocabulary),
            "decode_none": lambda: decode(request, none, vocabulary),
            "decode_zstd": lambda: decode(request, zstd, vocabulary),
        },
        options.rounds,
    )
    sizes = {
        name: len(pb.ScoreResponse(frames=frames).SerializeToString())
        for name, frames in (("none", none), ("zstd", zstd))
    }
    added = {end: seconds[f"{end}_zstd"] - seconds[f"{end}_none"] for end in ("encode", "decode")}
    figures = {f"bytes_per_position_{name}": size / options.rows for name, size in sizes.items()}
    figures["ratio"] = sizes["zstd"] / sizes["none"]
    for end, value in added.items():
        figures[f"{end}_us_per_position"] = 1e6 * seconds[f"{end}_none"] / options.rows
        figures[f"{end}_zstd_us_per_position"] = 1e6 * value / options.rows
    figures["pays_below_mbit_per_s"] = 8e-6 * (sizes["none"] - sizes["zstd"]) / max(sum(added.values()), 1e-9)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compression", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rows", type=int, default=512, help="positions of one answer")
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--level", type=int, default=compression.LEVEL, help="of zstd's effort")
    options = parser.parse_args()
    compression.LEVEL = options.level
    figures: dict[str, float] = {}
    for vocabulary in VOCABULARIES:
        completion, scores = rows(vocabulary, options.rows, options.top_k)
        for value_type in VALUE_TYPES:
            found = measure(completion, scores, vocabulary, value_type, options)
            suffix = f"_{value_type}_v{vocabulary}"
            figures |= {name + suffix: value for name, value in found.items()}
    for name, value in figures.items():
        print(f"{name:56s} {value:10.3f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
