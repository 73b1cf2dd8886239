"""Judging by hand-worked cases; the interval against scipy-free closed values; the loop against a scripted sampler."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from student_trainer.evaluate import TASKS, Judged, evaluate, summarise
from student_trainer.types import Prompt, Rollout


@pytest.mark.parametrize(
    ("task", "completion", "answer", "correct"),
    [
        ("exact_match", " a  b\n", "a b", True),
        ("exact_match", "a b c", "a b", False),
        ("final_answer", "61-44=17\nAnswer: 36", "36", True),
        ("final_answer", "Answer: 35\nno: Answer: 36", "worked\n#### 36", True),
        ("final_answer", "36", "36", False),
        ("final_answer", "Answer: 3", "36", False),
        ("final_answer", r"so \boxed{x+1}", "x+1", True),
        ("final_answer", "Answer: 36 cards", "36", False),
        ("final_answer", r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        ("final_answer", r"so \boxed{\frac{1}{2}}", r"\frac{1}{3}", False),
        ("final_answer", r"\boxed{\sqrt{\frac{a}{b}}} {x}", r"thus \boxed{\sqrt{\frac{a}{b}}}", True),
        ("final_answer", r"\boxed{1} no, \boxed{x_{2}}.", "x_{2}", True),
        ("final_answer", r"Answer: $\boxed{7}$", "7", True),
        ("final_answer", "\\boxed{7}\nAnswer: 8", "8", True),
        ("final_answer", r"\boxed{\boxed{7}}", "7", True),
        ("final_answer", r"\boxed{\{1, 2\}}", r"\{1, 2\}", True),
        ("final_answer", r"\boxed{\left\{ x \right.}", r"\left\{ x \right.", True),
        ("final_answer", r"\boxed{3} but \boxed{4", "3", True),  # never closed
        ("final_answer", r"\boxed{\frac{1}{2}", r"\frac{1}{2}", False),
        ("final_answer", r"\boxed{3 or \boxed{4}", "4", True),
        ("final_answer", r"} a { b \boxed{5} }}", "5", True),
        ("final_answer", "\\boxed{" * 20_000, "5", False),
        ("final_answer", r"\boxed{}", "5", False),
        ("exact_match", "", "", False),
        ("exact_match", " \n", " ", False),
        ("final_answer", "Answer: \n", "", False),
        ("final_answer", r"\boxed{}", " ", False),
        ("final_answer", r"\boxed{}", "worked, then\n####", False),
        ("numeric_answer", "no idea", "", False),
        ("numeric_answer", "it is 1,200 dollars", "#### 1200.0", True),
        ("numeric_answer", "17 then 36.5", "36.5", True),
        ("numeric_answer", "-3", "3", False),
        ("numeric_answer", "\u22123", "3", False),  # a minus sign
        ("numeric_answer", "\u22123", "-3", True),
        ("numeric_answer", ".5", "5", False),
        ("numeric_answer", "it is .5.", "0.50", True),
        ("numeric_answer", "5", "1e5", False),
        ("numeric_answer", "about 1.2e+3", "1,200", True),
        ("numeric_answer", "none", "3", False),
        ("numeric_answer", "Answer: 7, not 9", "7", False),
    ],
)
def test_judges(task: str, completion: str, answer: str, correct: bool) -> None:
    assert TASKS[task](completion, answer) is correct  # type: ignore[index]


@pytest.mark.parametrize(
    ("correct", "num", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (512, 512, 0.9925, 1.0)]
)
def test_interval_equals_published_wilson_values(correct: int, num: int, low: float, high: float) -> None:
    result = summarise([Judged("", "", "", i < correct) for i in range(num)])
    assert result.accuracy == correct / num
    assert (result.low, result.high) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))


class Scripted:
    """Answers prompt i with the code points of its text; odd prompts don't end by themselves."""

    def sample(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> list[Rollout]:
        rollouts = []
        for prompt, uid in zip(prompts, uids, strict=True):
            ids = np.array([ord(c) for c in prompt.extra["says"]], np.int32)
            zeros = np.zeros(len(ids), np.float32)
            rollouts.append(Rollout(uid, prompt, ids, "length" if prompt.extra["cut"] else "eos", zeros, zeros))
        return rollouts


def prompt(index: int, says: str, answer: str | None, cut: bool = False) -> Prompt:
    return Prompt(index, np.array([1], np.int32), f"p{index}", answer, {"says": says, "cut": cut})


def test_loop_judges_each_prompt_once_and_counts_unfinished_as_wrong() -> None:
    prompts = [prompt(0, "Answer: 1", "1"), prompt(1, "Answer: 2", "2", cut=True), prompt(2, "Answer: 4", "3")]
    result = evaluate(Scripted(), prompts, "final_answer", decode=lambda ids: "".join(map(chr, ids)), batch_size=2)
    assert [s.correct for s in result.samples] == [True, False, False]
    assert (result.num, result.accuracy) == (3, pytest.approx(1 / 3))


def test_prompts_without_answers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="row 7; set answer_key"):
        evaluate(Scripted(), [prompt(7, "x", None)], "exact_match", decode=str)
    with pytest.raises(ValueError, match="1 of 2 prompts have no answer, or an empty one, the first is row 4"):
        evaluate(Scripted(), [prompt(2, "x", "x"), prompt(4, "", " \n")], "exact_match", decode=str)
    numbers = [prompt(1, "x", "so it is 7"), prompt(3, "x", "seven"), prompt(5, "x", "\\boxed{no} 3")]
    with pytest.raises(ValueError, match="2 of 3 prompts have no answer, or one without a number, the first is row 3"):
        evaluate(Scripted(), numbers, "numeric_answer", decode=str)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(Scripted(), [], "exact_match", decode=str)
