"""Exact top-k of rows of logits with a fixed order among equals, searching few of the columns.

Shape legend: n rows, V columns, k entries, B blocks, J entries of a block, c entries searched.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ENTRIES = (16, 32, 64)
NEIGHBOURS = 128  # columns of a block where equal entries have to be told apart


class Blocks:
    """A row's columns in blocks, of which few have to be searched: the k largest entries lie in the k blocks with the
    largest maxima.

    Entry j of block b is column b + j * B: maxima over such blocks are taken of whole vectors of neighbouring columns,
    which is as fast as reading them. The last V - B * J columns are in no block and are always searched.

    Args:
        width: V.
        entries: J.
    """

    def __init__(self, width: int, entries: int) -> None:
        self.width = width
        self.entries = entries
        self.number = width // entries
        self.covered = self.number * entries
        self._firsts_J: Tensor | None = None

    @classmethod
    def for_search(cls, width: int, k: int) -> Blocks | None:
        """Those with which the k largest of `width` entries are found soonest: about V / J + k * J are looked at.
        None where that is no less than all."""
        entries = next((j for j in BLOCK_ENTRIES if j * j * k >= width / 2), BLOCK_ENTRIES[-1])
        return cls(width, entries) if 2 * (k + 1) < width // entries else None

    def maxima(self, values_nV: Tensor) -> Tensor:
        """[n, B]."""
        return values_nV[:, : self.covered].reshape(len(values_nV), self.entries, self.number).amax(1)

    def columns(self, chosen_nb: Tensor) -> Tensor:
        """Ids [n, c] of the entries of the chosen blocks, and of the columns that are in none."""
        if self._firsts_J is None or self._firsts_J.device != chosen_nb.device:
            self._firsts_J = torch.arange(0, self.covered, self.number, device=chosen_nb.device)
        inside = (chosen_nb[:, :, None] + self._firsts_J).flatten(1)
        if self.covered == self.width:
            return inside
        rest = torch.arange(self.covered, self.width, device=inside.device).expand(len(inside), -1)
        return torch.cat([inside, rest], dim=-1)


def top_k_by_id(
    values_nV: Tensor, k: int, blocks: Blocks | None = None, maxima_nB: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(values, ids int64) [n, k] of the k largest entries per row, descending; equal values by ascending id.

    torch.topk leaves open which of several equal entries it returns: one entry more is taken, and rows in which two
    neighbours are equal are chosen again by (value, id).

    Args:
        values_nV: float32, no NaN.
        k: 1 <= k <= V.
        blocks, maxima_nB: of `values_nV` (`for_search`), where the caller has them.
    """
    width = values_nV.shape[-1]
    if k >= width:
        values, ids = torch.sort(values_nV, dim=-1, descending=True, stable=True)
        return values[:, :k], ids[:, :k]
    blocks = blocks or Blocks.for_search(width, k)
    if blocks is None:
        values, ids = values_nV.topk(k + 1, dim=-1)
    else:
        maxima_nB = blocks.maxima(values_nV) if maxima_nB is None else maxima_nB
        searched = blocks.columns(maxima_nB.topk(k + 1, dim=-1, sorted=False).indices)
        values, places = values_nV.gather(1, searched).topk(k + 1, dim=-1)
        ids = searched.gather(1, places)
    equal_nk = values[:, 1:] == values[:, :-1]
    values, ids = values[:, :k], ids[:, :k]
    if bool(equal_nk.any()):
        tied_n = equal_nk.any(-1)
        ids[tied_n] = _top_k_of_keys(values_nV[tied_n], k)
        values[tied_n] = values_nV[tied_n].gather(1, ids[tied_n])
    return values, ids


def _top_k_of_keys(values_nV: Tensor, k: int) -> Tensor:
    """Ids [n, k] by (value descending, id ascending), as integers that order the same.

    The search goes by blocks of neighbours here: of blocks with equal maxima the first is taken, and an entry of a
    block that k others precede in (maximum, place) is itself preceded by k entries.
    """
    width = values_nV.shape[-1]
    number = width // NEIGHBOURS
    if 2 * (k + 1) < number:
        covered = number * NEIGHBOURS
        maxima = values_nV[:, :covered].reshape(len(values_nV), number, NEIGHBOURS).amax(-1)
        chosen = order_keys(maxima, torch.arange(number, device=maxima.device)).topk(k, dim=-1).indices
        ids = (chosen[:, :, None] * NEIGHBOURS + torch.arange(NEIGHBOURS, device=chosen.device)).flatten(1)
        after = torch.arange(covered, width, device=chosen.device).expand(len(chosen), -1)
        ids = torch.cat([ids, after], dim=-1)
    else:
        ids = torch.arange(width, device=values_nV.device).expand(len(values_nV), -1)
    places = order_keys(values_nV.gather(1, ids), ids).topk(k, dim=-1).indices
    return ids.gather(1, places)


def order_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 that orders as (value ascending, id descending)."""
    bits = (values + 0.0).contiguous().view(torch.int32)  # + 0.0: -0 and 0 are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0x7FFFFFFF - ids)
