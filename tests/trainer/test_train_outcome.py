"""What a run says of itself: its evaluations, whoever solves the problems, its best checkpoint, its metrics."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import jsonschema
import pytest
import torch
from tinymodels import save_tiny
from training import PROMPTS, TeacherProcess, arguments, metrics, teacher, weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer import cli

# Runs in this process leave gRPC's threads behind; its handlers must not run when a later test starts processes.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "teacher", seed=1, scale=2.5)
    save_tiny(place / "student", seed=2)
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return place


@pytest.fixture(scope="module")
def served(place) -> Iterator[TeacherProcess]:
    with teacher(place / "serve", place / "teacher", "--reference") as one:
        yield one


@pytest.fixture(scope="module")
def solvable(place) -> Path:
    """Five problems of which the untrained student solves three: one token long, it is what it finds most likely."""
    model = AutoModelForCausalLM.from_pretrained(place / "student")
    tokenizer = AutoTokenizer.from_pretrained(place / "student")
    lines, stops = [], set()
    for n, question in enumerate(("fox", "dog 1", "lazy 2", "the quick", "brown 3 + 4")):
        with torch.no_grad():
            logits = model(tokenizer(question, return_tensors="pt").input_ids).logits[0, -1]
        token = int(logits[: len(tokenizer)].argmax())
        stops.add(token)  # a completion counts only where it ends
        lines.append({"question": question, "answer": "never said" if n in (1, 3) else tokenizer.decode([token])})
    (place / "stop_ids.json").write_text(json.dumps(sorted(stops)))
    (place / "solvable.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place / "solvable.jsonl"


@pytest.fixture(autouse=True)
def _own_torch_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def train(place, served, tmp_path) -> Callable[..., tuple[int, Path]]:
    """Runs the command in this process; (exit code, output directory)."""

    def run(*more: str, url: str = served.url, name: str = "run") -> tuple[int, Path]:
        argv = arguments(tmp_path / name, place / "student", place / "prompts.txt", url, *more)
        return cli.run(argv), tmp_path / name

    return run


def test_the_best_checkpoint_stays_and_the_export_says_who_taught(train, served) -> None:
    ranked = ("checkpoint.metric=loss", "checkpoint.mode=min", "checkpoint.save_every=1", "checkpoint.keep_last=1")
    code, run_dir = train("optim.learning_rate=0.2", *ranked)
    assert code == 0
    losses = {line["step"]: line["loss"] for line in metrics(run_dir)}
    best = min(losses, key=lambda step: losses[step])
    assert best != 6, losses  # else this shows nothing
    assert (run_dir / "checkpoints" / "best").resolve().name == f"step-{best:08d}"
    kept = {"best", f"step-{best:08d}", "step-00000006"}
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == kept
    AutoModelForCausalLM.from_pretrained(run_dir / "checkpoints" / "best")
    card = (run_dir / "final" / "README.md").read_text()
    fingerprint = httpx.get(f"{served.http_url}/v1/info").json()["fingerprint"]
    assert fingerprint in card
    assert f"| 6 | {losses[6]:.4g} |" in card


def test_checkpoints_are_ranked_by_a_metric_that_only_some_steps_have(train, solvable) -> None:
    mixed = (f"data.source={solvable}", "data.on_policy_fraction=0.5", "loss.distill_weight=0.5")
    ranked = ("checkpoint.metric=cross_entropy", "checkpoint.mode=min", "checkpoint.save_every=1")
    code, run_dir = train(*mixed, *ranked)
    assert code == 0
    found = {line["step"]: line.get("cross_entropy") for line in metrics(run_dir)}
    assert found[1] is None, found  # else this shows nothing
    values = {step: value for step, value in found.items() if value is not None}
    best = min(values, key=lambda step: values[step])
    assert (run_dir / "checkpoints" / "best").resolve().name == f"step-{best:08d}"


def documented_names() -> list[str]:
    """Names in the first column of the tables of metrics; `<…>` in one stands for any text."""
    names = []
    for text in ((Path("docs") / name).read_text() for name in ("training.md", "losses.md")):
        for cell in re.findall(r"^\| ((?:`[^`|]+`(?:, )?)+) \|", text, re.MULTILINE):
            names += [re.sub(r"<[^>]+>", ".+", name) for name in re.findall(r"`([^`]+)`", cell)]
    return names


def test_every_line_of_metrics_is_as_the_schema_and_the_docs_say(train, solvable) -> None:
    settings = (f"eval.data.source={solvable}", "eval.task=exact_match", "eval.every=3")
    code, run_dir = train(*settings, "teacher.top_k=all")
    assert code == 0
    schema = json.loads(Path("docs/metrics.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    lines = metrics(run_dir)
    assert [line["step"] for line in lines if "eval_accuracy" in line] == [0, 3, 6]
    for line in lines:
        validator.validate(line)
        unknown = [key for key in line if not any(re.fullmatch(name, key) for name in ["step", *documented_names()])]
        assert not unknown, f"{unknown} stands in no table of docs/training.md or docs/losses.md"
    good = next(line for line in lines if "loss" in line)
    for bad in (
        {**good, "loss": "1.0"}, {**good, "skipped": 0.5}, {**good, "finished": 1.5}, {**good, "seconds": -1.0},
        {**good, "step": 0}, {**good, "eval_accuracy": 0.5}, {**good, "tokens": 1.5}, {"step": 1},
        {key: value for key, value in good.items() if key != "grad_norm"}, {"step": 0, "eval_accuracy": 0.5},
    ):  # fmt: skip
        assert not validator.is_valid(bad), bad


@pytest.mark.slow
def test_two_processes_end_where_one_does(train, solvable) -> None:
    """And solve the problems of an evaluation together, with the same outcome."""
    stop = (solvable.parent / "stop_ids.json").read_text()
    settings = (
        f"eval.data.source={solvable}",
        "eval.task=exact_match",
        "eval.every=6",
        f"rollout.stop_token_ids={stop}",
    )
    _, one = train(*settings, name="one")
    code, two = train("--num-processes=2", *settings, name="two")
    assert code == 0
    first = metrics(two)[0]
    assert (first["step"], first["eval_accuracy"]) == (0, 0.6)
    assert [line for line in metrics(one) if "eval_accuracy" in line] == [
        line for line in metrics(two) if "eval_accuracy" in line
    ]
    a, b = (torch.cat([t.reshape(-1) for t in weights(d / "final").values()]).double() for d in (one, two))
    assert float((a - b).norm() / a.norm()) < 1e-5
    for left, right in zip(*([m for m in metrics(d) if "loss" in m] for d in (one, two)), strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-3)
        assert right["tokens"] == left["tokens"]


@pytest.mark.long
@pytest.mark.vllm
def test_an_evaluation_by_vllm_finds_what_the_sampler_finds(train, place, tmp_path) -> None:
    """And leaves nothing behind but its figures."""
    pytest.importorskip("vllm")
    heads = {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    student = save_tiny(tmp_path / "student", seed=2, **heads)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(student), AutoTokenizer.from_pretrained(student)
    with torch.no_grad():
        logits = model(tokenizer("fox", return_tensors="pt").input_ids).logits[0, -1]
    token = int(logits[: len(tokenizer)].argmax())
    rows = [{"question": "fox", "answer": tokenizer.decode([token])}, {"question": "dog", "answer": "never said"}]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [f"--student={student}", f"eval.data.source={tmp_path / 'two.jsonl'}", "eval.task=exact_match"]
    settings += ["eval.every=1", "--steps=1", "eval.num_prompts=2", f"rollout.stop_token_ids=[{token}]"]
    found = {}
    for engine in (["eval.engine=vllm", "eval.vllm={enforce_eager: true, max_model_len: 64}"], []):
        code, run_dir = train(*settings, *engine, name=f"run{len(found)}")
        assert code == 0
        found[run_dir] = [line for line in metrics(run_dir) if "eval_accuracy" in line]
        assert not (run_dir / ".evaluating").exists()
    by_vllm, by_sampler = found.values()
    assert by_vllm == by_sampler
    assert by_vllm[0]["eval_accuracy"] == 0.5
