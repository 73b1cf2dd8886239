"""What every objective gets and gives. Pure functions of tensors: no config globals, no collectives, no reductions over
tokens (normalise.py owns those).

An objective asks for the student's side through student_side.py: `student_rows` (support and tail), `token_logprob`
(of y), `student_entropy`. Whatever it makes of them, their gradient over the vocabulary is formed by hand, once, in
place. Whoever computes with `LossInputs.student_logits` itself gets the right gradient as well, through a graph over
[N, W].

Shape legend: N scored positions of one chunk, S support slots, V vocabulary shared by both models (ids below the
tokenizer's size), W the student's logit width (W >= V).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from student_trainer.losses.config import LossConfig
from student_trainer.types import ScoredRollout
from teacher_api.types import FloatArray

if TYPE_CHECKING:
    from student_trainer.losses.student_side import Tape

ConfigT = TypeVar("ConfigT", bound=LossConfig)
AllReduceSum = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
"""Sums an array elementwise over all ranks; the identity when there is one."""


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """The teacher's distribution at N positions on a per-row support. Padded slots have mask False, id 0 and
    logprob 0; the actual token is always in the support and no id is there twice."""

    support_ids: Tensor | None  # int64 [N, S]; None: dense, slot s is id s and S = V
    support_logprob: Tensor  # float32 [N, S]: log p at the teacher's temperature
    support_mask: Tensor | None  # bool [N, S]; None: all valid
    log_tail: Tensor  # float32 [N]: log mass of everything outside the support; <= -1e4 if nothing is
    token_logprob: Tensor  # float32 [N]: log p(y)
    topk_overlap: Tensor | None = None  # float32 [N]: share of the teacher's top-k that the student's top-k holds

    def take(self, index: Tensor, device: torch.device) -> TeacherRows:
        """Rows `index` (int64 [n], on any device), moved to `device`."""
        return TeacherRows(
            support_ids=_take(self.support_ids, index, device),
            support_logprob=_take_one(self.support_logprob, index, device),
            support_mask=_take(self.support_mask, index, device),
            log_tail=_take_one(self.log_tail, index, device),
            token_logprob=_take_one(self.token_logprob, index, device),
            topk_overlap=_take(self.topk_overlap, index, device),
        )


@dataclass(frozen=True, slots=True)
class LossRows:
    """All that is known of N scored positions before the student's forward; `rows.loss_rows` makes it."""

    target: Tensor  # int64 [N]: y, the actual next token
    teacher: TeacherRows
    old_logprob: Tensor  # float32 [N]: log q_old(y), T = 1, untruncated; NaN where nobody sampled y
    behaviour_logprob: Tensor  # float32 [N]: log b(y); NaN where nobody sampled y
    sampled: Tensor  # bool [N]: the student sampled y; False in fixed data and in prompts
    fixed: Tensor  # bool [N]: of a sample of fixed data, which cross-entropy applies to
    lengths: tuple[int, ...] = ()  # rows of each sample, summing to N
    advantage: Tensor | None = None  # float32 [N]: policy_gradient's A_t, computed over whole completions

    @property
    def num_rows(self) -> int:
        return len(self.target)

    def inputs(self, index: Tensor, student_logits: Tensor, tape: Tape | None = None) -> LossInputs:
        """Rows `index` (int64 [n]) beside their logits [n, W], on the logits' device."""
        device = student_logits.device
        return LossInputs(
            student_logits=student_logits,
            target=_take_one(self.target, index, device),
            teacher=self.teacher.take(index, device),
            old_logprob=_take_one(self.old_logprob, index, device),
            behaviour_logprob=_take_one(self.behaviour_logprob, index, device),
            sampled=_take_one(self.sampled, index, device),
            fixed=_take_one(self.fixed, index, device),
            advantage=_take(self.advantage, index, device),
            tape=tape,
        )


