"""Where prompts, answers and text come from and how they are put to the student: the `data` section of the
configuration. Checks what one section can know of itself; what other sections make idle is config.py's of the trainer.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from student_trainer.data import presets
from student_trainer.data.presets import PresetName
from teacher_api.settings import Section

PLACE = "{question}"


class PromptConfig(Section):
    """One source of prompts."""

    preset: PresetName | None = None
    """A dataset by name: fills in source, subset, keys and template where they are not given. With a `source` of your
    own, such as a local copy, it says which fields that has."""

    source: str = ""
    """A file (.txt with one prompt per line, .jsonl, .json, .parquet, .csv), a directory of such files of one kind, a
    hub dataset id `org/name`, or your own `package.module:Class` (called without arguments; iterating over it gives
    mappings)."""

    split: str = "train"
    """Split of a hub dataset."""

    subset: str | None = None
    """Configuration name of a hub dataset that has several."""

    local_files_only: bool = False
    """Hub datasets: use what is in the local cache, and never reach out."""

    question_key: str | None = None
    """Field that holds the user's question. Unset: the first of `question`, `prompt`, `problem`, `instruction`,
    `input`, `query`, `text` that the first record has."""

    prompt_key: str | None = None
    """Field that holds a finished prompt: it is tokenised as it stands, without system prompt or templates. A list of
    `role`/`content` messages there goes through the tokenizer's chat template. Excludes `question_key`."""

    messages_key: str | None = None
    """Field that holds a whole conversation of `role`/`content` messages: what comes before the last turn of the
    assistant is the prompt, that turn is the answer. Excludes `question_key` and `prompt_key`."""

    answer_key: str | None = None
    """Field that holds the reference answer, for evaluation and for fixed data. Unset: `answer` where records have
    it."""

    system_key: str | None = None
    """Field that holds a system prompt of the record's own."""

    system_prompt: str | None = None
    """System prompt of records without one of their own."""

    template: Literal["auto", "chat", "plain"] = "auto"
    """`chat`: the tokenizer's chat template. `plain`: the text alone (a system prompt goes before it, with an empty
    line between). `auto`: chat if the tokenizer has a chat template."""

    prompt_template: str = PLACE
    """Text around the question, `{question}` being its place. Other braces stay as they are."""

    prompt_template_file: str = ""
    """A text file that holds the prompt template instead."""

    add_generation_prompt: bool = True
    """Chat only: end the prompt with the opening of the assistant's turn."""

    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt, in tokens; unset: no limit."""

    overlong: Literal["error", "drop"] = "error"
    """What happens to a prompt over `max_prompt_tokens`, or with a fixed answer over `max_answer_tokens`: stop with an
    error, or leave it out and count it. Nothing is ever cut."""

    limit: int | None = Field(default=None, ge=1)
    """Use only the first so many records of the source."""

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, values: Any) -> Any:
        return presets.apply(values, cls.model_fields) if isinstance(values, dict) else values

    @field_validator("prompt_template")
    @classmethod
    def _has_a_place(cls, value: str) -> str:
        if PLACE not in value:
            raise ValueError(f"prompt_template {value!r} has no {PLACE}: the question would be lost")
        return value

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if self.prompt_key is not None:
            self._alone(
                "prompt_key takes the prompt as it stands",
                ("question_key", "messages_key", "system_key", "system_prompt"),
            )
        if self.messages_key is not None:
            self._alone("messages_key takes the conversation as it stands", ("question_key", "answer_key"))
        if self.prompt_template_file and self.prompt_template != PLACE:
            raise ValueError("prompt_template_file: got one beside prompt_template, expected one of the two")
        return self

    def _alone(self, why: str, others: tuple[str, ...]) -> None:
        clash = [name for name in others if getattr(self, name) is not None]
        if self.prompt_template != PLACE:
            clash.append("prompt_template")
        if self.prompt_template_file:
            clash.append("prompt_template_file")
        if clash:
            raise ValueError(f"{why}; remove {', '.join(clash)}")

    @model_validator(mode="after")
    def _nothing_idle(self) -> Self:
        limits = [name for name in ("max_prompt_tokens", "max_answer_tokens") if name in type(self).model_fields]
        if self.overlong == "drop" and not any(getattr(self, name) for name in limits):
            raise ValueError(f"overlong: got drop without {' or '.join(limits)}; expected both, or neither")
        if self.template == "plain" and not self.add_generation_prompt:
            raise ValueError(
                "add_generation_prompt: got false with template plain, expected a chat template to leave it to"
            )
        return self


class SourceConfig(PromptConfig):
    """One source of training data."""

    format: Literal["prompts", "packed_text"] = "prompts"
    """`packed_text`: the records are documents; they are joined with the end token between them and cut into pieces of
    `seq_length` + 1 tokens, every one of which but the first is trained on. Fixed data only."""

    text_key: str = "text"
    """Packed text: field that holds the document."""

    seq_length: int = Field(1024, ge=1)
    """Packed text: tokens trained on per piece. What is left at the end of the source is no whole piece, and left
    out."""

    streaming: bool = False
    """Read records when they are needed and keep none: for what does not fit in memory. A hub dataset is read over the
    network without downloading it first, or from the local cache with `local_files_only`."""

    completion_key: str | None = None
    """Fixed data: field that holds the completion to train on, where that is not the reference answer."""

    fixed_source: str = ""
    """Fixed data: a file that `teacher-generate` wrote for these prompts; its completions take the place of the
    records' answers."""

    max_answer_tokens: int | None = Field(default=None, ge=1)
    """Longest fixed completion, in tokens, its end token included; unset: no limit. See `overlong`."""

    @model_validator(mode="after")
    def _one_format(self) -> Self:
        if self.format == "packed_text":
            idle = [name for name in _ONLY_PROMPTS if getattr(self, name) != type(self).model_fields[name].default]
            if idle:
                raise ValueError(f"{idle[0]}: got {getattr(self, idle[0])!r} with format packed_text, expected none")
        else:
            for name in ("text_key", "seq_length"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"{name}: got {getattr(self, name)!r} with format prompts, expected none: it is packed_text's"
                    )
        return self

    @model_validator(mode="after")
    def _one_answer(self) -> Self:
        if self.fixed_source and self.completion_key is not None:
            raise ValueError("completion_key: got one beside fixed_source, expected one of the two")
        if self.messages_key is not None and self.completion_key is not None:
            raise ValueError("completion_key: got one beside messages_key, whose last turn is the completion")
        if self.streaming and self.format == "prompts" and self.max_prompt_tokens is None:
            raise ValueError(
                "max_prompt_tokens: not set with streaming; expected a limit, as nobody can look for the longest"
            )
        return self


