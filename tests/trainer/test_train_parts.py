"""The parts of the training loop, each by itself: hidden rows, guards, what may go on in a directory."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tinymodels import ARCHITECTURES, save_tiny

from student_trainer import guards
from student_trainer.config import StudentConfig, TrainConfig, differences, experiment
from student_trainer.distributed import BUCKET_BYTES, Distributed, _buckets, join, weights_digest
from student_trainer.optim import OptimConfig, Optimizer
from student_trainer.resume import ResumeError, claim, find_start, record
from student_trainer.rollout.servers.engine import ServersSampler
from student_trainer.rollout.vllm_side.request import Weights
from student_trainer.run import Run
from student_trainer.student import StudentError, load
from student_trainer.types import Prompt, Rollout

CPU = torch.device("cpu")


def rollout(uid: int, prompt: list[int], completion: list[int]) -> Rollout:
    zeros = np.zeros(len(completion), dtype=np.float32)
    return Rollout(
        uid=uid,
        prompt=Prompt(index=uid, token_ids=np.array(prompt, dtype=np.int32)),
        token_ids=np.array(completion, dtype=np.int32),
        finish="length",
        behaviour_logprob=zeros,
        full_logprob=zeros,
    )


# -- student


def test_a_revision_of_a_directory_is_refused(tmp_path) -> None:
    save_tiny(tmp_path)
    with pytest.raises(StudentError, match=r"student.revision: got 'v1' with the directory .*, expected none"):
        load(StudentConfig(model=str(tmp_path), revision="v1"), CPU)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_hidden_rows_predict_the_completion_tokens(arch: str, tmp_path) -> None:
    """Row n through the head is the whole model's logits at position P + n - 1 of that sequence alone."""
    save_tiny(tmp_path, arch)
    student = load(StudentConfig(model=str(tmp_path)), CPU)
    samples = [rollout(0, [5, 6, 7], [8, 9, 1]), rollout(1, [10], [11]), rollout(2, [4] * 9, [3, 2, 1, 1, 5])]
    with torch.no_grad():
        got = student.head(student.hidden_rows(samples))
        expected = torch.cat(
            [
                student.model(torch.tensor([[*s.prompt.token_ids, *s.token_ids]])).logits[
                    0, len(s.prompt.token_ids) - 1 : -1
                ]
                for s in samples
            ]
        )
    assert got.shape == expected.shape == (9, 128)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-5)


def test_student_lists_every_end_token_and_keeps_pad_apart(tmp_path) -> None:
    save_tiny(tmp_path)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    settings["eos_token_id"] = [7, 1, 500]
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    student = load(StudentConfig(model=str(tmp_path)), CPU)
    assert student.eos_token_ids == (1, 7)  # 500 is no id of the tokenizer
    assert student.pad_token_id == 0
    assert student.vocabulary_size == 120
    assert student.max_tokens == 128


def test_a_pad_token_that_is_eos_leaves_the_end_in_the_rows(tmp_path) -> None:
    save_tiny(tmp_path)
    student = load(StudentConfig(model=str(tmp_path)), CPU)
    ending = rollout(0, [5, 6], [8, 1])
    padded_by_eos = [ending, rollout(1, [5] * 8, [3, 2])]
    with torch.no_grad():
        alone = student.hidden_rows([ending])
        student_with_eos = type(student)(**{**_fields(student), "pad_token_id": 1})
        together = student_with_eos.hidden_rows(padded_by_eos)[:2]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def _fields(student):
    return {name: getattr(student, name) for name in student.__slots__}


