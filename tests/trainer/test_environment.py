"""Conversations around an engine: the ids that were there stay, every turn has its own random numbers, answers have no
logprobs; limits, ends, errors and hangs.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pytest
import talking
import torch
from talking import STOPS, Scripted, opening
from tinymodels import tiny_model

from student_trainer.evaluate import judged
from student_trainer.rollout.base import RolloutError
from student_trainer.rollout.chat import Chat
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.environment import TURN_BIT, EnvironmentEngine
from student_trainer.rollout.torch_sampler import TorchSampler
from student_trainer.types import Rollout

V, END = talking.TOKENIZER_SIZE, 1
PROMPTS = [opening(i, text) for i, text in enumerate(["fox", "the lazy dog", "4 + 5 = ?", "over", "jumps", "0123"])]


def config(environment: str = "talking:scripted", **keys: Any) -> RolloutConfig:
    return RolloutConfig(**{"environment": environment, "max_new_tokens": 12, "max_total_tokens": 110, **keys})


def chat(template: str = talking.TEMPLATE) -> Chat:
    return Chat(talking.tokenizer(template), [END])


def around(inner: Any, settings: RolloutConfig) -> EnvironmentEngine:
    return EnvironmentEngine(inner, settings, chat())


class Recording:
    """An engine that keeps what it was asked and what it gave."""

    def __init__(self, inner: TorchSampler) -> None:
        self.inner, self.asked, self.given = inner, [], []

    def stream(self, prompts, uids, *, keep_top_k=0):
        self.asked += zip(prompts, uids, strict=True)
        for rollout in self.inner.stream(prompts, uids, keep_top_k=keep_top_k):
            self.given.append(rollout)
            yield rollout


def torch_sampler(model: Any, settings: RolloutConfig, seed: int = 5) -> TorchSampler:
    settings = settings.model_copy(update={"stop_token_ids": STOPS})
    return TorchSampler(model, eos_token_ids=[END], pad_token_id=0, vocabulary_size=V, config=settings, seed=seed)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(logit_width=talking.WIDTH, scale=2.0, max_position_embeddings=256)


@pytest.fixture(scope="module")
def talks(model) -> tuple[list[Rollout], Recording]:
    inner = Recording(torch_sampler(model, config()))
    inner.inner.update(7)
    return around(inner, config()).sample(PROMPTS * 3, range(10, 28), keep_top_k=4), inner


def test_a_conversation_is_one_completion_of_its_prompt(talks):
    rollouts, inner = talks
    assert [r.uid for r in rollouts] == list(range(10, 28))
    finished = [r for r in rollouts if len(r.turns) == 3]
    assert len(finished) >= 6
    for rollout, prompt in zip(rollouts, PROMPTS * 3, strict=True):
        assert rollout.prompt is prompt
        wrote, num = rollout.by_student, rollout.num_tokens
        assert wrote is not None
        assert wrote[0]
        assert wrote[-1]
        for values in (rollout.behaviour_logprob, rollout.full_logprob):
            assert np.array_equal(np.isnan(values), ~wrote)
        assert np.array_equal(rollout.versions, np.where(wrote, 7, -1))
        assert np.array_equal(rollout.sampled, wrote)
        kept = rollout.student_topk_ids
        assert kept.shape == (num, 4)
        assert ((kept >= 0) & (kept < V)).all()
        assert all(len(set(row)) == 4 for row in kept.tolist())
        turns = [g for g in inner.given if g.uid % 2**48 == rollout.uid]
        assert np.array_equal(kept[wrote], np.concatenate([t.student_topk_ids for t in turns]))
    assert {r.finish for r in finished} <= {"eos", "length"}
    assert any(r.finish == "eos" for r in finished)


def test_the_ids_that_are_there_are_never_made_again(talks):
    """Decoding a conversation and encoding it again for its next turn: other tokens, logprobs of nothing sampled."""
    rollouts, inner = talks
    tokenizer, changed = talking.tokenizer(), 0
    for rollout in rollouts:
        asked = sorted(
            (uid >> TURN_BIT, prompt)
            for prompt, uid in inner.asked
            if uid % 2**48 == rollout.uid
            for prompt in [prompt.token_ids.tolist()]
        )
        given = sorted((g.uid >> TURN_BIT, g.token_ids.tolist()) for g in inner.given if g.uid % 2**48 == rollout.uid)
        whole = [*rollout.prompt.token_ids.tolist(), *rollout.token_ids.tolist()]
        assert [n for n, _ in asked] == list(range(len(rollout.turns)))
        for turn, (_, prompt), (_, said) in zip(rollout.turns, asked, given, strict=True):
            start = len(rollout.prompt.token_ids) + turn.start
            assert whole[:start] == prompt
            assert whole[start : start + len(said)] == said == rollout.token_ids[turn].tolist()
        changed += tokenizer(tokenizer.decode(whole), add_special_tokens=False)["input_ids"] != whole
    assert changed > len(rollouts) // 2  # so that a round trip would have been seen


def test_between_two_turns_stands_what_the_chat_template_puts_there(talks):
    tokenizer, ended_by_student = talking.tokenizer(), 0
    for rollout in talks[0]:
        for number, (before, after) in enumerate(zip(rollout.turns, rollout.turns[1:], strict=False), start=1):
            text = f"<|end|>[tool]the {number}. answer, 4 + 5<|end|>[user]=<|end|>[assistant]"
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            if rollout.token_ids[before][-1] == END:  # the student has ended its turn itself
                expected, ended_by_student = expected[1:], ended_by_student + 1
            assert rollout.token_ids[before.stop : after.start].tolist() == expected


def test_every_turns_logprobs_are_those_of_a_plain_forward_pass(talks, model):
    worst = 0.0
    for rollout in talks[0]:
        ids = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.token_ids])).long()[None]
        with torch.no_grad():
            log_q = model(input_ids=ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1].log_softmax(-1)
        expected = log_q.gather(1, torch.from_numpy(rollout.token_ids).long()[:, None])[:, 0].numpy()
        worst = max(worst, float(np.abs(expected - rollout.full_logprob)[rollout.by_student].max()))
    assert worst <= 1e-5


def test_no_turn_draws_the_random_numbers_of_another():
    """A second turn that begins with the first one's random numbers repeats it, wherever the context matters little."""
    even = tiny_model(logit_width=V)
    with torch.no_grad():
        even.get_output_embeddings().weight.zero_()  # every id is as likely, so that a number in [0, 1) says which
    settings = config(max_new_tokens=8)
    seen = []
    for rollout in around(torch_sampler(even, settings, seed=5), settings).sample(PROMPTS, range(6)):
        for number, turn in enumerate(rollout.turns):
            key = np.array([5, rollout.uid + number * 2**48], dtype=np.uint64)
            drawn = np.random.Generator(np.random.Philox(key=key)).random(8)
            tokens = rollout.token_ids[turn]
            assert tokens.tolist() == np.floor(drawn[: len(tokens)] * V).astype(int).tolist()
            seen.append(drawn[0])
    assert len(seen) > 8
    assert len(set(seen)) == len(seen)


