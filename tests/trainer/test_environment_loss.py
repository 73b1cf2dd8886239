"""Conversations in the loss: only what the student wrote counts. Gradients and weights against float64 definitions that
never look at an environment's tokens.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onestep import CPU, V, bare_run, gradients, relative, scored_samples
from tinymodels import save_tiny

from student_trainer import metrics
from student_trainer.config import StudentConfig
from student_trainer.losses import build, parse_loss
from student_trainer.rollout.given import with_prompt
from student_trainer.student import load
from student_trainer.train import accumulate
from student_trainer.types import ScoredRollout

pytestmark = pytest.mark.slow

WROTE = ["111", "1", "110011101", "1011", "1111", "10", "100111"]
"""Of each sample's tokens, those of the student (1) and of an environment (0)."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("student"), scale=2.0)


@pytest.fixture(scope="module")
def model(checkpoint) -> Any:
    return copy.deepcopy(load(StudentConfig(model=str(checkpoint)), CPU).model).double()


@pytest.fixture(scope="module")
def samples() -> list[ScoredRollout]:
    return [conversation(s, mask) for s, mask in zip(scored_samples(), WROTE, strict=True)]


def conversation(scored: ScoredRollout, pattern: str) -> ScoredRollout:
    rollout, wrote = scored.rollout, np.array([c == "1" for c in pattern])
    own = np.where(wrote, rollout.full_logprob, np.nan).astype(np.float32)
    return dataclasses.replace(
        scored, rollout=dataclasses.replace(rollout, by_student=wrote, behaviour_logprob=own, full_logprob=own)
    )


def reference(model: Any, samples: list[ScoredRollout], loss: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """(loss, gradient) in float64, summed over the places t at which the student wrote, one after the other."""
    model.zero_grad()
    total, conversations = torch.zeros((), dtype=torch.float64), len(samples)
    tokens = sum(int(s.rollout.by_student.sum()) for s in samples)
    for sample in samples:
        rollout, start = sample.rollout, len(sample.rollout.prompt.token_ids)
        ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]]).long()
        log_q = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        places = [t for t in range(rollout.num_tokens) if rollout.by_student[t]]
        now = [log_q[t, rollout.token_ids[t]] for t in places]
        gaps = [float(rollout.full_logprob[t] - sample.scores.token_logprob[t]) for t in places]
        log_ratio = [float(n.detach()) - float(rollout.full_logprob[t]) for n, t in zip(now, places, strict=True)]
        for n, t in enumerate(places):
            if loss["objective"] == "policy_gradient":
                later = [loss.get("kl_discount", 0.0) ** j * -gap for j, gap in enumerate(gaps[n:])]
                value = -(now[n] - float(rollout.full_logprob[t])).exp() * sum(later)
            elif loss["objective"] == "k2":
                value = 0.5 * (now[n] - float(sample.scores.token_logprob[t])) ** 2
            else:
                q = torch.cat([log_q[t, :V], log_q[t, V:].logsumexp(0, keepdim=True)])
                row = np.append(sample.scores.topk_logprob[t], sample.scores.log_tail[t])
                value = (q.exp() * (q - torch.from_numpy(row).double())).sum()
            if loss.get("staleness") == "prefix":
                over = log_ratio[: n + 1] if loss["objective"] == "k2" else log_ratio[:n]
                value = value * min(np.exp(sum(over)), loss["staleness_cap"])
            share = 1 / tokens if loss.get("normalise") != "sequence" else 1 / len(places) / conversations
            total = total + share * value
    total.backward()
    return float(total.detach()), torch.cat([p.grad.reshape(-1) for p in model.parameters()])


LOSSES = [
    {"objective": "reverse_kl"},
    {"objective": "reverse_kl", "normalise": "sequence"},
    {"objective": "policy_gradient", "kl_discount": 0.7},
    {"objective": "reverse_kl", "staleness": "prefix", "staleness_cap": 50.0},
    {"objective": "k2", "staleness": "prefix", "staleness_cap": 50.0},
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(str(v) for v in loss.values()))
def test_only_the_students_tokens_have_a_part_in_a_steps_gradient(loss, checkpoint, model, samples):
    """Tool results in the loss; discounts and prefix products that run over them."""
    run = bare_run(checkpoint, loss=loss, train={"micro_batch_tokens": 30, "loss_chunk_rows": 5, "updates": 2})
    tokens, sums, trouble = accumulate(run, samples)
    expected_loss, expected = reference(model, samples, loss)
    assert (tokens, trouble) == (float("".join(WROTE).count("1")), "")
    assert sums["loss"] == pytest.approx(expected_loss, rel=1e-5, abs=1e-7)
    assert relative(gradients(run), expected) < 1e-5