def test_gradient_checkpointing_changes_memory_not_gradients(tmp_path) -> None:
    save_tiny(tmp_path, "gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    gradients = []
    for checkpointing in (False, True):
        student = load(StudentConfig(model=str(tmp_path), gradient_checkpointing=checkpointing), CPU)
        assert student.model.training == checkpointing
        student.hidden_rows([rollout(0, [5, 6, 7], [8, 9, 1])]).square().sum().backward()
        gradients.append(student.model.transformer.h[0].mlp.c_fc.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-6)


def test_dropout_is_a_function_of_seed_and_sample(tmp_path) -> None:
    save_tiny(tmp_path, "gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    student = load(StudentConfig(model=str(tmp_path), dropout=True), CPU)
    hidden = []
    for seed, uid in ((3, 10), (3, 10), (3, 11)):
        student.seed_dropout(seed, uid)
        hidden.append(student.hidden_rows([rollout(0, [5, 6, 7], [8, 9, 1])]).detach())
    assert torch.equal(hidden[0], hidden[1])
    assert not torch.equal(hidden[0], hidden[2])


def test_bfloat16_is_arithmetic_and_not_storage(tmp_path) -> None:
    save_tiny(tmp_path)
    student = load(StudentConfig(model=str(tmp_path), dtype="bfloat16"), CPU)
    assert {p.dtype for p in student.model.parameters()} == {torch.float32}
    exact = load(StudentConfig(model=str(tmp_path)), CPU)
    samples = [rollout(0, [5, 6, 7], [8, 9, 1])]
    with torch.no_grad():
        rounded, full = student.head(student.hidden_rows(samples)).float(), exact.head(exact.hidden_rows(samples))
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - full).abs().max()) < 0.1 * float(full.abs().max())


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere/at/all", "not a directory"), ("./nowhere", "not a directory"), ("{tmp}", "config.json")],
)
def test_a_student_that_is_not_there_is_one_clear_line(name: str, words: str, tmp_path) -> None:
    with pytest.raises(StudentError, match=words) as caught:
        load(StudentConfig(model=name.format(tmp=tmp_path)), CPU)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_cut_short_or_without_some_weights_is_refused(tmp_path) -> None:
    for name in ("cut", "lacking"):
        save_tiny(tmp_path / name)
    cut, lacking = tmp_path / "cut" / "model.safetensors", tmp_path / "lacking" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    tensors = load_file(lacking)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, lacking, metadata={"format": "pt"})
    with pytest.raises(StudentError, match="can't be loaded"):
        load(StudentConfig(model=str(cut.parent)), CPU)
    with pytest.raises(StudentError, match=r"missing keys: model.layers.0.mlp.up_proj.weight; .* partly random"):
        load(StudentConfig(model=str(lacking.parent)), CPU)


def test_a_tokenizer_larger_than_the_head_is_refused(tmp_path) -> None:
    save_tiny(tmp_path, tokenizer_size=130, logit_width=128)
    with pytest.raises(StudentError, match="130 entries, its head only 128"):
        load(StudentConfig(model=str(tmp_path)), CPU)


# -- ranks, alone


