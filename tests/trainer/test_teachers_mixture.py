"""Several teachers on the same samples, against float64 sums over plain transformers models."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from serving import serving
from tinymodels import save_tiny, tiny_model, tiny_tokenizer
from torch import Tensor

from student_trainer import scoring
from student_trainer.config import TrainConfig
from student_trainer.losses import build, parse_loss
from student_trainer.losses.rows import loss_rows, teacher_rows
from student_trainer.teachers import panel
from student_trainer.types import Prompt, Rollout
from teacher_api.types import LOGPROB_FLOOR

pytestmark = pytest.mark.slow

VOCABULARY, WIDTH = 120, 128
SEEDS = {"left": 1, "right": 5}
WEIGHTS = {"left": 3.0, "right": 1.0}
TEMPERATURE = 1.7


@pytest.fixture(scope="module")
def urls(tmp_path_factory: Any) -> Iterator[dict[str, str]]:
    """Two small models, each behind a server."""
    place: Path = tmp_path_factory.mktemp("mixture")
    for name, seed in SEEDS.items():
        save_tiny(place / name, seed=seed, scale=2.5, tokenizer_size=VOCABULARY)
    common: dict[str, Any] = {"backend": "torch", "device": "cpu", "threads": 1}
    with (
        serving(model=str(place / "left"), **common) as left,
        serving(model=str(place / "right"), **common) as right,
    ):
        yield {"left": left.http_url, "right": right.http_url}


def samples(kept: int = 0, count: int = 3) -> list[Rollout]:
    """Completions of different lengths, with ids that the student found likely; teacher and student share few."""
    draw = np.random.default_rng(3)
    found = []
    for uid in range(count):
        tokens = draw.integers(2, VOCABULARY, 4 + uid, dtype=np.int32)
        prompt = Prompt(index=uid // 2, token_ids=np.arange(2 + uid // 2, 6, dtype=np.int32))
        ids = np.stack([draw.permutation(VOCABULARY)[:kept] for _ in tokens]).astype(np.int32) if kept else None
        logprob = draw.uniform(-3, -1, len(tokens)).astype(np.float32)
        found.append(Rollout(uid, prompt, tokens, "eos", logprob, logprob, ids))
    return found


def connected(urls: dict[str, str], loss: dict[str, Any], **settings: Any) -> panel.Panel:
    """A panel of both, by mixture unless said otherwise."""
    teachers = {
        name: {"url": url, "weight": WEIGHTS[name], "start_timeout_s": 20, "timeout_s": 20, **settings}
        for name, url in urls.items()
    }
    config = TrainConfig.model_validate(
        {
            "student": {"model": "s"},
            "data": {"source": "p.txt"},
            "teachers": teachers,
            "teaching": {"by": "mixture"},
            "loss": {"teacher_temperature": TEMPERATURE, **loss},
        }
    )
    opened, warnings = panel.connect(
        config,
        urls,
        build(config.loss),
        tokenizer=tiny_tokenizer(VOCABULARY),
        longest_tokens=16,
        longest_privileged=16,
        began_with={},
    )
    assert not warnings
    return opened


@functools.cache
def plain_model(seed: int) -> Any:
    return tiny_model(seed=seed, scale=2.5, logit_width=WIDTH).double()


@torch.no_grad()
def plain_logits(seed: int, sequence: Tensor) -> Tensor:
    """[T, W], by transformers alone, in float64."""
    return plain_model(seed)(sequence[None]).logits[0]


def expected(rollout: Rollout, temperature: float = TEMPERATURE) -> npt.NDArray[np.float64]:
    """log Σ_m w_m p_m [N, W] by the definition, in float64."""
    sequence = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.token_ids]).astype(np.int64))
    total = torch.zeros(rollout.num_tokens, WIDTH, dtype=torch.float64)
    for name, seed in SEEDS.items():
        logits = plain_logits(seed, sequence)[len(rollout.prompt.token_ids) - 1 : -1] / temperature
        total += WEIGHTS[name] / sum(WEIGHTS.values()) * logits.softmax(-1)
    return total.log().numpy()


def test_the_whole_mixture_is_the_weighted_sum_of_the_distributions(urls: dict[str, str]) -> None:
    teachers = connected(urls, {"objective": "forward_kl"}, top_k="all")
    for scored in teachers.score(samples()):
        log_p = expected(scored.rollout)
        rows = np.arange(scored.rollout.num_tokens)
        values = scored.scores.topk_logprob
        assert values is not None
        np.testing.assert_allclose(values, log_p[:, :VOCABULARY], atol=1e-5)
        np.testing.assert_allclose(scored.scores.token_logprob, log_p[rows, scored.rollout.token_ids], atol=1e-5)
        outside = np.log(np.exp(log_p[:, VOCABULARY:]).sum(1))
        np.testing.assert_allclose(scored.scores.log_tail, outside, atol=1e-4)
    teachers.close()


@pytest.mark.slow
@pytest.mark.parametrize("support", ["teacher", "union", "student"])
@pytest.mark.parametrize("value_type", ["float32", "float16"])
def test_on_a_support_every_id_and_the_tail_are_the_mixtures(support: str, value_type: str, urls: dict) -> None:
    if support == "student" and value_type == "float16":
        return  # refused: no top-k values are asked for
    loss = {"objective": "reverse_kl", "support": support}
    teachers = connected(urls, loss, top_k=4, value_type=value_type)
    scored = teachers.score(samples(kept=0 if support == "teacher" else 4))
    rows = teacher_rows(scored, parse_loss(loss))
    at = 0
    for sample in scored:
        log_p = expected(sample.rollout)
        for n, y in enumerate(sample.rollout.token_ids):
            held = rows.support_mask[at].nonzero().flatten()
            ids = rows.support_ids[at][held].numpy()
            assert len(set(ids.tolist())) == len(ids)
            assert set(ids.tolist()) == expected_support(sample.rollout, n, int(y), support)
            np.testing.assert_allclose(rows.support_logprob[at][held].numpy(), log_p[n][ids], atol=2e-5)
            rest = np.setdiff1d(np.arange(WIDTH), ids)
            assert float(rows.log_tail[at]) == pytest.approx(np.log(np.exp(log_p[n][rest]).sum()), abs=1e-4)
            if support == "union":
                theirs = top_of_all(sample.rollout, n)
                mine = set(sample.rollout.student_topk_ids[n].tolist())
                assert float(rows.topk_overlap[at]) == pytest.approx(len(theirs & mine) / len(theirs))
            at += 1
    assert at == rows.support_ids.shape[0]
    teachers.close()


def top_of_all(rollout: Rollout, n: int) -> set[int]:
    """The ids that one of the teachers finds likely."""
    sequence = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.token_ids]).astype(np.int64))
    place = len(rollout.prompt.token_ids) - 1 + n
    logits = [plain_logits(seed, sequence)[place, :VOCABULARY] for seed in SEEDS.values()]
    return {i for z in logits for i in z.topk(4).indices.tolist()}


def expected_support(rollout: Rollout, n: int, y: int, support: str) -> set[int]:
    found = {y}
    if support != "student":
        found |= top_of_all(rollout, n)
    if support != "teacher":
        assert rollout.student_topk_ids is not None
        found |= set(rollout.student_topk_ids[n].tolist())
    return found


def test_the_loss_at_full_vocabulary_is_the_textbooks(urls: dict[str, str]) -> None:
    """KL(Σ w p ‖ q), not Σ w KL(p ‖ q)."""
    teachers = connected(urls, {"objective": "forward_kl"}, top_k="all")
    config = parse_loss({"objective": "forward_kl", "teacher_temperature": TEMPERATURE})
    scored = teachers.score(samples())
    rows = loss_rows(scored, config)
    log_p = torch.from_numpy(np.concatenate([expected(s.rollout) for s in scored]))
    z = torch.randn(log_p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = build(config).per_token(rows.inputs(torch.arange(len(z)), z.float())).value
    log_p, log_q = (lumped(x) for x in (log_p, z.log_softmax(-1)))
    textbook: Tensor = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(value.double(), textbook, atol=1e-5, rtol=0)
    teachers.close()


def lumped(log_p: Tensor) -> Tensor:
    """Columns beyond the tokenizer are one outcome: no id stands for them."""
    return torch.cat([log_p[:, :VOCABULARY], log_p[:, VOCABULARY:].logsumexp(1, keepdim=True)], dim=1)


def test_sampled_token_objectives_take_the_mixtures_logprob(urls: dict[str, str]) -> None:
    teachers = connected(urls, {"objective": "policy_gradient", "teacher_temperature": 1.0})
    for scored in teachers.score(samples()):
        log_p = expected(scored.rollout, 1.0)
        rows = np.arange(scored.rollout.num_tokens)
        np.testing.assert_allclose(scored.scores.token_logprob, log_p[rows, scored.rollout.token_ids], atol=1e-5)
        assert scored.scores.topk_logprob is None
    teachers.close()


def test_each_teacher_is_measured_by_its_name(urls: dict[str, str]) -> None:
    teachers = connected(urls, {"objective": "forward_kl"}, top_k=4)
    scored = teachers.score(samples())
    figures = teachers.figures(lambda sums: {name: 2 * value for name, value in sums.items()})  # two ranks alike
    tokens = sum(s.rollout.num_tokens for s in scored)
    for name, url in urls.items():
        alone = connected({name: url}, {"objective": "forward_kl"}, top_k=4)
        views = alone.score(samples())
        delta = np.mean(np.concatenate([v.rollout.full_logprob - v.scores.token_logprob for v in views]))
        assert figures[f"{name}/delta"] == pytest.approx(float(delta), abs=1e-5)
        assert figures[f"{name}/tokens"] == 2 * tokens
        assert figures[f"{name}/seconds"] > 0
        own = np.concatenate([v.scores.log_tail for v in views])
        assert 1 - np.exp(own).mean() < figures[f"{name}/teacher_mass"] < 1  # the union holds more than its own top-k
        alone.close()
    teachers.close()


def test_what_a_teacher_of_a_mixture_can_not_answer_is_refused_with_its_name(urls: dict[str, str]) -> None:
    teachers = connected(urls, {"objective": "reverse_kl", "support": "union"}, top_k=4)
    teachers.check_mixture()
    right = teachers.members["right"]
    for lacking in ({"max_candidates": 11}, {"features": ("top_k",)}):
        teachers.members["right"] = replace(right, info=replace(right.info, **lacking))
        with pytest.raises(scoring.HandshakeError, match=r"teachers\.right: .* up to 12 candidates"):
            teachers.check_mixture()
    teachers.close()
    with pytest.raises(scoring.HandshakeError, match=r"teachers\.left\.top_k is 400, this teacher gives at most 120"):
        connected(urls, {"objective": "reverse_kl"}, top_k=400)


def test_a_teacher_that_leaves_an_id_out_is_an_error() -> None:
    from student_trainer.teachers import mixture
    from teacher_api.types import Candidates

    asked = Candidates(np.array([3, 7], np.int32), np.array([0, 2], np.int32))
    with pytest.raises(ValueError, match="was not asked"):
        mixture._look_up(np.array([[3, 8]]), asked, np.zeros(2, np.float32))


def test_values_at_the_floor_stay_finite() -> None:
    from student_trainer.teachers import mixture

    floor = np.full(3, LOGPROB_FLOOR, np.float32)
    log_w = mixture.log_weights([1.0, 3.0])
    assert (mixture.log_mean([floor, floor], log_w) == np.float32(LOGPROB_FLOOR)).all()
    assert np.allclose(mixture.log_mean([floor, np.zeros(3, np.float32)], log_w), np.log(0.75))
