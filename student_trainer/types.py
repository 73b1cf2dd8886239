"""What flows through the training loop: Prompt -> Rollout -> ScoredRollout. Plain numpy on the host, no torch.

Shape legend: P prompt tokens, N completion tokens (EOS included), K ids kept per position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from teacher_api.types import FloatArray, IntArray, Scores

Metrics = dict[str, float]
MAXIMUM = "max_of_"
"""Prefix of metrics of which parts are put together by the largest, where others are sums."""
BoolArray = npt.NDArray[np.bool_]
Message = Mapping[str, str]
"""One turn of a conversation: `role`, `content`, and what else the chat template reads."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """A completion that came with its prompt, or that a teacher wrote."""

    token_ids: IntArray  # [N], N > 0; with the end token where the text is complete
    finish: Literal["eos", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem put to the student."""

    index: int  # its place in the data source
    token_ids: IntArray  # [P]
    text: str = ""
    answer: str | None = None  # reference answer where the data has one; for evaluation and fixed data
    extra: dict[str, Any] = field(default_factory=dict)
    fixed: tuple[Fixed, ...] = ()  # completions of fixed data; none where all training is on the student's own
    teacher_ids: Mapping[str, IntArray] = field(default_factory=dict)  # what teachers see instead, by their names
    domain: str = ""  # name of the source in data.domains that it comes from; empty where there is one source
    messages: tuple[Message, ...] = ()  # what the chat template rendered; none where the prompt is text as it stands


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion the student sampled. Three policies must not be confused (docs/losses.md): `behaviour_logprob`
    is log b(y) of the policy that sampled (after temperature, top-p, top-k); `full_logprob` is log q_old(y) of the
    same weights at T = 1, untruncated. Both are NaN where nobody sampled: in fixed data and in prompts.

    With `loss.on_prompt` a sample is cut after its first token: `prompt` holds that one alone, and `token_ids` all that
    follow, the rest of the prompt included. Whatever reads a rollout aligns as ever."""

    uid: int  # global sample number of the run: (step * batch_size + prompt row) * group_size + member
    prompt: Prompt
    token_ids: IntArray  # [N], with the EOS token if it ended by itself
    finish: Literal["eos", "length"]
    behaviour_logprob: FloatArray  # [N]
    full_logprob: FloatArray  # [N]
    student_topk_ids: IntArray | None = None  # [N, K]: ids the student found likely at sampling time, best first
    source: Literal["on_policy", "fixed"] = "on_policy"  # fixed: the completion was read from data, nobody sampled it
    scored_prompt_tokens: int = 0  # so many leading tokens of `token_ids` are the prompt's (loss.on_prompt)
    versions: IntArray | None = None  # [N]: optimizer steps behind the weights that sampled each token; -1: nobody did
    by_student: BoolArray | None = None  # [N]: False where an environment wrote the token; None: the student wrote all

    @property
    def num_tokens(self) -> int:
        """Tokens that are scored and trained on."""
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        """Tokens after the prompt, an environment's included."""
        return len(self.token_ids) - self.scored_prompt_tokens

    @property
    def num_environment_tokens(self) -> int:
        return 0 if self.by_student is None else int((~self.by_student).sum())

    @property
    def turns(self) -> list[slice]:
        """What the student wrote, one slice of `token_ids` after the other; one that is all, without environment."""
        wrote = np.ones(self.num_tokens, dtype=np.bool_) if self.by_student is None else self.by_student.copy()
        wrote[: self.scored_prompt_tokens] = False
        edges = np.flatnonzero(np.diff(wrote, prepend=False, append=False)).tolist()
        return [slice(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True)]

    @property
    def prompt_ids(self) -> IntArray:
        """The whole prompt, however it is cut."""
        return np.concatenate([self.prompt.token_ids, self.token_ids[: self.scored_prompt_tokens]])

    @property
    def sampled(self) -> BoolArray:
        """bool [N]: the student sampled this token, so that b and q_old are defined."""
        drawn = np.arange(self.num_tokens) >= (self.scored_prompt_tokens if self.source == "on_policy" else np.inf)
        return drawn if self.by_student is None else drawn & self.by_student


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """A rollout and the teacher's view of every one of its completion tokens: row n of `scores` is token n."""

    rollout: Rollout
    scores: Scores
    teacher: str = ""  # whose view it is; empty: the only teacher's, or the mixture of all

    def __post_init__(self) -> None:
        start = len(self.rollout.prompt.token_ids)
        expected = np.arange(start, start + self.rollout.num_tokens, dtype=np.int32)
        if not np.array_equal(self.scores.positions, expected):
            raise ValueError(
                f"scores of sample {self.rollout.uid} cover positions {self.scores.positions[:3]}… "
                f"({self.scores.num_rows} rows); expected {start}…{start + self.rollout.num_tokens - 1}"
            )
