"""Who teaches: the `teacher` section of the configuration."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from teacher_api import compression
from teacher_api.settings import Section


class TeacherConfig(Section):
    """The service that scores, and what is asked of it."""

    url: tuple[str, ...] = ()
    """grpc://host:port, grpcs://…, http://… or https://… of a running teacher; openai+http://host:port/v1 or
    openai+https://… of a stock `vllm serve`, with ?model=NAME where it serves several. Exactly one."""
    tokenizer: str = ""
    """With an openai+ URL: directory of the tokenizer that the teacher was started with, which a stock server can't be
    asked for; empty: it is taken to be the student's, with a warning."""
    model: str = ""
    """Instead of a URL: a model to serve from a child process of this run, stopped when the run ends."""
    serve_args: tuple[str, ...] = ()
    """With `model`: further arguments of the child's command line, such as --dtype=bfloat16."""
    visible_devices: str = ""
    """With `model`: CUDA_VISIBLE_DEVICES of the child, such as 1 or 0,1; empty: as this process has it."""
    name: str = Field("", max_length=128)
    """One of the teachers that the server offers beside its base, such as a LoRA adapter; empty: the base. With
    `model` an adapter of the child's, as given in serve_args by --lora.NAME=DIR."""
    top_k: int | Literal["all"] = 64
    """Most likely ids per position that the teacher sends; all: its whole distribution (small vocabularies)."""
    value_type: Literal["float32", "float16"] = "float32"
    """Of the top-k logprobs on the wire; float16 halves the traffic at 3 significant digits."""
    compression: Literal["none", "zstd"] = "none"
    """Of requests and answers; zstd needs the extra of that name and a teacher that offers it. The numbers stay exactly
    the same, and little is saved: logprobs hardly compress."""
    api_key: SecretStr = SecretStr("")
    """Sent as a bearer token. Better in the environment (STUDENT_TEACHER__API_KEY) than in a file."""
    timeout_s: float = Field(600.0, gt=0, le=86_400)
    """How long one call may take, retries included: the longest outage of the teacher that a run sits out."""
    attempt_timeout_s: float = Field(120.0, gt=0, le=86_400)
    """Longest single attempt before it is given up and retried."""
    start_timeout_s: float = Field(60.0, gt=0, le=86_400)
    """How long to wait at the start for a teacher that isn't there or is still loading."""
    max_concurrency: int = Field(8, ge=1, le=1024)
    """Requests in flight at a time, per process."""
    request_sequences: int = Field(8, ge=1, le=4096)
    """Completions per request; those of one prompt stay together."""
    accept_new_teacher: bool = False
    """Go on although the teacher is not the one this run began with. Off, that is refused."""

    @field_validator("url", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("url")
    @classmethod
    def _at_most_one(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) > 1:
            raise ValueError(f"got {len(value)} URLs ({', '.join(value)}), expected one")
        return value

    @field_validator("top_k")
    @classmethod
    def _not_negative(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 0:
            raise ValueError(f"got {value}, expected 0 or more, or all")
        return value

    @model_validator(mode="after")
    def _compression_that_both_can(self) -> TeacherConfig:
        compression.check_available(self.compression)
        if self.compression != "none" and self.url and self.url[0].startswith("openai+"):
            raise ValueError(
                f"compression: got {self.compression!r} with {self.url[0]}, expected none: a stock server has none"
            )
        return self

    @model_validator(mode="after")
    def _tokenizer_of_a_stock_server_only(self) -> TeacherConfig:
        if self.tokenizer and not (self.url and self.url[0].startswith("openai+")):
            got = self.url[0] if self.url else "no URL"
            raise ValueError(
                f"tokenizer: got {self.tokenizer!r} with {got}, expected none: only a stock server (openai+http://…) "
                "does not say which one it has"
            )
        return self

    @model_validator(mode="after")
    def _a_stock_server_has_models(self) -> TeacherConfig:
        if self.name and self.url and self.url[0].startswith("openai+"):
            raise ValueError(
                f"name: got {self.name!r} with {self.url[0]}, expected none: a stock server's teachers are models, "
                "named as ?model=NAME in the URL"
            )
        return self

    @model_validator(mode="after")
    def _nothing_for_a_child_that_is_not_started(self) -> TeacherConfig:
        for name in ("serve_args", "visible_devices"):
            if self.url and not self.model and getattr(self, name):
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} with teacher.url, expected none: it is for a teacher "
                    "that the run starts itself (teacher.model)"
                )
        return self
