"""The `loss` section. Its keys depend on `objective`: each objective brings its own class; `parse_loss` picks it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, field_validator

from student_trainer.losses import registry
from teacher_api.settings import Section

DEFAULT_OBJECTIVE = "reverse_kl"


class LossConfig(Section):
    """What every objective has."""

    objective: str
    """Which divergence from the teacher is minimised: a name from docs/losses.md, or `package.module:function` for one
    of your own."""

    normalise: Literal["token", "sequence"] = "token"
    """`token`: mean over the counted tokens of the global batch. `sequence`: mean within each completion, then over
    completions, so that long ones weigh no more than short ones."""

    ignore_token_ids: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Positions whose actual token is one of these do not count."""

    teacher_temperature: float = Field(1.0, gt=0.0, le=100.0)
    """Divides the teacher's logits before its softmax, on the teacher's side."""


class DivergenceConfig(LossConfig):
    """What every objective that compares two distributions has."""

    support: Literal["teacher", "student", "union"] = "teacher"
    """The ids compared at each position: the teacher's top-k, the k the student found likely when it sampled, or both.
    The actual token is always among them. With `teacher.top_k: all` the support is the whole vocabulary."""

    tail: Literal["bucket", "renormalise", "none"] = "bucket"
    """What becomes of the mass outside the support: one more outcome; both distributions rescaled to sum to one on
    the support; or left out."""

    student_temperature: float = Field(1.0, gt=0.0, le=100.0)
    """Divides the student's logits before its softmax."""


class SampledTokenConfig(LossConfig):
    """What every objective that looks at the sampled token alone has: T = 1 on both sides."""

    @field_validator("teacher_temperature")
    @classmethod
    def _is_one(cls, value: float) -> float:
        if value != 1.0:
            raise ValueError("objectives of the sampled token compare T = 1 distributions; leave it at 1")
        return value


class CustomConfig(DivergenceConfig):
    """For `objective: package.module:function`. The function gets (LossInputs, this) and returns a PerToken."""

    options: dict[str, Any] = Field(default_factory=dict)
    """Yours, handed to the function as they are."""


def parse_loss(value: Mapping[str, Any] | LossConfig) -> LossConfig:
    """The `loss` section as the config class of the objective it names (`reverse_kl` if it names none).

    Raises:
        ValueError: one line: an unknown objective or key (with the nearest right one), or a value out of bounds.
    """
    if isinstance(value, LossConfig):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"loss: expected a section of keys and values, got {value!r}")
    keys = {"objective": DEFAULT_OBJECTIVE, **value}
    name = keys["objective"]
    if not isinstance(name, str):
        raise ValueError(f"loss.objective: expected a name, got {name!r}")
    if registry.is_custom(name):
        registry.import_function(name)
        config_class: type[LossConfig] = CustomConfig
    else:
        config_class = registry.get(name).config_class
    for key in keys:
        if key not in config_class.model_fields:
            raise ValueError(_unknown_key(str(key), name, config_class))
    try:
        return config_class.model_validate(keys)
    except ValidationError as error:
        raise ValueError("; ".join(_one_line(e) for e in error.errors())) from None


LossField = Annotated[SerializeAsAny[LossConfig], BeforeValidator(parse_loss)]
"""The type of a `loss` field inside another section."""


def _unknown_key(key: str, objective: str, config_class: type[LossConfig]) -> str:
    known = [k for k in config_class.model_fields if k != "objective"]
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"loss.{key}: unknown key; did you mean loss.{near[0]}?"
    owners = [name for name in registry.names() if key in registry.get(name).config_class.model_fields]
    hint = f" (it belongs to {', '.join(owners)})" if owners else ""
    return f"loss.{key}: not a key of objective {objective!r}{hint}; its keys are {', '.join(known)}"


def _one_line(error: Any) -> str:
    where = ".".join(str(part) for part in ("loss", *error["loc"]))
    return f"{where}: {error['msg'].removeprefix('Value error, ')}, got {error['input']!r}"
