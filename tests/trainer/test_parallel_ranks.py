"""Every strategy on 2 to 4 processes against one: the same loss, gradient, weights and samples, whichever rank holds
what. One group of processes per case does all of it, because starting them is what takes the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from onestep import ALONE, CPU, bare_run, relative, scored_samples
from ports import free_port
from safetensors.torch import load_file, save_file
from tinymodels import save_tiny
from torch.distributed.fsdp import FSDPModule
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard
from training import DEEPSPEED, FORKS

from student_trainer.config import TrainConfig
from student_trainer.distributed import Distributed, join
from student_trainer.packing_check import applied
from student_trainer.parallel.base import Replicated
from student_trainer.parallel.ddp_sharded import DdpSharded
from student_trainer.parallel.fsdp2 import Fsdp2, full_tensor
from student_trainer.parallel.zero import Zero
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.torch_sampler import TorchSampler
from student_trainer.student import load
from student_trainer.train import accumulate, learn
from student_trainer.types import ScoredRollout

pytestmark = pytest.mark.slow

STEPS = 4
SETTINGS: dict[str, Any] = {
    "loss": {"objective": "policy_gradient"},
    "optim": {"learning_rate": 1e-3, "grad_clip": 0.05, "weight_decay": 0.1},
    "train": {"micro_batch_tokens": 24, "max_bad_steps": 9},
}
"""Of the step: several micro-batches on each rank, unlike in number, and clipping that bites."""
NEEDED = {"teacher": {"url": "grpc://unused:1", "top_k": "all"}, "data": {"source": "unused"}}
STRATEGIES: dict[str, Callable[[Distributed], Replicated]] = {
    "ddp": Replicated,
    "ddp_sharded": DdpSharded,
    "fsdp2": Fsdp2,
    "fsdp2 with offload": lambda dist: Fsdp2(dist, cpu_offload=True),
    "zero2": lambda dist: Zero(dist, 2),
    "zero3": lambda dist: Zero(dist, 3, whole_below=0),
}


def shares(samples: list[ScoredRollout], dist: Distributed, lopsided: bool) -> list[ScoredRollout]:
    if lopsided:
        return samples if dist.rank == 0 else []
    return [s for i, s in enumerate(samples) if dist.owns(i)]


def draw(run: Any, samples: list[ScoredRollout]) -> list[list[int]]:
    """Completions of the run's student as it is, sampled from the plain model."""
    config = RolloutConfig(max_new_tokens=6, temperature=0.8)
    with run.strategy.whole():
        sampler = TorchSampler(
            run.student.model, eos_token_ids=(1,), pad_token_id=0, vocabulary_size=120, config=config, seed=5
        )
        rollouts = sampler.sample([s.rollout.prompt for s in samples], range(len(samples)))
    return [r.token_ids.tolist() for r in rollouts]


def whole(run: Any) -> torch.Tensor:
    """All weights in one row."""
    with run.strategy.whole():
        return torch.cat([p.detach().reshape(-1) for p in run.student.model.parameters()])


def whole_gradients(run: Any) -> torch.Tensor:
    """All gradients in one row."""
    parameters = [p for _, p in run.strategy.named_parameters() if p.requires_grad]
    if isinstance(run.strategy, Zero):
        from deepspeed.utils import safe_get_full_grad

        return torch.cat([safe_get_full_grad(p).reshape(-1) for p in parameters])
    return torch.cat([full_tensor(p.grad).reshape(-1) for p in parameters])


def describe(run: Any) -> dict[str, Any]:
    """What is really in use on this rank."""
    parameters = [p for _, p in run.strategy.named_parameters()]
    held = [p.to_local() if isinstance(p, DTensor) else getattr(p, "ds_tensor", p) for p in parameters]
    states = [o.optim if isinstance(o, ZeroRedundancyOptimizer) else o for o, _ in run.optimizer._parts.values()]
    slots = [v for o in states for slot in o.state.values() for v in slot.values() if v.ndim]
    engine = getattr(run.strategy, "engine", None)
    return {
        "optimizers": sorted({type(o).__name__ for o, _ in run.optimizer._parts.values()}),
        "engine": engine and [type(engine).__name__, engine.zero_optimization_stage(), type(engine.optimizer).__name__],
        "dtensors": [isinstance(p, DTensor) and p.placements == (Shard(0),) for p in parameters],
        "groups": sum(isinstance(m, FSDPModule) for m in run.strategy._trained.modules()),
        "plain_on_meta": all(p.is_meta for p in run.student.model.parameters()),
        "held_values": sum(p.numel() for p in held),
        "state_values": sum((v.to_local() if isinstance(v, DTensor) else v).numel() for v in slots),
    }


