"""`python -m examples.interop`: both programs against this server's backends and against stock `vllm serve`, of one
checkpoint, and how far their numbers are apart."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from examples.interop import parts
from examples.interop.distillation import FORWARD_KL, REVERSE_KL, distil
from examples.interop.environment import VENV, InteropError, program
from examples.interop.harness import Evaluation, evaluate
from examples.interop.servers import KINDS, server

OBJECTIVES = {"forward_kl": FORWARD_KL, "reverse_kl": REVERSE_KL}


@dataclass(frozen=True)
class Numbers:
    """Of one server."""

    evaluation: Evaluation
    losses: dict[str, list[float]]
    """By objective, of each step."""


def measure(kind: str, model: Path, folder: Path, venv: Path = VENV, steps: int = 20) -> Numbers:
    with server(kind, model, folder / "server") as url:
        evaluation = evaluate(url, model, folder / "harness", venv)
        losses = {
            name: distil(("--teacher-url", url), model, folder / name, *options, "--steps", str(steps), venv=venv)
            for name, options in OBJECTIVES.items()
        }
    return Numbers(evaluation, losses)


def differences(one: Numbers, other: Numbers) -> dict[str, float]:
    """How far two servers' numbers are apart, at most."""
    a, b = one.evaluation, other.evaluation
    if a.loglikelihoods.keys() != b.loglikelihoods.keys() or a.metrics.keys() != b.metrics.keys():
        raise InteropError("the harness asked the two servers different questions")
    accuracies = [name for name in a.metrics if name.endswith(("/acc", "/acc_norm"))]
    found = {
        "accuracy": max(abs(a.metrics[name] - b.metrics[name]) for name in accuracies),
        "loglikelihood_nats": max(abs(a.loglikelihoods[key] - b.loglikelihoods[key]) for key in a.loglikelihoods),
        "greedy_flags": float(sum(a.greedy[key] != b.greedy[key] for key in a.greedy)),
    }
    for name in one.losses:
        pairs = zip(one.losses[name], other.losses[name], strict=True)
        found[f"loss_{name}"] = max(abs(x - y) for x, y in pairs)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.interop", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/interop"), help="where results go")
    parser.add_argument("--venv", type=Path, default=VENV, help="the environment that `make interop` made")
    parser.add_argument("--steps", type=int, default=20, help="of each training (default: 20)")
    arguments = parser.parse_args()
    found: dict[str, Numbers] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    try:
        program(arguments.venv, "lm_eval")
        model = parts.teacher(arguments.output / "teacher").resolve()
        for name in (*KINDS, "stock again"):
            folder = arguments.output / name.replace(" ", "_")
            found[name] = measure(name.split()[0], model, folder, arguments.venv, arguments.steps)
            print(f"{name}:", json.dumps(found[name].evaluation.metrics), json.dumps(found[name].losses))
        against = {name: differences(found[name], found["stock"]) for name in found if name != "stock"}
    except InteropError as error:
        print(f"interop: {error}", file=sys.stderr)
        return 1
    print("largest difference from stock vllm serve:")
    for name, values in against.items():
        print(f"  {name:12}", "  ".join(f"{key} {value:.2g}" for key, value in values.items()))
    (arguments.output / "differences.json").write_text(json.dumps(against, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
