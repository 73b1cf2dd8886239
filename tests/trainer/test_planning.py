"""The planner against what is measured here, against transformers' own counts, and against sums by hand."""

from __future__ import annotations

import dataclasses
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from planned import run_of
from tinymodels import ARCHITECTURES, save_tiny, tiny_model
from training import FORKS

from student_trainer import measure, plan
from student_trainer.cli import run as command
from student_trainer.config import StudentConfig, TrainConfig
from student_trainer.guards import BadSteps
from student_trainer.packing import Packing
from student_trainer.planning import asked, machine, memory, shape, speed
from student_trainer.planning.calibrate import calibrate
from student_trainer.planning.config import PlanConfig
from student_trainer.planning.shape import Shape
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.engines import make_torch
from student_trainer.student import load
from student_trainer.train import learn
from student_trainer.types import Rollout, ScoredRollout
from teacher_api import causal_lm

pytestmark = pytest.mark.slow

MEMORY_FACTOR = 1.5
"""As docs/operations.md states it: measured peaks lie within this factor of the formula, either way."""
SPEED_FACTOR = 2.0
TURNS = 3
FEW = {"batch_size": 8, "micro_batch_tokens": 1700, "loss_chunk_rows": 256}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "packed": {"hidden": 256, "packing": Packing(packed=True), "train": FEW},
    "checkpointing": {"hidden": 256, "layers": 6, "checkpointing": True, "train": FEW},
    "large_vocabulary": {
        "hidden": 128,
        "vocabulary": 32_000,
        "train": {"batch_size": 8, "micro_batch_tokens": 800, "loss_chunk_rows": 512},
    },
    "sampling": {
        "hidden": 256,
        "train": {"batch_size": 64, "micro_batch_tokens": 200, "loss_chunk_rows": 256},
        "rollout": {"max_new_tokens": 100},
    },
}  # fmt: skip
"""Peaks of learning and of sampling are among them, optimizer state is in all."""


# -- memory


def _whole_steps(name: str, pipe: Any) -> None:
    """In a process of its own: (peak over three steps above what was there before the model, expected, its phase)."""
    torch.set_num_threads(1)
    learn_once(run_of(64, train={"micro_batch_tokens": 200}))  # so that the libraries are in memory
    before = measure._restart_peak(torch.device("cpu"))
    run = run_of(**CONFIGURATIONS[name])
    rows = asked.per_device(run.config, 1)
    sampler = make_torch(run.config, run.student, {})
    learn_once(run)
    learn_once(run)
    longest = run.prompts.all()[-1]
    unlike = [np.concatenate([[i], longest.token_ids[1:]]).astype(np.int32) for i in range(rows)]  # nobody's group
    prompts = [dataclasses.replace(longest, token_ids=ids) for ids in unlike]
    sampler.sample(prompts, list(range(rows)), keep_top_k=run.needs.student_top_k)
    learn_once(run)
    peak = measure._peak(torch.device("cpu")) - before
    tokens = asked.micro_batch_tokens(run.config, run.longest_tokens, 1)
    pipe.send((peak, memory.peak(plan.phases(run, tokens))))


def learn_once(run: Any) -> None:
    from student_trainer.guards import BadSteps

    run.bad_steps = BadSteps(3)
    assert not learn(run, measure.worst_case(run))["skipped"]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_peak_of_whole_steps_is_near_the_formula(name: str) -> None:
    mine, other = FORKS.Pipe()
    process = FORKS.Process(target=_whole_steps, args=(name, other))
    process.start()
    other.close()  # so that its end is seen
    assert mine.poll(400), "no answer"
    measured, (phase, expected) = mine.recv()
    process.join()
    print(f"{name}: measured {measured / 2**20:.0f} MiB, expected {expected / 2**20:.0f} MiB when it {phase}s")
    assert expected / MEMORY_FACTOR <= measured <= expected * MEMORY_FACTOR


def test_prompts_of_groups_are_planned_once_and_not_all_at_a_time() -> None:
    run = run_of(64)
    model = Shape.of(run.student.model, run.student.parts)
    assert model.continuous
    load = dataclasses.replace(load_of(run), decoded=64, prompt=100, group=8, arithmetic_bytes=2)

    def sampling(shape: Shape, **changes: int) -> memory.Bytes:
        return memory.phases(shape, dataclasses.replace(load, **changes), (1, 1, 1), 1)["sample"]

    assert sampling(model)["prompts"] == sampling(model, decoded=8, group=1)["prompts"]  # eight groups: eight prompts
    assert (
        sampling(model, group=1, prompt=1000)["prompts"] == sampling(model, decoded=1, group=1, prompt=4096)["prompts"]
    )
    batches = dataclasses.replace(model, continuous=False)
    assert sampling(batches)["prompts"] == 8 * sampling(model)["prompts"]
    # Slots keep both in bfloat16, a family's own cache rotated keys in float32.
    assert sampling(batches)["cache"] * 4 == sampling(model)["cache"] * 6