def test_a_conversation_does_not_depend_on_those_beside_it(talks, model):
    some = [1, 4, 11, 17]
    alone = around(torch_sampler(model, config()), config()).sample(
        [(PROMPTS * 3)[i] for i in some], [10 + i for i in some]
    )
    for place, rollout in zip(some, alone, strict=True):
        assert np.array_equal(rollout.token_ids, talks[0][place].token_ids)
        assert rollout.finish == talks[0][place].finish
        np.testing.assert_allclose(rollout.full_logprob, talks[0][place].full_logprob, atol=1e-5)


LONG = [*range(20, 31), END]
SHORT = [40, END]


@pytest.mark.parametrize(
    ("turns", "keys", "num_turns", "finish"),
    [
        ([SHORT, SHORT, SHORT], {}, 3, "eos"),
        ([SHORT] * 5, {"environment_options": {"turns": 9}, "max_turns": 4, "max_total_tokens": 300}, 4, "length"),
        ([SHORT, LONG[:-1], SHORT], {}, 2, "length"),
        ([LONG] * 9, {"environment_options": {"turns": 9}, "max_total_tokens": 90}, 2, "length"),
    ],
    ids=["the environment has nothing to add", "no turn is left", "a turn is cut off", "no room for a whole turn"],
)
def test_a_conversation_ends(turns, keys, num_turns, finish):
    settings = config(**keys)
    engine = around(Scripted({3: turns}), settings)
    (rollout,) = engine.sample(PROMPTS[:1], [3])
    assert (len(rollout.turns), rollout.finish) == (num_turns, finish)
    assert rollout.num_tokens <= settings.longest_completion
    between = [b.start - a.stop for a, b in zip(rollout.turns, rollout.turns[1:], strict=False)]
    if "max_total_tokens" in keys:  # one more answer and turn would have been too long, and by no more than that
        assert rollout.num_tokens + max(between) + 12 > 90
    assert rollout.turns[-1].stop == rollout.num_tokens  # no answer that nobody reads


