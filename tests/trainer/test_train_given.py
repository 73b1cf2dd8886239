"""Steps on prompts and fixed data beside the student's own samples, against float64 autograd over whole-model logits;
the ids that the student finds likely at tokens that it did not sample."""

from __future__ import annotations

import copy
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from onestep import CPU, V, bare_run, gradients, relative, scored_samples
from pydantic import ValidationError
from tinymodels import save_tiny, tiny_model

from student_trainer import metrics
from student_trainer.config import StudentConfig
from student_trainer.losses import build, parse_loss
from student_trainer.losses.rows import loss_rows
from student_trainer.rollout import likely
from student_trainer.rollout.given import with_prompt
from student_trainer.rollout.likely import with_likely_ids
from student_trainer.student import load
from student_trainer.train import accumulate, learn
from student_trainer.types import Prompt, Rollout, ScoredRollout
from teacher_api.types import Scores

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("student"), scale=2.0)


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    """Those of onestep, the last three of fixed data."""
    undefined = lambda r: np.full(r.num_tokens, np.nan, np.float32)  # noqa: E731
    sampled = [s.rollout for s in scored_samples()]
    return [
        r if r.uid < 4 else dataclasses.replace(
            r, source="fixed", full_logprob=undefined(r), behaviour_logprob=undefined(r)
        )
        for r in sampled
    ]  # fmt: skip


def sequence(rollout: Rollout) -> torch.Tensor:
    return torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]]).long()


def scored(rollout: Rollout) -> ScoredRollout:
    """Whole-vocabulary scores by a float64 teacher at every token after `rollout.prompt`."""
    teacher, start = tiny_model(seed=9, scale=2.0).double(), len(rollout.prompt.token_ids)
    with torch.no_grad():
        log_p = teacher(sequence(rollout)).logits[0, start - 1 : -1].log_softmax(-1)
    at = torch.from_numpy(rollout.token_ids).long()[:, None]
    return ScoredRollout(
        rollout,
        Scores(
            id=str(rollout.uid),
            positions=np.arange(start, start + rollout.num_tokens, dtype=np.int32),
            token_logprob=log_p.gather(1, at)[:, 0].float().numpy(),
            log_tail=log_p[:, V:].logsumexp(1).float().numpy(),
            topk_logprob=log_p[:, :V].float().numpy(),
        ),
    )


def reference(checkpoint: Path, rollouts: list[Rollout], *, on_prompt: bool, w: float) -> tuple[float, torch.Tensor]:
    """(loss, gradient): mean over tokens of (1 − w)·CE·[fixed] + w·KL(q‖p), teacher and student in float64."""
    student = copy.deepcopy(load(StudentConfig(model=str(checkpoint)), CPU).model).double()
    teacher = tiny_model(seed=9, scale=2.0).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for rollout in rollouts:
        ids = sequence(rollout)
        first = 1 if on_prompt else len(rollout.prompt.token_ids)
        with torch.no_grad():
            log_p = teacher(ids).logits[0, first - 1 : -1].log_softmax(-1)
        log_q = student(ids).logits[0, first - 1 : -1].log_softmax(-1)
        outcomes_q = torch.cat([log_q[:, :V], log_q[:, V:].logsumexp(1, keepdim=True)], 1)
        outcomes_p = torch.cat([log_p[:, :V], log_p[:, V:].logsumexp(1, keepdim=True)], 1)
        total = total + w * (outcomes_q.exp() * (outcomes_q - outcomes_p)).sum()
        if rollout.source == "fixed":
            total = total - (1 - w) * log_q.gather(1, ids[0, first:, None]).sum()
        count += ids.shape[1] - first
    (total / count).backward()
    return float(total.detach()) / count, torch.cat([p.grad.reshape(-1) for p in student.parameters()])


