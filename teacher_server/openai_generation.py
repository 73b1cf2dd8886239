"""What an OpenAI-style completions request may ask of a teacher that writes text: the fields that such a server honours
beyond those of one that scores, their defaults (OpenAI's), and their limits."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, FiniteFloat

from teacher_api.errors import InvalidRequest, TooLarge, Unsupported
from teacher_api.types import IntArray, TeacherInfo
from teacher_server.backends.generation import Sampling
from teacher_server.config import ServerConfig
from teacher_server.openai_models import CompletionRequest, validated
from teacher_server.validation import check_ids

LOWEST_TEMPERATURE = 0.01  # vLLM takes everything below for it
MOST_STOPS = 64  # strings, and ids: vLLM's second model runner takes 128 with the model's own
_INT64 = 1 << 63


class GenerationRequest(CompletionRequest):
    """The fields that are honoured."""

    max_tokens: int | None = Field(default=16, ge=0)
    """Most tokens to write; 0: score only."""
    temperature: FiniteFloat | None = Field(default=1.0, ge=0, le=1e3)
    """Of sampling; 0: the most likely token each time. Does not touch logprobs."""
    top_p: FiniteFloat | None = Field(default=1.0, gt=0, le=1)
    """Draws from the most likely tokens that have this mass together."""
    top_k: int | None = Field(default=0, ge=-1)
    """Draws from so many of the most likely tokens; 0 and -1: from all."""
    min_p: FiniteFloat | None = Field(default=0.0, ge=0, le=1)
    """Draws from the tokens that have at least this share of the most likely one's probability."""
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    """Of the random numbers; completion i of `n` has seed + i. Null: other ones each time."""
    n: int | None = Field(default=1, ge=1)
    """Completions of each prompt."""
    stop: str | list[str] | None = None
    """Texts that end a completion; they are not part of its text."""
    stop_token_ids: list[int] | None = None
    """Ids that end a completion, beside the model's own."""

    @property
    def num_completions(self) -> int:
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def generates(self) -> bool:
        return self.max_tokens == 1 and not self.writes

    @property
    def writes(self) -> bool:
        """Scoring gives the one most likely token faster, and with the prompt's rows."""
        drawn = bool(self.temperature) or self.num_completions > 1 or bool(self.stops) or bool(self.stop_token_ids)
        return bool(self.max_tokens) and (self.max_tokens != 1 or drawn)

    def sampling(self, index: int) -> Sampling:
        """Of completion `index` of a prompt."""
        if not self.temperature:
            return Sampling(temperature=0.0)
        seed = None if self.seed is None else (self.seed + index + _INT64) % (2 * _INT64) - _INT64
        return Sampling(
            temperature=self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            min_p=self.min_p or 0.0,
            seed=seed,
        )


def generation_from_json(body: bytes, config: ServerConfig) -> GenerationRequest:
    """As openai_models.request_from_json, for a server that writes. Raises TeacherError."""
    asked = validated(body, GenerationRequest)
    if asked.max_tokens is not None and asked.max_tokens > config.max_generated_tokens:
        raise TooLarge(
            f"got {asked.max_tokens}; this server writes at most {config.max_generated_tokens} tokens a completion",
            field="max_tokens",
        )
    if asked.temperature and asked.temperature < LOWEST_TEMPERATURE:
        raise InvalidRequest(
            f"got {asked.temperature}; expected 0, which takes the most likely token, or at least {LOWEST_TEMPERATURE}",
            field="temperature",
        )
    if not asked.max_tokens and asked.num_completions > 1:
        raise Unsupported(f"got {asked.n}; expected 1 where max_tokens is 0: nothing is written", field="n")
    for name, values in (("stop", asked.stops), ("stop_token_ids", asked.stop_token_ids or ())):
        if len(values) > MOST_STOPS:
            raise TooLarge(f"{len(values)} of them; expected at most {MOST_STOPS}", field=name)
    if "" in asked.stops:
        raise InvalidRequest("an empty text; expected one or more characters", field="stop")
    return asked


def check_writing(asked: GenerationRequest, prompts: Sequence[IntArray], info: TeacherInfo) -> None:
    """What depends on the model and on the prompts. Raises TeacherError."""
    for n, ids in enumerate(prompts):
        check_ids(ids, f"prompt[{n}]", info)
    wrong = next((t for t in asked.stop_token_ids or () if not 0 <= t < info.tokenizer_size), None)
    if wrong is not None:
        raise InvalidRequest(
            f"token id {wrong}; expected 0 to {info.tokenizer_size - 1}, this teacher's tokenizer",
            field="stop_token_ids",
        )
    if len(prompts) * asked.num_completions > info.max_completions:
        raise TooLarge(
            f"{asked.num_completions} completions of {len(prompts)} prompts; expected at most {info.max_completions} "
            "in all",
            field="n",
        )
