"""One step's gradient against a plain float64 implementation of the definitions: whole-model logits, log-softmax, sums.
Micro-batches, chunks, ranks and bad values must not show in it.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from onestep import CPU, V, bare_run, gradients, relative, scored_samples
from ports import free_port
from tinymodels import ARCHITECTURES, save_tiny
from training import FORKS

from student_trainer import guards
from student_trainer.config import StudentConfig
from student_trainer.distributed import Distributed, join, weights_digest
from student_trainer.losses.base import PerToken
from student_trainer.student import load
from student_trainer.train import accumulate, learn
from student_trainer.types import Rollout, ScoredRollout

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("student"), scale=2.0)


@pytest.fixture(scope="module")
def samples() -> list[ScoredRollout]:
    return scored_samples()


def reference(
    checkpoint: Path, samples: list[ScoredRollout], loss: dict[str, Any], student: Any = None
) -> tuple[float, torch.Tensor]:
    """(loss, gradient) in float64 from the textbook expressions; of `student`, if given, a model in float64."""
    student = student or copy.deepcopy(load(StudentConfig(model=str(checkpoint)), CPU).model).double()
    weights, total = [], torch.zeros((), dtype=torch.float64)
    lengths = [s.rollout.num_tokens for s in samples]
    for sample in samples:
        rollout = sample.rollout
        start = len(rollout.prompt.token_ids)
        logits = student(torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]]).long()).logits[
            0, start - 1 : -1
        ]
        log_q = (logits / loss.get("student_temperature", 1.0)).log_softmax(-1)
        log_p = torch.from_numpy(
            np.concatenate([sample.scores.topk_logprob, sample.scores.log_tail[:, None]], 1)
        ).double()
        outcomes = torch.cat([log_q[:, :V], log_q[:, V:].logsumexp(1, keepdim=True)], 1)
        if loss["objective"] == "reverse_kl":
            value = (outcomes.exp() * (outcomes - log_p)).sum(1)
        elif loss["objective"] == "forward_kl":
            value = (log_p.exp() * (log_p - outcomes)).sum(1)
        else:
            at = torch.from_numpy(rollout.token_ids).long()[:, None]
            advantage = -(rollout.full_logprob.astype(np.float64) - sample.scores.token_logprob)
            ratio = (log_q.gather(1, at)[:, 0] - torch.from_numpy(rollout.full_logprob).double()).exp()
            value = -ratio * torch.from_numpy(advantage)
        weights.append(1 / sum(lengths) if loss.get("normalise") != "sequence" else 1 / len(value) / len(samples))
        total = total + weights[-1] * value.sum()
    total.backward()
    return float(total.detach()), torch.cat([p.grad.reshape(-1) for p in student.parameters() if p.requires_grad])


@pytest.mark.parametrize(
    "loss",
    [
        {"objective": "reverse_kl"},
        {"objective": "reverse_kl", "normalise": "sequence", "student_temperature": 2.0},
        {"objective": "forward_kl"},
        {"objective": "policy_gradient"},
    ],
    ids=lambda loss: "-".join(str(v) for v in loss.values()),
)
def test_a_steps_gradient_is_that_of_the_definition(loss: dict[str, Any], checkpoint, samples) -> None:
    run = bare_run(checkpoint, loss=loss, train={"micro_batch_tokens": 30, "loss_chunk_rows": 5})
    tokens, sums, trouble = accumulate(run, samples)
    expected_loss, expected = reference(checkpoint, samples, loss)
    assert (tokens, trouble) == (29.0, "")
    assert sums["loss"] == pytest.approx(expected_loss, rel=1e-5, abs=1e-7)
    assert relative(gradients(run), expected) < 1e-5


@pytest.mark.parametrize("train", [{"micro_batch_size": 1}, {"micro_batch_tokens": 20}, {"loss_chunk_rows": 1}])
def test_micro_batches_and_chunks_do_not_show(train: dict[str, int], checkpoint, samples) -> None:
    results = []
    for settings in ({}, train):
        run = bare_run(checkpoint, train=settings)
        accumulate(run, samples)
        results.append(gradients(run))
    assert relative(results[1], results[0]) < 1e-5


def test_a_step_moves_towards_the_teacher(checkpoint, samples) -> None:
    run = bare_run(checkpoint, optim={"learning_rate": 1e-3})
    losses = []
    for _ in range(12):
        losses.append(learn(run, samples)["loss"])
        run.step += 1
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_learns_and_survives_its_checkpoint(arch: str, tmp_path, samples) -> None:
    path = save_tiny(tmp_path / "before", arch, scale=2.0)
    run = bare_run(path, optim={"learning_rate": 1e-2})
    before = run.student.model.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    learned = learn(run, samples)
    assert learned["skipped"] == 0.0
    after = run.student.model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    run.student.model.save_pretrained(tmp_path / "after")
    run.student.tokenizer.save_pretrained(tmp_path / "after")
    reloaded = load(StudentConfig(model=str(tmp_path / "after")), CPU).model.state_dict()
    assert all(torch.equal(after[name], reloaded[name]) for name in after)


# -- bad values


def poisoned(sample: ScoredRollout, position: int) -> ScoredRollout:
    """The same sample, except that the student's old logprob of one token is NaN."""
    rollout = copy.copy(sample.rollout)
    broken = rollout.full_logprob.copy()
    broken[position] = np.nan
    return ScoredRollout(
        Rollout(rollout.uid, rollout.prompt, rollout.token_ids, rollout.finish, rollout.behaviour_logprob, broken),
        sample.scores,
    )