@pytest.mark.parametrize("on_prompt", [False, True])
@pytest.mark.parametrize(
    "train",
    [{}, {"micro_batch_size": 1, "loss_chunk_rows": 3}, {"micro_batch_tokens": 20, "packing": "on"}],
    ids=lambda t: "-".join(t) or "whole",
)
def test_a_step_on_prompts_samples_and_fixed_data_is_that_of_the_definition(on_prompt, train, checkpoint, rollouts):
    """Labels not shifted for the KL although shifted for the CE; the first token dropped; a mask for the wrong side."""
    run = bare_run(
        checkpoint, loss={"on_prompt": on_prompt, "distill_weight": 0.3}, train=train,
        data={"source": "unused", "on_policy_fraction": 0.5, "mix": "sample"},
    )  # fmt: skip
    taken = [with_prompt(r) for r in rollouts] if on_prompt else rollouts
    tokens, sums, trouble = accumulate(run, [scored(r) for r in taken])
    expected_loss, expected = reference(checkpoint, rollouts, on_prompt=on_prompt, w=0.3)
    assert trouble == ""
    assert tokens == sum(r.num_tokens for r in taken)
    assert sums["loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert relative(gradients(run), expected) < 1e-5


def test_a_prompt_that_is_trained_on_is_the_same_sequence_cut_after_its_first_token(rollouts):
    for whole in rollouts:
        cut = with_prompt(whole)
        prompt = len(whole.prompt.token_ids)
        assert torch.equal(sequence(cut), sequence(whole))
        assert np.array_equal(cut.prompt_ids, whole.prompt.token_ids)
        assert (cut.scored_prompt_tokens, cut.num_completion_tokens) == (prompt - 1, whole.num_tokens)
        assert cut.sampled.tolist() == [False] * (prompt - 1) + [whole.source == "on_policy"] * whole.num_tokens
        assert np.isnan(cut.full_logprob[: prompt - 1]).all()
        assert np.array_equal(cut.full_logprob[prompt - 1 :], whole.full_logprob, equal_nan=True)
        assert np.array_equal(cut.behaviour_logprob[prompt - 1 :], whole.behaviour_logprob, equal_nan=True)
    one = dataclasses.replace(rollouts[0], prompt=Prompt(0, np.array([5], np.int32)))
    assert with_prompt(one).scored_prompt_tokens == 0


def test_the_students_ids_at_given_tokens_are_its_likeliest(checkpoint, rollouts, monkeypatch):
    student = load(StudentConfig(model=str(checkpoint)), CPU)
    monkeypatch.setattr(likely, "ROWS", 4)
    recorded = np.zeros((rollouts[0].num_tokens, 5), np.int32)
    mixed = [dataclasses.replace(rollouts[0], student_topk_ids=recorded), *[with_prompt(r) for r in rollouts[1:]]]
    kept = with_likely_ids(student, mixed, 5, 30)
    assert kept[0].student_topk_ids is recorded
    for before, after in zip(mixed[1:], kept[1:], strict=True):
        start = len(before.prompt.token_ids)
        with torch.no_grad():
            logits = student.model(sequence(before)).logits[0, start - 1 : -1, :V]
        assert np.array_equal(after.student_topk_ids, logits.topk(5).indices.numpy())
        assert after.uid == before.uid
    assert with_likely_ids(student, mixed, 0, 30) == mixed


def test_later_updates_of_a_step_see_stale_samples_and_weigh_them(checkpoint, rollouts):
    """train.updates: the first update finds fresh samples, the second ones of older weights."""
    sampled = scored_samples()
    student = load(StudentConfig(model=str(checkpoint)), CPU)
    fresh = []
    for s in sampled:  # q_old as the student has it
        with torch.no_grad():
            log_q = student.model(sequence(s.rollout)).logits[0].log_softmax(-1)
        start = len(s.rollout.prompt.token_ids)
        own = log_q[start - 1 : -1].gather(1, torch.from_numpy(s.rollout.token_ids).long()[:, None])[:, 0].numpy()
        fresh.append(
            ScoredRollout(dataclasses.replace(s.rollout, full_logprob=own, behaviour_logprob=own), s.scores)
        )  # fmt: skip
    run = bare_run(
        checkpoint,
        loss={"staleness": "prefix", "staleness_cap": 1.05, "ratio_bounds": [0.9, 1.1]},
        train={"updates": 3},
        optim={"learning_rate": 3e-3, "warmup_steps": 0},
    )
    figures = [learn(run, fresh) for _ in range(3)]
    assert figures[0]["staleness_ess"] == pytest.approx(1.0, abs=1e-5)
    assert figures[0]["staleness_clipped"] == figures[0]["ratio_masked"] == figures[0]["skipped_tokens"] == 0
    assert figures[-1]["staleness_ess"] < 0.999
    assert figures[-1]["staleness_clipped"] > 0
    assert figures[-1]["skipped_tokens"] == pytest.approx(figures[-1]["ratio_masked"] * 29) != 0
    assert figures[-1]["rollout_gap"] > figures[0]["rollout_gap"]


class Ranks:
    """Collectives of threads that stand for ranks."""

    def __init__(self, world: int) -> None:
        self.world, self._barrier, self._parts = world, threading.Barrier(world), [np.zeros(0)] * world

    def member(self, rank: int) -> Any:
        def all_reduce_sum(local: Any) -> np.ndarray:
            self._parts[rank] = np.asarray(local, dtype=np.float64)
            self._barrier.wait(60)
            total = np.sum(self._parts, axis=0)
            self._barrier.wait(60)
            return total

        return SimpleNamespace(all_reduce_sum=all_reduce_sum, world=self.world, rank=rank, is_main=rank == 0)


@pytest.mark.parametrize(
    "loss",
    [
        {"on_prompt": True, "distill_weight": 0.3, "normalise": "sequence", "support": "teacher"},
        {"objective": "policy_gradient", "center": "group", "kl_discount": 0.9, "ce_weight": 0.5, "staleness": "prefix",
         "ratio_bounds": [0.2, 5.0]},
        {"objective": "k3", "behaviour": "weight", "ce_weight": 0.5},
    ],
    ids=lambda loss: loss.get("objective", "reverse_kl"),
)  # fmt: skip
def test_ranks_change_neither_gradient_nor_metrics(loss, checkpoint, rollouts):
    """Three ranks, one of them without samples; samples, prompts and fixed data, stale and tempered."""
    sections = {
        "loss": loss, "data": {"source": "unused", "on_policy_fraction": 0.5, "mix": "sample"},
        "rollout": {"temperature": 0.8}, "train": {"updates": 2, "micro_batch_size": 2},
    }  # fmt: skip
    noise = np.random.default_rng(0)
    taken = []
    for r in rollouts:
        moved = r.behaviour_logprob + noise.normal(scale=0.3, size=r.num_tokens).astype(np.float32)
        r = dataclasses.replace(r, behaviour_logprob=moved)
        taken.append(scored(with_prompt(r) if loss.get("on_prompt") else r))
    alone = bare_run(checkpoint, **sections)
    tokens, sums, _ = accumulate(alone, taken)
    ranks = Ranks(3)
    runs = [bare_run(checkpoint, ranks.member(rank), **sections) for rank in range(3)]
    shares = [taken[::2], taken[1::2], []]
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(accumulate, runs, shares))
    together: dict[str, float] = {}
    for counted, part, trouble in parts:
        assert (counted, trouble) == (tokens, "")
        metrics.add(together, part)
    assert relative(sum(gradients_or_zero(run) for run in runs), gradients(alone)) < 1e-6
    figures, expected = metrics.means(together), metrics.means(sums)
    assert together["loss"] == pytest.approx(sums["loss"], rel=1e-6)
    assert figures.keys() == expected.keys() >= {"staleness_ess", "behaviour_ess", "cross_entropy", "distillation"}
    assert figures == pytest.approx(expected, rel=1e-5, abs=1e-7)


