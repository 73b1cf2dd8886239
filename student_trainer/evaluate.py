"""Accuracy of a model on problems with known answers: completions from a sampler, a task that judges them, and a
confidence interval. Knows nothing of training.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, Protocol, Self

from pydantic import Field, model_validator

from student_trainer.data.config import PromptConfig
from student_trainer.types import Prompt, Rollout
from teacher_api.settings import Section

TaskName = Literal["exact_match", "final_answer", "numeric_answer"]


class EvalConfig(Section):
    every: int = Field(0, ge=0)
    """Steps between evaluations (before the first step and after the last as well); 0: none."""
    data: PromptConfig | None = None
    """Problems with answers, none of them in the training data."""
    task: TaskName = "final_answer"
    num_prompts: int = Field(256, ge=1)
    """The first so many of the data; all where there are fewer."""
    max_new_tokens: int = Field(0, ge=0)
    """0: as in training."""
    engine: Literal["torch", "vllm"] = "torch"
    """torch: the training weights themselves, each process solves its share. vllm: the weights are written to a
    directory beside the checkpoints and evaluated there by a `student-eval --engine vllm` of its own, which the main
    process starts and the others wait for."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """With engine vllm: arguments of its engine, such as gpu_memory_utilization (of what training leaves)."""

    @model_validator(mode="after")
    def _arguments_of_an_engine_that_starts(self) -> Self:
        if self.vllm and self.engine != "vllm":
            raise ValueError(f"vllm: got {self.vllm} with engine {self.engine}, expected none")
        return self


class Sampler(Protocol):
    def sample(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> list[Rollout]: ...


@dataclass(frozen=True, slots=True)
class Judged:
    prompt: str
    completion: str
    answer: str
    correct: bool


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Share of correct answers with its 95 % Wilson score interval."""

    accuracy: float
    low: float
    high: float
    num: int
    samples: tuple[Judged, ...] = ()


def evaluate(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    task: TaskName,
    *,
    decode: Callable[[Sequence[int]], str],
    progress: Callable[[Iterator[Judged]], Iterator[Judged]] = iter,
    batch_size: int = 64,
) -> EvalResult:
    """Samples one completion per prompt and judges it against `Prompt.answer`.

    Args:
        decode: token ids to text, special tokens left out.
        progress: wraps the stream of judged completions, to show how far it is.
    Raises:
        ValueError: no prompts, or a prompt without an answer, with an empty one, or with none that the task knows.
    """
    require_answers(prompts, task)
    places = range(len(prompts))
    return summarise(list(progress(judged(sampler, prompts, places, task, decode=decode, batch_size=batch_size))))


def require_answers(prompts: Sequence[Prompt], task: TaskName) -> None:
    """Raises ValueError where there is nothing to judge, or nothing to judge it by."""
    if not prompts:
        raise ValueError("nothing to evaluate: no prompts")
    missing = unanswered(prompts, task)
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(prompts)} prompts have {NO_ANSWER[task]}, the first is row {missing[0]}; "
            "set answer_key"
        )


def unanswered(prompts: Sequence[Prompt], task: TaskName) -> list[int]:
    """Rows of those without a reference answer. An empty one is none: a completion that says nothing would have it; nor
    is one without a number where numbers are compared: every completion would be wrong."""

    def can_judge(answer: str) -> bool:
        return bool(answer.strip()) and (task != "numeric_answer" or _number_in(answer) is not None)

    return [p.index for p in prompts if p.answer is None or not can_judge(p.answer)]


def judged(
    sampler: Sampler,
    prompts: Sequence[Prompt],
    places: Sequence[int],
    task: TaskName,
    *,
    decode: Callable[[Sequence[int]], str],
    batch_size: int = 64,
) -> Iterator[Judged]:
    """The prompts at `places`, judged; of a conversation, the student's last turn. A sample's random numbers are those
    of its place, whoever draws it."""
    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        for rollout in sampler.sample([prompts[place] for place in batch], batch):
            text, last = decode(rollout.token_ids.tolist()), decode(rollout.token_ids[rollout.turns[-1]].tolist())
            finished, answer = rollout.finish == "eos", rollout.prompt.answer or ""
            yield Judged(rollout.prompt.text, text, answer, finished and TASKS[task](last, answer))


def in_order(shares: Sequence[Sequence[Judged]]) -> list[Judged]:
    """The ranks' shares, rank r having judged places r, r + world, …, as one list in the order of places."""
    world = len(shares)
    return [shares[place % world][place // world] for place in range(sum(map(len, shares)))]


def summarise(samples: Sequence[Judged]) -> EvalResult:
    """The Wilson score interval (E. B. Wilson, 1927) at z = 1.96 around the share of correct samples."""
    num, correct = len(samples), sum(s.correct for s in samples)
    z, share = 1.96, correct / num
    centre = (share + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return EvalResult(share, max(0.0, centre - half), min(1.0, centre + half), num, tuple(samples))


def exact_match(completion: str, answer: str) -> bool:
    """The whole completion is the answer; white space at both ends and its amount in between don't count. Nothing is
    never the answer."""
    return completion.split() == answer.split() != []


def final_answer(completion: str, answer: str) -> bool:
    """What follows the last "Answer:" (or "####", or stands in the last \\boxed{}) is the answer. The reference may
    be the answer alone or a worked solution that ends in one of these forms. Nothing is never the answer."""
    got, expected = _marked(completion), _marked(answer)
    return got is not None and got.split() == (expected if expected is not None else answer).split() != []


def numeric_answer(completion: str, answer: str) -> bool:
    """The last number of the completion has the value of the reference's last number (1,200 = 1200.0 = 1.2e3)."""
    got = _number_in(completion)
    return got is not None and got == _number_in(answer)


TASKS: dict[TaskName, Callable[[str, str], bool]] = {
    "exact_match": exact_match,
    "final_answer": final_answer,
    "numeric_answer": numeric_answer,
}

NO_ANSWER: dict[TaskName, str] = {
    "exact_match": "no answer, or an empty one",
    "final_answer": "no answer, or an empty one",
    "numeric_answer": "no answer, or one without a number",
}
"""What `unanswered` finds of a task's references."""

_MARKS = re.compile(r"Answer:|####|\\boxed\{|\\.|[{}]")
_NUMBER = re.compile(r"[-\u2212]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?")  # a minus sign is as good


def _marked(text: str) -> str | None:
    """What the last marker of `text` marks: the rest of its line, or the inside of a box up to the brace that closes
    it. A box that is never closed marks nothing; of nested ones the innermost counts."""
    found: str | None = None
    last_box = -1
    opened: list[int] = []  # where the inside of each open brace begins; -1 where it is no box's
    for mark in _MARKS.finditer(text):
        match mark[0]:
            case "{" | "\\boxed{" as brace:
                opened.append(mark.end() if brace != "{" else -1)
            case "}":
                begin = opened.pop() if opened else -1
                if begin > last_box:
                    found, last_box = text[begin : mark.start()], begin
            case escaped if escaped.startswith("\\"):
                pass
            case _:
                end = text.find("\n", mark.end())
                found = text[mark.end() : end if end >= 0 else None]
    return found


def _number_in(text: str) -> Decimal | None:
    """The last number of what `text` marks, or of all of it."""
    return _last_number(_marked(text) or text)


def _last_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "").replace("\u2212", "-")) if found else None
    except InvalidOperation:
        return None
