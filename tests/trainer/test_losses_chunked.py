"""A real tiny model through mask, weights and chunked.backward, against the plain thing: all logits of each sequence by
itself, one loss over all tokens, one backward. Also the pitfalls of masks and of normalisation."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from losscases import likeliest, log_softmax, scored_rollout
from tinymodels import tiny_model

from student_trainer import losses
from student_trainer.losses import chunked, normalise
from student_trainer.losses.base import Needs
from student_trainer.losses.mask import loss_mask
from student_trainer.losses.rows import loss_rows
from teacher_api.causal_lm import split

W, V, PROMPT = 128, 120, [2, 3, 4]
LENGTHS = [9, 1, 14, 5, 7, 11]


@functools.cache
def models():
    return tiny_model("qwen3", seed=1), tiny_model("llama", seed=2)


def tokens_of(uid):
    return np.random.default_rng(uid).integers(0, V, LENGTHS[uid]).astype(np.int32)


def logits_of(model, tokens):
    ids = torch.tensor([[*PROMPT, *tokens.tolist()]])
    return model(input_ids=ids).logits[0, len(PROMPT) - 1 : -1]


@functools.cache
def samples(needs: Needs):
    """What the tiny teacher says of six made-up completions; log q_old a little off the student's own."""
    student, teacher = models()
    scored = []
    for uid in range(len(LENGTHS)):
        tokens = tokens_of(uid)
        with torch.no_grad():
            log_p = log_softmax(logits_of(teacher, tokens).double().numpy())
            log_q = log_softmax(logits_of(student, tokens).double().numpy())
        old = log_q[np.arange(len(tokens)), tokens] + np.random.default_rng(uid).normal(scale=0.1, size=len(tokens))
        ids = likeliest(log_q, needs.student_top_k, V) if needs.student_top_k else None
        scored.append(
            scored_rollout(
                log_p, tokens, vocabulary=V, top_k=needs.top_k, student_ids=ids, full_logprob=old, uid=uid,
                prompt_index=uid // 2,
            )
        )  # fmt: skip
    return scored


def objective_of(name, **keys):
    ignored = [int(tokens_of(2)[3]), int(tokens_of(1)[0])]  # sample 1 has no counted token at all
    return losses.build(losses.parse_loss({"objective": name, "ignore_token_ids": ignored, **keys}))


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def plain(objective, scored):
    """Loss and gradients with nothing clever: sequence by sequence, all logits, weights by their definition."""
    student, _ = models()
    student.zero_grad()
    config = objective.config
    advantages = objective.prepare(scored, lambda x: x)
    counted = [~np.isin(s.rollout.token_ids, config.ignore_token_ids) for s in scored]
    total = torch.zeros(())
    for i, s in enumerate(scored):
        rows = loss_rows([s], config, advantages=None if advantages is None else [advantages[i]])
        logits = logits_of(student, s.rollout.token_ids)
        value = objective.per_token(rows.inputs(torch.arange(len(logits)), logits)).value[torch.from_numpy(counted[i])]
        if config.normalise == "token":
            total = total + value.sum() / sum(c.sum() for c in counted)
        elif len(value):
            total = total + value.mean() / sum(c.any() for c in counted)
    total.backward()
    return total.item(), gradients(student)


def clever(objective, scored, *, micro_batch, chunk_rows, pad_to=0, head=None):
    """The same as the trainer does it: padded micro-batches, chunks, accumulation."""
    student, _ = models()
    student.zero_grad()
    parts = split(student)
    masks = [loss_mask(s.rollout, objective.config) for s in scored]
    weights = normalise.token_weights(masks, normalise.count(masks), objective.config.normalise)
    advantages = objective.prepare(scored, lambda x: x)
    loss, sums = 0.0, {}
    for start in range(0, len(scored), micro_batch):
        members = range(start, min(start + micro_batch, len(scored)))
        batch = [scored[i] for i in members]
        width = max(pad_to, len(PROMPT) + max(s.rollout.num_tokens for s in batch))
        ids = torch.zeros((len(batch), width), dtype=torch.int64)
        for row, s in enumerate(batch):
            ids[row, : len(PROMPT) + s.rollout.num_tokens] = torch.tensor([*PROMPT, *s.rollout.token_ids.tolist()])
        hidden_BTH = parts.trunk(ids)
        hidden = torch.cat([hidden_BTH[r, len(PROMPT) - 1 :][: s.rollout.num_tokens] for r, s in enumerate(batch)])
        rows = loss_rows(batch, objective.config, advantages=advantages and [advantages[i] for i in members])
        part, metrics = chunked.backward(
            head or parts.head, hidden, objective, rows,
            torch.from_numpy(np.concatenate([weights[i] for i in members])), chunk_rows,
        )  # fmt: skip
        loss += part
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value
    return loss, gradients(student), sums