def test_each_strategy_cuts_what_it_says() -> None:
    """By hand: 4 bytes a weight, 8 of AdamW's state, 4 of its gradient."""
    run = run_of(64)
    model = Shape.of(run.student.model, run.student.parts)
    load = dataclasses.replace(load_of(run), decoded=0)
    found = {s: memory.phases(model, load, memory.parts_of(s, 4), 4)["learn"] for s in memory.STRATEGIES}
    num = sum(p.numel() for p in run.student.model.parameters())
    held = {s: tuple(parts[k] for k in ("weights", "gradients", "optimizer")) for s, parts in found.items()}
    assert held == {
        "ddp": (4 * num, 4 * num, 8 * num),
        "ddp_sharded": (4 * num, 4 * num, 2 * num),
        "zero2": (4 * num, num, 2 * num),
        "fsdp2": (num, num, 2 * num),
        "zero3": (num, num, 2 * num),
    }
    assert "gathered" in found["fsdp2"]
    assert "gathered" not in found["ddp"]


def test_sampling_meanwhile_holds_a_copy_of_the_weights_and_its_cache_while_learning() -> None:
    run = run_of(64)
    model = Shape.of(run.student.model, run.student.parts)
    load = load_of(run)
    apart = memory.phases(model, load, (1, 1, 1), 1)
    both = memory.phases(model, dataclasses.replace(load, samples_meanwhile=True), (1, 1, 1), 1)
    assert both["learn"]["copied weights"] == 4 * sum(p.numel() for p in run.student.model.parameters())
    sampling = sum(apart["sample"][k] for k in ("cache", "prompts", "logits of sampling"))
    more = both["learn"]["copied weights"] + sampling
    assert sum(both["learn"].values()) == sum(apart["learn"].values()) + more
    assert "sample" not in both


def test_an_engine_of_vllm_has_weights_and_a_cache_of_its_own() -> None:
    """By hand: float32, on a CPU for ever, on a GPU while it samples; servers take nothing here."""
    run = run_of(64)
    model = Shape.of(run.student.model, run.student.parts)
    num, gib = sum(p.numel() for p in run.student.model.parameters()), 2**30

    def planned(gpu_gib: int, **rollout: Any) -> dict[str, memory.Bytes]:
        run.config = run.config.model_copy(update={"rollout": RolloutConfig(**rollout)})
        asking = {"tokens": 1600, "prompt": 100, "longest": 200, "width": 2000, "world": 1}
        load = asked.load_of(run.config, run.needs, gpu_bytes=gpu_gib * gib, **asking)
        return memory.phases(model, load, (1, 1, 1), 1)

    on_cpu = planned(0, engine="vllm", vllm={"kv_cache_gib": 3})
    for phase in ("learn", "update", "sample"):
        assert (on_cpu[phase]["engine's weights"], on_cpu[phase]["engine's cache"]) == (4 * num, 3 * gib)
    on_gpu = planned(80, engine="vllm", vllm={"gpu_memory_utilization": 0.25})
    assert on_gpu["sample"]["engine's weights"] + on_gpu["sample"]["engine's cache"] == 20 * gib
    assert "engine's cache" not in on_gpu["learn"]
    assert set(planned(80, engine="vllm-server", server={"urls": "http://a:1"})) == {"learn", "update"}


def load_of(run: Any) -> memory.Load:
    return asked.load_of(run.config, run.needs, tokens=1600, prompt=100, longest=200, width=2000, gpu_bytes=0, world=1)