def test_the_environment_gets_the_messages_so_far(monkeypatch):
    heard = []

    def listening(messages):
        heard.append([dict(m) for m in messages])
        messages[0]["content"] = "changed"  # of a copy
        return [{"role": "tool", "content": "17", "name": "clock"}] if len(heard) == 1 else None

    monkeypatch.setattr(talking, "listening", listening, raising=False)
    ids = talking.tokenizer()("fox <|end|> jumps")["input_ids"]
    around(Scripted({0: [[*ids, END], SHORT]}), config("talking:listening")).sample(PROMPTS[:1], [0])
    first = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "fox <|end|> jumps"}]
    said = talking.tokenizer().decode([40])
    tool = {"role": "tool", "content": "17", "name": "clock"}
    assert heard == [first, [*first, tool, {"role": "assistant", "content": said}]]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raise", ["KeyError: 'a tool that\\nis not there'", "talking.py:"]),
        ("exit", ["SystemExit: 3"]),
        ("text", ["returned str, expected a list of messages"]),
        ("message", ["message 0", "'tool'", "expected text in `role`, `content`"]),
        ("number", ["message 0", "17", "expected text"]),
        ("self", ["role assistant", "it is the student's"]),
        ("hang", ["no answer within rollout.environment_timeout_s 0.2"]),
    ],
)
def test_an_environment_that_fails_is_named_with_sample_and_turn(how, words):
    settings = config("talking:failing", environment_options={"how": how}, environment_timeout_s=0.2)
    engine = around(Scripted({3: [SHORT] * 3, 8: [SHORT] * 3}), settings)
    began = time.monotonic()
    with pytest.raises(RolloutError) as caught:
        engine.sample(PROMPTS[:2], [3, 8])
    assert time.monotonic() - began < 5.0
    message = str(caught.value)
    assert message.startswith("rollout.environment talking:failing: sample 3, turn 2: ")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_who_is_finished_does_not_wait_for_a_slow_answer(monkeypatch):
    import threading

    gate = threading.Event()

    def slow(messages):
        if messages[0]["content"] == PROMPTS[1].messages[0]["content"]:
            gate.wait(20)
        return []

    monkeypatch.setattr(talking, "slow", slow, raising=False)
    slowest = Scripted({i: [SHORT] for i in range(3)})
    stream = around(slowest, config("talking:slow")).stream([PROMPTS[0], PROMPTS[1], PROMPTS[2]], [0, 1, 2])
    assert next(stream).uid == 0
    gate.set()
    assert {r.uid for r in stream} == {1, 2}


def test_weights_move_and_end_with_the_engine_inside():
    inner = Scripted({0: [SHORT] * 3})
    engine = around(inner, config())
    engine.update(4)
    (rollout,) = engine.sample(PROMPTS[:1], [0])
    assert set(rollout.versions[rollout.by_student]) == {4}
    engine.close()
    assert inner.version == -1


def test_an_answer_is_judged_by_the_last_turn():
    tokenizer = talking.tokenizer()
    said = [[*tokenizer(text)["input_ids"], END] for text in ("Answer: 5", "Answer: 9", "so Answer: 9")]
    engine = around(Scripted({0: said, 1: [*said[:2], said[0]]}), config(max_new_tokens=20, max_total_tokens=300))
    prompts = [dataclasses.replace(p, answer="9") for p in PROMPTS[:2]]
    found = list(judged(engine, prompts, [0, 1], "exact_match", decode=lambda ids: tokenizer.decode(ids)))
    assert [j.correct for j in found] == [False, False]
    found = list(
        judged(
            engine, prompts, [0, 1], "final_answer", decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
        )
    )
    assert [j.correct for j in found] == [True, False]
    assert "[tool]" in found[0].completion


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_turns": 3}, "max_turns: got 3 without environment"),
        ({"environment_timeout_s": 3.0}, "environment_timeout_s: got 3.0 without environment"),
        ({"environment_options": {"a": 1}}, "environment_options: got {'a': 1} without environment"),
        ({"max_total_tokens": 999}, "max_total_tokens: got 999 without environment"),
        ({"environment": "calculater"}, "unknown environment 'calculater'; did you mean 'calculator'"),
        ({"environment": "talking:nothing"}, "can't import 'talking:nothing'"),
        ({"environment": "talking:STOPS"}, "'talking:STOPS' is a tuple; expected a function"),
        (
            {"environment": "calculator", "environment_options": {"opner": "["}},
            "environment_options: got {'opner': '['}",
        ),
        ({"environment": "calculator", "max_total_tokens": 256}, "max_total_tokens: got 256 with max_new_tokens 256"),
    ],
)
def test_idle_and_unknown_options_are_refused(keys, message):
    with pytest.raises(ValueError, match=r"environment|max_") as caught:
        RolloutConfig(**keys)
    assert message in str(caught.value)


def test_prompts_that_are_no_conversation_are_refused():
    engine = around(Scripted({0: [SHORT]}), config())
    plain = dataclasses.replace(PROMPTS[0], messages=())
    with pytest.raises(ValueError, match="prompt 0 is text as it stands"):
        engine.sample([plain], [0])
    closed = dataclasses.replace(PROMPTS[0], text=PROMPTS[0].text.removesuffix("[assistant]"))
    with pytest.raises(ValueError, match=r"data\.add_generation_prompt"):
        engine.sample([closed], [0])
    with pytest.raises(ValueError, match="a uid comes twice"):
        engine.sample(PROMPTS[:2], [0, 0])
    with pytest.raises(ValueError, match="uid 281474976710656"):
        engine.sample(PROMPTS[:1], [2**48])
