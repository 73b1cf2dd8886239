"""`student-train` against a real `teacher-serve`: what a run leaves behind, and how every refusal reads."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tinymodels import save_tiny
from training import PROMPTS, TeacherProcess, arguments, assert_same_bits, metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer import cli
from student_trainer.tracking import Tracker

# Runs in this process leave gRPC's threads behind; its handlers must not run when a later test starts processes.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two teachers' and two students' checkpoints, and a file of prompts."""
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "teacher", seed=1, scale=2.5)
    save_tiny(place / "other_teacher", seed=5, scale=2.5)
    save_tiny(place / "student", seed=2)
    save_tiny(place / "other_tokenizer", seed=2, tokenizer_size=117)
    (place / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    problems = [{"question": text, "answer": "never said"} for text in PROMPTS]
    (place / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    (place / "unsaid.jsonl").write_text('{"question": "the fox", "answer": "a"}\n{"question": "fox", "answer": " "}\n')
    return place


@pytest.fixture(scope="module")
def teachers(place) -> Iterator[dict[str, TeacherProcess]]:
    served = {
        name: TeacherProcess(place / f"serve_{name}", place / name, "--reference", "--max-top-k=32")
        for name in ("teacher", "other_teacher")
    }
    try:
        for one in served.values():
            one.begin()
        for one in served.values():
            one.wait()
        yield served
    finally:
        for one in served.values():
            one.stop()


@pytest.fixture(autouse=True)
def _own_torch_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def train(place, teachers, tmp_path) -> Callable[..., tuple[int, Path]]:
    """Runs the command in this process; (exit code, output directory)."""

    def run(*more: str, url: str = teachers["teacher"].url, name: str = "run") -> tuple[int, Path]:
        argv = arguments(tmp_path / name, place / "student", place / "prompts.txt", url, *more)
        return cli.run(argv), tmp_path / name

    return run


# -- what a run leaves


def test_a_run_leaves_a_student_that_plain_transformers_loads(train, place) -> None:
    code, run_dir = train()
    assert code == 0
    model = AutoModelForCausalLM.from_pretrained(run_dir / "final")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "final")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(place / "student").get_vocab()
    before = AutoModelForCausalLM.from_pretrained(place / "student").state_dict()
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    lines = metrics(run_dir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "delta", "grad_norm", "learning_rate", "seconds_sample", "seconds_score", "seconds_learn"} <= set(
        lines[0]
    )
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["optim"]["learning_rate"] == 0.002
    assert_same_bits(run_dir / "final", run_dir / "checkpoints" / "step-00000006")


def test_transports_and_packing_of_requests_leave_no_trace(train, teachers) -> None:
    http_url = teachers["teacher"].http_url
    _, grpc = train(name="grpc")
    code, http = train("teacher.request_sequences=1", "teacher.max_concurrency=1", url=http_url, name="http")
    assert code == 0
    assert_same_bits(grpc / "final", http / "final")


def test_the_same_command_again_finds_nothing_to_do(train, capfd) -> None:
    _, run_dir = train()
    lines = metrics(run_dir)
    capfd.readouterr()
    code, _ = train()
    assert code == 0
    assert "all 6 steps are done" in capfd.readouterr().err
    assert metrics(run_dir) == lines


def test_a_longer_run_goes_on_from_the_shorter_one(train) -> None:
    _, whole = train(name="whole")
    train("--steps=4", name="parts")
    code, parts = train(name="parts")
    assert code == 0
    assert_same_bits(whole / "final", parts / "final")
    assert [line["step"] for line in metrics(parts)] == [1, 2, 3, 4, 5, 6]


def test_a_run_begun_from_anothers_checkpoint_goes_on_from_its_own(train, capfd) -> None:
    _, first = train("--steps=4", name="first")
    begun = f"checkpoint.resume={first / 'checkpoints' / 'step-00000002'}"
    assert train("--steps=4", begun, name="branch")[0] == 0
    code, branch = train(begun, name="branch")
    assert code == 0
    assert [line["step"] for line in metrics(branch)] == [3, 4, 5, 6]
    _, whole = train(name="whole")
    assert_same_bits(whole / "final", branch / "final")
    assert train(f"checkpoint.resume={first / 'checkpoints' / 'step-00000004'}", name="branch")[0] == 2
    assert "did not begin from" in capfd.readouterr().err


def test_a_damaged_checkpoint_is_passed_over_and_named(train, capfd) -> None:
    _, run_dir = train("--steps=4")
    (run_dir / "checkpoints" / "step-00000004" / "optimizer.safetensors").write_bytes(b"")
    capfd.readouterr()
    assert train()[0] == 0
    said = " ".join(capfd.readouterr().err.split())
    assert "step-00000004/optimizer.safetensors has 0 bytes" in said
    assert "goes on from" in said
    assert [line["step"] for line in metrics(run_dir)] == [1, 2, 3, 4, 5, 6]


def test_a_run_past_its_steps_is_refused(train, capfd) -> None:
    train("--steps=2")
    assert train("--steps=1")[0] == 2
    assert "is at step 2, train.steps is 1" in capfd.readouterr().err


def mean_kl(student: Path, teacher: Path, prompts: list[str]) -> float:
    """KL(student‖teacher) per token in float64, by definition, on the student's own greedy text."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    q_model = AutoModelForCausalLM.from_pretrained(student).double().eval()
    p_model = AutoModelForCausalLM.from_pretrained(teacher).double().eval()
    values = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            ids = q_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
            log_q, log_p = (m(ids).logits[0].log_softmax(-1) for m in (q_model, p_model))
        values.append(float((log_q.exp() * (log_q - log_p)).sum(-1).mean()))
    return sum(values) / len(values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "left"),
    [
        (["loss.objective=reverse_kl", "teacher.top_k=all"], 0.6),
        (["loss.objective=forward_kl", "teacher.top_k=16"], 0.8),  # 16 of 128 ids and one bucket show less
    ],
    ids=["reverse_kl", "forward_kl"],
)
def test_the_student_moves_towards_the_teacher(loss: list[str], left: float, train, place) -> None:
    settings = ["--steps=40", "train.batch_size=8", "optim.learning_rate=0.02", "checkpoint.save_every=0"]
    code, run_dir = train(*settings, *loss)
    assert code == 0
    before = mean_kl(place / "student", place / "teacher", PROMPTS)
    after = mean_kl(run_dir / "final", place / "teacher", PROMPTS)
    assert after < left * before
    lines = metrics(run_dir)
    assert sum(line["loss"] for line in lines[-5:]) < 0.7 * sum(line["loss"] for line in lines[:5])


def test_evaluation_comes_before_during_and_after(train, place) -> None:
    problems = place / "problems.jsonl"
    code, run_dir = train("eval.every=4", f"eval.data.source={problems}", "eval.task=exact_match", "eval.num_prompts=3")
    assert code == 0
    evaluated = [(line["step"], line["eval_accuracy"]) for line in metrics(run_dir) if "eval_accuracy" in line]
    assert evaluated == [(0, 0.0), (4, 0.0), (6, 0.0)]


def test_a_stop_while_an_evaluation_is_noted_does_not_note_it_twice(train, place, monkeypatch) -> None:
    def log_and_stop(self: Tracker, step: int, values: dict[str, float]) -> None:
        log(self, step, values)
        if step == 4 and "eval_accuracy" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    log = Tracker.log
    settings = ["eval.every=4", f"eval.data.source={place / 'problems.jsonl'}", "eval.num_prompts=3"]
    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "log", log_and_stop)
        assert train(*settings)[0] == 143
    code, run_dir = train(*settings)
    assert code == 0
    assert [line["step"] for line in metrics(run_dir) if "eval_accuracy" in line] == [0, 4, 6]


def test_evaluation_does_not_touch_the_run(train, place) -> None:
    _, plain = train(name="plain")
    problems = place / "problems.jsonl"
    _, evaluated = train("eval.every=1", f"eval.data.source={problems}", name="evaluated")
    assert_same_bits(plain / "final", evaluated / "final")


@pytest.mark.slow
def test_a_local_teacher_is_started_and_stopped(place, tmp_path, capfd) -> None:
    argv = arguments(tmp_path / "run", place / "student", place / "prompts.txt", "")
    argv = [a for a in argv if not a.startswith("--teacher-url")]
    code = cli.run([*argv, f"--teacher-model={place / 'teacher'}", 'teacher.serve_args=["--reference"]', "--steps=1"])
    assert code == 0
    ready = re.search(r"ready grpc://127\.0\.0\.1:(\d+)", capfd.readouterr().err)
    assert ready is not None
    assert cli.run([*arguments(tmp_path / "again", place / "student", place / "prompts.txt", f"grpc://127.0.0.1:{ready[1]}"),
                    "teacher.start_timeout_s=0.3"]) == 75  # fmt: skip


@pytest.mark.slow
def test_two_ranks_record_the_local_teacher_as_it_was_configured(place, tmp_path) -> None:
    argv = arguments(tmp_path / "run", place / "student", place / "prompts.txt", "", "--steps=1", "--num-processes=2")
    argv = [a for a in argv if not a.startswith("--teacher-url")]
    assert cli.run([*argv, f"--teacher-model={place / 'teacher'}", 'teacher.serve_args=["--reference"]']) == 0
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["teacher"]
    assert (written["url"], written["model"]) == ([], str(place / "teacher"))
    assert written["serve_args"] == ["--reference"]


# -- looking without touching


def test_dry_run_scores_a_sequence_and_writes_nothing(train, capsys) -> None:
    code, run_dir = train("--dry-run")
    assert code == 0
    shown = capsys.readouterr().out
    for words in ("19,648 parameters", "scored one sequence", "memory", "optimizer 154 KiB", "6 of 6 to do"):
        assert words in shown
    assert re.search(r"measured  forward and backward of 4 sequences of \d+ tokens took .*; by the formula", shown)
    assert not run_dir.exists()


def test_print_config_is_yaml_that_gives_itself_again(train, capsys, tmp_path) -> None:
    code, run_dir = train("--print-config", "teacher.api_key=hush-hush")
    shown = capsys.readouterr().out
    assert code == 0
    assert "hush-hush" not in shown
    values = yaml.safe_load(shown)
    assert (values["train"]["steps"], values["loss"]["objective"]) == (6, "reverse_kl")
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(values))
    assert cli.run([f"--config={tmp_path / 'again.yaml'}", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == values
    assert not run_dir.exists()


# -- refusals: one line, the right exit code, nothing written

DESCRIBED = ("--dry-run", "plan.device_memory_gib=80")
"""A machine that is described: the planner reads the student's tokenizer alone."""
REFUSALS: list[tuple[list[str], str]] = [
    (["optim.lerning_rate=1"], "optim.learning_rate"),
    (["--train.batch_sise=1"], "train.batch_size"),
    (["loss.objective=revers_kl"], "reverse_kl"),
    (["optim.learning_rate=-1"], "optim.learning_rate"),
    (["train.steps=many"], "train.steps"),
    (["--prompts=nowhere.txt"], "nowhere.txt"),
    ([f"--prompts={'a' * 300}.txt"], "can't be read: File name too long"),
    (["--student=./nowhere"], "not a directory"),
    (["student.device=gpu"], "student.device"),
    (["--config=nowhere.yaml"], "nowhere.yaml"),
    (["--student={place}/other_tokenizer"], "different tokenizers"),
    (["teacher.top_k=33"], "at most 32"),
    (["rollout.max_new_tokens=500"], "positions for 128"),
    (["eval.every=1"], "eval.data"),
    (["eval.every=1", "eval.data.source={place}/prompts.txt"], "have no answer"),
    (["eval.every=1", "eval.data.source={place}/unsaid.jsonl"], "1 of 2 problems have no answer, or an empty one"),
    (["checkpoint.resume={place}"], "not a whole checkpoint"),
    (["eval.every=1", "eval.data.source={place}/problems.jsonl", "eval.max_new_tokens=500"], "eval.max_new_tokens"),
    (["tracking.trackers=[clearml]"], "clearml is not installed"),
    (["--output-dir={place}/prompts.txt"], "is a file"),
    (["--output-dir={place}/prompts.txt/below"], "can't be written"),
    (["--teacher-model=x"], "got both"),
    (["teacher.visible_devices=1"], "visible_devices: got '1' with teacher.url"),
    (["data.split=test"], "data.split: got 'test' with data.source"),
    (["data.add_generation_prompt=false"], "data.add_generation_prompt: got false"),
    (["loss.support=student", "teacher.value_type=float16"], "teacher.value_type: got float16"),
    (["loss.ignore_token_ids=[5,120]"], "loss.ignore_token_ids: got 120, expected ids from 0 to 119"),
    (["rollout.stop_token_ids=[119,120,9999]"], "rollout.stop_token_ids: got 120, 9999, expected ids from 0 to 119"),
    (["rollout.stop_token_ids=[120]", "--dry-run"], "rollout.stop_token_ids: got 120, expected"),
    (["loss.ignore_token_ids=[120]", *DESCRIBED], "loss.ignore_token_ids: got 120, expected"),
    (["rollout.stop_token_ids=[-1]"], "rollout.stop_token_ids"),
]


@pytest.mark.parametrize(("more", "words"), REFUSALS, ids=lambda value: str(value)[:40])
def test_refusals_are_one_line_and_leave_nothing(more, words, train, place, capfd) -> None:
    code, run_dir = train(*[argument.format(place=place) for argument in more])
    said = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert code == 2
    assert len(said) == 1, said
    assert said[0].startswith("student-train: ")
    assert words in said[0]
    assert not run_dir.exists()


RANKS_OF_THEIR_OWN = """
import os, signal
def one_bad():
    return [{"question": 3 if os.environ["RANK"] == "1" else "the fox"}]
def one_dead():
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return [{"question": "the fox"}]
def one_other():
    return [{"question": "the fox" + os.environ["RANK"]}]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--prompts=ranks_of_mine:one_bad"], 2, "field 'question' is int; expected text"),
        (["--prompts=ranks_of_mine:one_other"], 2, "the digest of the prompts differs between ranks"),
        (["--student={place}/other_tokenizer"], 2, "different tokenizers"),  # all ranks
        (["--output-dir={place}/prompts.txt/below"], 2, "can't be written"),  # the main rank
        (["--prompts=ranks_of_mine:one_dead"], 137, "process 1 of 2 was killed by SIGKILL"),
    ],
    ids=["one", "differ", "all", "main", "dead"],
)
def test_refusals_of_ranks_are_one_line(more, code, words, train, place, capfd, tmp_path, monkeypatch) -> None:
    (tmp_path / "ranks_of_mine.py").write_text(RANKS_OF_THEIR_OWN)
    monkeypatch.chdir(tmp_path)
    got, run_dir = train("--num-processes=2", *[argument.format(place=place) for argument in more])
    said = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert got == code
    assert len(said) == 1, said
    assert said[0].startswith("student-train: ")
    assert words in said[0]
    assert not (run_dir / "metrics.jsonl").exists()


def test_a_launchers_number_of_processes_is_not_argued_with(train, capfd, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)  # vLLM's engine leaves it where one was started before
    code, run_dir = train("train.num_processes=3")
    assert code == 2
    assert "train.num_processes: got 3, but the launcher started 2" in capfd.readouterr().err
    assert not run_dir.exists()


def test_a_top_k_that_nobody_asks_for_is_a_warning(train, capfd) -> None:
    assert train("--steps=1", "loss.objective=policy_gradient", "teacher.top_k=9")[0] == 0
    assert "teacher.top_k is 9, but policy_gradient asks for the sampled token alone" in capfd.readouterr().err


@pytest.mark.parametrize("url", ["grpc://127.0.0.1:9", "http://127.0.0.1:9"])
def test_a_teacher_that_is_not_there_is_named_with_the_wait(url: str, train, capfd) -> None:
    code, run_dir = train("teacher.start_timeout_s=0.3", url=url)
    said = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert code == 75
    assert len(said) == 1
    assert f"no teacher at {url} for" in said[0]
    assert not run_dir.exists()


def test_another_teacher_is_refused_until_it_is_accepted(train, teachers, capfd) -> None:
    train("--steps=2")
    other = teachers["other_teacher"].url
    capfd.readouterr()
    code, run_dir = train(url=other)
    said = capfd.readouterr().err
    assert code == 2
    assert "--accept-new-teacher" in said
    first, second = re.findall(r"[0-9a-f]{32}", said)
    assert first != second
    assert len(metrics(run_dir)) == 2
    assert train("--accept-new-teacher", url=other)[0] == 0
    assert len(metrics(run_dir)) == 6


def test_other_prompts_are_refused_until_they_are_accepted(train, place, tmp_path, capfd) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("\n".join(PROMPTS) + "\n")
    train("--steps=2", f"--prompts={mine}")
    mine.write_text("\n\n".join(PROMPTS))  # the same prompts, written otherwise
    assert train("--steps=3", f"--prompts={mine}")[0] == 0
    mine.write_text("\n".join([*PROMPTS[1:], "a new one"]))
    capfd.readouterr()
    code, run_dir = train(f"--prompts={mine}")
    said = capfd.readouterr().err.strip()
    assert code == 2
    assert len(said.splitlines()) == 1
    assert f"data.source {mine} has changed" in said
    assert "--accept-new-prompts" in said
    first, second = re.findall(r"\b[0-9a-f]{32}\b", said)
    assert first != second
    assert len(metrics(run_dir)) == 3
    assert train(f"--prompts={mine}", "--accept-new-prompts", "--steps=5")[0] == 0
    assert train(f"--prompts={mine}")[0] == 0  # accepted once
    assert len(metrics(run_dir)) == 6


def test_a_run_begun_from_anothers_checkpoint_has_prompts_of_its_own(train, tmp_path) -> None:
    _, first = train("--steps=2", name="first")
    mine = tmp_path / "mine.txt"
    mine.write_text("a new one\nanother")
    begun = f"checkpoint.resume={first / 'checkpoints' / 'step-00000002'}"
    assert train("--steps=3", begun, f"--prompts={mine}", name="branch")[0] == 0


def test_a_decaying_schedule_keeps_its_length(train, capfd) -> None:
    train("--steps=2", "optim.schedule=cosine")
    capfd.readouterr()
    code, run_dir = train("--steps=4", "optim.schedule=cosine")
    assert code == 2
    assert "optim.schedule: 'cosine over train.steps=2' -> 'cosine over train.steps=4'" in capfd.readouterr().err
    assert len(metrics(run_dir)) == 2


def test_another_experiment_is_refused_in_the_same_directory(train, capfd) -> None:
    train("--steps=2")
    capfd.readouterr()
    code, _ = train("train.seed=7")
    assert code == 2
    assert "train.seed: 0 -> 7" in capfd.readouterr().err


def test_an_objective_that_gives_what_it_must_not_is_one_line(train, capfd, tmp_path, monkeypatch) -> None:
    (tmp_path / "losses_of_mine.py").write_text(
        "import torch\nfrom student_trainer.losses.base import PerToken\n"
        "def wrong(inputs, config):\n    return PerToken(torch.zeros(3))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    code, _ = train("loss.objective=losses_of_mine:wrong")
    said = capfd.readouterr().err.splitlines()
    assert code == 1
    assert said[-1].startswith("student-train: losses_of_mine:wrong returned value of shape (3,)")


def test_the_key_from_the_environment_reaches_the_teacher(train, monkeypatch) -> None:
    monkeypatch.setenv("STUDENT_TEACHER__API_KEY", "unused-but-sent")
    assert train("--steps=1")[0] == 0


def numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without wall-clock seconds."""
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def test_a_run_is_a_function_of_its_seed(train) -> None:
    _, first = train(name="first")
    _, second = train(name="second")
    _, third = train("train.seed=7", name="third")
    assert_same_bits(first / "final", second / "final")
    assert numbers(metrics(first)) == numbers(metrics(second))
    assert numbers(metrics(first)) != numbers(metrics(third))