def test_the_cache_is_that_of_transformers() -> None:
    run = run_of(128)
    model = Shape.of(run.student.model, run.student.parts)
    cache = run.student.model(torch.ones(3, 7, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert 3 * 7 * memory.cache_bytes(model, 8) == held


def test_sampling_in_bfloat16_keeps_each_weight_once_as_it_was_cast() -> None:
    """Against the copies that are really made while many tokens are sampled."""
    from torch.utils._python_dispatch import TorchDispatchMode

    run = run_of(64, rollout={"max_new_tokens": 12})
    student = dataclasses.replace(run.student, autocast=True)
    matrices = {p.data_ptr(): p.numel() for p in student.model.parameters() if p.ndim > 1}
    cast: list[int] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in matrices:
                cast.append(matrices[args[0].data_ptr()])
            return func(*args, **(kwargs or {}))

    with student.arithmetic(), Counting():
        make_torch(run.config, student, {}).sample(run.prompts.all()[:1], [0])
    load = dataclasses.replace(load_of(run), arithmetic_bytes=2)
    model = Shape.of(student.model, student.parts)
    assert memory.phases(model, load, (1, 1, 1), 1)["sample"]["cast weights"] == 2 * sum(cast)
    apart = dataclasses.replace(load, samples_meanwhile=True)
    assert memory.phases(model, apart, (1, 1, 1), 1)["learn"]["cast weights"] == 2 * model.active


# -- sizes


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sizes_from_a_configuration_alone_are_those_of_the_loaded_model(arch: str, tmp_path) -> None:
    save_tiny(tmp_path, arch)
    student = load(StudentConfig(model=str(tmp_path)), torch.device("cpu"))
    got = shape.of_student(StudentConfig(model=str(tmp_path)))
    assert dataclasses.replace(got, dtype_bytes=4) == dataclasses.replace(
        Shape.of(student.model, student.parts), dtype_bytes=4
    )
    assert got.parameters == sum(p.numel() for p in tiny_model(arch).parameters())


def test_adapters_and_frozen_weights_are_counted(tmp_path) -> None:
    save_tiny(tmp_path, "llama")
    config = StudentConfig.model_validate({"model": str(tmp_path), "lora": {"r": 4, "target_modules": ["q_proj"]}})
    got, plain = shape.of_student(config), shape.of_student(StudentConfig(model=str(tmp_path)))
    assert got.trained == 2 * 4 * (32 + 32) == got.parameters - plain.parameters
    frozen = StudentConfig.model_validate({"model": str(tmp_path), "freeze": ["mlp"]})
    assert plain.trained - shape.of_student(frozen).trained == 2 * 3 * 32 * 48


def test_operations_of_a_forward_are_those_that_torch_counts() -> None:
    """Of the products: torch counts no attention on a CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    for arch in ("llama", "gpt2"):
        model = tiny_model(arch)
        sizes = Shape.of(model, causal_lm.split(model))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.ones(2, 64, dtype=torch.int64))
        products = speed.forward_flop(sizes, 2, 64, computed=128) + speed.head_flop(sizes, 128)
        attention = 4.0 * sizes.layers * sizes.queries * 32 * 128
        assert products - attention == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_token_goes_through_the_experts_it_is_routed_to() -> None:
    model = tiny_model("mixtral")
    sizes = Shape.of(model, causal_lm.split(model))
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert experts == 2 * 4 * 3 * 32 * 48
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert matrices - sizes.embeddings - sizes.active == experts // 2
    assert sizes.inner == 2 * 48


# -- time


class MadeUpScores:
    """A teacher that answers at once."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def score(self, rollouts: list[Rollout]) -> list[ScoredRollout]:
        shapes = [(r.uid, len(r.prompt.token_ids), r.num_tokens) for r in rollouts]
        made = measure.made_up(shapes, self.run.student.vocabulary_size, self.run.needs)
        return [ScoredRollout(r, m.scores) for r, m in zip(rollouts, made, strict=True)]


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden": 128, "train": {"batch_size": 24, "micro_batch_tokens": 1700, "loss_chunk_rows": 256}},
        {"hidden": 256, "layers": 2, "checkpointing": True},
    ],
    ids=["many", "checkpointing"],
)
def test_the_time_of_a_step_is_near_what_a_short_calibration_says(settings: dict[str, Any]) -> None:
    """In CPU seconds of one thread, so that what else the machine does is left out; the median of several turns,
    since even those grow where others use the same caches."""
    torch.set_num_threads(1)
    clock = time.process_time
    run = run_of(**settings, prompts=(60, 60), rollout={"max_new_tokens": 60, "batch_sequences": 16})
    run.scorer = MadeUpScores(run)
    run.bad_steps = BadSteps(3)
    step = asked.step_of(run.config, prompt=60, longest=120, world=1, shares_prompt=False)
    said, took = [], []
    for _ in range(TURNS):
        said.append(calibrate(run, step, clock).of(step))
        took.append(_time_of_a_step(run, step.sequences, clock))
    for part in ("sample", "learn", "total"):
        mine, theirs = (median(getattr(seconds, part) for seconds in each) for each in (said, took))
        assert theirs / SPEED_FACTOR <= mine <= theirs * SPEED_FACTOR, (part, said, took)


