"""From a record to the token ids of its prompt. Owns keys, templates and special tokens; invariants: no end-of-sequence
token is appended, and a begin-of-sequence token is there exactly as the tokenizer puts it, once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from student_trainer.data.config import PLACE, PromptConfig
from student_trainer.data.errors import DataError
from student_trainer.data.views import View
from student_trainer.types import Message, Prompt
from teacher_api.types import IntArray

QUESTION_KEYS = ("question", "prompt", "problem", "instruction", "input", "query", "text")
ANSWER_KEY = "answer"


@dataclass(frozen=True, slots=True)
class _Rendered:
    text: str
    token_ids: IntArray
    messages: tuple[Message, ...] = ()  # that the chat template made it of

    def prompt(self, index: int, answer: str | None, domain: str) -> Prompt:
        return Prompt(index, self.token_ids, self.text, answer, domain=domain, messages=self.messages)


class Renderer:
    """Turns records into prompts; keys are settled by the first record.

    Args:
        tokenizer: a transformers tokenizer.
        first: the first record, and `where` it was found.
    Raises:
        DataError: a configured key is not in the first record, or the tokenizer lacks the chat template asked for.
    """

    def __init__(self, config: PromptConfig, tokenizer: Any, first: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.tokenizer = tokenizer
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if config.template == "chat" and not has_template:
            raise DataError("data.template is `chat`, but the tokenizer has no chat template; use `plain` or `auto`")
        self.is_chat = has_template and config.template != "plain"
        if not self.is_chat and not config.add_generation_prompt:
            raise DataError(
                "data.add_generation_prompt: got false, but the tokenizer has no chat template; expected true, or a "
                "tokenizer with one"
            )
        self.prompt_template = _template_of(config)
        named = config.messages_key or config.prompt_key or config.question_key
        self.question_key = named or _first_present(QUESTION_KEYS, first, where)
        self.answer_key = config.answer_key or (ANSWER_KEY if ANSWER_KEY in first else None)

    def prompt(self, index: int, where: str, record: Mapping[str, Any], *, domain: str = "") -> Prompt:
        """The prompt of one record; `index` is its place in the source.

        Raises:
            DataError: a field is missing, isn't text, or renders to nothing.
        """
        body = field_of(record, self.question_key, where)
        if self.config.messages_key is not None:
            return self._from_conversation(index, where, body, record, domain)
        if isinstance(body, list) and self.config.prompt_key is not None:
            rendered = self._from_messages(_messages(body, f"{where}: field {self.question_key!r}"))
        else:
            question = string_of(body, self.question_key, where)
            if not question.strip():
                raise DataError(f"{where}: field {self.question_key!r} is empty")
            rendered = self._from_question(question, self._system(record, where))
        if not len(rendered.token_ids):
            raise DataError(f"{where}: the prompt has no tokens")
        return rendered.prompt(index, self._answer(record, where), domain)

    def _from_conversation(self, index: int, where: str, body: Any, record: Mapping[str, Any], domain: str) -> Prompt:
        opening, answer = self._opening(body, where, record)
        return self._from_messages(opening).prompt(index, answer, domain)

    def _opening(self, body: Any, where: str, record: Mapping[str, Any]) -> tuple[list[dict[str, str]], str]:
        """Messages of the prompt, and with data.messages_key the turn of the assistant that follows."""
        place = f"{where}: field {self.question_key!r}"
        if not isinstance(body, list):
            raise DataError(f"{place} is {type(body).__name__}; expected a list of messages")
        messages = _messages(body, place)
        if self.config.messages_key is None:
            return list(messages), ""
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        if last == 0:
            raise DataError(f"{place}: no turn of the assistant after another; expected a question and its answer")
        opening = messages[:last]
        system = self._system(record, where)
        if system and opening[0]["role"] != "system":
            opening = [{"role": "system", "content": system}, *opening]
        return opening, messages[last]["content"]

    def seen_by(self, view: View, prompt: Prompt, where: str, record: Mapping[str, Any]) -> IntArray:
        """Token ids of `prompt` as a teacher sees it, by the same rules as the student's.

        In a list of messages `{question}` is the last turn of the user, which the template takes the place of.

        Raises:
            DataError: what the view shows is not there, or renders to nothing.
        """
        hint = None if view.hint_key is None else _text_of(field_of(record, view.hint_key, where), view.hint_key, where)
        body = record[self.question_key]
        messages = self._opening(body, where, record)[0] if isinstance(body, list) else []
        turn = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        if messages and turn < 0:
            raise DataError(f"{where}: field {self.question_key!r} has no turn of the user to put {view.key} around")
        values = {"question": messages[turn]["content"] if messages else body, "answer": prompt.answer, "hint": hint}
        system = None if view.system_prompt is None else view.filled(view.system_prompt, values, where)
        as_it_stands = PLACE if messages or self.config.prompt_key else self.prompt_template
        user = view.filled(view.template or as_it_stands, values, where)
        if messages:
            messages[turn] = {"role": "user", "content": user}
            token_ids = self._from_messages(_under(system, messages)).token_ids
        else:
            token_ids = self._from_user(user, self._system(record, where) if system is None else system).token_ids
        if not len(token_ids):
            raise DataError(f"{where}: the prompt that {view.key} makes for the teacher has no tokens")
        return token_ids

    def _from_question(self, question: str, system: str | None) -> _Rendered:
        if self.config.prompt_key is not None:
            return _Rendered(question, self._encode(question, special_tokens=True))
        # Not str.format: braces are common in prompts (code, LaTeX) and must not be read as fields.
        return self._from_user(self.prompt_template.replace(PLACE, question), system)

    def _from_user(self, user: str, system: str | None) -> _Rendered:
        if not self.is_chat or self.config.prompt_key is not None:
            text = f"{system}\n\n{user}" if system else user
            return _Rendered(text, self._encode(text, special_tokens=True))
        opening = [{"role": "system", "content": system}] if system else []
        return self._from_messages([*opening, {"role": "user", "content": user}])

    def _from_messages(self, messages: list[dict[str, str]]) -> _Rendered:
        if not self.is_chat:
            raise DataError("a list of messages needs a tokenizer with a chat template, and data.template not `plain`")
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=self.config.add_generation_prompt
        )
        # The template writes its own special tokens, the begin-of-sequence one included.
        return _Rendered(text, self._encode(text, special_tokens=False), tuple(messages))

    def _encode(self, text: str, *, special_tokens: bool) -> IntArray:
        bare = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        bos = getattr(self.tokenizer, "bos_token", None)
        if not special_tokens or (bos and text.startswith(bos)):
            return np.asarray(bare, dtype=np.int32)
        ids = list(self.tokenizer(text)["input_ids"])
        # An end-of-sequence token that the tokenizer appends would tell the student that everything has been said;
        # special tokens at the end of the text itself stay.
        appended = self._trailing_special(ids) - self._trailing_special(bare)
        return np.asarray(ids[: len(ids) - max(appended, 0)], dtype=np.int32)

    def _trailing_special(self, ids: list[int]) -> int:
        special = set(self.tokenizer.all_special_ids)
        return sum(1 for _ in itertools.takewhile(special.__contains__, reversed(ids)))

    def _system(self, record: Mapping[str, Any], where: str) -> str | None:
        key = self.config.system_key
        if key is None:
            return self.config.system_prompt
        value = field_of(record, key, where)
        return self.config.system_prompt if value is None else string_of(value, key, where)

    def _answer(self, record: Mapping[str, Any], where: str) -> str | None:
        if self.answer_key is None:
            return None
        is_asked_for = self.config.answer_key is not None
        value = field_of(record, self.answer_key, where) if is_asked_for else record.get(self.answer_key)
        # Numbers are natural answers; their shortest spelling is what a grader compares.
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _number_of(value)
        # Those who read answers say which problems have none: training on the student's own needs prompts alone.
        if value is None or not (is_asked_for or isinstance(value, str)):
            return None
        return string_of(value, self.answer_key, where)


def _under(system: str | None, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages with `system` in place of their own system prompt, or before them."""
    if system is None:
        return messages
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    return [{"role": "system", "content": system}, *rest]


