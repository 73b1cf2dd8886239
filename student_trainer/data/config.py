"""Where prompts come from and how they are put to the student: the `data` section of the configuration."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from teacher_api.settings import Section


class DataConfig(Section):
    source: str = ""
    """A file (.txt with one prompt per line, .jsonl, .json, .parquet, .csv), a hub dataset id `org/name`, or your own
    `package.module:Class` (called without arguments; iterating over it gives mappings)."""

    split: str = "train"
    """Split of a hub dataset."""

    subset: str | None = None
    """Configuration name of a hub dataset that has several."""

    question_key: str | None = None
    """Field that holds the user's question. Unset: the first of `question`, `prompt`, `problem`, `instruction`,
    `input`, `query`, `text` that the first record has."""

    prompt_key: str | None = None
    """Field that holds a finished prompt: it is tokenised as it stands, without system prompt or templates. A list of
    `role`/`content` messages there goes through the tokenizer's chat template. Excludes `question_key`."""

    answer_key: str | None = None
    """Field that holds the reference answer, read by evaluation only. Unset: `answer` where records have it."""

    system_key: str | None = None
    """Field that holds a system prompt of the record's own."""

    system_prompt: str | None = None
    """System prompt of records without one of their own."""

    template: Literal["auto", "chat", "plain"] = "auto"
    """`chat`: the tokenizer's chat template. `plain`: the text alone (a system prompt goes before it, with an empty
    line between). `auto`: chat if the tokenizer has a chat template."""

    prompt_template: str = "{question}"
    """Text around the question, `{question}` being its place. Other braces stay as they are."""

    add_generation_prompt: bool = True
    """Chat only: end the prompt with the opening of the assistant's turn."""

    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt, in tokens; unset: no limit."""

    overlong: Literal["error", "drop"] = "error"
    """What happens to a prompt over `max_prompt_tokens`: stop with an error, or leave it out and count it. Prompts are
    never cut."""

    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many records of the source."""

    shuffle: bool = True
    """A new order every epoch, a pure function of the seed; false: the source's order, over and over."""

    @field_validator("prompt_template")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        if "{question}" not in value:
            raise ValueError(f"prompt_template {value!r} has no {{question}}: the question would be lost")
        return value

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if self.prompt_key is not None:
            others = {
                "question_key": self.question_key is not None,
                "system_key": self.system_key is not None,
                "system_prompt": self.system_prompt is not None,
                "prompt_template": self.prompt_template != "{question}",
            }
            clash = [name for name, is_set in others.items() if is_set]
            if clash:
                raise ValueError(f"prompt_key takes the prompt as it stands; remove {', '.join(clash)}")
        return self

    @model_validator(mode="after")
    def _nothing_idle(self) -> Self:
        if self.overlong == "drop" and self.max_prompt_tokens is None:
            raise ValueError("overlong: got drop without max_prompt_tokens; expected both, or neither")
        if self.template == "plain" and not self.add_generation_prompt:
            raise ValueError(
                "add_generation_prompt: got false with template plain, expected a chat template to leave it to"
            )
        return self
