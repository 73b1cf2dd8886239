"""Prompts: where they come from, how they are rendered, and in which order steps see them."""

from student_trainer.data.config import DataConfig
from student_trainer.data.errors import DataError
from student_trainer.data.prompts import PromptSource, load_prompts

__all__ = ["DataConfig", "DataError", "PromptSource", "load_prompts"]