def _number_of(value: float) -> str | None:
    """As text; NaN is how tables of numbers say that there is none."""
    return str(value) if math.isfinite(value) else None


def _text_of(value: Any, key: str, where: str) -> str | None:
    """A field that may be a number, or nothing."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number_of(value)
    return None if value is None else string_of(value, key, where)


def _template_of(config: PromptConfig) -> str:
    """The prompt template, from its file where there is one."""
    if not config.prompt_template_file:
        return config.prompt_template
    return read_template(config.prompt_template_file, "data.prompt_template_file")


def read_template(file: str, key: str) -> str:
    """The text of a template's file, which `key` names."""
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig").removesuffix("\n")
    except OSError as error:
        raise DataError(f"{key} {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{key} {path}: not UTF-8 text: {error.reason}") from None
    if PLACE not in text:
        raise DataError(f"{key} {path}: has no {PLACE}: the question would be lost")
    return text


def _first_present(keys: tuple[str, ...], record: Mapping[str, Any], where: str) -> str:
    for key in keys:
        if key in record:
            return key
    raise DataError(
        f"{where}: none of the usual question fields ({', '.join(keys)}) is there; it has {_names(record)}. "
        "Set data.question_key"
    )


def field_of(record: Mapping[str, Any], key: str, where: str) -> Any:
    """A field that must be there."""
    if key not in record:
        raise DataError(f"{where}: no field {key!r}; it has {_names(record)}")
    return record[key]


def string_of(value: Any, key: str, where: str) -> str:
    """A field's value that must be text."""
    if not isinstance(value, str):
        hint = "; a list of messages goes in data.prompt_key" if isinstance(value, list) else ""
        raise DataError(f"{where}: field {key!r} is {type(value).__name__}; expected text{hint}")
    return value


def _messages(value: list[Any], where: str) -> list[dict[str, str]]:
    for position, message in enumerate(value):
        is_message = isinstance(message, Mapping) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        if not is_message:
            raise DataError(f"{where}: message {position} needs text in `role` and `content`; got {message!r:.80}")
    if not value:
        raise DataError(f"{where}: no messages")
    return value


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(map(str, record)) or "no fields"
