"""What fits before a run begins: the longest sequences that can come up, refused where the student has no positions for
them, and settings that are allowed but should be known of.
"""

from __future__ import annotations

from typing import Any

from student_trainer.config import TrainConfig
from student_trainer.data import Prompts
from student_trainer.losses.base import Needs
from student_trainer.rollout.chat import Chat
from student_trainer.student import Student, require_known, room_for
from student_trainer.teachers.config import prefix


def warnings(config: TrainConfig, prompts: Prompts, needs: Needs) -> list[str]:
    """What is allowed, but should be known."""
    found = []
    for name, one in config.all_teachers.items():
        idle = one.top_k not in (0, type(one).model_fields["top_k"].default)
        if idle and not needs.top_k and not needs.student_top_k:
            found.append(
                f"{prefix(name)}.top_k is {one.top_k}, but {config.loss.objective} asks for the sampled token alone"
            )
    dropped = prompts.dropped()
    for count, limit in ((dropped.prompts, "max_prompt_tokens"), (dropped.answers, "max_answer_tokens")):
        if count and prompts.num_prompts is not None:
            found.append(f"{count} prompts are left out for data.{limit}")
    rollout = config.rollout
    if rollout.is_truncated:
        names = [
            n for n in ("greedy", "top_p", "top_k") if getattr(rollout, n) != type(rollout).model_fields[n].default
        ]
        found.append(f"rollout.{', rollout.'.join(names)}: some tokens are never sampled, the estimate is biased")
    if rollout.temperature != 1.0 and config.loss.behaviour == "none":
        found.append(
            f"rollout.temperature is {rollout.temperature}: samples come from another policy than is trained "
            "(loss.behaviour=weight corrects for it)"
        )
    return found


def require_known_ids(config: TrainConfig, tokenizer: Any) -> None:
    """Raises ValueError for token ids of the configuration that the student's tokenizer has not."""
    require_known("rollout.stop_token_ids", config.rollout.stop_token_ids, tokenizer)
    require_known("loss.ignore_token_ids", config.loss.ignore_token_ids, tokenizer)


def longest_tokens(config: TrainConfig, student: Student, prompts: Prompts) -> int:
    """Longest sequence that can come up in training."""
    longest = prompts.longest
    if student.max_tokens and longest.sequence > student.max_tokens:
        key = "data.max_answer_tokens or data.seq_length"
        raise ValueError(
            f"the longest prompt with its fixed completion has {longest.sequence} tokens, the student has positions "
            f"for {student.max_tokens}; lower {key}"
        )
    if config.data.on_policy_fraction == 0.0:
        return longest.sequence
    if config.rollout.environment:
        chat = Chat(student.tokenizer, student.eos_token_ids)
        for prompt in prompts.take(0, 1, config.train.seed):
            chat.check(prompt)
    key = "rollout.max_total_tokens" if config.rollout.environment else "rollout.max_new_tokens"
    new_tokens = config.rollout.longest_completion
    sampled = room_for(longest.prompt, new_tokens, student, key, "data.max_prompt_tokens")
    return max(sampled, longest.sequence)


def longest_completion(config: TrainConfig, prompts: Prompts) -> int:
    """In tokens, sampled or given."""
    sampled = config.rollout.longest_completion if config.data.on_policy_fraction else 0
    return max(sampled, prompts.longest.fixed)
