"""Micro-batches: nobody is lost, the budget holds, and few are needed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_trainer.microbatch import PADDED_WINDOW, InOrder, divide, divide_in_order
from student_trainer.packing import PREFIX_WEIGHT, Packing, Row
from student_trainer.types import Prompt, Rollout, ScoredRollout
from teacher_api.types import Scores

PADDED, PACKED = Packing(), Packing(packed=True)
SHARED = Packing(packed=True, shared=True, min_saved_tokens=8)
NOTHING = np.zeros(0, dtype=np.float32)


def samples(shapes: list[tuple[int, int, int]]) -> list[Rollout]:
    """One per (prompt, its tokens, completion tokens)."""
    prompts = {index: Prompt(index, np.full(1 + num, index, dtype=np.int32)) for index, num, _ in shapes}
    return [
        Rollout(uid, prompts[index], np.ones(new, dtype=np.int32), "length", NOTHING, NOTHING)
        for uid, (index, _, new) in enumerate(shapes)
    ]


def cost(rollouts: list[Rollout], packing: Packing) -> float:
    """By the definitions in the documentation of train.micro_batch_tokens."""
    lengths = [len(r.prompt.token_ids) + r.num_tokens for r in rollouts]
    if not packing.packed:
        return len(lengths) * max(lengths)
    total = float(sum(lengths))
    for index in {r.prompt.index for r in rollouts} if packing.shared else ():
        same = [r for r in rollouts if r.prompt.index == index]
        prompt = len(same[0].prompt.token_ids)
        if (len(same) - 1) * prompt >= packing.min_saved_tokens:
            total -= (len(same) - 1) * prompt - PREFIX_WEIGHT * prompt * len(same)
    return total


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.integers(1, 30)), max_size=40),
    st.integers(1, 150),
    st.integers(0, 5),
    st.sampled_from([PADDED, PACKED, SHARED]),
)
def test_nobody_is_lost_and_the_budget_holds(
    shapes: list[tuple[int, int, int]], max_tokens: int, max_sequences: int, packing: Packing
) -> None:
    rollouts = samples(shapes)
    batches = divide(rollouts, max_tokens, max_sequences, packing)
    assert sorted(i for batch in batches for i in batch) == list(range(len(shapes)))
    assert batches == sorted((sorted(b) for b in batches), key=lambda b: b[0])
    assert batches == divide(rollouts, max_tokens, max_sequences, packing)
    for batch in batches:
        assert len(batch) == 1 or cost([rollouts[i] for i in batch], packing) <= max_tokens
        assert not max_sequences or len(batch) <= max_sequences


def scored(rollouts: list[Rollout], teachers: str = "") -> list[ScoredRollout]:
    """Each by the teacher that a letter of `teachers` names."""
    found = []
    for index, rollout in enumerate(rollouts):
        start = len(rollout.prompt.token_ids)
        positions = np.arange(start, start + rollout.num_tokens, dtype=np.int32)
        values = np.zeros(rollout.num_tokens, dtype=np.float32)
        found.append(
            ScoredRollout(rollout, Scores(str(index), positions, values, values), (teachers or "x" * 99)[index % 99])
        )
    return found


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30), st.integers(1, 30)), max_size=30),
    st.integers(1, 150),
    st.integers(0, 5),
    st.sampled_from([PADDED, PACKED, SHARED]),
    st.text("ab", min_size=99, max_size=99),
    st.integers(0, 30),
)
def test_division_in_order_knows_nothing_of_what_is_to_come(
    shapes: list[tuple[int, int, int]], max_tokens: int, max_sequences: int, packing: Packing, teachers: str, seen: int
) -> None:
    """Nobody is lost, the budget holds, a micro-batch has one teacher, and what is given out after some samples is the
    same whatever follows them."""
    samples_ = scored(samples(shapes), teachers)
    batches = divide_in_order(samples_, max_tokens, max_sequences, packing)
    assert sorted(i for batch in batches for i in batch) == list(range(len(shapes)))
    for batch in batches:
        assert len({samples_[i].teacher for i in batch}) == 1
        assert len(batch) == 1 or cost([samples_[i].rollout for i in batch], packing) <= max_tokens
        assert not max_sequences or len(batch) <= max_sequences
    division = InOrder(max_tokens, max_sequences, packing)
    early = [batch for i, sample in enumerate(samples_[:seen]) for batch in division.add(i, sample)]
    assert batches[: len(early)] == early


def test_a_packed_micro_batch_is_complete_when_the_next_sample_finds_no_room() -> None:
    division = InOrder(100, 0, PACKED)
    given_out = [division.add(i, s) for i, s in enumerate(scored(samples([(0, 9, 40), (0, 9, 40), (0, 9, 40)])))]
    assert given_out == [[], [], [[0, 1]]]
    assert division.rest() == [[2]]
    limited = InOrder(100, 2, PACKED)
    assert [limited.add(i, s) for i, s in enumerate(scored(samples([(0, 1, 4)] * 3)))] == [[], [[0, 1]], []]


def test_padded_micro_batches_are_sorted_by_length_within_a_window() -> None:
    """Long and short samples in turn: at most one micro-batch of a window has both."""
    lengths = (100, 2) * 20
    batches = divide_in_order(scored(samples([(0, 0, num - 1) for num in lengths])), 200, 0, PADDED)
    waste = sum(len(b) * max(lengths[i] for i in b) - sum(lengths[i] for i in b) for b in batches)
    windows = -(-sum(lengths) // (200 * PADDED_WINDOW - max(lengths)))
    assert waste <= 98 * windows
    assert max(abs(i - j) for b in batches for i in b for j in b) < 16  # of one window


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_a_packed_step_takes_few_micro_batches(lengths: list[int]) -> None:
    """Never more than two of them half empty, so never more than twice the least possible number."""
    rollouts = samples([(0, 0, num) for num in lengths])
    batches = divide(rollouts, 101, 0, PACKED)
    fill = sorted(sum(1 + lengths[i] for i in batch) for batch in batches)
    assert sum(1 for tokens in fill if tokens <= 50) <= 1
    assert len(batches) <= len(divide(rollouts, 101, 0, PADDED))


def test_like_lengths_are_padded_together() -> None:
    rollouts = samples([(0, 0, num) for num in (99, 1, 99, 1, 99, 1)])
    assert divide(rollouts, 300, 0, PADDED) == [[0, 2, 4], [1, 3, 5]]
    assert divide(rollouts, 300, 2, PADDED) == [[0, 2], [1, 4], [3, 5]]
    assert divide(rollouts, 306, 0, PACKED) == [[0, 1, 2, 3, 4, 5]]


def test_completions_of_one_prompt_stay_together_where_they_share_it() -> None:
    rollouts = samples([(0, 39, 10), (1, 39, 10), (0, 39, 10), (1, 39, 10)])
    assert divide(rollouts, 100, 0, PACKED) == [[0, 1], [2, 3]]
    assert divide(rollouts, 100, 0, SHARED) == [[0, 2], [1, 3]]
    row = Row.of([rollouts[0], rollouts[2]], SHARED)
    assert len(row.token_ids) == 40 + 9 + 9
    assert row.positions.tolist() == [*range(40), *range(40, 49), *range(40, 49)]


@pytest.mark.parametrize("packing", [PACKED, SHARED])
def test_a_row_holds_each_sequence_but_for_its_last_token(packing: Packing) -> None:
    rollouts = samples([(0, 2, 1), (1, 0, 5), (0, 2, 3)])
    row = Row.of(rollouts, packing)
    assert row.token_ids.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1]
    assert row.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    assert row.scored.tolist() == [2, 3, 4, 5, 6, 7, 10, 11, 12]
