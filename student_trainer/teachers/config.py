"""Who teaches: the `teacher` section of the configuration, and `teachers` and `teaching` in its place for several."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, SecretStr, field_validator, model_validator

from student_trainer.data.views import QUESTION
from teacher_api import compression
from teacher_api.endpoints import urls_of
from teacher_api.settings import Section
from teacher_api.tls import SECURE_SCHEMES

ONLY = ""
"""Name of the teacher of a run that has one."""
FIGURES = ("delta", "student_mass", "teacher_mass", "tokens", "step")
"""What a step may say of one of several teachers, as NAME/delta; times apart, by which nothing is ranked."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class TeacherConfig(Section):
    """The service that scores, and what is asked of it."""

    url: tuple[str, ...] = ()
    """grpc://host:port, grpcs://…, http://… or https://… of a running teacher; openai+http://host:port/v1 or
    openai+https://… of a stock `vllm serve`, with ?model=NAME where it serves several. Several of ours, repeated or
    with commas between them, are replicas of one teacher."""
    tokenizer: str = ""
    """With an openai+ URL: directory of the tokenizer that the teacher was started with, which a stock server can't be
    asked for; empty: it is taken to be the student's, with a warning."""
    model: str = ""
    """Instead of a URL: a model to serve from a child process of this run, stopped when the run ends. `self`: the
    student as it was at an earlier step; `ema`: its moving average (optim.ema_decay). (A directory of that name is
    ./self.)"""
    refresh_every: int = Field(0, ge=0)
    """With model self or ema: every so many steps the child is started again with the student of that step. 0: it
    stays what the run began with."""
    serve_args: tuple[str, ...] = ()
    """With `model`: further arguments of the child's command line, such as --dtype=bfloat16."""
    visible_devices: str = ""
    """With `model`: CUDA_VISIBLE_DEVICES of the child, such as 1 or 0,1; empty: as this process has it."""
    name: str = Field("", max_length=128)
    """One of the teachers that the server offers beside its base, such as a LoRA adapter; empty: the base. With
    `model` an adapter of the child's, as given in serve_args by --lora.NAME=DIR."""
    prompt_template: str = ""
    """Another prompt for the teacher than the student's: text around `{question}`, the record's own, in place of
    data.prompt_template, in which `{answer}` is the reference answer and `{hint}` the field of `hint_key`. It goes
    through the same chat template; only the completion is compared. Other braces stay as they are."""
    prompt_template_file: str = ""
    """A text file that holds that template instead."""
    system_prompt: str | None = None
    """Another system prompt for the teacher, with the same places."""
    hint_key: str | None = None
    """Field of the data's records that `{hint}` stands for."""
    max_prompt_tokens: int | None = Field(None, ge=1)
    """Longest prompt as the teacher sees it, where that is another; beyond it data.overlong decides. Unset: no limit
    but the teacher's own."""
    top_k: int | Literal["all"] = 64
    """Most likely ids per position that the teacher sends; all: its whole distribution (small vocabularies)."""
    value_type: Literal["float32", "float16"] = "float32"
    """Of the top-k logprobs on the wire; float16 halves the traffic at 3 significant digits."""
    compression: Literal["none", "zstd"] = "none"
    """Of requests and answers; zstd needs the extra of that name and a teacher that offers it. The numbers stay exactly
    the same, and little is saved: logprobs hardly compress."""
    api_key: SecretStr = SecretStr("")
    """Sent as a bearer token. Better in the environment (STUDENT_TEACHER__API_KEY) than in a file."""
    tls_cert: str = ""
    """File of the run's own certificate (PEM), for a server that asks for one (its --tls-client-ca)."""
    tls_key: str = ""
    """File of its key, without a password."""
    tls_ca: str = ""
    """File of the authorities of which the server's certificate must be; empty: those of the system and environment."""
    experiment: str = Field("", max_length=128)
    """Name under which a shared teacher counts this run, and divides its time: runs of one experiment have one part
    together. Empty: the run directory's, so that each run is an experiment."""
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
    def _replicas_of_one(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return urls_of(value) if value else value

    @field_validator("top_k")
    @classmethod
    def _not_negative(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 0:
            raise ValueError(f"got {value}, expected 0 or more, or all")
        return value

    @property
    def is_past(self) -> bool:
        """Whether it is the student's own past."""
        return self.model in ("self", "ema")

    @model_validator(mode="after")
    def _refreshed_from_the_student_alone(self) -> TeacherConfig:
        if self.refresh_every and not self.is_past:
            raise ValueError(
                f"refresh_every: got {self.refresh_every} with model {self.model!r}, expected none: only self and ema "
                "change while the student learns"
            )
        if self.model == "ema" and not self.refresh_every:
            raise ValueError("refresh_every: not set with model ema, expected the steps after which it is served anew")
        return self

    @property
    def is_privileged(self) -> bool:
        """Whether it sees another prompt than the student."""
        return bool(self.prompt_template or self.prompt_template_file or self.system_prompt is not None)

    @model_validator(mode="after")
    def _one_view(self) -> TeacherConfig:
        if self.prompt_template and self.prompt_template_file:
            raise ValueError("prompt_template_file: got one beside prompt_template, expected one of the two")
        if self.prompt_template and QUESTION not in self.prompt_template:
            raise ValueError(f"prompt_template {self.prompt_template!r} has no {QUESTION}: the question would be lost")
        for name in ("hint_key", "max_prompt_tokens"):
            if getattr(self, name) is not None and not self.is_privileged:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} without prompt_template or system_prompt, expected none: the "
                    "teacher sees the student's prompt"
                )
        return self

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
    def _files_for_a_connection_with_tls(self) -> TeacherConfig:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError(
                f"tls_key: got {self.tls_key!r} with tls_cert {self.tls_cert!r}, expected both: a certificate and "
                "its key"
            )
        clear = [url for url in self.url if not url.startswith(tuple(f"{s}://" for s in SECURE_SCHEMES))]
        for name in ("tls_cert", "tls_ca"):
            if getattr(self, name) and (clear or not self.url):
                where = clear[0] if clear else "a teacher that the run starts itself"
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} with {where}, expected none: that is in the clear "
                    "(grpcs:// and https:// are not)"
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