def take_steps(run: Any, mine: list[ScoredRollout], samples: list[ScoredRollout]) -> tuple[dict[str, Any], Any]:
    """(facts, tensors) of a run from its first step to its last."""
    dist, facts, tensors = run.dist, {"sampled": draw(run, samples)}, {}
    _, sums, _ = accumulate(run, mine)
    run.strategy.sum_gradients()
    facts["loss"] = dist.sum_metrics(sums)["loss"]
    facts["grad_norm"] = run.optimizer.grad_norm()
    tensors["gradient"] = whole_gradients(run)
    run.optimizer.zero_grad()
    for _ in range(STEPS):
        assert learn(run, mine)["skipped"] == 0.0
        run.step += 1
    facts["described"] = describe(run)
    tensors["weights"] = whole(run)
    state, facts["state_of"] = run.optimizer.gathered().state()
    tensors.update({f"state/{name}": value.detach().clone() for name, value in state.items()})
    return facts, tensors


@contextlib.contextmanager
def poisoned_backward(run: Any) -> Iterator[None]:
    """On the last rank alone, the gradient that reaches the last layer is NaN."""
    if run.dist.rank != run.dist.world - 1:
        yield
        return

    def watch(_module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.register_hook(lambda gradient: gradient * torch.nan)

    layers = next(m for m in run.strategy._trained.modules() if isinstance(m, torch.nn.ModuleList))
    hook = layers[-1].register_forward_hook(watch)
    try:
        yield
    finally:
        hook.remove()


def begun(checkpoint: Path, dist: Distributed, strategy: Replicated | None, more: dict[str, Any]) -> Any:
    """A run with `more` settings; of the student's form, too."""
    sections = {name: {**SETTINGS.get(name, {}), **more.get(name, {})} for name in {*SETTINGS, *more} - {"student"}}
    form = {"model": str(checkpoint), **more.get("student", {})}
    config = TrainConfig.model_validate({**NEEDED, **sections, "student": form})
    student = applied(load(config.student, CPU), config)
    return bare_run(checkpoint, dist, strategy, student, **sections)


def _rank(
    rank: int,
    world: int,
    port: int,
    strategy: str,
    lopsided: bool,
    checkpoint: Path,
    folder: Path,
    more: dict[str, Any],
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    if strategy.startswith("zero"):
        sys.path.append(str(DEEPSPEED))
    dist = join("cpu", 60.0)
    samples = scored_samples()
    run = begun(checkpoint, dist, STRATEGIES[strategy](dist), more)
    mine = shares(samples, dist, lopsided)
    facts, tensors = take_steps(run, mine, samples)
    if not lopsided:
        before = whole(run)
        with poisoned_backward(run):
            facts["poisoned_skipped"] = learn(run, mine)["skipped"]
        facts["unchanged"] = torch.equal(before, whole(run))
        facts["after"] = learn(run, mine)["skipped"]
    save_file(tensors, folder / f"rank{rank}.safetensors")
    (folder / f"rank{rank}.json").write_text(json.dumps(facts))
    dist.close()


CASES = [
    pytest.param("qwen3", "ddp", 2, False, id="ddp", marks=pytest.mark.long),
    pytest.param("qwen3", "ddp_sharded", 2, False, id="ddp_sharded", marks=pytest.mark.long),
    pytest.param("qwen3", "fsdp2", 2, False, id="fsdp2-tied"),
    pytest.param("mixtral", "fsdp2", 2, False, id="fsdp2-experts", marks=pytest.mark.long),
    pytest.param("qwen3", "zero2", 2, False, id="zero2", marks=pytest.mark.long),
    pytest.param("llama", "zero3", 2, False, id="zero3"),
    pytest.param("llama", "fsdp2", 4, True, id="fsdp2-four-three-without-tokens"),
    pytest.param("qwen3", "ddp_sharded", 3, True, id="ddp_sharded-two-without-tokens", marks=pytest.mark.long),
    pytest.param("qwen3", "zero3", 4, True, id="zero3-three-without-tokens", marks=pytest.mark.long),
    pytest.param("gemma2", "zero2", 3, True, id="zero2-two-without-tokens", marks=pytest.mark.long),
    pytest.param("gpt2", "fsdp2", 4, False, id="fsdp2-gpt2", marks=pytest.mark.long),
    pytest.param("qwen3", "fsdp2 with offload", 2, False, id="fsdp2-offload", marks=pytest.mark.long),
    pytest.param("mamba2", "fsdp2", 2, False, id="fsdp2-mamba2", marks=pytest.mark.long),
    pytest.param("gemma2", "ddp_sharded", 4, False, id="ddp_sharded-four", marks=pytest.mark.long),
]
MUON = {"optim": {"name": "muon", "muon_learning_rate": 1e-3}}
ADAPTERS = {"student": {"lora": {"r": 4, "alpha": 8}}}
FORMS = [
    pytest.param("qwen3", "fsdp2", MUON, id="fsdp2-muon"),
    pytest.param("qwen3", "ddp_sharded", MUON, id="ddp_sharded-muon", marks=pytest.mark.long),
    pytest.param("qwen3", "zero2", ADAPTERS, id="zero2-lora"),
    pytest.param("llama", "zero3", ADAPTERS, id="zero3-lora"),
    pytest.param("qwen3", "fsdp2", ADAPTERS, id="fsdp2-lora", marks=pytest.mark.long),
    pytest.param("qwen3", "ddp_sharded", ADAPTERS, id="ddp_sharded-lora", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("arch", "strategy", "more"), FORMS)
def test_two_ranks_of_a_form_do_what_one_does(arch: str, strategy: str, more: dict[str, Any], tmp_path: Path) -> None:
    together_as_one(arch, strategy, 2, False, tmp_path, more)


@pytest.mark.parametrize(("arch", "strategy", "world", "lopsided"), CASES)
def test_ranks_together_do_what_one_does(arch: str, strategy: str, world: int, lopsided: bool, tmp_path: Path) -> None:
    together_as_one(arch, strategy, world, lopsided, tmp_path, {})


def together_as_one(arch: str, strategy: str, world: int, lopsided: bool, tmp_path: Path, more: dict[str, Any]) -> None:
    if strategy.startswith("zero") and not DEEPSPEED.is_dir():
        pytest.skip("no DeepSpeed here: make setup-test")
    checkpoint = save_tiny(tmp_path / "student", arch, scale=2.0)
    assert FORKS.get_start_method() == "forkserver"  # with the imports done
    arguments = (world, free_port(), strategy, lopsided, checkpoint, tmp_path, more)
    multiprocessing.start_processes(_rank, arguments, nprocs=world, start_method="forkserver")
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(world)]
    saved = [load_file(tmp_path / f"rank{r}.safetensors") for r in range(world)]

    samples = scored_samples()
    alone = begun(checkpoint, ALONE, None, more)
    expected, reference = take_steps(alone, samples, samples)
    for facts, tensors in zip(ranks, saved, strict=True):
        assert facts["sampled"] == expected["sampled"]
        assert facts["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert facts["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
        assert relative(tensors["gradient"].double(), reference["gradient"].double()) < 1e-6
        off = (tensors["weights"].double() - reference["weights"].double()).norm()
        assert off < 1e-5 * reference["weights"].norm()
        assert torch.equal(tensors["weights"], saved[0]["weights"])
        if not lopsided:
            assert (facts["poisoned_skipped"], facts["unchanged"], facts["after"]) == (1.0, True, 0.0)
    check_wrapper(strategy.split()[0], [facts["described"] for facts in ranks], alone, len(reference["weights"]))

    assert ranks[0]["state_of"] == expected["state_of"]
    state = {name: value for name, value in saved[0].items() if name.startswith("state/")}
    assert state.keys() == {name for name in reference if name.startswith("state/")}
    for name, value in state.items():
        assert relative(value.double(), reference[name].double()) < 1e-4, name


def check_wrapper(strategy: str, described: list[dict[str, Any]], alone: Any, num_values: int) -> None:
    """Pitfall: a strategy that was asked for and silently became another."""
    plain, world = describe(alone), len(described)
    engines = {"zero2": 2, "zero3": 3}
    for rank in described:
        assert all(rank["dtensors"]) if strategy == "fsdp2" else not any(rank["dtensors"])
        assert rank["groups"] == (alone.student.model.config.num_hidden_layers if strategy == "fsdp2" else 0)
        assert rank["plain_on_meta"] == (strategy in ("fsdp2", "zero2", "zero3"))
        assert rank["optimizers"] == (["ZeroRedundancyOptimizer"] if strategy == "ddp_sharded" else plain["optimizers"])
        if strategy in engines:
            kind = "DeepSpeedZeroOptimizer" + ("_Stage3" if strategy == "zero3" else "")
            assert rank["engine"] == ["DeepSpeedEngine", engines[strategy], kind]
        if strategy in ("fsdp2", "zero3"):
            assert rank["held_values"] <= 1.25 * num_values / world
        else:
            assert rank["held_values"] == num_values
        if strategy != "ddp":
            assert rank["state_values"] <= 1.5 * plain["state_values"] / world
    total = sum(rank["state_values"] for rank in described)
    assert plain["state_values"] * (world if strategy == "ddp" else 1) <= total <= 1.05 * world * plain["state_values"]
