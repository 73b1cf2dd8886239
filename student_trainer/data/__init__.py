"""Prompts and fixed data: where they come from, how they are rendered, and in which order steps see them."""

from student_trainer.data.config import DataConfig
from student_trainer.data.errors import DataError
from student_trainer.data.mixture import open_prompts
from student_trainer.data.prompts import Prompts, PromptSource, load_prompts

__all__ = ["DataConfig", "DataError", "PromptSource", "Prompts", "load_prompts", "open_prompts"]