def assert_close(got, wanted, tolerance=1e-5):
    assert got[0] == pytest.approx(wanted[0], rel=tolerance, abs=1e-6)  # centred advantages nearly cancel
    assert got[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        scale = gradient.abs().max()
        assert (got[1][name] - gradient).abs().max() <= tolerance * scale, name


SETTINGS = {"forward_kl": {"tail": "renormalise"}, "policy_gradient": {"kl_discount": 0.9, "center": "group"}}


@pytest.mark.slow
@pytest.mark.parametrize("name", losses.names())
@pytest.mark.parametrize("weighting", ["token", "sequence"])
@pytest.mark.parametrize("top_k", [4, "all"])
def test_micro_batches_padding_chunks_and_accumulation_change_nothing(name, weighting, top_k):
    """Mean of micro-batch means != global token mean; a mask that assumes the wrong padding; and so on."""
    objective = objective_of(name, normalise=weighting, **SETTINGS.get(name, {}))
    scored = samples(objective.needs(top_k))
    wanted = plain(objective, scored)
    assert max(g.abs().max() for g in wanted[1].values()) > 1e-3
    for layout in (
        {"micro_batch": 6, "chunk_rows": 1000},
        {"micro_batch": 1, "chunk_rows": 4},
        {"micro_batch": 4, "chunk_rows": 1, "pad_to": 40},
        {"micro_batch": 5, "chunk_rows": 7},
    ):
        assert_close(clever(objective, scored, **layout), wanted)


def test_the_logits_of_all_rows_never_exist_at_once():
    objective = objective_of("reverse_kl")
    scored, (student, _) = samples(objective.needs(4)), models()
    seen = []

    def head(hidden):
        seen.append(len(hidden))
        return split(student).head(hidden)

    clever(objective, scored, micro_batch=6, chunk_rows=8, head=head)
    counted = sum(int(loss_mask(s.rollout, objective.config).sum()) for s in scored)
    assert max(seen) == 8
    assert sum(seen) == counted < sum(LENGTHS)


def test_metric_sums_are_plain_sums_over_counted_tokens():
    objective = objective_of("reverse_kl")
    scored, (student, _) = samples(objective.needs(4)), models()
    _, _, sums = clever(objective, scored, micro_batch=2, chunk_rows=5)
    delta, overlap, count = 0.0, 0.0, 0
    for s in scored:
        with torch.no_grad():
            log_q = log_softmax(logits_of(student, s.rollout.token_ids).double().numpy())
        for n in np.flatnonzero(~np.isin(s.rollout.token_ids, objective.config.ignore_token_ids)):
            delta += log_q[n, s.rollout.token_ids[n]] - float(s.scores.token_logprob[n])
            overlap += len(set(s.scores.topk_ids[n].tolist()) & set(s.rollout.student_topk_ids[n].tolist())) / 4
            count += 1
    assert sums["delta"] == pytest.approx(delta, rel=1e-4)
    assert sums["topk_overlap"] == pytest.approx(overlap, rel=1e-6)
    assert sums["nonfinite"] == 0
    assert 0 < sums["teacher_mass"] < count


def test_masked_rows_cannot_reach_a_gradient_whatever_stands_there():
    objective = objective_of("reverse_kl")
    scored = samples(objective.needs(4))[:3]
    mask = np.concatenate([loss_mask(s.rollout, objective.config) for s in scored])
    assert not mask.all()
    hidden = torch.randn(len(mask), 32, generator=torch.Generator().manual_seed(0))
    hidden[~torch.from_numpy(mask)] = torch.nan
    hidden.requires_grad_()
    head = torch.nn.Linear(32, W, bias=False)
    rows = loss_rows(scored, objective.config)
    loss, sums = chunked.backward(head, hidden, objective, rows, torch.from_numpy(mask / mask.sum()).float(), 6)
    assert np.isfinite(loss)
    assert sums["nonfinite"] == 0
    assert head.weight.grad.isfinite().all()
    assert torch.equal(hidden.grad.abs().sum(1) > 0, torch.from_numpy(mask))


@pytest.mark.parametrize("name", losses.names())
def test_a_micro_batch_of_masked_rows_only_contributes_nothing(name):
    objective = objective_of(name)
    scored = samples(objective.needs(4))[1:2]
    advantages = objective.prepare(scored, lambda x: x)
    assert advantages is None or np.isfinite(advantages[0]).all()
    head = torch.nn.Linear(32, W)
    rows = loss_rows(scored, objective.config, advantages=advantages)
    assert chunked.backward(head, torch.ones(1, 32, requires_grad=True), objective, rows, torch.zeros(1), 4) == (0, {})
    assert head.weight.grad is None


def test_a_non_finite_value_is_counted():
    objective = objective_of("reverse_kl")
    scored = samples(objective.needs(4))[:1]
    hidden = torch.zeros(LENGTHS[0], 32)
    hidden[2] = torch.inf
    rows = loss_rows(scored, objective.config)
    head = torch.nn.Linear(32, W)
    loss, sums = chunked.backward(head, hidden.requires_grad_(), objective, rows, torch.ones(LENGTHS[0]), 3)
    assert not np.isfinite(loss)
    assert sums["nonfinite"] == 1


def test_frozen_trunk_or_head_still_train_the_other_half():
    objective = objective_of("reverse_kl")
    scored = samples(objective.needs(4))[:1]
    rows, weights = loss_rows(scored, objective.config), torch.full((LENGTHS[0],), 0.1)
    data = torch.randn(LENGTHS[0], 32, generator=torch.Generator().manual_seed(1))
    results = []
    for frozen in ("trunk", "head", "none"):
        hidden, head = data.clone(), torch.nn.Linear(32, W, bias=False)
        torch.nn.init.ones_(head.weight)
        hidden.requires_grad_(frozen != "trunk")
        head.requires_grad_(frozen != "head")
        chunked.backward(head, hidden, objective, rows, weights, 4)
        results.append((hidden.grad, head.weight.grad))
    (no_trunk, head_only), (trunk_only, no_head), (trunk, head) = results
    assert no_trunk is None
    assert no_head is None
    assert torch.equal(head_only, head)
    assert torch.equal(trunk_only, trunk)


def test_wrong_sizes_are_refused():
    objective = objective_of("reverse_kl")
    scored = samples(objective.needs(4))[:1]
    rows, weights, hidden = loss_rows(scored, objective.config), torch.ones(9), torch.ones(9, 32, requires_grad=True)
    with pytest.raises(ValueError, match="8 hidden rows, 9 scored rows, 9 weights"):
        chunked.backward(torch.nn.Linear(32, W), hidden[:8], objective, rows, weights, 4)
    with pytest.raises(ValueError, match="chunk_rows: expected at least 1, got 0"):
        chunked.backward(torch.nn.Linear(32, W), hidden, objective, rows, weights, 0)
    with pytest.raises(ValueError, match="student has 50 logits, but the teacher scored token id 1"):
        chunked.backward(torch.nn.Linear(32, 50), hidden, objective, rows, weights, 4)


# Masks and weights ------------------------------------------------------------------------------------------------


def rollout_of(tokens):
    log_p = log_softmax(np.zeros((len(tokens), W)))
    return scored_rollout(log_p, tokens, vocabulary=V).rollout


def test_pad_equal_to_eos_does_not_mask_the_real_eos():
    """pad == eos masks the real EOS, and the student never learns to stop. Here nothing looks at a pad id."""
    eos = pad = 1
    assert loss_mask(rollout_of([7, pad, 9, eos]), losses.parse_loss({})).tolist() == [True] * 4


def test_first_and_last_token_of_a_completion_count():
    """The first completion token dropped; the EOS dropped."""
    assert loss_mask(rollout_of([5, 1]), losses.parse_loss({})).all()


def test_ignored_ids_do_not_count():
    config = losses.parse_loss({"ignore_token_ids": [7, 9]})
    assert loss_mask(rollout_of([7, 8, 9, 1]), config).tolist() == [False, True, False, True]


MASKS = [np.array(m, bool) for m in ([1, 0, 1, 1], [0, 0], [1], [1, 1, 1, 1, 0, 1])]


def test_token_weights_are_one_over_the_global_count():
    """Mean of micro-batch means != global token mean."""
    weights = normalise.token_weights(MASKS, normalise.count(MASKS), "token")
    assert np.allclose(np.concatenate(weights), np.concatenate(MASKS) / 9)
    shards = normalise.count(MASKS[:1]) + normalise.count(MASKS[1:])
    assert np.array_equal(normalise.token_weights(MASKS[1:], shards, "token")[2], weights[3])


def test_sequence_weights_are_means_of_means_over_sequences_that_count():
    weights = normalise.token_weights(MASKS, normalise.count(MASKS), "sequence")
    values = [np.arange(len(m)) + 10.0 * i for i, m in enumerate(MASKS)]
    got = sum((w * v).sum() for w, v in zip(weights, values, strict=True))
    wanted = np.mean([v[m].mean() for v, m in zip(values, MASKS, strict=True) if m.any()])
    assert got == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("how", ["token", "sequence"])
def test_a_batch_in_which_nothing_counts_has_weight_zero(how):
    masks = [np.zeros(3, bool), np.zeros(0, bool)]
    weights = normalise.token_weights(masks, normalise.count(masks), how)
    assert np.concatenate(weights).tolist() == [0.0] * 3
