"""The prompts of a run as a file for `teacher-generate`: token ids, so that a teacher completes exactly what the
student is shown, whatever template rendered it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from student_trainer.data.config import DataConfig
from student_trainer.data.errors import DataError
from student_trainer.data.reader import Source


def prompt_lines(config: DataConfig, tokenizer: Any) -> Iterator[str]:
    """A JSON object a line: `prompt` (token ids), `text`, `index`, and `domain` where there are several. Prompts in the
    order of their sources, each once.

    Raises:
        DataError: see load_prompts; or a source is packed text, which has no prompts.
    """
    for number, source_config in enumerate(config.sources):
        if source_config.format == "packed_text":
            raise DataError(f"data.source {source_config.source}: packed text has no prompts to print")
        source = Source(source_config, tokenizer, number=number, of=len(config.sources))
        for prompt in source.read():
            line: dict[str, Any] = {"prompt": prompt.token_ids.tolist(), "text": prompt.text, "index": prompt.index}
            if prompt.domain:
                line["domain"] = prompt.domain
            yield json.dumps(line, ensure_ascii=False)