@pytest.mark.parametrize("objective", ["reverse_kl", "policy_gradient", "jsd", "k3"])
def test_what_the_teacher_says_of_an_environments_tokens_reaches_no_gradient(objective, checkpoint, samples):
    found = []
    for shift in (0.0, 3.0):
        changed = []
        for sample in samples:
            outside = ~sample.rollout.by_student
            values = {n: getattr(sample.scores, n).copy() for n in ("token_logprob", "log_tail", "topk_logprob")}
            for array in values.values():
                array[outside] -= np.float32(shift)
            changed.append(dataclasses.replace(sample, scores=dataclasses.replace(sample.scores, **values)))
        run = bare_run(checkpoint, loss={"objective": objective})
        accumulate(run, changed)
        found.append(gradients(run))
    assert torch.equal(*found)
    assert found[0].abs().max() > 0


def test_the_position_of_an_environments_token_has_no_gradient_of_its_own(checkpoint, samples):
    """The hidden state that would predict it: exactly zero."""
    run = bare_run(checkpoint)
    student, kept = run.student, []

    class Watched:
        def __getattr__(self, name):
            return getattr(student, name)

        def hidden_rows(self, rollouts):
            kept.append((rollouts, student.hidden_rows(rollouts)))
            return kept[-1][1]

    run.student = Watched()
    accumulate(run, samples)
    for rollouts, hidden_NH in kept:
        wrote_N = torch.from_numpy(np.concatenate([r.by_student for r in rollouts]))
        assert (hidden_NH.grad[~wrote_N] == 0).all()
        assert (hidden_NH.grad[wrote_N] != 0).any(1).all()


@pytest.mark.parametrize("center", ["batch", "group"])
def test_the_mean_of_advantages_is_over_the_students_tokens(center, samples):
    objective = build(parse_loss({"objective": "policy_gradient", "center": center}))
    found = objective.prepare(samples, lambda array: array)
    groups = [0] * len(samples) if center == "batch" else [s.rollout.prompt.index for s in samples]
    raw = [-(s.rollout.full_logprob.astype(float) - s.scores.token_logprob) for s in samples]
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        mean = np.nanmean(np.concatenate([raw[i] for i in members]))
        for i in members:
            expected = np.where(samples[i].rollout.by_student, raw[i] - mean, 0.0)
            np.testing.assert_allclose(found[i], expected, rtol=1e-5, atol=1e-6)


def test_figures_count_the_students_tokens_and_the_environments_apart(samples):
    found = metrics.of_rollouts(samples, lambda sums: sums)
    text = "".join(WROTE)
    assert found["tokens"] == text.count("1")
    assert found["completion_tokens"] == pytest.approx(text.count("1") / len(WROTE))
    assert found["environment_tokens"] == pytest.approx(text.count("0") / len(WROTE))
    assert found["turns"] == pytest.approx(sum(len(w.replace("0", " ").split()) for w in WROTE) / len(WROTE))
    plain = metrics.of_rollouts(scored_samples(), lambda sums: sums)
    assert "turns" not in plain
    assert "environment_tokens" not in plain
    rows = metrics.sample_rows(samples, lambda ids: str(ids), len(samples))
    assert [row.tokens for row in rows] == [w.count("1") for w in WROTE]
    assert all(np.isfinite(row.divergence_nats) for row in rows)


def test_turns_are_what_the_student_wrote(samples):
    for sample, pattern in zip(samples, WROTE, strict=True):
        for rollout, before in (
            (sample.rollout, 0),
            (with_prompt(sample.rollout), len(sample.rollout.prompt.token_ids) - 1),
        ):
            inside = ["0"] * (before + len(pattern))
            for turn in rollout.turns:
                inside[turn] = ["1"] * (turn.stop - turn.start)
            assert "".join(inside) == "0" * before + pattern
    assert scored_samples()[0].rollout.turns == [slice(0, 3)]
