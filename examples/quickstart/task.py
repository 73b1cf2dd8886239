"""The quickstart's task: two-step word problems with two-digit numbers, solved column by column.

    Mia has 61 cards, loses 44, then finds 19 more. How many cards now?
    61-44: 11-4=7, 6-4-1=1 -> 17
    17+19: 7+9=16, 1+1+1=3 -> 36
    Answer: 36

Pure functions of a numpy generator. A problem belongs to exactly one split, decided by its three numbers as they are
finally written, in any order and in either template: nothing in a held-out split was ever seen in training.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

Split = Literal["train", "tuning", "report"]
SPLITS: tuple[Split, ...] = ("train", "tuning", "report")

NAMES = ("Ada", "Ben", "Eva", "Finn", "Ida", "Leo", "Mia", "Noah", "Omar", "Ruth", "Tom", "Zoe")
THINGS = ("apples", "books", "cards", "coins", "eggs", "keys", "nuts", "pens", "shells", "stamps")
GAINS = ("buys", "finds", "gets", "makes", "wins")
LOSSES = ("breaks", "drops", "loses", "sells", "trades")


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem and its only accepted solution."""

    question: str
    solution: str
    answer: int
    numbers: tuple[int, int, int]


def split_of(numbers: tuple[int, int, int]) -> Split:
    """The split of a problem: 1 in 16 number triples is for tuning, 1 in 16 for the report, the rest for training.
    The order of the numbers does not count, so `61-44+19` and `61+19-44` are always on the same side."""
    bucket = zlib.crc32("-".join(map(str, sorted(numbers))).encode()) % 16
    return "report" if bucket == 0 else "tuning" if bucket == 1 else "train"


def _add(a: int, b: int) -> str:
    units = a % 10 + b % 10
    carry = units // 10
    tens = a // 10 + b // 10 + carry
    second = f"{a // 10}+{b // 10}{'+1' if carry else ''}={tens}"
    return f"{a}+{b}: {a % 10}+{b % 10}={units}, {second} -> {tens * 10 + units % 10}"


def _subtract(a: int, b: int) -> str:
    borrow = a % 10 < b % 10
    units = a % 10 + (10 if borrow else 0)
    tens = a // 10 - b // 10 - borrow
    second = f"{a // 10}-{b // 10}{'-1' if borrow else ''}={tens}"
    return f"{a}-{b}: {units}-{b % 10}={units - b % 10}, {second} -> {tens * 10 + units - b % 10}"


def _problem(rng: np.random.Generator) -> Problem:
    """One problem whose three numbers, intermediate result and answer all have two digits."""
    loses_first = bool(rng.integers(2))
    start = int(rng.integers(20, 100) if loses_first else rng.integers(10, 90))
    if loses_first:
        loss = int(rng.integers(10, start - 9))
        middle = start - loss
        gain = int(rng.integers(10, max(100 - middle, 11)))
        answer, numbers = middle + gain, (start, loss, gain)
    else:
        gain = int(rng.integers(10, 100 - start))
        middle = start + gain
        loss = int(rng.integers(10, middle - 9))
        answer, numbers = middle - loss, (start, gain, loss)
    name, thing = NAMES[rng.integers(len(NAMES))], THINGS[rng.integers(len(THINGS))]
    gains, loses = GAINS[rng.integers(len(GAINS))], LOSSES[rng.integers(len(LOSSES))]
    if loses_first:
        story = f"{loses} {loss}, then {gains} {gain} more"
        steps = f"{_subtract(start, loss)}\n{_add(middle, gain)}"
    else:
        story = f"{gains} {gain} more, then {loses} {loss}"
        steps = f"{_add(start, gain)}\n{_subtract(middle, loss)}"
    return Problem(
        question=f"{name} has {start} {thing}, {story}. How many {thing} now?",
        solution=f"{steps}\nAnswer: {answer}",
        answer=answer,
        numbers=numbers,
    )


def problems(split: Split, count: int, seed: int, stream: int = 0) -> list[Problem]:
    """`count` problems of `split`, a pure function of (split, seed, stream)."""
    rng = np.random.Generator(np.random.Philox(key=[seed, stream * len(SPLITS) + SPLITS.index(split)]))
    found: list[Problem] = []
    while len(found) < count:
        problem = _problem(rng)
        if split_of(problem.numbers) == split and problem.answer <= 99:
            found.append(problem)
    return found


def prompt_text(problem: Problem) -> str:
    """What both models read; the solution follows directly."""
    return f"{problem.question}\n"
