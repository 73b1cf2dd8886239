"""Objectives by name. The modules in objectives/ register themselves when imported; the first look-up imports them."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from student_trainer.imports import import_function

if TYPE_CHECKING:
    from student_trainer.losses.base import AnyObjective
    from student_trainer.losses.config import LossConfig

ClassT = TypeVar("ClassT", bound=type)


@dataclass(frozen=True, slots=True)
class Entry:
    name: str
    config_class: type[LossConfig]
    objective_class: type[AnyObjective]


_entries: dict[str, Entry] = {}


def register(config_class: type[LossConfig]) -> Callable[[ClassT], ClassT]:
    """Class decorator: the objective is known by the default of `config_class.objective`."""
    name = config_class.model_fields["objective"].default
    if not isinstance(name, str) or not name.isidentifier():
        raise TypeError(f"{config_class.__name__}.objective needs a name as its default, got {name!r}")

    def decorate(objective_class: ClassT) -> ClassT:
        if name in _entries:
            raise TypeError(f"objective {name!r} is registered twice: {_entries[name].objective_class.__module__}")
        _entries[name] = Entry(name, config_class, objective_class)
        return objective_class

    return decorate


def names() -> list[str]:
    """All objectives, in alphabetical order."""
    _discover()
    return sorted(_entries)


def get(name: str) -> Entry:
    """The objective of that name.

    Raises:
        ValueError: there is none; says which is nearest.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"loss.objective: unknown objective {name!r}; {meant}Known: {', '.join(known)}, "
            "or package.module:function for your own"
        )
    return _entries[name]


def build(config: LossConfig) -> AnyObjective:
    """The objective that `config` describes, with its share of cross-entropy and its factors."""
    from student_trainer.losses.custom import CustomObjective
    from student_trainer.losses.total import Total

    if is_custom(config.objective):
        objective: AnyObjective = CustomObjective(config, import_function(config.objective, "loss.objective"))
    else:
        objective = get(config.objective).objective_class(config)
    return objective if config.totals == (0.0, 1.0) else Total(objective)


def is_custom(name: str) -> bool:
    return ":" in name


@functools.cache
def _discover() -> None:
    package = importlib.import_module("student_trainer.losses.objectives")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