def gradients_or_zero(run: Any) -> torch.Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in run.student.model.parameters()]
    ).double()


def test_skipped_tokens_are_all_that_had_no_part_in_the_loss(checkpoint):
    """Those of micro-batches in which nothing counts, which are not even run, too."""
    samples = scored_samples()
    ignored = sorted({int(t) for t in samples[1].rollout.token_ids} | {int(samples[2].rollout.token_ids[0])})
    run = bare_run(checkpoint, loss={"ignore_token_ids": ignored}, train={"micro_batch_size": 1})
    skipped = sum(int(np.isin(s.rollout.token_ids, ignored).sum()) for s in samples)
    assert samples[1].rollout.num_tokens == 1
    assert skipped >= 2
    assert learn(run, samples)["skipped_tokens"] == skipped


def test_a_micro_batch_whose_tokens_are_all_out_of_bounds_still_runs_its_backward(checkpoint):
    """Where passes are collective a rank that left one out would hang the others."""
    sample = scored_samples()[2]
    off = dataclasses.replace(sample.rollout, full_logprob=sample.rollout.full_logprob - 30.0)
    run = bare_run(checkpoint, loss={"ratio_bounds": [0.5, 2.0]}, train={"updates": 2})
    _, sums, trouble = accumulate(run, [ScoredRollout(off, sample.scores)])
    assert (trouble, sums["loss"], sums["trained_tokens"]) == ("", 0.0, 0.0)
    assert all(p.grad is not None for p in run.student.parts.body.parameters())
    assert gradients(run).abs().max() == 0


