"""What a report is made of, as plain data: collect.py and curves.py fill it, html.py draws it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Choice:
    """A token that could have come next."""

    text: str
    probability: float


@dataclass(frozen=True, slots=True)
class TokenView:
    """One token of a completion, with both models' view of its position."""

    text: str
    kl_nats: float  # KL(student || teacher) of the next-token distributions, not of this token
    student_probability: float  # of this token
    teacher_probability: float
    student_top: tuple[Choice, ...]
    teacher_top: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class CompletionView:
    """One model's completion of a prompt."""

    tokens: tuple[TokenView, ...]
    finished: bool  # ended by itself rather than cut at the limit
    correct: bool | None = None  # None: not judged

    @property
    def mean_kl_nats(self) -> float:
        return sum(token.kl_nats for token in self.tokens) / max(len(self.tokens), 1)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same prompt completed by each of the report's models, in the order of `Report.sides`."""

    prompt: str
    answer: str | None
    completions: tuple[CompletionView, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart. `reference` draws it dashed: a level to compare with, not something learned."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]
    reference: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    y_label: str
    series: tuple[Series, ...]
    share: bool = False  # values in 0..1, shown as per cent
    log_y: bool = False  # values > 0


@dataclass(frozen=True, slots=True)
class Figure:
    """One number at the top of the report, already formatted."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    title: str
    subtitle: str
    sides: tuple[str, ...]  # names of the models compared, such as before and after
    figures: tuple[Figure, ...] = ()
    charts: tuple[Chart, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    exact: bool = True  # the divergences are over the full vocabulary; otherwise lower bounds from a top-k and a tail
    notes: tuple[str, ...] = ()
    config_yaml: str = ""
    facts: dict[str, str] = field(default_factory=dict)