def test_a_step_without_finite_loss_changes_nothing_and_is_counted(checkpoint, samples) -> None:
    run = bare_run(checkpoint, loss={"objective": "policy_gradient"}, train={"max_bad_steps": 2})
    before = [p.detach().clone() for p in run.student.model.parameters()]
    bad = [*samples[:2], poisoned(samples[2], 4), *samples[3:]]
    assert learn(run, bad)["skipped"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, run.student.model.parameters(), strict=True))
    assert learn(run, samples)["skipped"] == 0.0
    learn(run, bad)
    with pytest.raises(guards.TrainingError, match="2 steps in a row"):
        learn(run, bad)


def test_a_broken_weight_is_found_by_sample_and_position(checkpoint, samples) -> None:
    run = bare_run(checkpoint, train={"max_bad_steps": 1})
    with torch.no_grad():
        run.student.model.get_input_embeddings().weight[int(samples[1].rollout.prompt.token_ids[0])] = torch.inf
    with pytest.raises(
        guards.TrainingError, match=r"prompt 0, sample 0, position 5: the student's hidden state is not finite"
    ):
        learn(run, samples)


def test_a_step_of_ignored_tokens_only_is_skipped(checkpoint, samples) -> None:
    every_id = list(range(V))
    run = bare_run(checkpoint, loss={"objective": "reverse_kl", "ignore_token_ids": every_id})
    assert learn(run, samples)["skipped"] == 1.0


# -- ranks


def infinite_slope(inputs: Any, config: Any) -> PerToken:
    """An objective whose value is finite everywhere, and whose gradient is not where the old logprob is NaN."""
    value = -inputs.student_logits.log_softmax(-1).gather(1, inputs.target[:, None])[:, 0]
    bad = inputs.old_logprob.isnan()
    root = torch.where(bad, value - value.detach(), 1.0).abs().sqrt()  # of 0 where bad, with slope 0 · ∞
    return PerToken(value + root - (~bad).float())


def broken_weight(run: Any) -> None:
    run.student.model.get_output_embeddings().weight.register_hook(lambda gradient: gradient * torch.nan)


BAD: dict[str, tuple[dict[str, str], Any, str]] = {
    "loss": ({"objective": "policy_gradient"}, None, "prompt 0, sample 2, position 9: the student's loss or its"),
    "gradient": (
        {"objective": f"{__name__}:infinite_slope"},
        None,
        "prompt 0, sample 2, position 9: the student's loss",
    ),
    "gradient of a weight": ({"objective": "forward_kl"}, broken_weight, "gradient of "),
}


