"""Environments and chat templates for tests of conversations."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tinymodels import save_tiny, tiny_tokenizer

from student_trainer.types import Prompt, Rollout

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOKENIZER_SIZE, WIDTH = 300, 304  # all bytes are in it
STOPS = tuple(range(3, TOKENIZER_SIZE, 6))
"""Ids at which a random model's turns end: after about five tokens."""
Messages = Sequence[Mapping[str, str]]


@functools.cache
def tokenizer(template: str | None = TEMPLATE) -> Any:
    made = copy.deepcopy(tiny_tokenizer(TOKENIZER_SIZE))
    made.chat_template = template
    return made


def save_student(path: Path, **settings: Any) -> Path:
    save_tiny(path, tokenizer_size=TOKENIZER_SIZE, logit_width=WIDTH, **settings)
    tokenizer().save_pretrained(path)
    return path


def opening(index: int, text: str, template: str = TEMPLATE) -> Prompt:
    """A prompt of one turn of the user."""
    messages = [{"role": "user", "content": text}]
    made = tokenizer(template)
    rendered = made.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = made(rendered, add_special_tokens=False)["input_ids"]
    return Prompt(index, np.asarray(ids, dtype=np.int32), rendered, messages=tuple(messages))


def number_of(messages: Messages) -> int:
    """Turns of the student so far."""
    return sum(m["role"] == "assistant" for m in messages)


def scripted(messages: Messages, turns: int = 3) -> list[dict[str, str]]:
    """Answers all turns but the last of so many."""
    n = number_of(messages)
    return (
        [] if n >= turns else [{"role": "tool", "content": f"the {n}. answer, 4 + 5"}, {"role": "user", "content": "="}]
    )


def counted(messages: Messages) -> list[dict[str, str]]:
    """Says how long the student's turn was, until a turn is long or has a vowel at its end."""
    said = messages[-1]["content"]
    return [] if said[-1:] in "aeiou" or number_of(messages) > 3 else [{"role": "tool", "content": str(len(said))}]


def failing(messages: Messages, how: str = "raise", turn: int = 2) -> Any:
    if number_of(messages) < turn:
        return [{"role": "tool", "content": "go on"}]
    if how == "raise":
        raise KeyError("a tool that\nis not there")
    if how == "exit":
        raise SystemExit(3)
    if how == "hang":
        threading.Event().wait()
    return {
        "text": "17",
        "message": [{"role": "tool"}],
        "number": [{"role": "tool", "content": 17}],
        "self": [{"role": "assistant", "content": "me"}],
    }[how]


class Scripted:
    """An engine whose turns are given: of each uid, the ids of one turn after the other. It keeps what it was asked."""

    def __init__(self, turns: Mapping[int, Sequence[Sequence[int]]], stops: Sequence[int] = (1,)) -> None:
        self.turns, self.stops = turns, stops
        self.asked: list[tuple[Prompt, int]] = []
        self.version = 0

    def sample(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> list[Rollout]:
        return list(self.stream(prompts, uids, keep_top_k=keep_top_k))

    def stream(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> Iterator[Rollout]:
        for prompt, uid in zip(prompts, uids, strict=True):
            self.asked.append((prompt, uid))
            ids = np.asarray(self.turns[uid % 2**48][uid >> 48], dtype=np.int32)
            own = -np.arange(1, len(ids) + 1, dtype=np.float32)
            kept = np.tile(np.arange(7, 7 + keep_top_k, dtype=np.int32), (len(ids), 1)) if keep_top_k else None
            finish = "eos" if int(ids[-1]) in self.stops else "length"
            yield Rollout(uid, prompt, ids, finish, own, own, kept, versions=np.full(len(ids), self.version, np.int32))

    def update(self, version: int) -> None:
        self.version = version

    def close(self) -> None:
        self.version = -1


def echo(messages: Messages, role: str, turns: int) -> list[dict[str, str]]:
    """Answers 17 in `role`."""
    return [{"role": role, "content": "17"}] if number_of(messages) < turns else []