@pytest.mark.parametrize("engine", ["torch", "vllm"])
def test_the_line_of_times_says_where_the_runs_own_engine_was_not_timed(engine: str) -> None:
    rollout = {"max_new_tokens": 12, "batch_sequences": 2, "engine": engine}
    run = run_of(64, layers=1, prompts=(8,), rollout=rollout, train={"batch_size": 2, "micro_batch_tokens": 100})
    run.scorer, run.longest_tokens = MadeUpScores(run), 20
    told = plan.timed(run)
    assert "completion tokens per second: sampling" in told
    assert ("timed with the torch sampler" in told) == (engine == "vllm")


def _time_of_a_step(run: Any, rows: int, clock: Callable[[], float]) -> speed.Seconds:
    sampler = make_torch(run.config, run.student, {})
    sampler.stop_ids = ()  # whole-length completions, as the plan has them
    started = clock()
    rollouts = sampler.sample([run.prompts.all()[0]] * rows, list(range(rows)), keep_top_k=run.needs.student_top_k)
    sampled = clock()
    scored = run.scorer.score(rollouts)
    assert {r.num_tokens for r in rollouts} == {60}
    learning = clock()
    learn(run, scored)
    return speed.Seconds(sample=sampled - started, score=learning - sampled, learn=clock() - learning)


@pytest.mark.parametrize(
    ("student", "sections", "weight_bytes"),
    [
        ({}, {}, 4),
        ({"dtype": "bfloat16"}, {}, 2),
        ({"dtype": "bfloat16"}, {"train": {"schedule": "async", "max_staleness": 1}}, 8),
        ({}, {"rollout": {"engine": "vllm"}}, 4),
        ({"dtype": "bfloat16"}, {"rollout": {"engine": "vllm"}}, 2),
    ],
)
def test_sampling_reads_the_weights_that_its_engine_has(student, sections, weight_bytes: int) -> None:
    """By hand, where nothing but the bytes of the weights counts."""
    run = run_of(256)
    told = {"student": {"model": "unused", **student}, "teacher": {"url": "grpc://a:1"}, "data": {"source": "unused"}}
    config = TrainConfig.model_validate({**told, **sections})
    model = dataclasses.replace(Shape.of(run.student.model, run.student.parts), keys=0)
    step = asked.step_of(config, prompt=1, longest=11, world=1, shares_prompt=False)
    got = speed.sampling(model, step, speed.Rates(flop_s=1e30, bytes_s=1e6))
    assert got == pytest.approx(10 * weight_bytes * model.parameters / 1e6, rel=1e-6)


def test_sampling_of_servers_takes_no_time_here() -> None:
    told = {"student": {"model": "x"}, "teacher": {"url": "grpc://a:1"}, "data": {"source": "x"}}
    servers = {"rollout": {"engine": "vllm-server", "server": {"urls": "http://a:1"}}}
    step = asked.step_of(
        TrainConfig.model_validate({**told, **servers}), prompt=1, longest=11, world=1, shares_prompt=False
    )
    run = run_of(64)
    assert speed.sampling(Shape.of(run.student.model, run.student.parts), step, speed.Rates(1.0, 1.0)) == 0
    assert "servers' sampling is not counted" in speed.told(speed.Seconds(0.0, 1.0, 1.0), step, 1)