_ONLY_PROMPTS = (
    "question_key", "prompt_key", "messages_key", "answer_key", "completion_key", "system_key", "system_prompt",
    "template", "prompt_template", "prompt_template_file", "add_generation_prompt", "max_prompt_tokens",
    "max_answer_tokens", "overlong", "fixed_source",
)  # fmt: skip


class DomainConfig(SourceConfig):
    """One of several sources."""

    name: str = Field(min_length=1, max_length=128)
    """What its prompts are known by: in the metrics, and where teachers are chosen by domain."""

    weight: float = Field(1.0, gt=0.0, allow_inf_nan=False)
    """Share of prompts that come from it, relative to the other domains' weights."""

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if not self.source:
            raise ValueError(f"domain {self.name!r} has no source: name a file of prompts")
        return self


class DataConfig(SourceConfig):
    """All training data."""

    domains: tuple[DomainConfig, ...] = ()
    """Several sources instead of one, each with `name`, `weight` and any of the keys above. Every prompt is drawn from
    one of them at random, by weight."""

    on_policy_fraction: float = Field(1.0, ge=0.0, le=1.0)
    """λ: the share of training on completions that the student samples; the rest is on fixed data, the completions that
    came with the prompts or that a teacher wrote."""

    mix: Literal["step", "sample"] = "step"
    """What λ decides on: whole steps, or each sample by itself."""

    shuffle: bool = True
    """A new order every epoch, a pure function of the seed; false: the source's order, over and over."""

    shuffle_buffer: int = Field(1000, ge=1)
    """Streaming: so many prompts or pieces are read at a time and given out in a random order."""

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if not self.domains:
            return self
        mine = [n for n in SourceConfig.model_fields if getattr(self, n) != SourceConfig.model_fields[n].default]
        if mine:
            raise ValueError(f"{mine[0]}: got {getattr(self, mine[0])!r} beside domains, expected it in each of them")
        names = [domain.name for domain in self.domains]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"domains: got {name!r} twice, expected a name of its own for each")
        return self

    @model_validator(mode="after")
    def _nothing_idle_in_the_mix(self) -> Self:
        if self.mix == "sample" and self.on_policy_fraction in (0.0, 1.0):
            raise ValueError(
                f"mix: got 'sample' with on_policy_fraction {self.on_policy_fraction:g}, expected none: nothing is "
                "mixed"
            )
        buffer = type(self).model_fields["shuffle_buffer"].default
        if self.shuffle_buffer != buffer and not (self.shuffle and any(s.streaming for s in self.sources)):
            raise ValueError(
                f"shuffle_buffer: got {self.shuffle_buffer}, expected none: it is for shuffle with streaming"
            )
        for source in self.sources:
            self._fits(source)
        return self

    def _fits(self, source: SourceConfig) -> None:
        """Refuses what λ leaves idle, or can't do, in one source."""
        if source.format == "packed_text" and self.on_policy_fraction != 0.0:
            raise ValueError(
                f"on_policy_fraction: got {self.on_policy_fraction:g} with format packed_text, expected 0: text has no "
                "prompts to sample from"
            )
        given = presets.PRESETS.get(source.preset or "", {})
        idle = ["fixed_source"] if source.fixed_source else []
        idle += [n for n in ("completion_key", "max_answer_tokens") if getattr(source, n) not in (None, given.get(n))]
        if self.on_policy_fraction == 1.0 and idle:
            raise ValueError(
                f"{idle[0]}: got {getattr(source, idle[0])!r} with on_policy_fraction 1, expected none: no step is on "
                "fixed data"
            )
        unbounded = source.streaming and source.format == "prompts" and source.max_answer_tokens is None
        if self.on_policy_fraction < 1.0 and unbounded:
            raise ValueError(
                "max_answer_tokens: not set with streaming and fixed data; expected a limit, as nobody can look for "
                "the longest"
            )

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """All of them: the domains, or this section itself."""
        return self.domains or (self,)

    @property
    def needs_fixed(self) -> bool:
        """Whether some samples are fixed data."""
        return self.on_policy_fraction < 1.0

    @property
    def named(self) -> str:
        """What to call the data in messages."""
        return ", ".join(f"{domain.name} ({domain.source})" for domain in self.domains) or self.source
