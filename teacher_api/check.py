"""`teacher-check URL`: who is there, its limits and features, the round trip, and a known sequence scored and verified.

Exit status: 0 all is well, 1 the teacher answers but something is wrong, 2 wrong usage, 3 it can't be reached.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence

import numpy as np

from teacher_api import tls
from teacher_api.asking import log_retries_plainly
from teacher_api.client import TeacherClient
from teacher_api.errors import DeadlineExceeded, TeacherError
from teacher_api.openai_info import differences
from teacher_api.types import Completion, ScoreOptions, ScoreRequest, Scores, TeacherInfo

OK, WRONG, USAGE, UNREACHABLE = 0, 1, 2, 3
SEQUENCE_TOKENS = 16
ROUND_TRIPS = 5
MASS_TOLERANCE = 1e-3
"""By which the probabilities of one row may miss 1: float32 rounding, and float16 weights of large models."""


def known_sequence(info: TeacherInfo) -> ScoreRequest:
    """The same for every teacher of a vocabulary size: ids spread over it by a multiplicative step."""
    length = min(SEQUENCE_TOKENS, info.max_sequence_tokens)
    ids = (np.arange(length, dtype=np.int64) * 7919 + 1) % info.tokenizer_size
    top_k = min(8, info.max_top_k) if "top_k" in info.features else 0
    return ScoreRequest([Completion("known", ids.astype(np.int32))], options=ScoreOptions(top_k=top_k))


def missing_mass(scores: Scores, token_ids: Sequence[int]) -> float:
    """max over rows of |1 - Σ p|, p over top-k, actual token and tail."""
    mass = np.exp(scores.log_tail.astype(np.float64))
    actual = np.asarray(token_ids)[scores.positions]
    listed = np.zeros(scores.num_rows, bool)
    if scores.topk_ids is not None and scores.topk_logprob is not None:
        mass += np.exp(scores.topk_logprob.astype(np.float64)).sum(1)
        listed = (scores.topk_ids == actual[:, None]).any(1)
    mass += np.where(listed, 0.0, np.exp(scores.token_logprob.astype(np.float64)))
    return float(np.abs(1 - mass).max())


def examine(client: TeacherClient) -> dict[str, object]:
    """Facts about the teacher. `problem` is among them if something is wrong."""
    info = client.info()
    times_s = []
    for _ in range(ROUND_TRIPS):
        start = time.perf_counter()
        client.info()
        times_s.append(time.perf_counter() - start)
    facts: dict[str, object] = {**dataclasses.asdict(info), "round_trip_ms": round(1000 * float(np.median(times_s)), 2)}
    request = known_sequence(info)
    start = time.perf_counter()
    (scores,) = client.score(request)
    facts["warnings"] = differences(info)
    facts["score_ms"] = round(1000 * (time.perf_counter() - start), 2)
    facts["scored_rows"] = scores.num_rows
    facts["mean_logprob_nats"] = round(float(scores.token_logprob.mean()), 4)
    if "exact_tail" in info.features:
        miss = missing_mass(scores, request.completions[0].token_ids.tolist())
        facts["missing_mass"] = miss
        if miss > MASS_TOLERANCE:
            facts["problem"] = f"probabilities of a row miss 1 by {miss:.2g}; expected at most {MASS_TOLERANCE:g}"
    return facts


def report(url: str, facts: dict[str, object]) -> str:
    features = facts["features"]
    teachers = facts["teachers"]
    warnings = facts["warnings"]
    assert isinstance(features, tuple), "of TeacherInfo"
    assert isinstance(teachers, tuple), "of TeacherInfo"
    assert isinstance(warnings, list), "of examine"
    lines = [
        f"teacher      {facts['model_name']} at {url}",
        f"fingerprint  {facts['fingerprint']}",
        f"engine       {facts['engine']} {facts['engine_version']}, {facts['scoring_path']}, weights {facts['dtype']}, "
        f"head {facts['head_dtype']}",
        f"tokenizer    {facts['tokenizer_size']} ids of {facts['logit_width']} columns, "
        f"fingerprint {facts['tokenizer_fingerprint'] or 'none'}",
        f"limits       {facts['max_sequence_tokens']} tokens a sequence, top-k {facts['max_top_k']}, "
        f"{facts['max_candidates']} candidates a row, {facts['max_completions']} completions a request",
        f"features     {', '.join(features)}",
        *([f"teachers     the base, {', '.join(teachers)}"] if teachers else []),
        f"round trip   {facts['round_trip_ms']} ms",
        f"known text   {facts['scored_rows']} positions in {facts['score_ms']} ms, "
        f"mean {facts['mean_logprob_nats']} nats a token",
        *(f"warning      {text}" for text in warnings),
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="teacher-check", description=__doc__)
    parser.add_argument(
        "url",
        help="grpc://host:port, grpcs://…, http://… or https://…, replicas with commas between them; "
        "openai+http://host:port/v1: vllm serve",
    )
    parser.add_argument("--api-key", help="better in the environment: TEACHER_API_KEY")
    parser.add_argument("--teacher", default="", metavar="NAME", help="an adapter the server offers; none: its base")
    parser.add_argument("--timeout-s", type=float, default=10.0, help="of each call, retries included (default 10)")
    parser.add_argument("--json", action="store_true", help="print the facts as one JSON object")
    tls.add_arguments(parser)
    args = parser.parse_args(argv)
    log_retries_plainly()
    key = args.api_key or os.environ.get("TEACHER_API_KEY") or None
    try:
        files = tls.of_arguments(args)
        with TeacherClient(args.url, api_key=key, timeout_s=args.timeout_s, teacher=args.teacher, tls=files) as client:
            facts = examine(client)
    except TeacherError as error:
        print(f"teacher-check: {args.url}: {error}", file=sys.stderr)
        return UNREACHABLE if error.kind == "unavailable" or isinstance(error, DeadlineExceeded) else WRONG
    except ValueError as error:
        print(f"teacher-check: {error}", file=sys.stderr)
        return USAGE
    print(json.dumps(facts) if args.json else report(args.url, facts))
    if "problem" in facts:
        print(f"teacher-check: {args.url}: {facts['problem']}", file=sys.stderr)
        return WRONG
    return OK


if __name__ == "__main__":
    sys.exit(main())