# -- a machine that is described


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("described")
    save_tiny(folder / "student", "qwen3")
    (folder / "prompts.txt").write_text("the quick\nbrown fox jumps\n")
    config = json.loads((folder / "student/config.json").read_text())
    large = {"hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 36, "vocab_size": 151_936}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    config.pop("layer_types", None)
    (folder / "large").mkdir()
    (folder / "large/config.json").write_text(json.dumps({**config, **large, **heads}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "large" / name).write_bytes((folder / "student" / name).read_bytes())
    return folder


def described(files: Path, *options: str, student: str = "large") -> list[str]:
    return [
        f"--student={files / student}",
        f"--prompts={files / 'prompts.txt'}",
        "--teacher-url=grpc://nobody:1",
        "--dry-run",
        "plan.device_memory_gib=80",
        *options,
    ]


def test_a_large_student_is_planned_without_its_weights(files, capsys) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = ["plan.devices=8", "plan.peak_tflops=989", "plan.memory_bandwidth_gb_s=3350"]
    assert command(described(files, *options, f"plan.teacher_model={files / 'large'}")) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "does not fit" in lines["ddp"]
    assert "does not fit" in lines["ddp_sharded"]
    assert lines["fsdp2"].endswith("; fits")
    assert lines["cure"].endswith("train.strategy=fsdp2 fits")
    assert "weights 14.1 GiB" in lines["teacher"]  # 7.57e9 parameters of two bytes: one copy of the tied matrix
    assert "most of it" in lines["speed"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: far less than its weights


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [([], ""), (["rollout.engine=vllm", "rollout.vllm.gpu_memory_utilization=0.6"], "rollout.vllm.kv_cache_gib=")],
)
def test_what_is_proposed_as_a_cure_fits(files, capsys, sampling, expected) -> None:
    options = ["plan.devices=2", "rollout.max_new_tokens=1024", "train.batch_size=16", "plan.device_memory_gib=120"]
    options += sampling
    assert command(described(files, *options)) == 0
    (cure,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("cure")]
    changes = [word for word in cure.split() if "=" in word]
    assert "student.gradient_checkpointing=true" in changes
    assert expected in cure
    assert command(described(files, *options, *changes)) == 0
    told = capsys.readouterr().out
    assert "cure" not in told
    assert next(line for line in told.splitlines() if line.startswith("fsdp2")).endswith("; fits")


@pytest.mark.parametrize(
    "more", [["teacher.model=self"], ["teacher.model=ema", "teacher.refresh_every=5", "optim.ema_decay=0.9"]]
)
def test_a_student_that_teaches_itself_is_planned_as_a_teacher_of_its_size(files, capsys, more) -> None:
    arguments = [a for a in described(files, *more, "student.lora.r=2", student="student") if "teacher-url" not in a]
    assert command(arguments) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("teacher")]
    num = sum(p.numel() for p in tiny_model("qwen3").parameters())
    assert f"{more[0].partition('=')[2]} (Qwen3ForCausalLM, {num:,} parameters) on 1 device" in line
    assert f"weights {4 * num / 1024:.0f} KiB" in line


def test_a_small_student_fits_and_nothing_is_proposed(files, capsys) -> None:
    assert command(described(files, student="student")) == 0
    told = capsys.readouterr().out
    assert "; fits" in told
    assert "cure" not in told
    assert "teacher   left out" in told
    assert "speed     not predicted" in told


def test_devices_of_a_teacher_that_nobody_names_are_refused(files, capsys) -> None:
    assert command(described(files, "plan.teacher_devices=4", student="student")) != 0
    assert "plan.teacher_devices: got 4 and no teacher to plan for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"devices": 4}, r"devices: got 4 without device_memory_gib, expected none"),
        ({"device_memory_gib": 80, "peak_tflops": 9}, r"got peak_tflops alone, expected peak_tflops and memory_band"),
        ({"device_memory_gib": 80, "utilisation": 0.5}, r"utilisation: got 0.5 without peak_tflops"),
    ],
)
def test_half_a_description_is_refused(options: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PlanConfig.model_validate(options)


def test_options_of_the_planner_are_refused_without_it(files, capsys) -> None:
    arguments = [a for a in described(files) if a != "--dry-run"]
    assert command(arguments) == 2
    assert "plan: got options without --dry-run, expected none" in capsys.readouterr().err


def test_a_class_of_the_users_own_is_planned_on_this_machine_only(files, capsys) -> None:
    assert command(described(files, "student.model_class=a.b:C")) == 2
    assert "student.model_class" in capsys.readouterr().err


def test_more_of_anything_takes_no_less() -> None:
    """Monotonous in what it is asked for."""
    run = run_of(64)
    model, load = Shape.of(run.student.model, run.student.parts), load_of(run)
    base = memory.peak(memory.phases(model, load, (1, 1, 1), 1))[1]
    for name in ("tokens", "chunk_rows", "teacher_values", "decoded", "longest"):
        more = dataclasses.replace(load, **{name: 100 * getattr(load, name)})
        assert memory.peak(memory.phases(model, more, (1, 1, 1), 1))[1] > base, name
    less = dataclasses.replace(load, gradient_checkpointing=True)
    assert memory.peak(memory.phases(model, less, (1, 1, 1), 1))[1] < base


def test_a_plan_needs_no_more_than_the_configuration(files) -> None:
    config = TrainConfig.model_validate(
        {
            "student": {"model": str(files / "student")},
            "teacher": {"url": "grpc://nobody:1"},
            "data": {"source": str(files / "prompts.txt")},
            "plan": {"device_memory_gib": 1, "devices": 2},
        }
    )
    lines = machine.plan(config)
    assert [line.split()[0] for line in lines] == [
        "machine", "student", "step", *memory.STRATEGIES, "teacher", "speed",
    ]  # fmt: skip
    assert np.all([len(line) > 20 for line in lines])
