"""Conversations instead of completions: the student's turns, sampled by any engine, and between them what an
environment answers. Owns whose turn it is and the limits; the ids that are there are kept as they are, turn after turn.

All conversations advance together, a turn at a time (docs/decisions/0033-conversations-in-waves.md).

Shape legend: N tokens after the prompt, n of one turn or answer, K ids kept.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from student_trainer.rollout.base import RolloutEngine, RolloutError
from student_trainer.rollout.calls import KEY, Call, Calls, EnvironmentFailed, function_of
from student_trainer.rollout.chat import Chat, TemplateError
from student_trainer.rollout.config import RolloutConfig
from student_trainer.types import Message, Metrics, Prompt, Rollout
from teacher_api.types import IntArray

TURN_BIT = 48
"""Turn number t of sample uid draws the random numbers of uid + t·2^48: of its own, and of no other sample's."""


class Streams(Protocol):
    """What conversations ask of the engine inside; `sample` is for those who have none."""

    def sample(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> list[Rollout]: ...

    def stream(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> Iterator[Rollout]: ...


@dataclass(slots=True, eq=False)
class _Talk:
    """One conversation on its way."""

    place: int  # in the caller's list
    uid: int
    prompt: Prompt
    messages: list[Message]
    turns: list[Rollout] = field(default_factory=list)  # of the student
    answers: list[IntArray] = field(default_factory=list)  # ids after each turn but the last
    num_tokens: int = 0  # after the prompt

    @property
    def num_turns(self) -> int:
        return len(self.turns)

    @property
    def turn_uid(self) -> int:
        """Of the next turn."""
        return self.uid + (self.num_turns << TURN_BIT)

    @property
    def is_cut(self) -> bool:
        return self.turns[-1].finish == "length"

    @property
    def last_id(self) -> int:
        return int(self.turns[-1].token_ids[-1])

    def next_prompt(self) -> Prompt:
        """All there is so far, for the next turn."""
        if not self.turns:
            return self.prompt
        return dataclasses.replace(
            self.prompt,
            token_ids=np.concatenate([self.turns[-1].prompt.token_ids, self.turns[-1].token_ids, self.answers[-1]]),
        )

    def add_turn(self, turn: Rollout, message: Message) -> None:
        self.turns.append(turn)
        self.messages.append(message)
        self.num_tokens += turn.num_tokens

    def add_answer(self, answer: Sequence[Message], token_ids: IntArray) -> None:
        self.answers.append(token_ids)
        self.messages.extend(answer)
        self.num_tokens += len(token_ids)

    def rollout(self, finish: Literal["eos", "length"]) -> Rollout:
        """All of it as one completion of the prompt."""
        answers = [_unsampled(ids, self.turns[0]) for ids in self.answers]
        parts = [part for pair in itertools.zip_longest(self.turns, answers) for part in pair if part is not None]

        def joined(name: str) -> Any:
            arrays = [getattr(part, name) for part in parts]
            return None if arrays[0] is None else np.concatenate(arrays)

        return Rollout(
            uid=self.uid,
            prompt=self.prompt,
            token_ids=joined("token_ids"),
            finish=finish,
            behaviour_logprob=joined("behaviour_logprob"),
            full_logprob=joined("full_logprob"),
            student_topk_ids=joined("student_topk_ids"),
            versions=joined("versions"),
            by_student=np.concatenate([np.full(part.num_tokens, part.source == "on_policy") for part in parts]),
        )


class Conversations:
    """Samples as RolloutEngine's are, each a conversation that begins with its prompt, and one Rollout: `by_student`
    says who wrote which token. Where the environment did, the logprobs are NaN, the version is -1, and the ids that the
    student finds likely are the first of the vocabulary: valid candidates for a position that has no part in any loss.

    `finish` is `eos` where the environment had nothing to add to a turn that ended by itself, else `length`: a turn was
    cut off at `max_new_tokens`, or there was no turn, or no room for a whole one, left.

    Args:
        inner: samples the turns; `config` is its own.
        chat: of the student's tokenizer.
    """

    def __init__(self, inner: Streams, config: RolloutConfig, chat: Chat) -> None:
        self._inner = inner
        self._config = config
        self._chat = chat
        self._calls = Calls(function_of(config.environment), config.environment_options, config.environment_timeout_s)

    def sample(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> list[Rollout]:
        """See RolloutEngine.sample.

        Raises:
            ValueError: besides, a prompt that is no conversation, or a uid that comes twice or is too large.
            RolloutError: besides, the environment failed, or the chat template can't carry a conversation on.
        """
        by_uid = {rollout.uid: rollout for rollout in self.stream(prompts, uids, keep_top_k=keep_top_k)}
        return [by_uid[uid] for uid in uids]

    def stream(self, prompts: Sequence[Prompt], uids: Sequence[int], *, keep_top_k: int = 0) -> Iterator[Rollout]:
        """See RolloutEngine.stream; raises as `sample`."""
        going = self._opened(prompts, uids)
        while going:
            waiting: deque[tuple[_Talk, Call]] = deque()
            carried_on: list[_Talk] = []
            for talk in self._spoken(going, keep_top_k):
                if talk.is_cut:
                    yield talk.rollout("length")
                else:
                    waiting.append((talk, self._calls.begin(talk.messages)))
                # Who is answered while others still speak is handed over at once.
                yield from self._answered(waiting, carried_on, wait=False)
            yield from self._answered(waiting, carried_on, wait=True)
            going = sorted(carried_on, key=lambda talk: talk.place)

    def _opened(self, prompts: Sequence[Prompt], uids: Sequence[int]) -> list[_Talk]:
        talks = []
        for place, (prompt, uid) in enumerate(zip(prompts, uids, strict=True)):
            if not 0 <= uid < 1 << TURN_BIT:
                raise ValueError(f"uid {uid}: expected 0 to 2^{TURN_BIT} - 1 with {KEY}")
            self._chat.check(prompt)
            talks.append(_Talk(place, uid, prompt, list(prompt.messages)))
        if len(set(uids)) < len(uids):
            raise ValueError(f"{KEY}: a uid comes twice; expected another for each conversation")
        return talks

    def _spoken(self, talks: Sequence[_Talk], keep_top_k: int) -> Iterator[_Talk]:
        """The conversations, each with one more turn of the student, as they are finished."""
        by_uid = {talk.turn_uid: talk for talk in talks}
        prompts = [talk.next_prompt() for talk in talks]
        for turn in self._inner.stream(prompts, list(by_uid), keep_top_k=keep_top_k):
            talk = by_uid[turn.uid]
            talk.add_turn(turn, self._chat.said(turn.token_ids))
            yield talk

    def _answered(
        self, waiting: deque[tuple[_Talk, Call]], carried_on: list[_Talk], *, wait: bool
    ) -> Iterator[Rollout]:
        """Takes those that are answered from the front of `waiting`: gives what is over, and adds the others to
        `carried_on`."""
        while waiting and (wait or waiting[0][1].is_done):
            talk, call = waiting.popleft()
            try:
                answer = call.answer()
                if not answer:
                    yield talk.rollout("eos")
                elif self._has_room(talk, ids := self._chat.following(talk.messages, answer, talk.last_id)):
                    talk.add_answer(answer, ids)
                    carried_on.append(talk)
                else:
                    yield talk.rollout("length")
            except (EnvironmentFailed, TemplateError) as error:
                raise RolloutError(
                    f"{KEY} {self._config.environment}: sample {talk.uid}, turn {talk.num_turns}: {error}"
                ) from error

    def _has_room(self, talk: _Talk, answer: IntArray) -> bool:
        """For `answer` and one more whole turn."""
        tokens = talk.num_tokens + len(answer) + self._config.max_new_tokens
        return talk.num_turns < self._config.max_turns and tokens <= self._config.longest_completion


class EnvironmentEngine(Conversations):
    """See RolloutEngine: conversations whose turns an engine samples."""

    def __init__(self, inner: RolloutEngine, config: RolloutConfig, chat: Chat) -> None:
        super().__init__(inner, config, chat)
        self._engine = inner

    def update(self, version: int) -> None:
        """See RolloutEngine.update."""
        self._engine.update(version)

    def figures(self) -> Metrics:
        """See RolloutEngine.figures."""
        return self._engine.figures()

    def close(self) -> None:
        """See RolloutEngine.close."""
        self._calls.close()
        self._engine.close()


def _unsampled(token_ids: IntArray, turn: Rollout) -> Rollout:
    """An answer in the form of a turn, with what `turn` has."""
    num, kept = len(token_ids), turn.student_topk_ids
    undefined = np.full(num, np.nan, dtype=np.float32)
    return dataclasses.replace(
        turn,
        token_ids=token_ids,
        behaviour_logprob=undefined,
        full_logprob=undefined,
        student_topk_ids=None if kept is None else np.tile(np.arange(kept.shape[1], dtype=np.int32), (num, 1)),
        versions=None if turn.versions is None else np.full(num, -1, dtype=np.int32),
        source="fixed",
    )
