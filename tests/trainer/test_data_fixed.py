"""Fixed data: which samples are on it, what their completions are, and what of it is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tinymodels import EOS, tiny_model, tiny_tokenizer

from student_trainer.data import DataConfig, DataError, load_prompts, open_prompts
from student_trainer.data.export import prompt_lines
from student_trainer.data.fixed import Mix, end_of_answer, rollout
from student_trainer.rollout.likely import with_likely_ids
from student_trainer.types import Fixed, Prompt
from teacher_api import generated_file
from teacher_api.generation import Answer, Sampling, Written

RECORDS = [{"question": f"{i} + {i} =", "answer": f" {2 * i}", "long": "the lazy dog"} for i in range(9)]


def write(path: Path, records: list[dict[str, Any]] | None = None) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records or RECORDS))
    return path


def opened(path: Path, tok: Any = None, **settings: Any) -> list[Prompt]:
    config = DataConfig.model_validate(
        {"source": str(path), "on_policy_fraction": 0.0, "shuffle": False, "template": "plain", **settings}
    )
    prompts = open_prompts(config, tok or tiny_tokenizer(300), eos_token_ids=(1,))
    assert prompts.num_prompts is not None
    return prompts.take(0, prompts.num_prompts, 0)


# -- which samples


@pytest.mark.parametrize("by", ["step", "sample"])
def test_the_extremes_are_all_and_nothing(by: Any) -> None:
    for fraction, expected in ((1.0, False), (0.0, True)):
        mix = Mix(fraction, by, seed=3)
        assert {mix.is_fixed(step, uid) for step in range(40) for uid in range(40 * step, 40 * step + 3)} == {expected}


def test_a_fraction_of_steps_or_of_samples_is_on_policy() -> None:
    for fraction in (0.1, 0.5, 0.9):
        allowed = 4 * (fraction * (1 - fraction) / 2000) ** 0.5
        steps, samples = Mix(fraction, "step", 0), Mix(fraction, "sample", 0)
        on_policy = [not steps.is_fixed(step, 8 * step) for step in range(2000)]
        assert abs(np.mean(on_policy) - fraction) < allowed
        for step in range(5):  # the whole step alike
            assert len({steps.is_fixed(step, uid) for uid in range(64)}) == 1
        drawn = [not samples.is_fixed(0, uid) for uid in range(2000)]
        assert abs(np.mean(drawn) - fraction) < allowed
        assert [samples.is_fixed(7, uid) for uid in range(50)] == [samples.is_fixed(0, uid) for uid in range(50)]
    assert [Mix(0.5, "step", 0).is_fixed(s, 0) for s in range(64)] != [
        Mix(0.5, "step", 1).is_fixed(s, 0) for s in range(64)
    ]


# -- what they hold


def test_a_fixed_completion_is_the_answer_and_the_end_token(tmp_path: Path) -> None:
    tok = tiny_tokenizer(300)
    for key, settings in (("answer", {}), ("long", {"completion_key": "long"}), ("long", {"answer_key": "long"})):
        for prompt, record in zip(opened(write(tmp_path / "p.jsonl"), **settings), RECORDS, strict=True):
            (given,) = prompt.fixed
            assert given.token_ids.tolist() == [*tok(record[key])["input_ids"], tok.eos_token_id]
            assert given.token_ids.dtype == np.int32
            assert given.finish == "eos"
    ended = opened(write(tmp_path / "e.jsonl", [{"question": "a", "answer": "b" + EOS}]))
    assert ended[0].fixed[0].token_ids.tolist() == [*tok("b")["input_ids"], tok.eos_token_id], "the end comes once"


def test_nothing_is_read_where_all_is_on_policy(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"question": "a", "answer": ""}])
    assert opened(path, on_policy_fraction=1.0)[0].fixed == ()


def test_the_end_of_an_answer_is_the_chat_templates_where_the_student_stops_at_it() -> None:
    tok = copy.deepcopy(tiny_tokenizer(300))
    tok.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    turn = tok.convert_tokens_to_ids("<|turn|>")
    tok.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|turn|>\n{% endfor %}"
    assert end_of_answer(tok, (1, turn), is_chat=True) == turn
    assert end_of_answer(tok, (1,), is_chat=True) == tok.eos_token_id == 1
    assert end_of_answer(tok, (1, turn), is_chat=False) == 1


def test_a_conversation_is_cut_before_its_last_answer(tmp_path: Path) -> None:
    tok = copy.deepcopy(tiny_tokenizer(300))
    tok.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "the dog"), ("user", "never seen")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    path = write(tmp_path / "m.jsonl", [record])
    (prompt,) = opened(path, tok, messages_key="messages", template="auto", system_prompt="be quick")
    shown = f"<system>be quick{EOS}<user>a{EOS}<assistant>b{EOS}<user>c{EOS}<assistant>"
    assert (prompt.text, prompt.answer) == (shown, "the dog")
    assert prompt.token_ids.tolist() == tok(shown)["input_ids"]
    assert prompt.fixed[0].token_ids.tolist() == [*tok("the dog")["input_ids"], 1]
    for unfit, message in (
        ([{"role": "user", "content": "a"}], "no turn of the assistant after another"),
        ([{"role": "assistant", "content": "a"}], "no turn of the assistant after another"),
        ("text", "is str; expected a list of messages"),
    ):
        write(path, [{"messages": unfit}])
        with pytest.raises(DataError, match=message):
            opened(path, tok, messages_key="messages", template="auto")


def test_a_fixed_sample_is_a_rollout_that_nobody_sampled() -> None:
    given = (Fixed(np.array([5, 6, 1], np.int32), "eos"), Fixed(np.array([7], np.int32), "length"))
    prompt = Prompt(4, np.array([2, 3], np.int32), fixed=given)
    for member in range(5):
        made = rollout(prompt, member, uid=100 + member)
        chosen = given[member % 2]
        assert (made.uid, made.source, made.finish) == (100 + member, "fixed", chosen.finish)
        assert made.token_ids is chosen.token_ids
        assert np.isnan(made.full_logprob).all() == np.isnan(made.behaviour_logprob).all() == True  # noqa: E712
        assert len(made.full_logprob) == len(made.behaviour_logprob) == made.num_tokens
        assert not made.sampled.any()
        assert made.student_topk_ids is None


def test_likely_ids_of_fixed_text_are_the_students_best_at_each_position() -> None:
    import torch

    from student_trainer.student import Student
    from teacher_api import causal_lm

    model = tiny_model()
    student = Student(model, range(120), causal_lm.split(model), torch.device("cpu"), (1,), 0, 128, False)
    rng = np.random.default_rng(0)
    rollouts = []
    for uid, (p, n) in enumerate(((3, 5), (7, 1), (2, 9), (4, 4))):
        given = Fixed(rng.integers(2, 120, n, dtype=np.int32), "length")
        rollouts.append(rollout(Prompt(uid, rng.integers(2, 120, p, dtype=np.int32), fixed=(given,)), 0, uid=uid))
    found = with_likely_ids(student, rollouts, 6, micro_batch_tokens=16)
    assert [r.uid for r in found] == [0, 1, 2, 3]
    for made in found:
        ids = torch.from_numpy(np.concatenate([made.prompt.token_ids, made.token_ids]).astype(np.int64))
        with torch.no_grad():
            logits = model.double()(ids[None]).logits[0, len(made.prompt.token_ids) - 1 : -1, :120]
        model.float()
        expected = logits.argsort(dim=-1, descending=True)[:, :6]
        assert made.student_topk_ids is not None
        assert np.array_equal(made.student_topk_ids, expected.numpy())
    assert with_likely_ids(student, rollouts, 0, 16) == rollouts


# -- teacher-written


def written(folder: Path, prompts: list[Any], completions: list[list[Written]]) -> Path:
    """A file as `teacher-generate` writes it."""
    path = folder / "written.jsonl"
    path.unlink(missing_ok=True)
    with generated_file.Output(path, prompts, Sampling(n=len(completions[0])), "model@1") as output:
        for index in reversed(range(len(prompts))):
            output.add(index, Answer(list(prompts[index]), completions[index]))
    return path


def one(ids: list[int], finish: str = "stop") -> Written:
    return Written("", ids, [-1.0] * len(ids), finish, None)


def test_what_a_teacher_wrote_for_the_printed_prompts_is_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl")
    config = DataConfig(source=str(path), template="plain")
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompt_lines(config, tiny_tokenizer(300))) + "\n")
    asked = generated_file.read_prompts(tmp_path / "prompts.jsonl", "prompt")
    shown = load_prompts(config, tiny_tokenizer(300)).all()
    assert [list(p) for p in asked] == [p.token_ids.tolist() for p in shown]

    answers = [[one([10 + i, 1]), one([40 + i, 41], "length"), one([70 + i])] for i in range(len(asked))]
    file = written(tmp_path, asked, answers)
    for i, prompt in enumerate(opened(path, fixed_source=str(file))):
        assert [(f.token_ids.tolist(), f.finish) for f in prompt.fixed] == [
            ([10 + i, 1], "eos"),
            ([40 + i, 41], "length"),  # cut off at its limit: no end was written
            ([70 + i, 1], "eos"),  # ended by a text or another id: the student's end follows
        ]


def test_prompts_that_the_teacher_never_saw_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl")
    tok = tiny_tokenizer(300)
    prompts = [tok(r["question"])["input_ids"] for r in RECORDS]
    file = written(tmp_path, prompts[:4], [[one([5, 1])]] * 4)
    with pytest.raises(DataError, match=r"p\.jsonl:5: data\.fixed_source .*written\.jsonl has no completion of this"):
        opened(path, fixed_source=str(file))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a"}, "w.jsonl:1: not a line that teacher-generate wrote"),
        ({"prompt_token_ids": [1], "completions": [{"token_ids": [], "finish_reason": "stop"}]}, "or none"),
        ({"prompt_token_ids": [1], "completions": [{"token_ids": [300], "finish_reason": "stop"}]}, "tokenizer's 300"),
        ({"prompt_token_ids": [1], "completions": [{"token_ids": [3], "finish_reason": "abort"}]}, "'abort'"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "p.jsonl")
    (tmp_path / "w.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=message) as caught:
        opened(path, fixed_source=str(tmp_path / "w.jsonl"))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        opened(path, fixed_source=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match=r"data\.fixed_source .*: a directory, expected a file"):
        opened(path, fixed_source=str(tmp_path))
    (tmp_path / "mem.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"data\.fixed_source .*mem\.jsonl: can't be read: Input/output error"):
        opened(path, fixed_source=str(tmp_path / "mem.jsonl"))


# -- what is refused, or left out


@pytest.mark.parametrize(
    ("records", "settings", "message"),
    [
        ([{"question": "a"}], {}, "no field holds answers; set data.answer_key"),
        ([{"question": "a", "answer": " "}], {}, "p.jsonl:1: no fixed completion: its answer is empty"),
        ([{"question": "a", "answer": None}], {}, "its answer is NoneType; expected text"),
        ([{"question": "a", "s": "x"}, {"question": "b"}], {"completion_key": "s"}, "p.jsonl:2: no fixed completion"),
    ],
)
def test_a_prompt_without_an_answer_is_an_error(
    tmp_path: Path, records: list[dict[str, Any]], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        opened(write(tmp_path / "p.jsonl", records), **settings)


@pytest.mark.parametrize("streaming", [False, True])
def test_overlong_answers_stop_or_are_dropped_and_counted_but_never_cut(tmp_path: Path, streaming: bool) -> None:
    records = [{"question": "a", "answer": "the lazy dog " * n} for n in (1, 9, 1, 1)]
    path = write(tmp_path / "p.jsonl", records)
    settings: dict[str, Any] = {"source": str(path), "on_policy_fraction": 0.5, "max_answer_tokens": 20}
    settings |= {"streaming": True, "max_prompt_tokens": 9} if streaming else {}
    with pytest.raises(DataError, match=r"p\.jsonl:2: the answer has \d+ tokens, data.max_answer_tokens is 20"):
        open_prompts(DataConfig(**settings), tiny_tokenizer(300), eos_token_ids=(1,))
    prompts = open_prompts(DataConfig(**settings, overlong="drop"), tiny_tokenizer(300), eos_token_ids=(1,))
    assert {p.index for p in prompts.take(0, 12, 0)} == {0, 2, 3}
    assert (prompts.dropped().prompts, prompts.dropped().answers) == (0, 4 if streaming else 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix": "sample"}, "mix: got 'sample' with on_policy_fraction 1"),
        ({"mix": "sample", "on_policy_fraction": 0.0}, "mix: got 'sample' with on_policy_fraction 0"),
        ({"fixed_source": "w.jsonl"}, "fixed_source: got 'w.jsonl' with on_policy_fraction 1"),
        ({"completion_key": "c"}, "completion_key: got 'c' with on_policy_fraction 1"),
        ({"max_answer_tokens": 4}, "max_answer_tokens: got 4 with on_policy_fraction 1"),
        ({"fixed_source": "w", "completion_key": "c", "on_policy_fraction": 0.5}, "beside fixed_source"),
        ({"on_policy_fraction": 1.5}, "on_policy_fraction"),
        ({"messages_key": "m", "question_key": "q"}, "remove question_key"),
        ({"prompt_key": "p", "messages_key": "m"}, "remove messages_key"),
    ],
)
def test_idle_and_contradictory_options_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate({"source": "a.jsonl", **settings})
