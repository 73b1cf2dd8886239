"""Packing of a step's samples into micro-batches: consecutive samples, in their own order, under a token budget. A pure
function of the lengths, so that a resumed step is packed as the first time.
"""

from __future__ import annotations

from collections.abc import Sequence


def pack(lengths: Sequence[int], max_tokens: int, max_sequences: int = 0) -> list[list[int]]:
    """Indices of the samples of each micro-batch.

    Args:
        lengths: tokens of each sample, prompt and completion, in sample order.
        max_tokens: most padded tokens of one micro-batch (number of sequences times the longest). A sample longer than
            this makes a micro-batch alone: nothing is ever cut.
        max_sequences: most samples of one micro-batch; 0: no such limit.
    """
    batches: list[list[int]] = []
    longest = 0
    for index, length in enumerate(lengths):
        grown = max(longest, length)
        fits = bool(batches) and grown * (len(batches[-1]) + 1) <= max_tokens
        if fits and (not max_sequences or len(batches[-1]) < max_sequences):
            batches[-1].append(index)
            longest = grown
        else:
            batches.append([index])
            longest = length
    return batches
