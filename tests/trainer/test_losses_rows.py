"""Supports and tails of rows.py against sets and float64 sums over the whole distribution."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losscases import likeliest, log_mass, log_softmax, scored_rollout

from student_trainer.losses import parse_loss
from student_trainer.losses.rows import loss_rows, teacher_rows
from teacher_api.types import LOGPROB_FLOOR

W, V = 14, 12  # two padded columns in the teacher's logits
CPU = torch.device("cpu")


def config(support, **keys):
    if support == "token":
        return parse_loss({"objective": "policy_gradient"})
    return parse_loss({"objective": "reverse_kl", "support": support, **keys})


def sample(seed=0, n=5, top_k=0, student_k=0, scale=2.0, **keys):
    """A scored rollout with its log p [n, W] and the student's ids."""
    generator = np.random.default_rng(seed)
    log_p = log_softmax(generator.normal(scale=scale, size=(n, W)))
    tokens = generator.integers(0, V, n)
    ids = likeliest(generator.normal(size=(n, W)), student_k, V) if student_k else None
    return scored_rollout(log_p, tokens, vocabulary=V, top_k=top_k, student_ids=ids, uid=seed, **keys), log_p, ids


def expected_support(scored, log_p, ids, support, top_k, n):
    chosen = {int(scored.rollout.token_ids[n])}
    if support in ("teacher", "union"):
        chosen |= set(likeliest(log_p, top_k, V)[n].tolist())
    if support in ("student", "union"):
        chosen |= set(ids[n].tolist())
    return chosen


def assert_rows(rows, offset, scored, log_p, ids, support, top_k, tolerance=2e-6):
    for n in range(len(log_p)):
        mask = rows.support_mask[offset + n]
        got = rows.support_ids[offset + n][mask].tolist()
        chosen = expected_support(scored, log_p, ids, support, top_k, n)
        assert len(got) == len(set(got))
        assert set(got) == chosen
        assert np.allclose(rows.support_logprob[offset + n][mask], log_p[n, got], rtol=0, atol=tolerance)
        outside = np.delete(log_p[n], sorted(chosen))
        assert rows.log_tail[offset + n].item() == pytest.approx(log_mass(outside), abs=1e-5)
        assert rows.token_logprob[offset + n].item() == pytest.approx(log_p[n, scored.rollout.token_ids[n]], abs=2e-6)
        assert (rows.support_ids[offset + n][~mask] == 0).all()
        assert (rows.support_logprob[offset + n][~mask] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    support=st.sampled_from(["token", "teacher", "student", "union"]),
    top_k=st.integers(1, V),
    student_k=st.integers(1, V),
    scale=st.sampled_from([0.1, 2.0, 9.0]),
    seed=st.integers(0, 2**20),
)
def test_support_is_the_set_asked_for_and_the_tail_all_the_rest(support, top_k, student_k, scale, seed):
    """Both sides' ids are there; a smaller support's tail takes the others in, each once."""
    cases = [sample(seed + i, n=3 + i, top_k=top_k, student_k=student_k, scale=scale) for i in range(2)]
    rows = teacher_rows([scored for scored, _, _ in cases], config(support))
    offset = 0
    for scored, log_p, ids in cases:
        assert_rows(rows, offset, scored, log_p, ids, support, top_k)
        offset += len(log_p)


@pytest.mark.parametrize(("support", "top_k", "student_k"), [("teacher", 4, 0), ("student", 0, 4), ("token", 0, 0)])
def test_only_what_the_objective_needs_is_enough(support, top_k, student_k):
    scored, log_p, ids = sample(1, top_k=top_k, student_k=student_k)
    assert_rows(teacher_rows([scored], config(support)), 0, scored, log_p, ids, support, top_k)


def test_asking_for_top_k_gives_k_or_one_more_slot_depending_on_the_actual_token():
    log_p = log_softmax(np.tile(np.arange(W)[::-1].astype(float), (2, 1)))  # top-3 is {0, 1, 2}
    rows = teacher_rows([scored_rollout(log_p, [1, 9], vocabulary=V, top_k=3)], config("teacher"))
    assert rows.support_mask.sum(1).tolist() == [3, 4]


@pytest.mark.parametrize("support", ["teacher", "student", "union"])
def test_whole_vocabulary_scores_make_dense_rows(support):
    scored, log_p, _ = sample(2, top_k="all")
    rows = teacher_rows([scored, scored], config(support))
    assert rows.support_ids is None
    assert rows.support_mask is None
    assert np.allclose(rows.support_logprob, np.tile(log_p[:, :V], (2, 1)), atol=2e-6)
    padded_columns = [log_mass(row[V:]) for row in log_p]
    assert np.allclose(rows.log_tail, padded_columns * 2, atol=1e-5)


def test_sampled_token_rows_of_whole_vocabulary_scores_have_their_exact_tail():
    scored, log_p, _ = sample(3, top_k="all")
    assert_rows(teacher_rows([scored], config("token")), 0, scored, log_p, None, "token", 0)


def test_half_precision_values_never_replace_float32_ones():
    """The actual token's and the candidates' values are float32 whatever value_type says."""
    scored, log_p, ids = sample(4, n=8, top_k=V, student_k=4, value_type=np.float16)
    rows = teacher_rows([scored], config("union"))
    for n in range(8):
        exact = {int(scored.rollout.token_ids[n]), *ids[n].tolist()}
        for slot, token in enumerate(rows.support_ids[n].tolist()):
            error = abs(rows.support_logprob[n, slot].item() - log_p[n, token])
            assert error < (2e-6 if token in exact else 1e-2)


