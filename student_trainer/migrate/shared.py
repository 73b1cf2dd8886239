"""Conversions that several systems' tables need."""

from __future__ import annotations

import re
from typing import Any

from student_trainer.migrate.base import UNCONVERTIBLE, Migration

DTYPES = {
    "bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32",
    "fp16": "bfloat16", "float16": "bfloat16",
}  # fmt: skip
PRESETS = {
    "math_cl": "math-cl", "math-cl": "math-cl", "pe-nlp/math-cl": "math-cl", "tulu3": "tulu3", "deepmath": "deepmath",
    "gsm8k": "gsm8k", "allenai/tulu-3-sft-mixture": "tulu3", "zwhe99/DeepMath-103K": "deepmath",
    "openai/gsm8k": "gsm8k", "HuggingFaceFW/fineweb-edu": "fineweb-edu",
}  # fmt: skip
TEST_SPLITS = {"gsm8k": "test"}
"""Presets whose dataset has problems that are not for training."""
TRACKERS = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "trackio": "trackio",
}
PROMPT_LENGTHS = "over-long inputs are left out and counted, never cut"


def truth(value: Any) -> bool:
    """Of a YAML value or an option's text.

    Raises:
        ValueError: it is neither true nor false.
    """
    if isinstance(value, str) and value.lower() in ("true", "yes", "1", ""):
        return True
    if isinstance(value, str) and value.lower() in ("false", "no", "0", "none"):
        return False
    if isinstance(value, bool | int):
        return bool(value)
    raise ValueError(f"got {value!r}, expected true or false")


def number(value: Any) -> float | int:
    found = float(_no_switch(value))
    return int(found) if found.is_integer() and not re.search(r"[.e]", str(value)) else found


def integer(value: Any) -> int:
    found = float(_no_switch(value))
    if not found.is_integer():
        raise ValueError(f"got {value!r}, expected a whole number")
    return int(found)


def _no_switch(value: Any) -> Any:
    """An option without a value is true, which Python takes for 1."""
    if isinstance(value, bool):
        raise ValueError(f"got {value!r}, expected a number")
    return value


def factor(migration: Migration, key: str) -> int | None:
    """A whole number of theirs that others are multiplied by, 1 where they don't say; None, and left by name, where it
    is no number."""
    value = migration.theirs.get(key)
    try:
        return 1 if value is None else integer(value)
    except UNCONVERTIBLE:
        migration.leave(key, value, "expected a whole number: train.batch_size is not known without it")
        return None


def dataset(migration: Migration, key: str, value: Any) -> None:
    """A dataset by name: a preset of ours, a hub id, or a file."""
    name = str(value)
    preset = PRESETS.get(name) or PRESETS.get(name.lower())
    if preset:
        migration.set("data.preset", preset)
    elif "/" in name or "." in name:
        migration.set("data.source", name)
    else:
        migration.leave(key, value, "no dataset of that name here: set data.source to its hub id or file")


def validation(migration: Migration, key: str, value: Any) -> None:
    """What is evaluated on, by name."""
    found = Migration(migration.system)
    dataset(found, key, value)
    for ours, named in found.settings.items():
        migration.set(f"eval.{ours}", named)
    for left in found.left:
        migration.leave(left.key, left.value, "no dataset of that name here: eval.data.source is its hub id or file")


def evaluate(migration: Migration) -> None:
    """Evaluations only where there are problems to solve: a run that asks for some without is refused at its start."""
    settings = migration.settings
    every, preset = settings.get("eval.every"), settings.get("data.preset")
    given = [key for key in settings if key.startswith("eval.data.")]
    if every and not given and preset in TEST_SPLITS:
        migration.set("eval.data.preset", preset)
        migration.set("eval.data.split", TEST_SPLITS[preset])
        migration.remark(f"eval.data is the {TEST_SPLITS[preset]} split of {preset}")
    elif every and not given:
        why = (
            f"nothing names problems with answers; eval.data.source=FILE eval.every={every} evaluates on those of FILE"
        )
        for key in [key for key in settings if key.startswith("eval.")]:
            migration.leave(key, migration.drop(key), why)
    elif not every and given:
        for key in [key for key in settings if key.startswith("eval.")]:
            migration.leave(key, migration.drop(key), "theirs evaluates never: eval.every is the steps between")


def track(migration: Migration, tracker: str) -> None:
    known = migration.settings.setdefault("tracking.trackers", [])
    if tracker not in known:
        known.append(tracker)


def serve(migration: Migration, argument: str) -> None:
    """One more argument of the teacher's own process."""
    known = migration.settings.setdefault("teacher.serve_args", [])
    if argument not in known:
        known.append(argument)


def only_for(migration: Migration, key: str, needed: str, allowed: tuple[Any, ...], why: str) -> None:
    """Drops one of our keys that another of our settings leaves without effect."""
    if key in migration.settings and migration.settings.get(needed) not in allowed:
        migration.leave(key, migration.drop(key), why)