def test_mixed_supports_of_samples_and_fixed_data_make_one_batch(checkpoint, rollouts):
    """The union needs the student's ids everywhere, however they came about."""
    student = load(StudentConfig(model=str(checkpoint)), CPU)
    kept = with_likely_ids(student, [with_prompt(r) for r in rollouts], 4, 1000)
    teacher = tiny_model(seed=9, scale=2.0).double()
    answers = []
    for r in kept:
        whole = scored(r)
        log_p = torch.from_numpy(whole.scores.topk_logprob)
        with torch.no_grad():
            width = teacher(sequence(r)).logits.shape[-1]
        assert width > V
        ids = torch.from_numpy(r.student_topk_ids).long()
        top = log_p.topk(4, 1)
        answers.append(
            ScoredRollout(
                r,
                dataclasses.replace(
                    whole.scores, topk_ids=top.indices.int().numpy(), topk_logprob=top.values.numpy(),
                    candidate_logprob=log_p.gather(1, ids).reshape(-1).numpy(),
                ),
            )
        )  # fmt: skip
    rows = loss_rows(answers, build(parse_loss({"on_prompt": True})).config)
    n = 0
    for r in kept:
        for token, ids in zip(r.token_ids, r.student_topk_ids, strict=True):
            got = set(rows.teacher.support_ids[n][rows.teacher.support_mask[n]].tolist())
            assert {int(token), *ids.tolist()} <= got
            n += 1
    assert rows.sampled.sum() == sum(r.num_tokens for r in rollouts if r.source == "on_policy")
    assert rows.fixed.sum() == sum(r.num_tokens for r in kept if r.source == "fixed")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"distill_weight": 0.5}}, "loss.distill_weight: got 0.5 with data.on_policy_fraction 1"),
        ({"loss": {"ce_weight": 0.5}}, "loss.ce_weight: got 0.5 with data.on_policy_fraction 1, expected none"),
        (
            {"loss": {"ce_weight": 1.0, "kl_weight": 0.0}, "data": {"source": "x", "on_policy_fraction": 0.5}},
            "loss.kl_weight: got 0 with data.on_policy_fraction 0.5, expected more, or on_policy_fraction 0",
        ),
        (
            {"loss": {"distill_weight": 0.0}, "data": {"source": "x", "on_policy_fraction": 0.5}},
            "loss.distill_weight: got 0 with data.on_policy_fraction 0.5, expected more",
        ),
        (
            {"loss": {"objective": "k2"}, "data": {"source": "x", "on_policy_fraction": 0.5}},
            "data.on_policy_fraction: got 0.5 with loss.objective k2, expected 1",
        ),
        (
            {"loss": {"objective": "k2", "ce_weight": 1.0}, "data": {"source": "x", "on_policy_fraction": 0.0}},
            "data.on_policy_fraction: got 0 with loss.objective k2, expected 1",
        ),
        ({"loss": {"behaviour": "weight"}}, "loss.behaviour: got weight, expected none: rollout's temperature 1"),
        (
            {"loss": {"behaviour": "weight"}, "rollout": {"greedy": True}},
            "loss.behaviour: got weight, expected none: rollout's greedy",
        ),
        ({"loss": {"staleness": "prefix"}}, "loss.staleness: got prefix with train.updates 1, expected none"),
        (
            {
                "loss": {"staleness": "prefix"},
                "train": {"updates": 2},
                "data": {"source": "x", "on_policy_fraction": 0.0},
            },
            "loss.staleness: got prefix with data.on_policy_fraction 0, expected none: nothing is sampled",
        ),
        (
            {
                "loss": {"on_prompt": True},
                "data": {"source": "x", "format": "packed_text", "seq_length": 32, "on_policy_fraction": 0.0},
            },
            "loss.on_prompt: got true with data.format packed_text",
        ),
        ({"loss": {"ratio_bounds": [0.5, 2.0]}}, r"loss.ratio_bounds: got \(0.5, 2.0\) with train.updates 1"),
    ],
)  # fmt: skip
def test_what_another_section_leaves_idle_is_refused(sections: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        bare_run(Path("unread"), **sections)