def test_tiny_tails_survive():
    """From 1 - sum a tail of 1e-9 would come out as noise, or negative."""
    scored, log_p, ids = sample(5, top_k=6, student_k=2, scale=12.0)
    smallest = min(log_mass(np.delete(row, top)) for row, top in zip(log_p, likeliest(log_p, 6, V), strict=True))
    assert smallest < np.log(1e-6)
    assert_rows(teacher_rows([scored], config("teacher")), 0, scored, log_p, ids, "teacher", 6)


def test_nothing_outside_leaves_the_floor():
    log_p = log_softmax(np.random.default_rng(0).normal(size=(2, V)))
    rows = teacher_rows([scored_rollout(log_p, [0, 1], vocabulary=V, top_k=V)], config("teacher"))
    assert rows.log_tail.tolist() == [LOGPROB_FLOOR] * 2


def test_top_k_overlap_is_the_share_of_the_teachers_ids_the_student_holds():
    scored, log_p, ids = sample(6, n=9, top_k=5, student_k=5)
    top = likeliest(log_p, 5, V)
    wanted = [len(set(a) & set(b)) / 5 for a, b in zip(top.tolist(), ids.tolist(), strict=True)]
    assert len(set(wanted)) > 1
    assert np.allclose(teacher_rows([scored], config("union")).topk_overlap, wanted)
    assert teacher_rows([sample(6, top_k=5)[0]], config("teacher")).topk_overlap is None


def test_rows_of_a_batch_stand_one_after_the_other_and_are_taken_by_index():
    cases = [sample(i, n=2 + i, top_k=3)[0] for i in range(3)]
    advantages = [np.full(s.rollout.num_tokens, float(i), np.float32) for i, s in enumerate(cases)]
    rows = loss_rows(cases, config("teacher"), advantages=advantages)
    tokens = np.concatenate([s.rollout.token_ids for s in cases])
    assert rows.target.tolist() == tokens.tolist()
    assert rows.advantage.tolist() == [0.0] * 2 + [1.0] * 3 + [2.0] * 4
    index = torch.tensor([7, 0, 3])
    inputs = rows.inputs(index, torch.zeros(3, V))
    assert inputs.target.tolist() == tokens[index].tolist()
    assert torch.equal(inputs.teacher.support_logprob, rows.teacher.support_logprob[index])
    assert torch.equal(inputs.old_logprob, rows.old_logprob[index])


def broken(name, value, **keys):
    scored, _, _ = sample(7, **keys)
    return dataclasses.replace(scored, scores=dataclasses.replace(scored.scores, **{name: value(scored.scores)}))


def poison(name, row, value):
    def change(scores):
        array = getattr(scores, name).copy()
        array[row] = value
        return array

    return change


@pytest.mark.parametrize(
    ("keys", "name", "change", "message"),
    [
        (
            {"top_k": 3},
            "token_logprob",
            poison("token_logprob", 2, np.nan),
            "token_logprob at position 5 is not finite",
        ),
        ({"top_k": 3}, "log_tail", poison("log_tail", 0, -np.inf), "log_tail at position 3 is not finite"),
        ({"top_k": 3}, "topk_logprob", poison("topk_logprob", (1, 2), np.inf), "topk_logprob at position 4"),
        (
            {"top_k": 3, "student_k": 4},
            "candidate_logprob",
            poison("candidate_logprob", 9, np.nan),
            "candidate_logprob at position 5 is not finite",
        ),
        ({"top_k": 3}, "log_tail", lambda s: None, "log_tail is missing"),
        ({"top_k": 3}, "token_logprob", lambda s: s.token_logprob[:-1], "token_logprob has 4 rows; expected 5"),
        ({"top_k": 3}, "topk_ids", lambda s: s.topk_ids[:, :2], "top-k ids and logprobs differ in shape"),
        ({"top_k": 3, "student_k": 4}, "candidate_logprob", lambda s: s.candidate_logprob[:-1], "19 candidate scores"),
    ],
)
def test_missing_or_non_finite_scores_never_become_training_tokens(keys, name, change, message):
    with pytest.raises(ValueError, match=f"sample 7: .*{message}"):
        teacher_rows([broken(name, change, **keys)], config("union" if "student_k" in keys else "teacher"))


def test_a_support_without_its_scores_is_refused():
    with pytest.raises(ValueError, match="needs the student's ids scored"):
        teacher_rows([sample(8, top_k=3)[0]], config("union"))
    with pytest.raises(ValueError, match="needs the teacher's top-k"):
        teacher_rows([sample(8, student_k=3)[0]], config("union"))
    with pytest.raises(ValueError, match="sample 9 has no top-k scores"):
        teacher_rows([sample(8, top_k=3)[0], sample(9)[0]], config("teacher"))
    with pytest.raises(ValueError, match="no samples"):
        teacher_rows([], config("teacher"))


def test_advantages_must_match_their_completions():
    scored, _, _ = sample(8, top_k=3)
    with pytest.raises(ValueError, match="sample 8: arrays of different lengths; expected 5"):
        loss_rows([scored], config("teacher"), advantages=[np.zeros(4, np.float32)])