def test_one_process_is_a_group_of_itself(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    alone = join("cpu", 1.0)
    assert (alone.rank, alone.world, alone.device, alone.is_main) == (0, 1, CPU, True)
    np.testing.assert_array_equal(alone.all_reduce_sum(np.array([1, 2])), [1.0, 2.0])
    assert alone.sum_metrics({"a": 1.0}) == {"a": 1.0}
    assert alone.first("x") == "x"
    alone.require_equal("anything", "x")
    alone.barrier()


def test_ranks_that_differ_are_a_refusal(monkeypatch) -> None:
    """Such as two teachers behind one address."""
    monkeypatch.setattr(Distributed, "gather", lambda _self, value: [value, "another"])
    with pytest.raises(ValueError, match="the teacher's fingerprint differs between ranks"):
        Distributed(0, 2, 0, CPU).require_equal("the teacher's fingerprint", "one")


def test_rows_are_shared_out_without_rest() -> None:
    ranks = [Distributed(r, 3, r, CPU) for r in range(3)]
    assert [[row for row in range(7) if d.owns(row)] for d in ranks] == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.mark.parametrize(("name", "words"), [("gpu", "expected auto, cpu"), ("cuda:0", "no CUDA device")])
def test_a_device_that_is_not_there_is_refused(name: str, words: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=words):
        join(name, 1.0)


def test_gradient_buckets_hold_every_parameter_once() -> None:
    sizes = [BUCKET_BYTES // 8, BUCKET_BYTES // 8, 1, BUCKET_BYTES, 3]
    parameters = [torch.nn.Parameter(torch.empty(n, device="meta")) for n in sizes]
    buckets = _buckets(parameters)
    assert [p for bucket in buckets for p in bucket] == parameters
    assert [len(b) for b in buckets] == [2, 1, 1, 1]


def test_the_weights_digest_sees_one_flipped_bit() -> None:
    weight = torch.zeros(3)
    before = weights_digest([("w", weight)])
    assert weights_digest([("w", torch.zeros(3))]) == before
    weight[1] = -0.0
    assert weights_digest([("w", weight)]) != before
    assert weights_digest([("v", torch.zeros(3))]) != before


# -- guards


def test_the_nth_bad_step_in_a_row_ends_the_run() -> None:
    bad = guards.BadSteps(2)
    bad.bad(7, "somewhere")
    bad.good()
    bad.bad(8, "somewhere")
    with pytest.raises(guards.TrainingError, match=r"step 9: 2 steps in a row.*sample 12, position 3"):
        bad.bad(9, "sample 12, position 3")


def test_a_non_finite_hidden_state_or_gradient_is_named_by_sample_and_position() -> None:
    samples = [rollout(40, [5, 6, 7], [8, 9, 1]), rollout(41, [10], [11, 12])]
    hidden = torch.zeros(5, 4)
    assert guards.locate_non_finite(1.0, hidden, samples) == ""
    assert "40 to 41" in guards.locate_non_finite(math.inf, hidden, samples)
    hidden.grad = torch.zeros(5, 4)
    hidden.grad[3, 0] = float("inf")
    assert "sample 41, position 1: the student's loss or its gradient" in guards.locate_non_finite(1.0, hidden, samples)
    hidden[4, 2] = float("nan")
    assert guards.locate_non_finite(1.0, hidden, samples).startswith("prompt 41, sample 41, position 2:")


def test_a_stop_signal_interrupts_only_where_nothing_is_lost() -> None:
    stop = guards.StopSignals()
    before = signal.getsignal(signal.SIGTERM)
    with stop.installed():
        os.kill(os.getpid(), signal.SIGTERM)  # outside: remembered
        assert stop.received == signal.SIGTERM
        with pytest.raises(guards.StopRequested), stop.interruptible():
            pytest.fail("the block must not begin")
    assert signal.getsignal(signal.SIGTERM) is before
    assert stop.exit_code == 143

    inside = guards.StopSignals()
    went_on = False
    with inside.installed(), contextlib.suppress(guards.StopRequested), inside.interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        went_on = True
    assert not went_on
    assert inside.exit_code == 130


class Told:
    """Rank 1 of two, which are asked to stop while it waits in the first collective for rank 0."""

    is_main, world, rank = False, 2, 1

    def __init__(self) -> None:
        self.entered: list[str] = []

    def all_reduce_max(self, value: float) -> float:
        self.entered.append("max")
        os.kill(os.getpid(), signal.SIGTERM)
        return 1.0  # rank 0 was handing over the weights, and has left that

    def gather(self, value: Any) -> list[Any]:
        self.entered.append("gather")
        return [guards.StopRequested(), value]


def test_a_stop_leaves_no_rank_in_a_collective_of_the_hand_over() -> None:
    stop, dist = guards.StopSignals(), Told()
    engine: Any = object.__new__(ServersSampler)
    engine._stop, engine._dist, engine._weights = stop, dist, Weights("run", 3)
    with stop.installed(), pytest.raises(guards.StopRequested), stop.interruptible():
        engine.update(4)
    assert dist.entered == ["max", "gather"]  # as rank 0


def test_a_stop_is_obeyed_at_once_where_one_rank_hands_over_for_all() -> None:
    stop = guards.StopSignals()
    went_on = []
    with stop.installed(), contextlib.suppress(guards.StopRequested), stop.interruptible(), stop.deferred():
        try:
            with stop.resumed():
                os.kill(os.getpid(), signal.SIGTERM)
                went_on.append("handing over")
        except guards.StopRequested:
            went_on.append("telling the others")
    assert went_on == ["telling the others"]


# -- one directory, one experiment


def config(tmp_path, **sections) -> TrainConfig:
    base = {
        "student": {"model": "s"},
        "teacher": {"url": "grpc://127.0.0.1:1"},
        "data": {"source": "p.txt"},
        "train": {"output_dir": str(tmp_path / "run")},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return TrainConfig.model_validate(base)


def test_another_experiment_in_the_same_directory_is_refused_by_key(tmp_path) -> None:
    record(config(tmp_path))
    with pytest.raises(ResumeError, match=r"optim.learning_rate: 1e-05 -> 0.1"):
        find_start(config(tmp_path, optim={"learning_rate": 0.1}))
    with pytest.raises(ResumeError, match=r"loss.objective: 'reverse_kl' -> 'forward_kl'"):
        find_start(config(tmp_path, loss={"objective": "forward_kl"}))


def test_where_things_are_and_how_fast_may_change(tmp_path) -> None:
    record(config(tmp_path))
    moved = config(
        tmp_path,
        teacher={"url": "http://other:1", "timeout_s": 1},
        train={"output_dir": str(tmp_path / "run"), "steps": 7, "micro_batch_tokens": 5},
        tracking={"project": "x", "trackers": ["wandb"]},
        checkpoint={"keep_last": 9},
    )
    assert find_start(moved).step == 0


@pytest.mark.parametrize(
    ("schedule", "refused"),
    [
        ({"schedule": "constant", "warmup_steps": 2}, False),
        ({"schedule": "linear"}, True),
        ({"schedule": "cosine"}, True),
        ({"schedule": "wsd", "decay_steps": 2}, True),
    ],
)
def test_only_a_constant_schedule_can_be_lengthened(schedule: dict, refused: bool, tmp_path) -> None:
    shorter, longer = (
        config(tmp_path, optim=schedule, train={"output_dir": str(tmp_path / "run"), "steps": steps})
        for steps in (10, 20)
    )
    record(shorter)
    assert find_start(shorter).step == 0
    if not refused:
        assert find_start(longer).step == 0
        return
    with pytest.raises(ResumeError, match=r"optim.schedule: '(\w+) over train.steps=10' -> '\1 over train.steps=20'"):
        find_start(longer)


def test_resume_never_refuses_a_directory_in_use(tmp_path) -> None:
    never = config(tmp_path, checkpoint={"resume": "never"})
    assert find_start(never).checkpoint is None
    record(never)
    with pytest.raises(ResumeError, match="resume is never"):
        find_start(never)


@pytest.mark.parametrize("failing", ["timeline", "tracker", "scorer"])
def test_everything_is_closed_where_one_part_fails_to(tmp_path, failing: str) -> None:
    """The claim on the run's directory above all: another process waits for it."""
    closed: list[str] = []

    def part(name: str) -> Any:
        def close() -> None:
            closed.append(name)
            if name == failing:
                raise OSError(name)

        return SimpleNamespace(close=close, write_trace=lambda *_: None)

    names = ["timeline", "console", "tracker", "scorer", "sampler", "claim"]
    run = SimpleNamespace(run_dir=tmp_path, dist=SimpleNamespace(rank=0), **{name: part(name) for name in names})
    with pytest.raises(OSError, match=failing):
        Run.close(run)  # type: ignore[arg-type]
    assert closed == names


def test_one_process_at_a_time_has_a_directory(tmp_path) -> None:
    with claim(tmp_path / "run"), pytest.raises(ResumeError, match="in use by another student-train"):
        claim(tmp_path / "run", wait_s=0.0)
    claim(tmp_path / "run", wait_s=0.0).close()
    (tmp_path / "file").touch()
    with pytest.raises(ResumeError, match="can't be written"):
        claim(tmp_path / "file" / "run")


def test_the_key_of_the_teacher_is_not_written_down(tmp_path) -> None:
    record(config(tmp_path, teacher={"url": "grpc://127.0.0.1:1", "api_key": "hush-hush"}))
    for path in (tmp_path / "run").iterdir():
        assert "hush-hush" not in path.read_text()


def test_differences_are_sorted_and_name_what_is_missing() -> None:
    assert differences({"b": 1, "a": 1}, {"b": 2, "c": 3}) == [
        "a: 1 -> '(not set)'",
        "b: 1 -> 2",
        "c: '(not set)' -> 3",
    ]
    assert differences({"a": [1]}, {"a": [1]}) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": {"model": "t"}}, "got both"),
        ({"teacher": {"url": ()}}, "got neither"),
        ({"teacher": {"url": ("grpc://a:1", "grpc://a:1")}}, "'grpc://a:1' is there twice"),
        ({"teacher": {"url": ("grpc://a:1", "openai+http://b:1/v1")}}, "is one of 2; expected it alone"),
        ({"teacher": {"top_k": -1}}, "0 or more"),
        ({"student": {"model": ""}}, "student.model is not set"),
        ({"data": {"source": ""}}, "data.source is not set"),
        ({"train": {"steps": 5}, "optim": {"warmup_steps": 6}}, "warmup_steps is 6"),
        ({"teacher": {"serve_args": ("--dtype=float32",)}}, r"serve_args: got \('--dtype=float32',\) with teacher.url"),
        ({"teacher": {"visible_devices": "1"}}, "visible_devices: got '1' with teacher.url, expected none"),
        ({"optim": {"muon_learning_rate": 0.1}}, "optim.muon_learning_rate: got 0.1 with optim.name adamw"),
        ({"eval": {"data": {"source": "p.jsonl"}}}, "eval.every: not set, but eval.data is"),
        ({"data": {"overlong": "drop"}}, "overlong: got drop without max_prompt_tokens"),
        ({"data": {"template": "plain", "add_generation_prompt": False}}, "add_generation_prompt: got false"),
        ({"tracking": {"project": "x"}}, "project: got 'x' with trackers tensorboard, expected one of .*mlflow"),
        ({"tracking": {"run_name": "x", "trackers": ["swanlab"]}}, "run_name: got 'x' with trackers swanlab"),
        ({"tracking": {"wandb_mode": "online", "trackers": []}}, "wandb_mode: got 'online' with trackers none"),
    ],
)
def test_sections_that_do_not_go_together_are_refused(changes: dict, words: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=words):
        config(tmp_path, **changes)


@pytest.mark.parametrize(
    "together",
    [
        {"teacher": {"url": (), "model": "t", "serve_args": ("--dtype=float32",), "visible_devices": "1"}},
        {"teacher": {"top_k": 8}, "loss": {"support": "union"}},
        {"optim": {"name": "muon", "muon_learning_rate": 0.1}},
        {"eval": {"data": {"source": "p.jsonl"}, "every": 0}},  # switched off
        {"data": {"overlong": "drop", "max_prompt_tokens": 5}},
        {"tracking": {"trackers": ["tensorboard", "wandb"], "project": "x", "run_name": "y", "wandb_mode": "online"}},
    ],
)
def test_options_are_taken_with_what_they_belong_to(together: dict, tmp_path) -> None:
    assert TrainConfig.model_validate(config(tmp_path, **together).model_dump()) == config(tmp_path, **together)


def test_the_experiment_is_json_and_leaves_places_out(tmp_path) -> None:
    flat = experiment(config(tmp_path))
    assert json.loads(json.dumps(flat)) == flat
    assert "teacher.url" not in flat
    assert "train.output_dir" not in flat
    assert {"student.model", "train.seed", "rollout.temperature", "loss.objective", "teacher.top_k"} <= flat.keys()


def test_a_weight_that_no_token_reached_moves_on_one_process_as_on_several() -> None:
    """Such as those of an expert that nothing was routed to in a step. Several processes sum zeros there."""
    expert = torch.nn.Parameter(torch.ones(2, 2))
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    expected = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    ours = Optimizer([("expert", expert)], OptimConfig(learning_rate=0.1, weight_decay=0.1, grad_clip=0), 3)
    theirs = torch.optim.AdamW([expected], lr=0.1, weight_decay=0.1, betas=(0.9, 0.95))
    for step, value in enumerate((1.0, 0.0, 0.0)):
        expert.grad = torch.full((2, 2), value) if value else None
        expected.grad = torch.full_like(expected, value)
        Distributed(0, 1, 0, CPU).sum_gradients([expert, frozen])
        ours.step(step)
        theirs.step()
    assert frozen.grad is None
    torch.testing.assert_close(expert.double(), expected, rtol=1e-6, atol=1e-6)
