"""Whole runs of each family of objectives, with the options that change what a step does: interrupted after half of
the steps and gone on with, each ends with the bits of the undisturbed run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tinymodels import save_tiny
from training import PROMPTS, TeacherProcess, arguments, assert_same_bits, metrics, teacher

from student_trainer import cli

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")  # as in test_train_run.py

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("place")
    save_tiny(place / "teacher", seed=1, scale=2.5)
    save_tiny(place / "student", seed=2)
    problems = [{"question": text, "answer": text[::-1]} for text in PROMPTS]
    (place / "problems.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    return place


@pytest.fixture(scope="module")
def served(place) -> Iterator[TeacherProcess]:
    with teacher(place / "serve", place / "teacher", "--reference", "--max-top-k=32") as process:
        yield process


@pytest.fixture(autouse=True)
def _own_torch_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


FAMILIES = {
    "jsd on prompts, samples and fixed data, with cross-entropy": (
        ["loss.objective=jsd", "loss.support=union", "loss.on_prompt=true", "loss.distill_weight=0.5",
         "data.on_policy_fraction=0.5", "data.mix=sample"],
        {"distillation", "cross_entropy", "topk_overlap", "teacher_mass", "staleness_ess"},
    ),
    "adaptive_kl on the student's ids": (
        ["loss.objective=adaptive_kl", "loss.support=student", "loss.tail=renormalise", "loss.ignore_token_ids=[1]"],
        {"student_mass", "teacher_entropy", "student_entropy", "behaviour_ess"},
    ),
    "policy gradient on stale and tempered groups": (
        ["loss.objective=policy_gradient", "loss.kl_discount=0.9", "loss.center=group", "loss.clip=0.2",
         "loss.staleness=prefix", "loss.behaviour=weight", "train.updates=2", "rollout.temperature=0.7",
         "rollout.group_size=2"],
        {"advantage", "ratio", "clipped", "staleness_ess", "behaviour_clipped"},
    ),
    "k3 within bounds": (
        ["loss.objective=k3", "loss.ratio_bounds=[0.8, 1.25]", "train.updates=2"],
        {"ratio_masked", "rollout_gap", "skipped_tokens"},
    ),
    "hybrid of cross-entropy and hot forward KL on fixed data": (
        ["loss.objective=forward_kl", "loss.ce_weight=0.5", "loss.kl_weight=0.5", "loss.scale_by_t2=true",
         "loss.student_temperature=2", "loss.teacher_temperature=2", "data.on_policy_fraction=0"],
        {"distillation", "cross_entropy"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_the_family_goes_on_bit_for_bit(family, place, served, tmp_path) -> None:
    options, named = FAMILIES[family]

    def run(name: str, steps: int) -> Path:
        more = [*options, f"--steps={steps}", "rollout.max_new_tokens=8"]
        assert cli.run(arguments(tmp_path / name, place / "student", place / "problems.jsonl", served.url, *more)) == 0
        return tmp_path / name

    whole = run("whole", 4)
    run("parts", 2)
    assert_same_bits(whole / "final", run("parts", 4) / "final")
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(math.isfinite(v) for line in lines for v in line.values() if isinstance(v, float))
    assert named <= set().union(*lines)
    assert all(line["skipped"] == 0 for line in lines)
    if "train.updates=2" in options:  # the last update of each step saw samples of older weights
        assert all(line["staleness_ess"] < 1 - 1e-7 and line["rollout_gap"] > 1e-4 for line in lines)
    elif "data.on_policy_fraction=0" in options:
        assert "staleness_ess" not in lines[0]
