"""Chat templates in conversations that grow: what is appended, and which templates are refused. The calculator."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import talking
from talking import Scripted, opening

from student_trainer.rollout.base import RolloutError
from student_trainer.rollout.calculator import calculator, worked_out
from student_trainer.rollout.chat import Chat
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.environment import EnvironmentEngine

END = 1
TRIMS = talking.TEMPLATE.replace("m.content", "m.content | trim")
FORGETS = (  # thinking before the last turn of the user, as Qwen3's template has it
    "{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set last.user = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and loop.index0 < last.user %}{% set text = text.split('</think>')[-1].lstrip() %}"
    "{% endif %}[{{ m.role }}]{{ text }}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
DROPS_TOOLS = talking.TEMPLATE.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
TURNS_AROUND = talking.TEMPLATE.replace("in messages", "in messages | reverse")
FAILS = "{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}" + talking.TEMPLATE


def conversation(template: str, said: str, role: str, turns: int = 2):
    """The student says `said`, is answered by `role`, and says it again."""
    tokenizer = talking.tokenizer(template)
    ids = [*tokenizer(said, add_special_tokens=False)["input_ids"], END]
    settings = RolloutConfig(
        environment="talking:echo", environment_options={"role": role, "turns": turns}, max_new_tokens=40
    )
    engine = EnvironmentEngine(Scripted({0: [ids] * turns}), settings, Chat(tokenizer, [END]))
    prompt = opening(0, "4 + 5", template)
    (rollout,) = engine.sample([prompt], [0])
    return tokenizer.decode(np.concatenate([prompt.token_ids, rollout.token_ids]).tolist())


def test_white_space_that_the_template_trims_stays_in_front_of_the_student():
    text = conversation(TRIMS, "  fox \n", "tool")
    assert text == "[user]4 + 5<|end|>[assistant]  fox \n<|end|>[tool]17<|end|>[assistant]  fox \n<|end|>"


def test_thinking_stays_where_the_template_keeps_it():
    said = "<think>\nlazy\n</think>\n\nfox"
    assert conversation(FORGETS, said, "tool").count("lazy") == 2


@pytest.mark.parametrize("said", ["<think>\nlazy\n</think>\n\nfox", "</think>lazy</think>dog"])
def test_a_template_that_forgets_thinking_is_refused_where_there_is_some(said):
    with pytest.raises(RolloutError) as caught:
        conversation(FORGETS, said, "user")
    assert "sample 0, turn 1: the chat template renders what the student has read and written otherwise" in str(
        caught.value
    )
    assert "role user" in str(caught.value)
    assert conversation(FORGETS, "fox", "user").count("fox") == 2


def test_a_template_that_leaves_the_tools_out_is_refused():
    with pytest.raises(RolloutError, match="turn 1: the chat template leaves out messages of role 'tool'"):
        conversation(DROPS_TOOLS, "fox", "tool")


def test_what_the_template_says_of_a_conversation_is_passed_on():
    with pytest.raises(RolloutError, match="turn 1: the chat template fails: no tools here"):
        conversation(FAILS, "fox", "tool")


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "has no chat template"), (TURNS_AROUND, "expected a template that only appends to it")],
)
def test_a_template_that_can_carry_nothing_on_is_refused_at_the_start(template, message):
    with pytest.raises(ValueError, match=message):
        Chat(talking.tokenizer(template), [END])


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("61-44", "17"),
        (" 2 + 3 * (4 - 1) ", "11"),
        ("-7 // 2", "-4"),
        ("7 % 4", "3"),
        ("0.1 + 0.2", "0.3"),
        ("1/3", "0.333333333333"),
        ("10/4", "2.5"),
        ("2/1000000000000000", "0.000000000000002"),
        ("9" * 60 + "*" + "9" * 60, str((10**60 - 1) ** 2)),
        ("1/0", "error: division by zero"),
        ("2**9", "error: not arithmetic"),
        ("9 9", "error: not arithmetic"),
        ("x", "error: not arithmetic"),
        ("__import__('os')", "error: not arithmetic"),
        ("", "error: not arithmetic"),
        ("1+" * 100, "error: not arithmetic"),
        ("1" * 201, "error: more than 200 characters"),
        ("(" * 99 + "1" + ")" * 99, "1"),
        ("-" * 199 + "1", "-1"),
    ],
)
def test_the_calculator_is_exact_and_harmless(expression, value):
    assert worked_out(expression) == value


def test_the_calculator_agrees_with_fractions_on_random_sums():
    rng = np.random.default_rng(0)
    for _ in range(200):
        numbers = rng.integers(1, 100, 4).tolist()
        signs = [str(rng.choice(["+", "-", "*"])) for _ in range(3)]
        text = "".join(f"{n}{s}" for n, s in zip(numbers, [*signs, ""], strict=True))
        assert Fraction(worked_out(text)) == Fraction(eval(text))


def test_the_calculator_answers_the_last_call_of_a_turn():
    def said(text, **options):
        return calculator([{"role": "user", "content": "1+1"}, {"role": "assistant", "content": text}], **options)

    assert said("I need <calc>1+1</calc> and <calc>2*3</calc>.") == [{"role": "tool", "content": "6"}]
    assert said("[[2*3]]", opening="[[", closing="]]", role="user") == [{"role": "user", "content": "6"}]
    for over in ("Answer: 6", "", "<calc>1+1", "1+1</calc>", "</calc>1+1<calc>"):
        assert said(over) == []
