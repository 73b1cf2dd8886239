"""The `loss` section. Its keys depend on `objective`: each objective brings its own class; `parse_loss` picks it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from student_trainer.imports import import_function
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
    """Positions whose actual token is one of these, ids of the student's tokenizer, do not count."""

    teacher_temperature: float = Field(1.0, gt=0.0, le=100.0)
    """Divides the teacher's logits before its softmax, on the teacher's side."""

    on_prompt: bool = False
    """Prompt tokens are scored and trained on too, all but the first, which nothing predicts."""

    distill_weight: float | None = Field(None, ge=0.0, le=1.0)
    """w: the loss is (1 − w)·CE + w·D, cross-entropy counting at tokens of fixed data only. Unset: D alone. Excludes
    ce_weight and kl_weight."""

    ce_weight: float | None = Field(None, ge=0.0, le=1e3)
    """Of cross-entropy on tokens of fixed data: the loss is ce_weight·CE + kl_weight·D. Unset: 0."""

    kl_weight: float | None = Field(None, ge=0.0, le=1e3)
    """Of the objective's own value. Unset: 1."""

    staleness: Literal["none", "prefix"] = "none"
    """`prefix`: a position counts as often as the weights being trained would come to it, by the ratio q_now/q_old of
    the tokens before it. For samples that are older than the weights."""

    staleness_cap: float = Field(2.0, ge=1.0, le=1e4)
    """Largest weight that a ratio over a prefix may give."""

    behaviour: Literal["none", "weight"] = "none"
    """`weight`: corrects for tempered sampling by q_old/b. Objectives of the sampled token: of that token. Divergences,
    which don't depend on it: of the tokens before it."""

    behaviour_cap: float = Field(2.0, ge=1.0, le=1e4)
    """Largest weight that q_old/b may give."""

    ratio_bounds: tuple[float, float] | None = None
    """[lo, hi]: tokens whose q_now/q_old is outside don't count. Unset: all do."""

    @property
    def totals(self) -> tuple[float, float]:
        """Factors of cross-entropy and of the objective's value."""
        if self.distill_weight is not None:
            return 1.0 - self.distill_weight, self.distill_weight
        return self.ce_weight or 0.0, 1.0 if self.kl_weight is None else self.kl_weight

    @field_validator("ratio_bounds")
    @classmethod
    def _around_one(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not 0.0 <= value[0] < 1.0 < value[1]:
            raise ValueError("expected [lo, hi] with 0 <= lo < 1 < hi")
        return value

    @model_validator(mode="after")
    def _one_form_of_total(self) -> Self:
        others = [name for name in ("ce_weight", "kl_weight") if getattr(self, name) is not None]
        if self.distill_weight is not None and others:
            raise ValueError(
                f"{others[0]}: got {getattr(self, others[0])} with distill_weight {self.distill_weight}, expected one "
                "form: distill_weight, or ce_weight and kl_weight"
            )
        if self.totals == (0.0, 0.0):
            raise ValueError("kl_weight: got 0 without a ce_weight, expected one of them above 0: nothing is learned")
        return self

    @model_validator(mode="after")
    def _no_idle_cap(self) -> Self:
        for name in ("staleness", "behaviour"):
            cap = getattr(self, f"{name}_cap")
            if getattr(self, name) == "none" and cap != type(self).model_fields[f"{name}_cap"].default:
                raise ValueError(f"{name}_cap: got {cap} with {name} none, expected none: nothing is weighted")
        return self


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

    scale_by_t2: bool = False
    """Multiply the divergence by T², T being both temperatures, which must be equal: its gradient then keeps its size
    as T grows, beside a cross-entropy at T = 1."""

    @property
    def totals(self) -> tuple[float, float]:
        cross_entropy, own = super().totals
        return cross_entropy, own * self.student_temperature**2 if self.scale_by_t2 else own

    @model_validator(mode="after")
    def _one_temperature(self) -> Self:
        if self.scale_by_t2 and self.student_temperature != self.teacher_temperature:
            raise ValueError(
                f"scale_by_t2: got true with student_temperature {self.student_temperature} and teacher_temperature "
                f"{self.teacher_temperature}, expected equal temperatures"
            )
        return self


class SampledTokenConfig(LossConfig):
    """What every objective that looks at the sampled token alone has: T = 1 on both sides."""

    @field_validator("teacher_temperature")
    @classmethod
    def _is_one(cls, value: float) -> float:
        if value != 1.0:
            raise ValueError("objectives of the sampled token compare T = 1 distributions; leave it at 1")
        return value

    @field_validator("on_prompt")
    @classmethod
    def _nobody_sampled_prompts(cls, value: bool) -> bool:
        if value:
            raise ValueError("objectives of the sampled token learn from what the student sampled, prompts it did not")
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
        import_function(name, "loss.objective")
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
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # several keys together; the message names them and what was got
        return f"loss.{message}"
    return f"{'.'.join(str(part) for part in ('loss', *error['loc']))}: {message}, got {error['input']!r}"