class NamedTeacherConfig(TeacherConfig):
    """One of several."""

    domains: tuple[str, ...] = ()
    """With teaching.by domain: the domains whose prompts it teaches; none named: the one of its own name."""
    weight: float | None = Field(None, gt=0, allow_inf_nan=False)
    """With teaching.by mixture or sample: its share, relative to the others'; unset: 1."""


class TeachingConfig(Section):
    """How several teachers share the work."""

    by: Literal["domain", "mixture", "sample"] = "domain"
    """domain: a prompt's domain has one teacher. mixture: the target at every position is the weighted mean of all
    teachers' distributions. sample: each sample has one teacher, drawn by weight from the seed and its number."""


def check_views(teachers: Mapping[str, TeacherConfig], *, on_prompt: bool, packed_text: bool) -> None:
    """Raises ValueError where a teacher is to see another prompt and there is none, or it is to be compared."""
    for name, one in teachers.items():
        if one.is_privileged and (on_prompt or packed_text):
            key = "prompt_template" if one.prompt_template or one.prompt_template_file else "system_prompt"
            why = "loss.on_prompt: only completions can be compared" if on_prompt else "data.format packed_text"
            raise ValueError(f"{prefix(name)}.{key}: got one with {why}, expected none")


def prefix(name: str) -> str:
    """What the keys of the teacher `name` begin with."""
    return f"teachers.{name}" if name else "teacher"


def check_metric(metric: str, teachers: Mapping[str, NamedTeacherConfig]) -> None:
    """Raises ValueError for a checkpoint.metric that is of a teacher, but of none of these, or no figure of theirs: no
    step would have it, and nothing be ranked."""
    known = [f"{name}/{figure}" for name in teachers for figure in FIGURES]
    if "/" not in metric or metric in known:
        return
    near = difflib.get_close_matches(metric, known, n=1)
    meant = f" (did you mean {near[0]}?)" if near else ""
    expected = f"one of {', '.join(known)}" if known else "one without a slash: no teachers have names here"
    raise ValueError(f"checkpoint.metric: got {metric!r}, expected {expected}{meant}")


def check_teachers(
    teacher: TeacherConfig,
    teachers: Mapping[str, NamedTeacherConfig],
    teaching: TeachingConfig,
    domains: Sequence[str],
) -> None:
    """What must hold between the three sections.

    Args:
        domains: names of data.domains.

    Raises:
        ValueError: both ways of naming teachers; an option that the choice of teachers leaves without effect; or two
            that contradict each other.
    """
    if teachers and teacher != TeacherConfig():
        raise ValueError(
            f"teacher: got it beside teachers ({', '.join(teachers)}), expected one of them; give each of several "
            "teachers its own section, as teachers.NAME.url=…"
        )
    if not teachers and teaching != TeachingConfig():
        raise ValueError(f"teaching.by: got {teaching.by} without teachers, expected several (teachers.NAME.url=…)")
    named: Mapping[str, TeacherConfig] = teachers or {ONLY: teacher}
    for name, one in named.items():
        if bool(one.url) == bool(one.model):
            got = "both" if one.url else "neither"
            flags = "" if name else " (--teacher-url)", "" if name else " (--teacher-model)"
            where = prefix(name)
            raise ValueError(f"expected one of {where}.url{flags[0]} and {where}.model{flags[1]}, got {got}")
    if teachers:
        _check_sharing(teachers, teaching.by)
    if teachers and teaching.by == "domain":
        _check_domains(teachers, domains)


def _check_sharing(teachers: Mapping[str, NamedTeacherConfig], by: str) -> None:
    idle = "weight" if by == "domain" else "domains"
    for name, one in teachers.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"teachers: got the name {name!r}, expected up to 64 letters, digits, dashes, underscores")
        if getattr(one, idle):
            raise ValueError(f"teachers.{name}.{idle}: got {getattr(one, idle)} with teaching.by {by}, expected none")
    kinds = {one.top_k == "all" for one in teachers.values()}
    if by == "mixture" and len(kinds) > 1:
        raise ValueError(
            "teachers.*.top_k: got all for some and a number for others with teaching.by mixture, expected all for "
            "every teacher or for none"
        )


def _check_domains(teachers: Mapping[str, NamedTeacherConfig], domains: Sequence[str]) -> None:
    """Each domain of the data has one teacher, and each teacher one of them."""
    owners: dict[str, str] = {}
    for name, one in teachers.items():
        for domain in domains_of(name, one):
            other = owners.setdefault(domain, name)
            if other != name:
                raise ValueError(
                    f"teachers.{name}.domains: {domain!r} is taught by teachers.{other}, expected one teacher"
                )
            if domain not in domains:
                expected = f"one of {', '.join(domains)}" if domains else "data.domains to name some"
                raise ValueError(f"teachers.{name}.domains: the data has no {domain!r}, expected {expected}")
    for domain in domains:
        if domain not in owners:
            raise ValueError(
                f"data.domains: {domain!r} has no teacher, expected it in the domains of one of {', '.join(teachers)}"
            )


def domains_of(name: str, config: NamedTeacherConfig) -> tuple[str, ...]:
    """The domains that the teacher `name` teaches."""
    return config.domains or (name,)
