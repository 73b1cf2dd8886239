"""How a conversation goes on under a chat template: what the template puts after the student's turn, and nothing before
it. Token ids that are there are never made again: text to ids and back changes them.

The template is asked with a mark in place of the student's turn, so that what follows does not depend on what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from student_trainer.rollout.calls import KEY, STUDENT
from student_trainer.types import Message, Prompt
from teacher_api.types import IntArray

MARK = "Xq7turnZ"
THINKING, THOUGHT = "<think>", "</think>"
PROBE: tuple[Message, ...] = ({"role": "user", "content": "Xq7askZ"},)
ROLES = ("tool", "user")
"""An environment's messages usually have one of these."""


class TemplateError(ValueError):
    """The chat template can't carry this conversation on; the message says why."""


class Chat:
    """A tokenizer's chat template, for conversations that grow.

    Args:
        eos_token_ids: ends of the student's turns.
    Raises:
        ValueError: there is no template, or it goes on from no turn: it renders earlier turns otherwise once more
            follows.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: Sequence[int]) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"{KEY}: the student's tokenizer has no chat template, which puts its messages into tokens"
            )
        self._tokenizer = tokenizer
        self._ends = frozenset(eos_token_ids)
        self._usable: dict[tuple[Any, ...], str] = {}
        self._probe()

    def check(self, prompt: Prompt) -> None:
        """Raises ValueError where a prompt is no opening of a conversation that the student is to go on with."""
        expected = "expected messages under the chat template, up to the opening of the student's turn"
        if not prompt.messages:
            raise ValueError(f"{KEY}: prompt {prompt.index} is text as it stands; {expected}")
        if self._rendered(prompt.messages) != prompt.text:
            raise ValueError(
                f"{KEY}: prompt {prompt.index} is not its messages as the chat template opens the student's turn after "
                f"them (data.add_generation_prompt); {expected}"
            )

    def said(self, token_ids: IntArray) -> Message:
        """A turn of the student as a message, without the token that ends it."""
        ids = token_ids[:-1] if len(token_ids) and int(token_ids[-1]) in self._ends else token_ids
        text = self._tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return {"role": STUDENT, "content": str(text)}

    def following(self, messages: Sequence[Message], answer: Sequence[Message], last_id: int) -> IntArray:
        """The ids between the student's turn and its next one: the end of the turn, as far as the student has not
        written it, `answer`, and the opening of the next turn.

        Args:
            messages: up to and with the student's turn.
            last_id: the last id of that turn.
        Raises:
            TemplateError: the template renders what the student has in front of it otherwise once `answer` follows
                (earlier thinking left out, say), leaves out part of `answer`, or fails.
        """
        self._require_usable(messages, answer)
        before = self._rendered(messages[:-1])
        after = self._rendered([*messages[:-1], _student(MARK), *answer])
        if not after.startswith(before + MARK):
            raise TemplateError(_changed(answer))
        text = after[len(before) + len(MARK) :]
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids and ids[0] == last_id:
            ids = ids[1:]
        if not ids:
            raise TemplateError("the chat template puts nothing between two turns of the student")
        return np.asarray(ids, dtype=np.int32)

    def _probe(self) -> None:
        """Refuses a template that no conversation could be carried on with. What fails on made-up messages may work on
        real ones."""
        found = []
        for role in ROLES:
            try:
                self._require_usable([*PROBE, _student(MARK)], [{"role": role, "content": MARK}])
            except TemplateError as error:
                found.append(str(error))
        if len(found) == len(ROLES):
            raise ValueError(f"{KEY}: {found[0]}")

    def _require_usable(self, messages: Sequence[Message], answer: Sequence[Message]) -> None:
        """Raises TemplateError where a turn in place of the student's, with thinking if that has some, and messages in
        place of the answer don't all come after what was there. Asked once for each such shape."""
        thinks = THOUGHT in messages[-1]["content"]
        shape = (tuple(m["role"] for m in messages), thinks, tuple((m["role"], *sorted(m)) for m in answer))
        if shape not in self._usable:
            self._usable[shape] = self._trouble(messages, answer, thinks)
        if self._usable[shape]:
            raise TemplateError(self._usable[shape])

    def _trouble(self, messages: Sequence[Message], answer: Sequence[Message], thinks: bool) -> str:
        marks = [f"{MARK}{number}" for number in range(len(answer))]
        marked = [{**m, "content": mark} for m, mark in zip(answer, marks, strict=True)]
        turn = f"{THINKING}\n{MARK}\n{THOUGHT}\n\n{MARK}" if thinks else MARK
        earlier = [{**m, "content": MARK} if m["role"] == STUDENT else m for m in messages[:-1]]
        before = self._rendered(earlier)
        after = self._rendered([*earlier, _student(turn), *marked])
        if not after.startswith(before + turn):
            return _changed(answer)
        lost = [m["role"] for m, mark in zip(answer, marks, strict=True) if mark not in after[len(before + turn) :]]
        return f"the chat template leaves out messages of role {lost[0]!r}" if lost else ""

    def _rendered(self, messages: Sequence[Message]) -> str:
        """With the opening of the student's next turn."""
        from jinja2 import TemplateError as JinjaError

        render: Callable[..., str] = self._tokenizer.apply_chat_template
        try:
            return render([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
        except (JinjaError, TypeError, KeyError) as error:
            raise TemplateError(f"the chat template fails: {' '.join(str(error).split())[:300]}") from error


def _student(content: str) -> Message:
    return {"role": STUDENT, "content": content}


def _changed(answer: Sequence[Message]) -> str:
    roles = ", ".join(dict.fromkeys(m["role"] for m in answer))
    return (
        f"the chat template renders what the student has read and written otherwise once messages of role {roles} "
        "follow, such as without its thinking; expected a template that only appends to it"
    )
