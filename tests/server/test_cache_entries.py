"""A key is of all that can change the answer; an entry opens as the very bits that were sealed, or not at all."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_api.types import Candidates, ScoreOptions, Scores
from teacher_server.backends.base import ScoreJob
from teacher_server.cache_entries import KEPT, Damaged, key_of, num_bytes, opened, sealed

pytestmark = pytest.mark.slow

OTHER: dict[str, st.SearchStrategy[Any]] = {
    "top_k": st.one_of(st.integers(0, 300), st.just("all")),
    "temperature": st.floats(1e-3, 1e3),
    "value_type": st.sampled_from(["float32", "float16"]),
    "entropy": st.booleans(),
    "rank": st.booleans(),
    "hidden": st.booleans(),
    "hidden_type": st.sampled_from(["float32", "bfloat16"]),
}
options = st.fixed_dictionaries(OTHER).map(lambda values: ScoreOptions(**values))
ids = st.lists(st.integers(0, 200_000), min_size=2, max_size=12)


@st.composite
def jobs(draw: st.DrawFn) -> ScoreJob:
    tokens = np.array(draw(ids), np.int32)
    chosen = draw(st.sets(st.integers(1, len(tokens) - 1), min_size=1))
    positions = np.array(sorted(chosen), np.int32)
    rows = draw(st.none() | st.lists(ids, min_size=len(positions), max_size=len(positions)))
    candidates = None if rows is None else Candidates.from_rows(rows)
    return ScoreJob("a", tokens, 1, positions, draw(options), candidates)


def test_every_option_has_other_values_to_be_tried():
    assert OTHER.keys() == {field.name for field in fields(ScoreOptions)}


@settings(deadline=None)
@given(job=jobs(), data=st.data())
def test_any_option_changed_is_another_key(job: ScoreJob, data: st.DataObject):
    for name, values in OTHER.items():
        was = getattr(job.options, name)
        changed = data.draw(values.filter(lambda value, was=was: value != was), label=name)
        other = replace(job, options=replace(job.options, **{name: changed}))
        assert key_of(other, "fp", "t") != key_of(job, "fp", "t"), name


@settings(deadline=None)
@given(job=jobs(), data=st.data())
def test_any_token_position_or_candidate_changed_is_another_key(job: ScoreJob, data: st.DataObject):
    def changed(array: np.ndarray) -> np.ndarray:
        copy = array.copy()
        copy[data.draw(st.integers(0, len(array) - 1))] ^= 1 << data.draw(st.integers(0, 16))
        return copy

    key = key_of(job, "fp", "t")
    others = [
        replace(job, token_ids=changed(job.token_ids)),
        replace(job, token_ids=job.token_ids[:-1]),
        replace(job, positions=changed(job.positions)),
        replace(job, positions=np.append(job.positions, job.positions[-1] + 1).astype(np.int32)),
        replace(job, candidates=Candidates.from_rows([[]] * len(job.positions))),
    ]
    if job.candidates is not None:
        row_of_one = Candidates(changed(job.candidates.ids), job.candidates.row_offsets)
        moved = Candidates(job.candidates.ids, job.candidates.row_offsets + 1)
        others += [replace(job, candidates=row_of_one), replace(job, candidates=moved), replace(job, candidates=None)]
    assert key not in [key_of(other, "fp", "t") for other in others]
    assert key_of(job, "another", "t") != key, "the teacher"
    assert key_of(job, "fp", "u") != key, "the owner"


@settings(deadline=None)
@given(job=jobs())
def test_what_does_not_change_the_answer_leaves_the_key(job: ScoreJob):
    same = replace(job, id="b", prompt_tokens=2, prompt_key=b"x", token_ids=job.token_ids.astype(np.int64))
    if isinstance(job.options.top_k, int):
        same = replace(same, options=replace(job.options, top_k=np.int64(job.options.top_k)))
    assert key_of(same, "fp", "t") == key_of(job, "fp", "t")


def test_tokens_are_not_taken_for_positions():
    """The same numbers, cut elsewhere."""
    one = ScoreJob("a", np.array([1, 2, 3, 1], np.int32), 1, np.array([2, 3], np.int32), ScoreOptions())
    two = ScoreJob("a", np.array([1, 2, 3], np.int32), 1, np.array([1, 2, 3], np.int32), ScoreOptions())
    assert key_of(one, "fp", "") != key_of(two, "fp", "")


JOB = ScoreJob("asked", np.arange(5, dtype=np.int32), 1, np.arange(1, 5, dtype=np.int32), ScoreOptions())


def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Every array that an answer may have, of arbitrary bits (NaNs with payloads among them)."""

    def bits(dtype: str, *shape: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        return np.frombuffer(rng.bytes(size * int(np.prod(shape))), dtype).reshape(shape)

    return {
        "token_logprob": bits("f4", 4),
        "log_tail": bits("f4", 4),
        "topk_ids": bits("i4", 4, 3),
        "topk_logprob": bits("f2", 4, 3),
        "candidate_logprob": bits("f4", 7),
        "entropy": bits("f4", 4),
        "rank": bits("u4", 4),
        "hidden": bits("f4", 4, 5),
    }


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), left_out=st.sets(st.sampled_from(KEPT[2:])))
def test_an_entry_opens_bit_for_bit_under_the_name_that_asks(seed: int, left_out: set[str]):
    values = {name: value for name, value in arrays(np.random.default_rng(seed)).items() if name not in left_out}
    key = key_of(JOB, "fp", "")
    entry = sealed(Scores("first", JOB.positions, computed_tokens=5, **values), key)
    got = opened(entry, key, JOB, "fp")
    assert (got.id, got.computed_tokens, got.cached_tokens, got.fingerprint) == ("asked", 0, 5, "fp")
    assert got.positions.tolist() == [1, 2, 3, 4]
    for name in KEPT:
        array = getattr(got, name)
        assert (array is None) == (name not in values), name
        if array is not None:
            assert (array.dtype, array.shape) == (values[name].dtype, values[name].shape)
            assert array.tobytes() == values[name].tobytes()
    assert len(entry) <= num_bytes(got)


