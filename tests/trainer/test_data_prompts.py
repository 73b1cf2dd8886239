"""Rendering (templates, special tokens, lengths) and the order in which steps see the prompts."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinymodels import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from student_trainer.data import DataConfig, DataError, PromptSource, load_prompts
from student_trainer.types import Prompt

CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BOS = "<|start|>"


def tokenizer(*, chat: bool = False, bos: bool = False, eos: bool = False) -> Any:
    """One that adds the special tokens asked for, as Llama's (bos) and T5's (eos) do."""
    made = copy.deepcopy(tiny_tokenizer(300))
    made.add_special_tokens({"bos_token": BOS})
    if bos or eos:
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS + ' ' if bos else ''}$A{' ' + made.eos_token if eos else ''}",
            special_tokens=[(t, made.convert_tokens_to_ids(t)) for t in (BOS, made.eos_token)],
        )
    made.chat_template = CHAT if chat else None
    return made


def load(tmp_path: Path, records: list[dict[str, Any]], tok: Any, *, limit: int | None = None, **settings: Any) -> Any:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in records))
    return load_prompts(DataConfig(source=str(path), **settings), tok, limit=limit)


def decoded(tok: Any, prompt: Prompt) -> str:
    return str(tok.decode(prompt.token_ids.tolist(), skip_special_tokens=False))


def test_plain_prompts_are_the_question_in_its_template(tmp_path: Path) -> None:
    tok = tokenizer()
    source = load(
        tmp_path,
        [{"q": "1 + 1 {x}"}],
        tok,
        question_key="q",
        prompt_template="say {curly}: {question} =",
        system_prompt="the fox",
    )
    prompt = source.all()[0]
    assert prompt.text == "the fox\n\nsay {curly}: 1 + 1 {x} ="
    assert prompt.token_ids.tolist() == tok(prompt.text)["input_ids"]
    assert prompt.token_ids.dtype == np.int32


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True)])
def test_the_tokenizers_bos_is_kept_and_its_eos_is_not(tmp_path: Path, bos: bool, eos: bool) -> None:
    tok = tokenizer(bos=bos, eos=eos)
    prompt = load(tmp_path, [{"question": "the dog"}], tok).all()[0]
    assert decoded(tok, prompt) == (BOS if bos else "") + "the dog"


def test_special_tokens_in_the_text_itself_stay(tmp_path: Path) -> None:
    tok = tokenizer(bos=True, eos=True)
    text = f"{BOS}the dog{tok.eos_token}"  # a dialogue rendered elsewhere, begin-of-sequence included
    prompt = load(tmp_path, [{"p": text}], tok, prompt_key="p").all()[0]
    assert decoded(tok, prompt) == text


@pytest.mark.parametrize("bos", [False, True])
def test_chat_prompts_have_one_bos_and_open_the_assistants_turn(tmp_path: Path, bos: bool) -> None:
    tok = tokenizer(chat=True, bos=bos, eos=True)
    records = [{"question": "the fox", "s": "be quick"}, {"question": "a dog", "s": None}]
    source = load(tmp_path, records, tok, system_key="s", system_prompt="default")
    end = tok.eos_token
    assert [decoded(tok, p) for p in source.all()] == [
        f"{BOS}<system>be quick{end}<user>the fox{end}<assistant>",
        f"{BOS}<system>default{end}<user>a dog{end}<assistant>",
    ]
    closed = load(tmp_path, records, tok, add_generation_prompt=False)
    assert decoded(tok, closed.all()[1]) == f"{BOS}<user>a dog{end}"
    plain = load(tmp_path, records, tok, template="plain")
    assert decoded(tok, plain.all()[1]) == (BOS if bos else "") + "a dog"


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    tok = tokenizer(chat=True)
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    prompt = load(tmp_path, [{"m": messages}], tok, prompt_key="m").all()[0]
    end = tok.eos_token
    assert decoded(tok, prompt) == f"{BOS}<user>a{end}<assistant>b{end}<user>c{end}<assistant>"


@pytest.mark.parametrize(
    ("chat", "record", "settings", "message"),
    [
        (False, {"question": "a"}, {"template": "chat"}, "the tokenizer has no chat template"),
        (
            False,
            {"m": [{"role": "user", "content": "a"}]},
            {"prompt_key": "m"},
            "needs a tokenizer with a chat template",
        ),
        (True, {"m": [{"role": "user"}]}, {"prompt_key": "m"}, "field 'm': message 0 needs text in `role` and"),
        (True, {"m": []}, {"prompt_key": "m"}, "field 'm': no messages"),
        (False, {"question": "a"}, {"question_key": "q"}, "no field 'q'; it has question"),
        (False, {"question": "a"}, {"answer_key": "a"}, "no field 'a'; it has question"),
        (False, {"question": "a"}, {"system_key": "s"}, "no field 's'; it has question"),
        (False, {"question": "a", "s": 1}, {"system_key": "s"}, "field 's' is int; expected text"),
    ],
)
def test_what_cannot_be_rendered_is_one_line(
    tmp_path: Path, chat: bool, record: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        load(tmp_path, [record], tokenizer(chat=chat), **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_template": "no place"}, "has no {question}"),
        ({"prompt_key": "p", "system_prompt": "s", "question_key": "q"}, "remove question_key, system_prompt"),
        ({"questionkey": "q"}, "questionkey"),
        ({"limit": 0}, "limit"),
        ({"overlong": "cut"}, "overlong"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(source="a.txt", **settings)


def test_numbers_are_answers(tmp_path: Path) -> None:
    records = [{"question": "a", "n": 3}, {"question": "b", "n": 2.5}, {"question": "c", "n": "x"}]
    assert [p.answer for p in load(tmp_path, records, tokenizer(), answer_key="n").all()] == ["3", "2.5", "x"]
    assert load(tmp_path, records, tokenizer()).all()[0].answer is None


def test_prompts_need_no_answers(tmp_path: Path) -> None:
    """Of a field that only happens to be called `answer`, texts and numbers are taken and nothing is demanded."""
    answers: list[dict[str, Any]] = [{"answer": "x"}, {"answer": None}, {}, {"answer": ["x", "y"]}, {"answer": 2}]
    records = [{"question": "a", **answer} for answer in answers]
    assert [p.answer for p in load(tmp_path, records, tokenizer()).all()] == ["x", None, None, None, "2"]
    assert [p.answer for p in load(tmp_path, records[:2], tokenizer(), answer_key="answer").all()] == ["x", None]
    for unfit, message in ((records[:3], "no field 'answer'"), ([records[3]], "is list; expected text")):
        with pytest.raises(DataError, match=message):
            load(tmp_path, unfit, tokenizer(), answer_key="answer")


def test_overlong_prompts_stop_or_are_dropped_and_counted_but_never_cut(tmp_path: Path) -> None:
    tok = tokenizer()
    records = [{"question": q} for q in ("a", "the fox jumps over the lazy dog", "b")]
    with pytest.raises(DataError, match=r"prompts.jsonl:2: the prompt has \d+ tokens, data.max_prompt_tokens is 2"):
        load(tmp_path, records, tok, max_prompt_tokens=2)
    source = load(tmp_path, records, tok, max_prompt_tokens=2, overlong="drop")
    assert [(p.index, p.text) for p in source.all()] == [(0, "a"), (2, "b")]
    assert source.dropped().prompts == 1
    exact = len(load(tmp_path, records, tok).all()[1].token_ids)
    assert len(load(tmp_path, records, tok, max_prompt_tokens=exact)) == 3
    with pytest.raises(DataError, match=r"all 1 prompts exceed data\.max_prompt_tokens 2"):
        load(tmp_path, records[1:2], tok, max_prompt_tokens=2, overlong="drop")


def test_the_lower_limit_counts(tmp_path: Path) -> None:
    records = [{"question": str(i)} for i in range(9)]
    assert len(load(tmp_path, records, tokenizer(), limit=4)) == 4
    assert len(load(tmp_path, records, tokenizer(), limit=4)) == 4
    path = tmp_path / "prompts.jsonl"
    assert [len(load_prompts(DataConfig(source=str(path), limit=6), tokenizer(), limit=n)) for n in (None, 2, 8)] == [
        6,
        2,
        6,
    ]


def numbered(count: int, *, shuffle: bool = True) -> PromptSource:
    return PromptSource([Prompt(i, np.array([i], dtype=np.int32)) for i in range(count)], shuffle=shuffle)


def indices(source: PromptSource, steps: range, size: int, seed: int = 0) -> list[int]:
    return [p.index for step in steps for p in source.batch(step, size, seed)]


@pytest.mark.parametrize(("count", "size"), [(10, 4), (7, 7), (3, 8), (1, 5), (11, 1)])
def test_every_epoch_is_a_permutation_whatever_the_batch_size(count: int, size: int) -> None:
    seen = indices(numbered(count), range(3 * count), size)
    for start in range(0, len(seen) - count + 1, count):
        assert Counter(seen[start : start + count]) == Counter(range(count))
    # The order belongs to the stream, not to the batch size.
    assert seen[:count] == indices(numbered(count), range(count), 1)


def test_batches_are_a_pure_function_of_step_and_seed() -> None:
    asked_before = numbered(50)
    for step in (0, 3, 12):
        asked_before.batch(step, 8, 1)
    fresh = [p.index for p in numbered(50).batch(9, 8, 1)]
    assert [p.index for p in asked_before.batch(9, 8, 1)] == fresh
    assert indices(numbered(50), range(10), 8, seed=1)[-8:] == fresh


def test_epochs_and_seeds_have_different_orders() -> None:
    first, second = indices(numbered(40), range(2), 40)[:40], indices(numbered(40), range(2), 40)[40:]
    other = indices(numbered(40), range(1), 40, seed=1)
    assert len({tuple(first), tuple(second), tuple(other), tuple(range(40))}) == 4


def test_without_shuffling_the_sources_order_repeats() -> None:
    assert indices(numbered(3, shuffle=False), range(3), 3, seed=5) == [0, 1, 2] * 3
    assert [p.index for p in numbered(4).all()] == [0, 1, 2, 3]


@pytest.mark.parametrize(("step", "size", "seed"), [(-1, 1, 0), (0, 0, 0), (0, 1, -1)])
def test_bad_batches_are_refused(step: int, size: int, seed: int) -> None:
    with pytest.raises(ValueError, match="expected step >= 0"):
        numbered(3).batch(step, size, seed)


def test_the_digest_is_of_every_token_and_their_order() -> None:
    def digest(*prompts: list[int]) -> str:
        return PromptSource([Prompt(9, np.array(p, dtype=np.int32)) for p in prompts]).digest()

    assert digest([1, 2], [3]) == digest([1, 2], [3])
    others = [digest([1], [2, 3]), digest([3], [1, 2]), digest([1, 2]), digest([1, 2], [3], [3]), digest([1, 2], [4])]
    assert len({digest([1, 2], [3]), *others}) == 6