def _rank_that_meets_a_bad_value(rank: int, port: int, checkpoint: Path, samples: Any, folder: Path) -> None:
    dist = _join(rank, 2, port)
    mine = [s for i, s in enumerate(samples) if dist.owns(i)]
    told = {}
    for what, (loss, spoil, _) in BAD.items():
        run = bare_run(checkpoint, dist, loss=loss, train={"max_bad_steps": 2})
        if rank == 0 and spoil is not None:
            spoil(run)
        bad = mine if rank or spoil is not None else [mine[0], poisoned(mine[1], 4), *mine[2:]]  # sample 2
        before = weights_digest(run.student.model.named_parameters())
        learned = learn(run, bad)
        try:
            learn(run, bad)
        except guards.TrainingError as error:
            after = weights_digest(run.student.model.named_parameters())
            told[what] = [before == after, learned["skipped"], run.bad_steps.total, str(error)]
    (folder / f"bad{rank}.json").write_text(json.dumps(told))
    dist.close()


def test_a_bad_value_on_one_rank_steps_no_rank_and_is_named_on_all(checkpoint, samples, tmp_path) -> None:
    """T5 of docs/reliability.md: NaN in the loss, in its gradient, or in a weight's gradient, on rank 0 alone."""
    arguments = (free_port(), checkpoint, samples, tmp_path)
    multiprocessing.start_processes(_rank_that_meets_a_bad_value, arguments, nprocs=2, start_method="forkserver")
    ranks = [json.loads((tmp_path / f"bad{rank}.json").read_text()) for rank in range(2)]
    for what, (_, _, words) in BAD.items():
        for unchanged, skipped, total, message in (rank[what] for rank in ranks):
            assert (unchanged, skipped, total) == (True, 1.0, 2), what
            assert "2 steps in a row" in message
            assert words in message


def _join(rank: int, world: int, port: int) -> Distributed:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    return join("cpu", 60.0)


def _rank_step(rank: int, world: int, port: int, checkpoint: Path, samples: Any, folder: Path) -> None:
    dist = _join(rank, world, port)
    run = bare_run(checkpoint, dist, optim={"learning_rate": 1e-3})
    mine = [s for i, s in enumerate(samples) if dist.owns(i)] if world < 3 else (samples if rank == 0 else [])
    _, sums, _ = accumulate(run, mine)
    dist.sum_gradients(run.student.model.parameters())
    first = {"loss": dist.sum_metrics(sums)["loss"], "gradient": gradients(run)}
    run.optimizer.zero_grad()
    for _ in range(5):
        learn(run, mine)
        run.step += 1
    weights = torch.cat([p.detach().reshape(-1) for p in run.student.model.parameters()]).double()
    torch.save({**first, "weights": weights}, folder / f"rank{rank}.pt")
    dist.close()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3], ids=["two", "two without tokens"])
def test_ranks_together_take_the_step_of_one(world: int, checkpoint, samples, tmp_path) -> None:
    """With three, rank 0 has all the samples: ranks without tokens take part and change nothing."""
    alone = bare_run(checkpoint, optim={"learning_rate": 1e-3})
    _, sums, _ = accumulate(alone, samples)
    expected = gradients(alone)
    alone.optimizer.zero_grad()
    for _ in range(5):
        learn(alone, samples)
        alone.step += 1
    weights = torch.cat([p.detach().reshape(-1) for p in alone.student.model.parameters()]).double()

    assert FORKS.get_start_method() == "forkserver"  # with the imports done
    arguments = (world, free_port(), checkpoint, samples, tmp_path)
    multiprocessing.start_processes(_rank_step, arguments, nprocs=world, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"rank{r}.pt") for r in range(world)]
    for rank in ranks:
        assert rank["loss"] == pytest.approx(sums["loss"], rel=1e-6)
        assert relative(rank["gradient"], expected) < 1e-6
        assert relative(rank["weights"], weights) < 1e-5
        assert torch.equal(rank["weights"], ranks[0]["weights"])