def test_every_array_of_an_answer_is_kept():
    assert set(KEPT) == arrays(np.random.default_rng(0)).keys()


def test_an_array_that_is_part_of_a_larger_one_is_kept_alone():
    """A view would hold the whole batch in memory."""
    batch = np.arange(400_000, dtype=np.float32).reshape(4, -1)
    entry = sealed(Scores("a", JOB.positions, batch[:, 0], batch[:, 1]), key_of(JOB, "fp", ""))
    assert len(entry) < 1000


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_any_flipped_bit_and_any_cut_is_found(data: st.DataObject):
    key = key_of(JOB, "fp", "")
    entry = bytearray(sealed(Scores("a", JOB.positions, **arrays(np.random.default_rng(1))), key))
    if data.draw(st.booleans()):
        entry[data.draw(st.integers(0, len(entry) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del entry[data.draw(st.integers(0, len(entry) - 1)) :]
    with pytest.raises(Damaged):
        opened(bytes(entry), key, JOB, "fp")


@pytest.mark.parametrize("entry", [None, b"", 5, "text", b"x" * 400])
def test_what_is_no_entry_is_found(entry: object):
    with pytest.raises(Damaged):
        opened(entry, key_of(JOB, "fp", ""), JOB, "fp")


def test_an_entry_under_another_key_is_found():
    """Two whole entries, swapped."""
    other = key_of(replace(JOB, token_ids=JOB.token_ids + 1), "fp", "")
    entry = sealed(Scores("a", JOB.positions, **arrays(np.random.default_rng(1))), other)
    with pytest.raises(Damaged, match="checksum"):
        opened(entry, key_of(JOB, "fp", ""), JOB, "fp")
