"""What a migration is made of: rules, one for each key of theirs, and what following them gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SECRETS = re.compile(r"api_?key|password|secret|(^|[^a-z])token$", re.IGNORECASE)
"""Values under names in which this is found are never repeated: of variables, options and keys of files."""


class MigrationError(ValueError):
    """What was given can't be read, or is no system's that is known here: one line."""


@dataclass(frozen=True, slots=True)
class Left:
    """A key of theirs that is not among our settings."""

    key: str
    value: Any
    why: str

    def __str__(self) -> str:
        hidden = SECRETS.search(self.key) or (self.key.isupper() and "TOKEN" in self.key)
        shown = "…" if hidden else repr(self.value)
        return f"{self.key} = {shown}: {self.why}"


@dataclass(slots=True)
class Migration:
    """Our settings, and what a person has to know of how they came about."""

    system: str
    settings: dict[str, Any] = field(default_factory=dict)  # `section.key` -> value
    left: list[Left] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    theirs: dict[str, Any] = field(default_factory=dict)  # all of their flat keys, for what depends on several

    def set(self, key: str, value: Any) -> None:
        self.settings[key] = value

    def leave(self, key: str, value: Any, why: str) -> None:
        self.left.append(Left(key, value, why))

    def remark(self, text: str) -> None:
        if text not in self.remarks:
            self.remarks.append(text)

    def drop(self, key: str) -> Any:
        return self.settings.pop(key, None)


Apply = Callable[[Migration, str, Any], None]
UNCONVERTIBLE = (AttributeError, KeyError, TypeError, ValueError)
"""What a rule raises for a value that is not of the kind it knows."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What becomes of one key of theirs."""

    ours: str  # for the table: our keys; empty: none
    remark: str  # for the table
    apply: Apply


Table = Mapping[str, Rule]
"""Their key, dotted; one that ends in `.*` is for all keys under it that have no rule of their own."""


def to(ours: str, convert: Callable[[Any], Any] = lambda value: value, remark: str = "") -> Rule:
    """The same thing under our name."""

    def apply(migration: Migration, key: str, value: Any) -> None:
        migration.set(ours, convert(value))
        if remark:
            migration.remark(f"{key} → {ours}: {remark}")

    return Rule(f"`{ours}`", remark, apply)


def choice(ours: str, names: Mapping[Any, Any], remark: str = "") -> Rule:
    """One of several names, each under ours."""
    shown = ", ".join(f"{theirs} → {own}" for theirs, own in names.items() if str(theirs) != str(own))
    rule = to(ours, lambda value: names[value], remark)
    return Rule(rule.ours, "; ".join(filter(None, [shown, remark])), rule.apply)


def nothing(why: str) -> Rule:
    """Not carried over, and said so."""
    return Rule("", why, lambda migration, key, value: migration.leave(key, value, why))


def covered(why: str) -> Rule:
    """Nothing to set: ours does it, or has no need of it, whatever the value."""
    return Rule("–", why, lambda migration, key, value: None)


def unless(usual: Any, why: str) -> Rule:
    """Not carried over; `usual` is what ours does, and needs no word."""

    def apply(migration: Migration, key: str, value: Any) -> None:
        if value is not None and value != usual:
            migration.leave(key, value, why)

    return Rule("", why, apply)


def by(ours: str, apply: Apply, remark: str = "") -> Rule:
    return Rule(ours, remark, apply)


def follow(table: Table, theirs: Mapping[str, Any], system: str, unknown: str) -> Migration:
    """Applies the rules to their flat keys, in their order; no key changes what one before it said.

    Args:
        unknown: why a key without a rule is left.
    """
    migration = Migration(system, theirs=dict(theirs))
    said_by: dict[str, str] = {}
    for key, value in theirs.items():
        rule = rule_of(table, key)
        if rule is None:
            migration.leave(key, value, unknown)
            continue
        before = dict(migration.settings)
        try:
            rule.apply(migration, key, value)
        except UNCONVERTIBLE:
            ours = rule.ours.replace("`", "") or "ours"
            migration.leave(key, value, f"not a value that {ours} has a counterpart for")
        said_by |= dict.fromkeys(migration.settings.keys() - before.keys(), key)
        _keep_what_was_said(migration, before, said_by, key, value)
    return migration


def _keep_what_was_said(
    migration: Migration, before: Mapping[str, Any], said_by: Mapping[str, str], key: str, value: Any
) -> None:
    """Two keys of theirs for one of ours, with different values: the first holds, the other is named."""
    for ours, was in before.items():
        if migration.settings.get(ours, was) != was:
            migration.set(ours, was)
            migration.leave(key, value, f"{ours} is {was!r} by {said_by[ours]} already, expected one value")


def rule_of(table: Table, key: str) -> Rule | None:
    if key in table:
        return table[key]
    parts = key.split(".")
    for length in range(len(parts) - 1, 0, -1):
        rule = table.get(".".join(parts[:length]) + ".*")
        if rule is not None:
            return rule
    return None


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones; lists and empty sections are values."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping) and value:
            found |= flat(value, key)
        elif not isinstance(value, Mapping):
            found[key] = value
    return found


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections."""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


def markdown(table: Table) -> str:
    """The table for docs/migration.md."""
    lines = ["| theirs | ours | remark |", "|---|---|---|"]
    for key, rule in table.items():
        lines.append(f"| `{key}` | {rule.ours} | {rule.remark} |".replace("|  |", "| |"))
    return "\n".join(lines)
