"""Whole runs on mixed, streamed, weighted and packed data: what is trained on by the definition, and resumed runs that
end with the bits of an undisturbed one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tinymodels import save_tiny
from training import (
    PROMPTS,
    TeacherProcess,
    arguments,
    assert_same_bits,
    finish,
    metrics,
    teacher,
    trainer,
    wait_until,
    weights,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer import cli
from teacher_api import generate, generated_file

# Runs in this process leave gRPC's threads behind; its handlers must not run when a later test starts processes.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

pytestmark = pytest.mark.slow

ANSWERS = [f" {text} {i}" for i, text in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("data_runs")
    save_tiny(place / "teacher", seed=1, scale=2.5)
    save_tiny(place / "student", seed=2)
    records = [{"question": q, "answer": a} for q, a in zip(PROMPTS, ANSWERS, strict=True)]
    (place / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (place / "others.txt").write_text("the fox\n0 1 2 3\n")
    (place / "text.jsonl").write_text("".join(json.dumps({"text": a * 5}) + "\n" for a in ANSWERS))
    return place


@pytest.fixture(scope="module")
def served(place) -> Iterator[TeacherProcess]:
    with teacher(place / "serve", place / "teacher", "--reference", "--max-top-k=128") as one:
        yield one


@pytest.fixture(autouse=True)
def _own_torch_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def argv(place, served, tmp_path) -> Callable[..., list[str]]:
    """Command lines of small runs on `prompts.jsonl`, with `more` stronger."""

    def made(name: str, *more: str) -> list[str]:
        return arguments(tmp_path / name, place / "student", place / "prompts.jsonl", served.url, *more)

    return made


def scenarios(place: Path) -> dict[str, list[str]]:
    stream = ["data.streaming=true", "data.max_prompt_tokens=16", "data.shuffle_buffer=5"]
    domains = [
        {"name": "a", "source": str(place / "prompts.jsonl"), "weight": 2},
        {"name": "b", "source": str(place / "others.txt")},
    ]
    return {
        "samples of both kinds, candidates at both": [
            "data.on_policy_fraction=0.5", "data.mix=sample", "rollout.group_size=2", "loss.support=union",
        ],
        "steps of both kinds": ["data.on_policy_fraction=0.5"],
        "a stream": [*stream, "data.max_prompt_tokens=6", "data.overlong=drop"],
        "a stream of samples of both kinds": [
            *stream, "data.on_policy_fraction=0.5", "data.mix=sample", "data.max_answer_tokens=40",
        ],
        "domains": ["--data.source=", f"data.domains={json.dumps(domains)}"],
        "a stream of packed text": [
            f"data.source={place / 'text.jsonl'}", "data.format=packed_text", "data.seq_length=12",
            "data.on_policy_fraction=0", "data.streaming=true", "data.shuffle_buffer=3", "loss.objective=forward_kl",
        ],
    }  # fmt: skip


NAMES = tuple(scenarios(Path()))


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_ends_with_the_same_bits(name: str, argv, place, tmp_path) -> None:
    settings = scenarios(place)[name]
    assert cli.run(argv("whole", *settings)) == 0
    for steps in (1, 3, 5, 6):  # each goes on from the one before, at places within windows and at their ends
        assert cli.run(argv("parts", *settings, f"--steps={steps}")) == 0
    assert_same_bits(tmp_path / "parts" / "final", tmp_path / "whole" / "final")
    kept = [
        [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in metrics(tmp_path / run)]
        for run in ("parts", "whole")
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 6
    fixed = [line["fixed_samples"] for line in kept[0]]
    if "samples" in name:
        assert 0.0 < sum(fixed) / 6 < 1.0
        assert any(0.0 < share < 1.0 for share in fixed)
    elif "steps" in name:
        assert set(fixed) == {0.0, 1.0}
    else:
        assert set(fixed) == {1.0 if "packed" in name else 0.0}
    assert ("dropped_prompts" in kept[0][0]) == (name == "a stream")


def test_a_killed_run_on_mixed_streams_ends_as_if_nothing_had_happened(argv, place, tmp_path) -> None:
    settings = [*scenarios(place)["a stream of samples of both kinds"], "--steps=10"]
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "killed.log"
    assert cli.run(argv("whole", *settings)) == 0
    for steps in (1, 4, 7):
        process = trainer(argv("killed", *settings), log)
        wait_until(lambda p=process, n=steps: len(metrics(killed)) >= n or p.exitcode is not None, what="some steps")
        process.kill()
        process.join()
    assert finish(trainer(argv("killed", *settings), log), log) == 0, log.read_text()
    assert_same_bits(killed / "final", whole / "final")


def test_ranks_train_on_the_same_mix(argv, tmp_path) -> None:
    settings = ["data.on_policy_fraction=0.5", "data.mix=sample", "loss.support=union"]
    assert cli.run(argv("one", *settings)) == 0
    log = tmp_path / "two.log"
    assert finish(trainer(argv("two", *settings, "--num-processes=2"), log), log) == 0, log.read_text()
    shares = [[line["fixed_samples"] for line in metrics(tmp_path / run)] for run in ("one", "two")]
    assert shares[0] == shares[1]
    a, b = (
        torch.cat([t.reshape(-1) for t in weights(tmp_path / d / "final").values()]).double() for d in ("one", "two")
    )
    assert float((a - b).norm() / a.norm()) < 1e-5


def forward_kl(place: Path, pairs: list[tuple[list[int], list[int]]]) -> float:
    """Mean of KL(teacher‖student) over all completion tokens in float64, by the definition: one outcome per id of the
    tokenizer, and one for the columns past it."""
    size = len(AutoTokenizer.from_pretrained(place / "teacher"))
    p_model, q_model = (AutoModelForCausalLM.from_pretrained(place / n).double().eval() for n in ("teacher", "student"))
    values = []
    for prompt, completion in pairs:
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            whole = [m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (p_model, q_model)]
        log_p, log_q = (torch.cat([w[:, :size], w[:, size:].logsumexp(-1, keepdim=True)], -1) for w in whole)
        values.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return float(torch.cat(values).mean())


def test_fixed_data_is_the_answers_and_their_ends_by_the_definition(argv, place, tmp_path) -> None:
    tok = AutoTokenizer.from_pretrained(place / "teacher")
    settings = ["loss.objective=forward_kl", "teacher.top_k=all", "data.on_policy_fraction=0", "train.batch_size=9"]
    assert cli.run(argv("answers", *settings, "--steps=1")) == 0
    pairs = [(tok(q)["input_ids"], [*tok(a)["input_ids"], 1]) for q, a in zip(PROMPTS, ANSWERS, strict=True)]
    (line,) = metrics(tmp_path / "answers")
    assert line["loss"] == pytest.approx(forward_kl(place, pairs), rel=1e-5)
    assert (line["finished"], line["tokens"]) == (1.0, sum(len(c) for _, c in pairs))

    text = [f"data.source={place / 'text.jsonl'}", "data.format=packed_text", "data.seq_length=20"]
    ids = [i for a in ANSWERS for i in (*tok(a * 5)["input_ids"], 1)]
    pieces = [ids[i : i + 21] for i in range(0, len(ids) - 20, 21)]
    settings[-1] = f"train.batch_size={len(pieces)}"
    assert cli.run(argv("packed", *settings, *text, "--steps=1")) == 0
    (line,) = metrics(tmp_path / "packed")
    assert line["loss"] == pytest.approx(forward_kl(place, [(p[:1], p[1:]) for p in pieces]), rel=1e-5)


def test_prompts_go_to_a_teacher_and_its_answers_come_back(argv, place, tmp_path, capfd) -> None:
    capfd.readouterr()
    assert cli.run(argv("printed", "--print-prompts")) == 0
    (tmp_path / "prompts.jsonl").write_text(capfd.readouterr().out)
    asked = generated_file.read_prompts(tmp_path / "prompts.jsonl", "prompt")
    assert len(asked) == len(PROMPTS)
    written = tmp_path / "written.jsonl"
    words = ["--max-tokens=7", "--seed=1", f"--prompts={tmp_path / 'prompts.jsonl'}", f"--output={written}"]
    with teacher(tmp_path / "writer", place / "teacher", "--generate") as writer:
        assert generate.main([f"--url={writer.http_url}", *words]) == 0
    settings = ["loss.objective=forward_kl", "teacher.top_k=all", "train.batch_size=9", "--steps=1"]
    fixed = ["data.on_policy_fraction=0", f"data.fixed_source={written}"]
    assert cli.run(argv("written", *settings, *fixed)) == 0
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == list(range(len(PROMPTS)))
    pairs: list[Any] = [(line["prompt_token_ids"], line["completions"][0]["token_ids"]) for line in lines]
    assert metrics(tmp_path / "written")[0]["loss"] == pytest.approx(forward_kl(place, pairs), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "plan"),
    [
        (["data.on_policy_fraction=0.5"], "prompts   9 (50% of training on fixed completions)"),
        (["data.on_policy_fraction=0"], "prompts   9 (100% of training on fixed completions)"),
        (["data.streaming=true", "data.max_prompt_tokens=16"], "prompts   a stream from"),
    ],
)
def test_a_dry_run_says_what_is_trained_on(settings: list[str], plan: str, argv, capfd) -> None:
    capfd.readouterr()
    assert cli.run(argv("dry", *settings, "loss.objective=forward_kl", "--dry-run")) == 0
    said = capfd.readouterr().out
    assert plan in said
    scored = "scored one fixed completion" if settings[0].endswith("=0") else "scored one sequence"
    assert scored in said


def test_epochs_make_the_steps_and_a_run_by_epochs_goes_on(argv, tmp_path, capfd) -> None:
    epochs = ["train.epochs=1.5", "optim.schedule=cosine"]
    line = [word for word in argv("epochs", *epochs) if not word.startswith("--steps")]
    process = trainer(line, tmp_path / "log")
    wait_until(lambda: len(metrics(tmp_path / "epochs")) >= 2 or process.exitcode is not None, what="two steps")
    process.kill()
    process.join()
    assert cli.run(line) == 0
    assert len(metrics(tmp_path / "epochs")) == 4  # 1.5 · 9 prompts in batches of 4
    assert cli.run([*line, "--steps=2", f"--output-dir={tmp_path / 'first'}"]) == 0
    assert len(metrics(tmp_path / "first")) == 2, "whichever ends first"
    capfd.readouterr()
    assert cli.run([*line, "data.streaming=true", "data.max_prompt_tokens=9"]) == 2
    assert "train.epochs: got 1.5 with streaming, expected train.steps" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.on_policy_fraction=0.5", "loss.objective=policy_gradient"], "data.on_policy_fraction: got 0.5 with"),
        (["data.on_policy_fraction=0", "rollout.temperature=0.5"], "rollout.temperature: got 0.5 with"),
        (["data.on_policy_fraction=0", "data.max_answer_tokens=2"], "the answer has"),
        (["data.on_policy_fraction=0", "data.answer_key=nope"], "no field 'nope'; it has question, answer"),
        (["data.shuffle_buffer=7"], "shuffle_buffer: got 7, expected none"),
        (["data.local_files_only=true"], "data.local_files_only: got True with data.source"),
        (["eval.every=1", "eval.data.source=x.jsonl", "eval.data.shuffle=false"], "eval.data.shuffle: unknown key"),
    ],
)
def test_what_does_not_fit_is_one_line(settings: list[str], message: str, argv, tmp_path, capfd) -> None:
    capfd.readouterr()
    assert cli.run(argv("refused", *settings)) == 2
    said = capfd.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "refused").exists()


def test_a_stream_that_changed_under_a_run_is_noticed(argv, place, tmp_path, capfd) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text((place / "prompts.jsonl").read_text())
    stream = ["data.streaming=true", "data.max_prompt_tokens=16", "data.shuffle_buffer=2", f"data.source={path}"]
    assert cli.run(argv("run", *stream, "--steps=1")) == 0
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:5], json.dumps({"question": "new"}), *lines[6:]]) + "\n")
    capfd.readouterr()
    assert cli.run(argv("run", *stream)) == 2
    assert "has changed: record 4 and what follows it" in capfd.readouterr().err
    assert cli.run(argv("run", *stream, "--accept-new-prompts")) == 0
