"""Streams: what a window, an epoch and a resumed run give, held against the source read whole."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinymodels import tiny_tokenizer

from student_trainer.data import DataConfig, DataError, Prompts, load_prompts, open_prompts

WORDS = ("the", "quick brown", "fox jumps over", "lazy dog", "0", "12", "345 + 6789")


CALLS_PER_PROMPT = 2  # of the tokenizer: with and without special tokens


class Counting:
    """A tokenizer that counts its calls."""

    def __init__(self) -> None:
        self.inner, self.calls = tiny_tokenizer(300), 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def write(path: Path, count: int) -> Path:
    lines = [json.dumps({"question": f"{WORDS[i % len(WORDS)]} {i}"}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return path


def stream(path: Path, tok: Any = None, **settings: Any) -> Prompts:
    config = DataConfig.model_validate(
        {"source": str(path), "streaming": True, "max_prompt_tokens": 64, "template": "plain", **settings}
    )
    return open_prompts(config, tok or tiny_tokenizer(300), eos_token_ids=(1,))


def indices(prompts: Prompts, start: int, count: int, seed: int = 0) -> list[int]:
    return [p.index for p in prompts.take(start, count, seed)]


@pytest.mark.parametrize(("count", "buffer"), [(10, 4), (12, 4), (5, 100), (1, 1), (9, 1)])
def test_every_epoch_gives_every_prompt_once_in_windows_of_the_buffer(tmp_path: Path, count: int, buffer: int) -> None:
    prompts = stream(write(tmp_path / "p.jsonl", count), shuffle_buffer=buffer)
    seen = indices(prompts, 0, 3 * count)
    for epoch in range(3):
        one = seen[epoch * count : (epoch + 1) * count]
        assert Counter(one) == Counter(range(count))
        for start in range(0, count, buffer):
            assert sorted(one[start : start + buffer]) == list(range(start, min(start + buffer, count)))


def test_windows_epochs_and_seeds_have_orders_of_their_own(tmp_path: Path) -> None:
    prompts = stream(write(tmp_path / "p.jsonl", 60), shuffle_buffer=30)
    first, second, again = (np.array(indices(prompts, 30 * i, 30)) - 30 * (i % 2) for i in range(3))
    other = np.array(indices(prompts, 0, 30, seed=1))
    assert len({tuple(first), tuple(second), tuple(again), tuple(other), tuple(range(30))}) == 5


def test_without_shuffling_a_stream_is_the_source_over_and_over(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", 7)
    prompts = stream(path, shuffle=False)
    whole = load_prompts(DataConfig(source=str(path), template="plain"), tiny_tokenizer(300)).all()
    taken = prompts.take(0, 14, 3)
    assert [p.text for p in taken] == [p.text for p in whole] * 2
    assert all(np.array_equal(a.token_ids, b.token_ids) for a, b in zip(taken, [*whole, *whole], strict=True))


def test_what_a_place_holds_does_not_depend_on_what_was_asked_before(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", 11)
    whole = indices(stream(path, shuffle_buffer=4), 0, 50)
    prompts = stream(path, shuffle_buffer=4)
    for start, count in ((40, 5), (3, 9), (0, 1), (21, 13), (20, 2), (44, 6)):
        assert indices(prompts, start, count) == whole[start : start + count]


@pytest.mark.parametrize("overlong", [False, True])
@pytest.mark.parametrize("place", [0, 1, 7, 8, 16, 19, 20, 21, 57])
def test_a_restored_stream_gives_what_follows_and_renders_no_more_than_a_window(
    tmp_path: Path, place: int, overlong: bool
) -> None:
    path = write(tmp_path / "p.jsonl", 20)
    settings: dict[str, Any] = {"shuffle_buffer": 4}
    if overlong:
        settings |= {"max_prompt_tokens": 6, "overlong": "drop"}
    undisturbed = stream(path, **settings)
    expected = indices(undisturbed, 0, place + 30)[place:]
    before = stream(path, **settings)
    indices(before, 0, place + 1)
    state = json.loads(json.dumps(before.state(place, 0)))

    tok = Counting()
    resumed = stream(path, tok, **settings)
    resumed.restore(state)
    calls = tok.calls
    first = indices(resumed, place, 1)
    assert tok.calls == calls, "the window was read when it was restored"
    rendered = calls / CALLS_PER_PROMPT
    assert rendered <= 2 * (4 + 10 * overlong)  # the first window and the restored one, with what was left out there
    assert first + indices(resumed, place + 1, 29) == expected
    undisturbed.take(0, place + 30, 0)
    assert resumed.dropped() == undisturbed.dropped()


def test_a_stream_that_changed_is_noticed_and_may_be_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", 20)
    prompts = stream(path, shuffle_buffer=4)
    prompts.take(0, 10, 0)
    state = prompts.state(10, 0)
    lines = path.read_text().splitlines()
    lines[9] = json.dumps({"question": "something else"})
    path.write_text("\n".join(lines))
    changed = stream(path, shuffle_buffer=4)
    assert changed.digest() == prompts.digest(), "the change is not in the first window"
    with pytest.raises(DataError, match="has changed: record 8 and what follows it are not what they were"):
        changed.restore(state)
    changed.restore(state, verify=False)
    assert len(changed.take(10, 30, 0)) == 30


def test_what_a_stream_leaves_out_is_counted_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    long = "the quick brown fox jumps over the lazy dog"
    path.write_text("\n".join(json.dumps({"question": long if i % 4 == 3 else "a"}) for i in range(16)))
    prompts = stream(path, shuffle_buffer=3, max_prompt_tokens=3, overlong="drop")
    seen = [(indices(prompts, place, 1), prompts.dropped().prompts)[1] for place in range(25)]
    # Windows of three, a long one after each, which is met when the next window is looked for.
    assert seen[::3] == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    with pytest.raises(DataError, match=r"p.jsonl:4: the prompt has \d+ tokens, data.max_prompt_tokens is 3"):
        stream(path, max_prompt_tokens=3).take(0, 10, 0)


def test_a_stream_of_nothing_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", 3)
    with pytest.raises(DataError, match=r"all 3 prompts exceed data\.max_prompt_tokens 1"):
        stream(path, max_prompt_tokens=1, overlong="drop")
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no prompts in it"):
        stream(tmp_path / "none.jsonl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"streaming": True}, "max_prompt_tokens: not set with streaming"),
        ({"streaming": True, "max_prompt_tokens": 9, "on_policy_fraction": 0.5}, "max_answer_tokens: not set with"),
        ({"shuffle_buffer": 5}, "shuffle_buffer: got 5, expected none"),
        ({"streaming": True, "max_prompt_tokens": 9, "shuffle": False, "shuffle_buffer": 5}, "shuffle_buffer: got 5"),
    ],
)
def test_what_a_stream_needs_and_what_it_leaves_idle_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(source="a.jsonl", **settings)
