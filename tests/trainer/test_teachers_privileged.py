"""Teachers that see another prompt: what is rendered, that completions are compared token for token, and refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serving import serving
from tinymodels import save_tiny, tiny_model, tiny_tokenizer

from student_trainer import scoring
from student_trainer.config import TrainConfig, experiment
from student_trainer.data import DataError, open_prompts
from student_trainer.losses import build, parse_loss
from student_trainer.losses.rows import teacher_rows
from student_trainer.teachers import panel, privileged
from student_trainer.types import Prompt, Rollout
from teacher_api.types import Scores

RECORDS = [
    {"question": "4 + 5 = ?", "answer": 9, "why": "the {answer} of {question}"},
    {"question": "the {answer} fox", "answer": "the quick brown fox", "why": "dog"},
]
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    found = tiny_tokenizer(300)
    before = found.chat_template
    found.chat_template = CHAT
    yield found
    found.chat_template = before


def configured(path: Path, records: list[Mapping[str, Any]], teacher: dict[str, Any], **data: Any) -> TrainConfig:
    source = path / "data.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    return TrainConfig.model_validate(
        {
            "student": {"model": "s"},
            "data": {"source": str(source), "shuffle": False, **data},
            "teacher": {"url": "grpc://a:1", **teacher},
        }
    )


def seen(config: TrainConfig, tokenizer: Any) -> list[str]:
    """What the teacher sees, decoded."""
    views = privileged.views(config.all_teachers, by_domain=True)
    prompts = open_prompts(config.data, tokenizer, eos_token_ids=(1,), views=views)
    return [tokenizer.decode(p.teacher_ids[""]) for p in prompts.all()]  # type: ignore[attr-defined]


# -- what the teacher is shown


def test_the_answer_is_shown_in_the_users_turn_and_braces_in_the_data_stay(tmp_path: Path, tokenizer: Any) -> None:
    """A question that holds {answer} is not filled in, nor is an answer that holds {question}."""
    template = "{question} {it is {answer}, for {hint}}"
    config = configured(
        tmp_path, RECORDS, {"prompt_template": template, "hint_key": "why", "system_prompt": "be {hint}"}
    )
    assert seen(config, tokenizer) == [
        "<system>be the {answer} of {question}<user>4 + 5 = ? {it is 9, for the {answer} of {question}}<assistant>",
        "<system>be dog<user>the {answer} fox {it is the quick brown fox, for dog}<assistant>",
    ]


def test_what_is_left_out_is_the_students(tmp_path: Path, tokenizer: Any) -> None:
    data = {"system_prompt": "student", "prompt_template": "Q: {question}"}
    first = RECORDS[:1]
    assert seen(configured(tmp_path, first, {"system_prompt": "teacher"}, **data), tokenizer) == [
        "<system>teacher<user>Q: 4 + 5 = ?<assistant>"
    ]
    assert seen(configured(tmp_path, first, {"prompt_template": "{question}!"}, **data), tokenizer) == [
        "<system>student<user>4 + 5 = ?!<assistant>"
    ]
    plain = configured(tmp_path, first, {"prompt_template": "{question} {answer}"}, template="plain", **data)
    assert seen(plain, tokenizer) == ["student\n\n4 + 5 = ? 9"]
    file = tmp_path / "template.txt"
    file.write_text("{question}?\n")
    assert seen(configured(tmp_path, first, {"prompt_template_file": str(file)}), tokenizer) == [
        "<user>4 + 5 = ??<assistant>"
    ]


def test_in_a_conversation_the_last_turn_of_the_user_is_the_question(tmp_path: Path, tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "old"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    teacher = {"system_prompt": "new", "prompt_template": "{question} ({answer})"}
    prompt = configured(tmp_path, [{"prompt": messages, "answer": "4"}], teacher, prompt_key="prompt")
    expected = ["<system>new<user>one<assistant>two<user>three (4)<assistant>"]
    assert seen(prompt, tokenizer) == expected
    whole = [{"messages": [*messages, {"role": "assistant", "content": "4"}]}]
    assert seen(configured(tmp_path, whole, teacher, messages_key="messages"), tokenizer) == expected


@pytest.mark.parametrize(
    ("teacher", "records", "words"),
    [
        ({"prompt_template": "{question}{answer}"}, [{"question": "x"}], "jsonl:1: has no answer for {answer}"),
        ({"prompt_template": "{question}{hint}"}, RECORDS, r"teacher\.hint_key: got none, expected the field"),
        ({"prompt_template": "{question}", "hint_key": "why"}, RECORDS, r"teacher\.hint_key: got why, expected none"),
        ({"prompt_template": "{question}{hint}", "hint_key": "so"}, RECORDS, "no field 'so'"),
        ({"prompt_template_file": "nowhere.txt"}, RECORDS, r"teacher\.prompt_template_file nowhere\.txt"),
        (
            {"prompt_template": "{question}{answer}", "max_prompt_tokens": 2},
            RECORDS,
            r"teacher\.max_prompt_tokens is 2",
        ),
    ],
)
def test_what_can_not_be_shown_is_refused(teacher, records, words: str, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=words):
        seen(configured(tmp_path, records, teacher), tokenizer)


def test_a_prompt_too_long_for_the_teacher_is_dropped_where_the_data_says_so(tmp_path: Path, tokenizer: Any) -> None:
    long = {"question": "x", "answer": "the lazy dog " * 20}
    teacher = {"prompt_template": "{question}{answer}", "max_prompt_tokens": 60}
    config = configured(tmp_path, [*RECORDS, long], teacher, overlong="drop", max_prompt_tokens=60)
    views = privileged.views(config.all_teachers, by_domain=True)
    prompts = open_prompts(config.data, tokenizer, eos_token_ids=(1,), views=views)
    assert (prompts.num_prompts, prompts.dropped().prompts) == (2, 1)
    assert prompts.longest.teacher_prompt == max(len(p.teacher_ids[""]) for p in prompts.take(0, 2, 0))
    plain = open_prompts(config.data, tokenizer, eos_token_ids=(1,))
    assert plain.num_prompts == 3
    assert plain.longest.teacher_prompt == 0


def test_a_run_is_bound_to_what_its_teacher_sees(tmp_path: Path, tokenizer: Any) -> None:
    def digest(records: list[dict[str, Any]]) -> str:
        config = configured(tmp_path, records, {"prompt_template": "{question} {answer}"})
        views = privileged.views(config.all_teachers, by_domain=True)
        return open_prompts(config.data, tokenizer, eos_token_ids=(1,), views=views).digest()

    assert digest(RECORDS) == digest(RECORDS)
    assert digest(RECORDS) != digest([{**RECORDS[0], "answer": 8}, RECORDS[1]])
    held = experiment(configured(tmp_path, RECORDS, {"prompt_template": "{question}{answer}", "system_prompt": "s"}))
    assert held["teacher.prompt_template"] == "{question}{answer}"
    assert held["teacher.system_prompt"] == "s"


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"teacher": {"hint_key": "x"}}, "hint_key: got 'x' without prompt_template or system_prompt"),
        ({"teacher": {"max_prompt_tokens": 5}}, "max_prompt_tokens: got 5 without"),
        ({"teacher": {"prompt_template": "no place"}}, "has no {question}"),
        ({"teacher": {"prompt_template": "{question}", "prompt_template_file": "f"}}, "expected one of the two"),
        (
            {"teacher": {"system_prompt": "x"}, "loss": {"objective": "forward_kl", "on_prompt": True}},
            r"teacher\.system_prompt: got one with loss\.on_prompt",
        ),
        (
            {"teacher": {"system_prompt": "x"}, "data": {"format": "packed_text", "on_policy_fraction": 0}},
            r"teacher\.system_prompt: got one with data\.format packed_text",
        ),
    ],
)
def test_idle_and_impossible_options_are_refused(sections: dict[str, Any], words: str) -> None:
    whole: dict[str, Any] = {"student": {"model": "s"}, "data": {"source": "p.txt"}, "teacher": {"url": "grpc://a:1"}}
    for name, keys in sections.items():
        whole[name] = {**whole.get(name, {}), **keys}
    with pytest.raises(ValueError, match=words):
        TrainConfig.model_validate(whole)


# -- what is compared


@pytest.fixture(scope="module")
def url(tmp_path_factory: Any) -> Iterator[str]:
    place = tmp_path_factory.mktemp("privileged")
    save_tiny(place / "teacher", seed=1, scale=2.5)
    with serving(model=str(place / "teacher"), backend="torch", device="cpu", threads=1) as server:
        yield server.http_url


def samples() -> list[Rollout]:
    """Two completions each of two prompts; the teacher's prompt is longer once, and shorter once."""
    draw = np.random.default_rng(5)
    found = []
    for uid in range(4):
        theirs = np.arange(10, 19 if uid < 2 else 12, dtype=np.int32)
        prompt = Prompt(uid // 2, np.arange(2, 7, dtype=np.int32), teacher_ids={"": theirs, "other": theirs[:3]})
        tokens = draw.integers(2, 120, 3 + uid, dtype=np.int32)
        likely = np.stack([draw.permutation(120)[:4] for _ in tokens]).astype(np.int32)
        zeros = np.zeros(len(tokens), np.float32)
        found.append(Rollout(uid, prompt, tokens, "eos", zeros, zeros, likely))
    return found


@torch.no_grad()
def expected(rollout: Rollout) -> np.ndarray:
    """log p [N, W] of the completion after the teacher's own prompt, by transformers in float64."""
    theirs = rollout.prompt.teacher_ids[""]
    sequence = torch.from_numpy(np.concatenate([theirs, rollout.token_ids]).astype(np.int64))
    model = tiny_model(seed=1, scale=2.5).double()
    return model(sequence[None]).logits[0, len(theirs) - 1 : -1].log_softmax(-1).numpy()


@pytest.mark.parametrize("top_k", [4, "all"])
def test_the_completion_is_scored_after_the_teachers_own_prompt_and_stands_where_the_students_does(
    top_k: Any, url: str
) -> None:
    loss = {"objective": "reverse_kl", "support": "union"}
    config = TrainConfig.model_validate(
        {
            "student": {"model": "s"},
            "data": {"source": "p.txt"},
            "teacher": {"url": url, "system_prompt": "x", "top_k": top_k, "start_timeout_s": 20},
            "loss": loss,
        }
    )
    opened, _ = panel.connect(
        config, {"": url}, build(config.loss), tokenizer=tiny_tokenizer(), longest_tokens=16, longest_privileged=40,
        began_with={},
    )  # fmt: skip
    scored = opened.score(samples())
    opened.close()
    for sample in scored:
        log_p = expected(sample.rollout)
        rows = np.arange(len(log_p))
        np.testing.assert_allclose(sample.scores.token_logprob, log_p[rows, sample.rollout.token_ids], atol=1e-5)
        assert sample.scores.positions.tolist() == (5 + rows).tolist()
    table = teacher_rows(scored, parse_loss(loss))
    log_p = np.concatenate([expected(s.rollout) for s in scored])
    if top_k == "all":
        np.testing.assert_allclose(table.support_logprob.numpy(), log_p[:, :120], atol=1e-5)
    else:
        ids = table.support_ids.numpy()
        values = np.where(table.support_mask.numpy(), np.take_along_axis(log_p, ids, axis=1), 0.0)
        np.testing.assert_allclose(table.support_logprob.numpy(), values, atol=1e-5)


def test_a_prompt_too_long_for_the_server_is_refused_before_the_first_step(url: str) -> None:
    config = TrainConfig.model_validate(
        {
            "student": {"model": "s"},
            "data": {"source": "p.txt"},
            "teacher": {"url": url, "system_prompt": "x", "start_timeout_s": 20},
        }
    )
    with pytest.raises(scoring.HandshakeError, match="up to 129 tokens, this teacher scores at most 128"):
        panel.connect(
            config, {"": url}, build(config.loss), tokenizer=tiny_tokenizer(), longest_tokens=16,
            longest_privileged=129, began_with={},
        )  # fmt: skip


def test_answers_that_are_not_of_the_completion_never_become_training_tokens() -> None:
    rollout = samples()[0]
    values = np.full(rollout.num_tokens, -1.0, np.float32)
    good = Scores("0", np.arange(9, 12, dtype=np.int32), values, values)
    assert privileged.aligned(rollout, good, "").positions.tolist() == [5, 6, 7]
    for wrong in (good.positions - 4, good.positions + 1, good.positions[:2]):  # the student's own, shifted, short
        with pytest.raises(ValueError, match="sample 0 cover positions"):
            privileged.aligned(rollout, replace(good, positions=wrong), "")
    assert privileged.prompt_of(rollout.prompt, "other").tolist() == [10, 11, 12]
    assert privileged.prompt_of(rollout.prompt, "unprivileged").tolist() == [2, 3, 4, 5, 6]
