"""`python -m examples.interop.harness`: lm-evaluation-harness scores a server through its `local-completions` model."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from examples.interop import parts, servers
from examples.interop.environment import VENV, InteropError, program, run

BATCH_SEQUENCES, NUM_CONCURRENT = 4, 4


@dataclass(frozen=True)
class Evaluation:
    """What the harness found."""

    metrics: dict[str, float]
    """By task and metric, such as `number_words/acc_norm`."""
    loglikelihoods: dict[tuple[str, int, int], float]
    """In nats, by task, document and number of the request."""
    greedy: dict[tuple[str, int, int], bool]
    """Whether each token was the most likely one, by the same; of passages the harness does not say."""


def evaluate(url: str, tokenizer: Path | str, folder: Path, venv: Path = VENV, num_questions: int = 40) -> Evaluation:
    """Runs the harness's own command on the tasks of parts.py.

    Args:
        url: the server's, without /v1.
        tokenizer: the served model's, a folder or a hub id.
        folder: for tasks, results and the harness's log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder = folder.resolve()
    tasks = parts.tasks(folder / "tasks", num_questions)
    model = {
        "model": servers.model_of(url),
        "base_url": f"{url.rstrip('/')}/v1/completions",
        "tokenizer": tokenizer,
        "num_concurrent": NUM_CONCURRENT,
        "max_length": servers.MAX_TOKENS,
    }
    command: list[str | Path] = [
        program(venv, "lm_eval"), "run", "--model", "local-completions",
        "--model_args", ",".join(f"{name}={value}" for name, value in model.items()),
        "--tasks", ",".join(parts.TASKS), "--include_path", tasks, "--batch_size", str(BATCH_SEQUENCES),
        "--output_path", folder / "results", "--log_samples",
    ]  # fmt: skip
    run(command, folder, folder / "lm_eval.log")
    return _read(folder / "results")


def _read(results: Path) -> Evaluation:
    summary = json.loads(max(results.rglob("results_*.json")).read_text())
    metrics = {
        f"{task}/{name.removesuffix(',none')}": value
        for task, found in summary["results"].items()
        for name, value in found.items()
        if name.endswith(",none") and "_stderr" not in name
    }
    values: dict[tuple[str, int, int], float] = {}
    greedy: dict[tuple[str, int, int], bool] = {}
    for task in parts.TASKS:
        for line in max(results.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines():
            sample = json.loads(line)
            for number, answer in enumerate(sample["filtered_resps"]):
                key = (task, sample["doc_id"], number)
                if isinstance(answer, list):
                    values[key], greedy[key] = float(answer[0]), str(answer[1]) == "True"
                else:
                    values[key] = float(answer)
    return Evaluation(metrics, values, greedy)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.interop.harness", description=__doc__)
    add_arguments(parser, Path("runs/interop/harness"))
    arguments = parser.parse_args()
    check_arguments(parser, arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    try:
        program(arguments.venv, "lm_eval")
        with contextlib.ExitStack() as stack:
            url, tokenizer = chosen(arguments, stack)
            found = evaluate(url, tokenizer, arguments.output, arguments.venv)
    except InteropError as error:
        print(f"harness: {error}", file=sys.stderr)
        return 1
    for name, value in found.metrics.items():
        print(f"{name:32} {value:.6f}")
    return 0


def add_arguments(parser: argparse.ArgumentParser, output: Path) -> None:
    """The options that every example here has."""
    parser.add_argument("--url", help="a running server, without /v1; without it one is started with a random model")
    parser.add_argument("--tokenizer", help="folder or hub id of the served model's tokenizer; with --url")
    parser.add_argument("--output", type=Path, default=output, help=f"where results go (default: {output})")
    parser.add_argument("--venv", type=Path, default=VENV, help="the environment that `make interop` made")


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if (arguments.url is None) != (arguments.tokenizer is None):
        parser.error("--url and --tokenizer go together: the programs count the served model's tokens themselves")


def chosen(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[str, Path | str]:
    """(url, tokenizer): the given ones, or those of a small random teacher that is served until `stack` closes."""
    if arguments.url is not None:
        return arguments.url, arguments.tokenizer
    model = parts.teacher(arguments.output / "teacher").resolve()
    return stack.enter_context(servers.server("torch", model, arguments.output / "server")), model


if __name__ == "__main__":
    sys.exit(main())
