"""Division of a step's samples into micro-batches under a token budget. A pure function of the samples' lengths and
prompts, so that a resumed step is divided as the first time; nothing but rounding depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence

from student_trainer.packing import PREFIX_WEIGHT, Packing
from student_trainer.types import Rollout, ScoredRollout


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


def divide_by_teacher(
    scored: Sequence[ScoredRollout], max_tokens: int, max_sequences: int, packing: Packing
) -> list[list[int]]:
    """As `divide`, with one teacher's samples in each: what different teachers give has different widths."""
    batches: list[list[int]] = []
    for teacher in dict.fromkeys(s.teacher for s in scored):
        mine = [index for index, s in enumerate(scored) if s.teacher == teacher]
        divided = divide([scored[index].rollout for index in mine], max_tokens, max_sequences, packing)
        batches += [[mine[place] for place in batch] for batch in divided]
    return batches


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
