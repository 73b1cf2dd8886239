"""Packed text against its definition: all documents, each with the end token, in a row, cut into equal pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinymodels import tiny_tokenizer

from student_trainer.data import DataConfig, DataError, Prompts, open_prompts

TEXTS = ["the quick brown fox", "", "a", "over the lazy dog 0123456789 " * 6, "jumps", "= ?", "the dog, the fox"]


def write(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


def packed(path: Path, length: int = 8, **settings: Any) -> Prompts:
    config = DataConfig(source=str(path), format="packed_text", seq_length=length, on_policy_fraction=0.0, **settings)
    return open_prompts(config, tiny_tokenizer(300), eos_token_ids=(1,))


def row(length: int, texts: list[str] = TEXTS) -> Any:
    """The definition: [pieces, length + 1]."""
    tok = tiny_tokenizer(300)
    ids = [i for text in texts for i in (*tok(text)["input_ids"], tok.eos_token_id)]
    return np.array(ids[: len(ids) // (length + 1) * (length + 1)]).reshape(-1, length + 1)


def whole(prompt: Any) -> list[int]:
    (given,) = prompt.fixed
    assert given.finish == "length"
    return [*prompt.token_ids.tolist(), *given.token_ids.tolist()]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("length", [1, 5, 8, 13, 40])
def test_pieces_are_the_documents_in_a_row_with_ends_between(tmp_path: Path, length: int, streaming: bool) -> None:
    expected = row(length)
    prompts = packed(write(tmp_path / "t.jsonl"), length, streaming=streaming, shuffle=False)
    taken = prompts.take(0, 2 * len(expected), 0)
    assert [whole(p) for p in taken] == [*expected.tolist(), *expected.tolist()]
    assert {len(p.token_ids) for p in taken} == {1}
    assert [p.index for p in taken] == [*range(len(expected))] * 2
    assert (prompts.longest.prompt, prompts.longest.sequence) == (1, length + 1)


@pytest.mark.parametrize("place", [0, 3, 4, 9, 15, 16, 29])
def test_a_restored_stream_of_pieces_goes_on_in_the_middle_of_a_document(tmp_path: Path, place: int) -> None:
    path = write(tmp_path / "t.jsonl")
    undisturbed = packed(path, 5, streaming=True, shuffle_buffer=2)
    expected = [(p.index, whole(p)) for p in undisturbed.take(place, 20, 7)]
    before = packed(path, 5, streaming=True, shuffle_buffer=2)
    before.take(0, max(place, 1), 7)
    state = json.loads(json.dumps(before.state(place, 7)))
    resumed = packed(path, 5, streaming=True, shuffle_buffer=2)
    resumed.restore(state)
    assert [(p.index, whole(p)) for p in resumed.take(place, 20, 7)] == expected


def test_pieces_are_shuffled_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl")
    expected = row(5).tolist()
    for settings in ({}, {"streaming": True}):
        taken = [whole(p) for p in packed(path, 5, **settings).take(0, len(expected), 0)]
        assert taken != expected
        assert sorted(taken) == sorted(expected)


def test_a_key_of_ones_own_and_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    taken = packed(path, 3, text_key="body", limit=4, shuffle=False)
    assert [whole(p) for p in taken.take(0, 5, 0)] == row(3, TEXTS[:4]).tolist()[:5]
    with pytest.raises(DataError, match=r"t.jsonl:1: no field 'text'; it has body"):
        packed(path, 3)


def test_text_shorter_than_a_piece_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", ["a"])
    for streaming in (False, True):
        with pytest.raises(DataError, match="shorter than one piece"):
            packed(path, 100, streaming=streaming)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_policy_fraction": 1.0}, "on_policy_fraction: got 1 with format packed_text, expected 0"),
        ({"question_key": "q"}, "question_key: got 'q' with format packed_text, expected none"),
        ({"max_prompt_tokens": 3}, "max_prompt_tokens: got 3 with format packed_text"),
        ({"format": "prompts", "seq_length": 8}, "seq_length: got 8 with format prompts"),
        ({"format": "prompts", "text_key": "t"}, "text_key: got 't' with format prompts"),
    ],
)
def test_what_packed_text_leaves_idle_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**{"source": "a.jsonl", "format": "packed_text", "on_policy_fraction": 0.0, **settings})
