"""How a teacher sees a prompt that it is shown otherwise than the student: with the answer or a hint in it, or under
another system prompt. Owns the text; render.py makes tokens of it as it does of the student's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from student_trainer.data.errors import DataError

QUESTION = "{question}"
_PLACES = re.compile(r"\{(question|answer|hint)\}")


@dataclass(frozen=True, slots=True)
class View:
    """What one teacher is shown."""

    teacher: str  # its name in the run
    key: str  # section of its configuration, for messages
    template: str = ""  # in place of data.prompt_template; empty: that one
    system_prompt: str | None = None  # in place of the data's; None: that one
    hint_key: str | None = None
    max_prompt_tokens: int | None = None
    domains: tuple[str, ...] | None = None  # whose prompts it is shown; None: all

    def shows(self, place: str) -> bool:
        """Whether the text has the place `{place}`."""
        return f"{{{place}}}" in self.template or f"{{{place}}}" in (self.system_prompt or "")

    def filled(self, text: str, values: Mapping[str, str | None], where: str) -> str:
        """`text` with its places filled in, in one pass: braces in what fills them are left alone, as are all others.

        Raises:
            DataError: a place has nothing to fill it with.
        """

        def value(found: re.Match[str]) -> str:
            filling = values[found[1]]
            if filling is None:
                raise DataError(f"{where}: has no {found[1]} for {found[0]} in the prompt that {self.key} makes")
            return filling

        return _PLACES.sub(value, text)