@dataclass(frozen=True, slots=True)
class LossInputs:
    """One chunk of scored positions."""

    student_logits: Tensor  # float32 [N, W], with gradient
    target: Tensor  # int64 [N]: y, the actual next token
    teacher: TeacherRows
    old_logprob: Tensor  # float32 [N]: log q_old(y), T = 1, untruncated; NaN where nobody sampled y
    behaviour_logprob: Tensor  # float32 [N]: log b(y); NaN where nobody sampled y
    sampled: Tensor  # bool [N]: the student sampled y; False in fixed data and in prompts
    fixed: Tensor  # bool [N]: of a sample of fixed data, which cross-entropy applies to
    advantage: Tensor | None = None  # float32 [N]: policy_gradient's A_t, computed over whole completions
    tape: Tape | None = None  # student_side.py's own; None: all through autograd


@dataclass(frozen=True, slots=True)
class PerToken:
    """An objective's value at each position, with gradient, and detached per-token metrics (each [N]). A metric that
    some positions don't have comes as `partly_defined`."""

    value: Tensor  # float32 [N]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    token_logprob: Tensor | None = None  # float32 [N]: log q_now(y), T = 1, detached


@dataclass(frozen=True, slots=True)
class Needs:
    """What an objective wants asked of the teacher and kept by the sampler."""

    top_k: int | Literal["all"]  # of ScoreOptions; 0: the actual token's logprob is enough
    student_top_k: int  # ids per position the sampler keeps; they are sent to the teacher as candidates


OwnToken = Literal["none", "weight", "ratio"]
"""How a value depends on the token that was sampled at its own position. none: not at all, it compares distributions.
weight: it looks at that token, and is to be weighted by how likely other policies find it. ratio: so it does, but has
q_now/q_old in it."""


class Objective(ABC, Generic[ConfigT]):
    """One row of the table in docs/losses.md. A new one is a file in objectives/ with its config class (a subclass of
    LossConfig whose `objective` is its name), its equation, and `@register(ItsConfig)`."""

    own_token: ClassVar[OwnToken] = "none"

    def __init__(self, config: ConfigT) -> None:
        self.config = config

    @abstractmethod
    def needs(self, teacher_top_k: int | Literal["all"]) -> Needs:
        """What to ask for, given `teacher.top_k`.

        Raises:
            ValueError: this objective can learn nothing from so few ids.
        """

    def prepare(self, scored: Sequence[ScoredRollout], all_reduce_sum: AllReduceSum) -> list[FloatArray] | None:
        """What needs whole completions: advantages, one float32 [N_i] per sample; None where the objective has none.
        Called once a step by every rank, with all of its samples."""
        return None

    @property
    def looks_at_whole_steps(self) -> bool:
        """Whether what `prepare` says of a sample depends on others, so that nothing can be learned before a step's
        last sample is scored."""
        return type(self).prepare is not Objective.prepare

    @abstractmethod
    def per_token(self, inputs: LossInputs) -> PerToken:
        """Value [N] at each position, to be minimised, and metrics. Each position's value may depend on its own row
        alone: chunks are cut anywhere. Metrics under no_grad."""


AnyObjective = Objective[Any]


ROWS_OF = "rows_of_"
"""Prefix of the metric that counts the positions another one is defined at."""


def partly_defined(name: str, value_N: Tensor, defined_N: Tensor) -> dict[str, Tensor]:
    """A metric that only some positions have: 0 at the others, beside the count that its sum is to be divided by."""
    return {name: value_N.where(defined_N, 0.0), ROWS_OF + name: defined_N.to(value_N.dtype)}


def rollout_gap(inputs: LossInputs, logprob_N: Tensor) -> dict[str, Tensor]:
    """|log q_old(y) − log q_now(y)| where y was sampled, from log q_now(y) at T = 1."""
    return partly_defined("rollout_gap", (inputs.old_logprob - logprob_N).abs(), inputs.sampled)


def as_float(logits: Tensor) -> Tensor:
    """float32, unless they are float64 already."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _take_one(tensor: Tensor, index: Tensor, device: torch.device) -> Tensor:
    return tensor.index_select(0, index.to(tensor.device)).to(device)


def _take(tensor: Tensor | None, index: Tensor, device: torch.device) -> Tensor | None:
    return None if tensor is None else _take_one(tensor, index, device)
