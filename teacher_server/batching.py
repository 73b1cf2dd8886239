"""Which sequences go through the engine together: those of the first one's prompt, then those of similar length. Knows
no tenants; who is first is the queue's choice (fair.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from teacher_api.errors import TeacherError
from teacher_api.types import Scores
from teacher_server.backends.base import BatchPolicy, ScoreJob
from teacher_server.caller import SERVER, Caller
from teacher_server.forwards import UNMARKED, Mark

Result = Scores | TeacherError
MAX_PADDING = 0.25  # share of a batch's padded tokens that may be padding


@dataclass(eq=False, slots=True)
class Entry:
    """A sequence that waits."""

    job: ScoreJob
    future: asyncio.Future[Result]
    caller: Caller = SERVER
    mark: Mark = UNMARKED
    tokens: int = 0
    """To be computed for it, a prompt that it shares counted once per call; 0: all of its own."""
    call_tokens: int = 0
    """Of the whole call that it came with; 0: it came alone."""
    begun: Callable[[], None] | None = None
    """Told when it goes to the engine, before those that were taken with it and come after it."""

    def __post_init__(self) -> None:
        self.tokens = self.tokens or self.job.num_tokens
        self.call_tokens = self.call_tokens or self.tokens


def tokens_to_compute(jobs: Sequence[ScoreJob], *, shares_prompts: bool) -> list[int]:
    """For each sequence of one call: the tokens that go through the model for it. A prompt that the engine computes
    once counts with the first sequence that has it."""
    seen: set[bytes] = set()
    tokens = []
    for job in jobs:
        again = shares_prompts and bool(job.prompt_key) and job.prompt_key in seen
        tokens.append(max(job.num_tokens - (job.prompt_tokens if again else 0), 1))
        seen.add(job.prompt_key)
    return tokens


def company(head: Entry, others: Iterable[Entry], policy: BatchPolicy, further: Iterable[Entry] = ()) -> list[Entry]:
    """A batch with `head` in it, and of `further` what there is still room for: at most what `policy` allows, unless
    `head` is longer than that; then it alone."""

    def distance(entry: Entry) -> tuple[bool, int]:
        same_prompt = bool(head.job.prompt_key) and entry.job.prompt_key == head.job.prompt_key
        return (not same_prompt, abs(entry.job.num_tokens - head.job.num_tokens))

    batch, longest, total, saved = [head], head.job.num_tokens, head.job.num_tokens, 0
    prompts = {head.job.prompt_key}
    for entry in (*sorted(others, key=distance), *sorted(further, key=distance)):
        if len(batch) >= policy.max_sequences:
            break
        new_longest = max(longest, entry.job.num_tokens)
        padded, new_total = new_longest * (len(batch) + 1), total + entry.job.num_tokens
        again = policy.shares_prompts and bool(entry.job.prompt_key) and entry.job.prompt_key in prompts
        new_saved = saved + (entry.job.prompt_tokens if again else 0)
        if padded - new_saved > policy.max_tokens or padded - new_total > MAX_PADDING * padded:
            continue
        batch.append(entry)
        longest, total, saved = new_longest, new_total, new_saved
        prompts.add(entry.job.prompt_key)
    first_of_prompt: dict[bytes, int] = {}
    for place, entry in enumerate(batch):
        first_of_prompt.setdefault(entry.job.prompt_key, place)
    return sorted(batch, key=lambda entry: first_of_prompt[entry.job.prompt_key])
