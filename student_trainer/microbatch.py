"""Division of a step's samples into micro-batches under a token budget. A pure function of the samples' lengths and
prompts in order of their numbers, never of when they arrive: a resumed step is divided as the first time, and one that
is learned from while it is sampled as one that is whole. Nothing but rounding depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from student_trainer.packing import PREFIX_WEIGHT, Packing
from student_trainer.types import Rollout, ScoredRollout

PADDED_WINDOW = 4
"""Micro-batches whose samples are sorted by length among each other where they are padded: the more, the less padding,
and the later the first is complete. Packed there is nothing to sort."""


def divide(rollouts: Sequence[Rollout], max_tokens: int, max_sequences: int, packing: Packing) -> list[list[int]]:
    """Indices of the samples of each micro-batch, ascending; micro-batches in order of their first sample.

    Args:
        max_tokens: most tokens of one micro-batch: its rows times its longest, or, packed, the sum of its lengths, with
            a shared prompt counted once and a share of it (PREFIX_WEIGHT) for every completion. A sample longer than
            this makes a micro-batch alone: nothing is ever cut.
        max_sequences: most samples of one micro-batch; 0: no such limit.
    """
    limit = max_sequences or len(rollouts)
    if packing.packed:
        batches = _first_fit(rollouts, max_tokens, limit, packing)
    else:
        batches = padded([len(r.prompt.token_ids) + r.num_tokens for r in rollouts], max_tokens, limit)
    return sorted((sorted(batch) for batch in batches), key=lambda batch: batch[0])


@dataclass(slots=True)
class _Window:
    """Consecutive samples of one teacher that are divided together, and what they take of the budget."""

    indices: list[int] = field(default_factory=list)
    rollouts: list[Rollout] = field(default_factory=list)
    sizes: dict[bytes, float] = field(default_factory=dict)  # of each prompt's completions
    members: dict[bytes, list[int]] = field(default_factory=dict)  # their places in `rollouts`

    @property
    def tokens(self) -> float:
        return sum(self.sizes.values())


class InOrder:
    """Micro-batches of samples that come one after the other in order of their numbers, each known as early as its
    members allow: whoever finds no room begins a new window, and windows are divided one by one. One teacher's samples
    in each: what different teachers give has different widths.

    Args: as of `divide`.
    """

    def __init__(self, max_tokens: int, max_sequences: int, packing: Packing) -> None:
        windows = 1 if packing.packed else PADDED_WINDOW
        self._budget = (max_tokens, max_sequences)
        self._packing = packing
        self._most_tokens = windows * max_tokens
        self._most_sequences = windows * max_sequences
        self._open: dict[str, _Window] = {}  # by teacher

    def add(self, index: int, scored: ScoredRollout) -> list[list[int]]:
        """Takes the sample that `index` stands for; gives the micro-batches that can get no further members."""
        found: list[list[int]] = []
        window = self._open.get(scored.teacher, _Window())
        key, size = self._grown(window, scored.rollout)
        if window.indices and window.tokens - window.sizes.get(key, 0.0) + size > self._most_tokens:
            found += self._divided(self._open.pop(scored.teacher))
            window = _Window()
            key, size = self._grown(window, scored.rollout)
        window.members.setdefault(key, []).append(len(window.rollouts))
        window.sizes[key] = size
        window.indices.append(index)
        window.rollouts.append(scored.rollout)
        self._open[scored.teacher] = window
        if len(window.indices) == self._most_sequences:
            found += self._divided(self._open.pop(scored.teacher))
        return found

    def rest(self) -> list[list[int]]:
        """The micro-batches that are left when there are no more samples."""
        windows = sorted(self._open.values(), key=lambda window: window.indices[0])
        self._open = {}
        return [batch for window in windows for batch in self._divided(window)]

    def _grown(self, window: _Window, rollout: Rollout) -> tuple[bytes, float]:
        """The prompt that `rollout` shares with others of the window, and what it and they would take."""
        key = rollout.prompt.token_ids.tobytes() if self._packing.shared else b"%d" % len(window.rollouts)
        members = [window.rollouts[place] for place in window.members.get(key, [])]
        grown = [*members, rollout]
        return key, _size(grown, range(len(grown)), self._packing)

    def _divided(self, window: _Window) -> list[list[int]]:
        batches = divide(window.rollouts, *self._budget, self._packing)
        return [[window.indices[place] for place in batch] for batch in batches]


def divide_in_order(
    scored: Sequence[ScoredRollout], max_tokens: int, max_sequences: int, packing: Packing
) -> list[list[int]]:
    """All micro-batches of a step's samples, which stand in order of their numbers: those of `InOrder`."""
    division = InOrder(max_tokens, max_sequences, packing)
    batches = [batch for index, sample in enumerate(scored) for batch in division.add(index, sample)]
    return batches + division.rest()


def padded(lengths: Sequence[int], max_tokens: int, max_sequences: int) -> list[list[int]]:
    """Samples by length, longest first, as many to a micro-batch as fit: neighbours pad each other least."""
    batches: list[list[int]] = []
    for index in _longest_first(lengths):
        longest = lengths[batches[-1][0]] if batches else 0
        fits = bool(batches) and longest * (len(batches[-1]) + 1) <= max_tokens
        if fits and len(batches[-1]) < max_sequences:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _first_fit(rollouts: Sequence[Rollout], max_tokens: int, max_sequences: int, packing: Packing) -> list[list[int]]:
    """First fit decreasing (Johnson 1973: at most 11/9 of the fewest bins, and 2/3 of one) of samples, or of the
    completions of one prompt together where they share it."""
    units: list[list[int]] = []
    for group in packing.groups(rollouts, range(len(rollouts))):
        units += _parts(rollouts, group, max_tokens, max_sequences, packing)
    sizes = [_size(rollouts, unit, packing) for unit in units]
    batches: list[list[int]] = []
    left: list[float] = []
    for index in _longest_first(sizes):
        unit = units[index]
        for b, room in enumerate(left):
            if sizes[index] <= room and len(batches[b]) + len(unit) <= max_sequences:
                batches[b] += unit
                left[b] -= sizes[index]
                break
        else:
            batches.append(list(unit))
            left.append(max_tokens - sizes[index])
    return batches


def _parts(
    rollouts: Sequence[Rollout], group: list[int], max_tokens: int, max_sequences: int, packing: Packing
) -> list[list[int]]:
    """One prompt's completions, cut where they don't fit into one micro-batch; longest first."""
    parts: list[list[int]] = []
    for place in _longest_first([rollouts[i].num_tokens for i in group]):
        grown = [*parts[-1], group[place]] if parts else []
        if grown and len(grown) <= max_sequences and _size(rollouts, grown, packing) <= max_tokens:
            parts[-1] = grown
        else:
            parts.append([group[place]])
    return parts


def _size(rollouts: Sequence[Rollout], unit: Sequence[int], packing: Packing) -> float:
    """Tokens that completions of one prompt take of the budget."""
    prompt = len(rollouts[unit[0]].prompt.token_ids)
    copies = 1 + PREFIX_WEIGHT * len(unit) if packing.shares(prompt, len(unit)) else len(unit)
    return copies * prompt + sum(rollouts[i].num_tokens for i in unit)


def _longest_first(sizes: Sequence[float]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
