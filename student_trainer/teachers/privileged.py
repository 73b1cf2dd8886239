"""Teachers that see another prompt than the student: what they are shown, and how their answers are brought back to the
student's positions. The completion's tokens are the same on both sides; everything else may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from student_trainer.data.errors import DataError
from student_trainer.data.render import read_template
from student_trainer.data.views import View
from student_trainer.teachers.config import NamedTeacherConfig, TeacherConfig, domains_of, prefix
from student_trainer.types import Prompt, Rollout
from teacher_api.types import IntArray, Scores


def views(teachers: Mapping[str, TeacherConfig], *, by_domain: bool) -> list[View]:
    """Of the teachers that see another prompt.

    Args:
        by_domain: each is shown prompts of its own domains only.

    Raises:
        DataError: a template's file can't be read, or what it shows and teacher.hint_key don't go together.
    """
    return [_view(name, one, by_domain) for name, one in teachers.items() if one.is_privileged]


def _view(name: str, config: TeacherConfig, by_domain: bool) -> View:
    key = prefix(name)
    template = config.prompt_template
    if config.prompt_template_file:
        template = read_template(config.prompt_template_file, f"{key}.prompt_template_file")
    own = domains_of(name, config) if by_domain and isinstance(config, NamedTeacherConfig) else None
    view = View(name, key, template, config.system_prompt, config.hint_key, config.max_prompt_tokens, own)
    if view.shows("hint") != (config.hint_key is not None):
        got, expected = ("none", "the field it stands for") if view.shows("hint") else (config.hint_key, "none")
        raise DataError(f"{key}.hint_key: got {got}, expected {expected}: {{hint}} in its template decides")
    return view


def prompt_of(prompt: Prompt, teacher: str) -> IntArray:
    """The token ids that this teacher sees."""
    return np.asarray(prompt.teacher_ids.get(teacher, prompt.token_ids), dtype=np.int32)


def aligned(rollout: Rollout, scores: Scores, teacher: str) -> Scores:
    """The scores at the student's positions: completion token n stands at P + n here and at P' + n there.

    Raises:
        ValueError: they are not of every completion token, one after the other.
    """
    theirs, ours = len(prompt_of(rollout.prompt, teacher)), len(rollout.prompt.token_ids)
    places = np.arange(rollout.num_tokens, dtype=np.int32)
    if not np.array_equal(scores.positions, theirs + places):
        raise ValueError(
            f"scores of sample {rollout.uid} cover positions {scores.positions[:3]}… ({scores.num_rows} rows) of the "
            f"teacher's sequence; expected {theirs}…{theirs + rollout.num_tokens - 1}"
        )
    return scores if theirs == ours else replace(scores, positions=ours + places)
