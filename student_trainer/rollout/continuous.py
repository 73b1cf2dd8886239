"""Continuous batching: sequences that have finished leave, new ones enter, the others go on decoding, all in the same
forward passes. The prompt of a group is computed once. Owns who is in which slot; slots.py computes.

Running sequences hold the slots 0…n-1: when some have finished, the last ones move into their slots.

Shape legend: S slots, n running sequences, H hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from student_trainer.rollout.jobs import Finished, Job
from student_trainer.rollout.ledger import Ledger, Rules
from student_trainer.rollout.slots import SlotDecoder
from teacher_api.types import IntArray

PROMPT_TOKENS = 4096
"""Of new prompts in one forward pass, at most, where one alone isn't longer: bounds memory, and how long the running
sequences wait."""
DEVICE_CHECK_EVERY = 8
"""Steps between looks at who has stopped; each makes the host wait for the accelerator."""


@dataclass(slots=True)
class _Group:
    """A prompt, and those of its sequences that have not entered."""

    prompt: IntArray
    jobs: deque[Job]
    hidden_1H: Tensor | None = None  # after the prompt, once it has been computed
    states: list[Tensor] | None = None  # its keys and values, kept if not all could enter at once


@dataclass(frozen=True, slots=True)
class _Entry:
    group: _Group
    slots: list[int]


class Continuous:
    """See jobs.Work. Groups enter in the order of their first member, a group's members one after the other."""

    def __init__(self, decoder: SlotDecoder, jobs: Sequence[Job], rules: Rules, num_slots: int) -> None:
        groups: dict[bytes, _Group] = {}
        for job in jobs:
            ids = job.prompt.token_ids
            groups.setdefault(ids.tobytes(), _Group(ids, deque())).jobs.append(job)
        self._groups = deque(groups.values())
        self._decoder, self._num_slots = decoder, num_slots
        self._ledger = Ledger(rules, num_slots, decoder.device)
        self._max_new_tokens = rules.config.max_new_tokens
        self._check_every = 1 if decoder.device.type == "cpu" else DEVICE_CHECK_EVERY
        self._step = 0
        self._running: list[Job] = []  # by slot
        self._prompt_S = np.zeros(num_slots, dtype=np.int64)  # tokens of the prompt
        self._count_S = np.zeros(num_slots, dtype=np.int64)  # tokens drawn
        self._token_S = torch.zeros(num_slots, dtype=torch.int64, device=decoder.device)  # the last one drawn
        self._position_S = torch.zeros(num_slots, dtype=torch.int64, device=decoder.device)  # of that token

    @property
    def is_done(self) -> bool:
        return not (self._running or self._groups)

    def advance(self) -> Finished:
        """See jobs.Work.advance; the caller is in `decoder.attending`."""
        while not self.is_done:
            self._decode()
            finished = self._finished()
            if len(finished):
                return self._leave(finished)
        return []

    def _decode(self) -> None:
        """One more token for everybody, and the first one for those who enter."""
        n = len(self._running)
        entering = self._entering()
        new = [entry for entry in entering if entry.group.hidden_1H is None]
        hidden = []
        if n or new:
            longest = int((self._prompt_S[:n] + self._count_S[:n]).max(initial=0))
            prompts, slots = [entry.group.prompt for entry in new], [entry.slots[0] for entry in new]
            computed = self._decoder.forward(self._token_S[:n], self._position_S[:n], longest, prompts, slots)
            hidden.append(computed[:n])
            for row, entry in enumerate(new, start=n):
                entry.group.hidden_1H = computed[row : row + 1]
        for entry in entering:
            assert entry.group.hidden_1H is not None
            hidden.append(entry.group.hidden_1H.expand(len(entry.slots), -1))
            self._spread(entry)
        logits = self._decoder.logits(torch.cat(hidden) if entering else hidden[0])
        token = self._ledger.draw(logits)
        self._position_S[:n] += 1
        self._token_S[: len(token)] = token
        self._count_S[: len(token)] += 1
        self._step += 1

    def _entering(self) -> list[_Entry]:
        """Gives the free slots to those next in line."""
        entries, tokens = [], 0
        while self._groups and len(self._running) < self._num_slots:
            group = self._groups[0]
            if group.hidden_1H is None:
                if tokens and tokens + len(group.prompt) > PROMPT_TOKENS:
                    break
                tokens += len(group.prompt)
            first = len(self._running)
            members = [group.jobs.popleft() for _ in range(min(len(group.jobs), self._num_slots - first))]
            slots = slice(first, first + len(members))
            self._running += members
            self._ledger.enter(first, [job.uid for job in members])
            self._prompt_S[slots] = len(group.prompt)
            self._count_S[slots] = 0
            self._position_S[slots] = len(group.prompt)
            entries.append(_Entry(group, list(range(first, first + len(members)))))
            if not group.jobs:
                self._groups.popleft()
        return entries

    def _spread(self, entry: _Entry) -> None:
        """Gives each slot the keys and values of the prompt; keeps them for those who have no slot yet."""
        group, length = entry.group, len(entry.group.prompt)
        if group.states is not None:
            self._decoder.put(group.states, entry.slots)
            return
        if len(entry.slots) > 1:
            self._decoder.copy(entry.slots[1:], entry.slots[:1], length)
        if group.jobs:
            group.states = self._decoder.taken(entry.slots[0], length)

    def _finished(self) -> list[int]:
        """Slots."""
        n = len(self._running)
        ended = self._count_S[:n] >= self._max_new_tokens
        if self._step % self._check_every == 0:
            ended = ended | self._ledger.stopped(n)
        return [int(slot) for slot in np.flatnonzero(ended)]

    def _leave(self, finished: list[int]) -> Finished:
        records = self._ledger.take(finished)
        left = [(self._running[slot], record) for slot, record in zip(finished, records, strict=True)]
        keep = len(self._running) - len(finished)
        gone = set(finished)
        free = [slot for slot in finished if slot < keep]
        last = [slot for slot in range(keep, len(self._running)) if slot not in gone]
        if free:
            self._decoder.copy(free, last, int((self._prompt_S[last] + self._count_S[last]).max()))
            self._ledger.move(free, last)
            for state in (self._prompt_S, self._count_S):
                state[free] = state[last]
            into, of = (torch.tensor(x, device=self._decoder.device) for x in (free, last))
            for tensor in (self._token_S, self._position_S):
                tensor[into] = tensor[of]
            for slot, moved in zip(free, last, strict=True):
                self._running[slot] = self._running[moved]
        del self._running[keep:]
        return left
