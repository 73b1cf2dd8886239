"""The quickstart's problems, solved with a calculator instead of column by column:

    user       Mia has 61 cards, loses 44, then finds 19 more. How many cards now?
    assistant  <calc>61-44</calc>
    tool       17
    assistant  <calc>17+19</calc>
    tool       36
    assistant  Answer: 36

Owns the conversations and how the two models' pre-training sees them; of their tokens only the assistant's are learned.

Shape legend: B conversations, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from examples.quickstart.pretrain import IGNORED
from examples.quickstart.task import Problem
from examples.quickstart.tokenizer import make_tokenizer
from student_trainer.rollout.calculator import calculator
from student_trainer.types import Message

OPENING, CLOSING = "<calc>", "</calc>"
ROLES = ("user", "assistant", "tool")
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WRONG_BY = 1
"""What `off_calculator` adds to each result."""


def tokenizer_for(seed: int) -> PreTrainedTokenizerFast:
    """The quickstart's, with a chat template and a token for each of its marks."""
    tokenizer = make_tokenizer(seed)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{role}|>" for role in ROLES]})
    tokenizer.add_tokens([OPENING, CLOSING])  # text, which evaluation shows
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def conversation(problem: Problem) -> list[Message]:
    """The whole of it. The lines of a solution are `61-44: … -> 17`, twice, and the answer."""
    turns: list[Message] = [{"role": "user", "content": problem.question}]
    *steps, answer = problem.solution.split("\n")
    for step in steps:
        call, result = step.split(":")[0], step.rsplit(" ", 1)[1]
        turns += [
            {"role": "assistant", "content": f"{OPENING}{call}{CLOSING}"},
            {"role": "tool", "content": result},
        ]
    return [*turns, {"role": "assistant", "content": answer}]


def encode(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """As pretrain.encode: right-padded ids [B, T] and targets [B, T], the next token where the assistant writes it (the
    end of its turn included), IGNORED elsewhere."""
    rows = [_row(conversation(problem), tokenizer) for problem in problems]
    width = max(len(row) for row, _ in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    target = torch.full((len(rows), width), IGNORED)
    for n, (row, learned) in enumerate(rows):
        ids[n, : len(row)] = torch.tensor(row)
        target[n, : len(row) - 1] = torch.tensor(row[1:]).where(torch.tensor(learned[1:]), IGNORED)
    return ids, target


def _row(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[bool]]:
    """Ids as the template has them, and which of them the assistant writes."""
    row: list[int] = []
    learned: list[bool] = []
    for message in messages:
        opening = tokenizer(f"<|{message['role']}|>", add_special_tokens=False)["input_ids"]
        rest = tokenizer(f"{message['content']}<|end|>", add_special_tokens=False)["input_ids"]
        row += opening + rest
        learned += [False] * len(opening) + [message["role"] == "assistant"] * len(rest)
    return row, learned


def off_calculator(messages: Sequence[Message]) -> list[Message]:
    """A calculator whose results are WRONG_BY too large: shows whether anybody reads them."""
    return [
        {**m, "content": str(int(m["content"]) + WRONG_BY)} if m["content"].lstrip("-").isdigit() else m
        for m in calculator(messages)
    ]
