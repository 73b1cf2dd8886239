"""Exact top-k of rows of logits with a fixed order among equals, searching few of the columns.

Shape legend: n rows, V columns, k entries, B blocks of BLOCK columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
"""Columns of one block of the search."""


def top_k_by_id(values_nV: Tensor, k: int, block_max_nB: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(values, ids int64) [n, k] of the k largest entries per row, descending; equal values by ascending id.

    The k largest entries lie in the k blocks with the largest maxima, so only those are searched. torch.topk leaves
    open which of several equal entries it returns: one entry more is taken, and rows in which two neighbours are equal
    are chosen again by (value, id).

    Args:
        values_nV: float32, no NaN.
        k: 1 <= k <= V.
        block_max_nB: maxima of the V // BLOCK whole blocks, where the caller has them.
    """
    width = values_nV.shape[-1]
    if k >= width:
        values, ids = torch.sort(values_nV, dim=-1, descending=True, stable=True)
        return values[:, :k], ids[:, :k]
    num_blocks = width // BLOCK
    if 2 * (k + 1) >= num_blocks:
        values, ids = values_nV.topk(k + 1, dim=-1)
    else:
        maxima = _block_max(values_nV, num_blocks) if block_max_nB is None else block_max_nB
        values, ids = _search(values_nV, maxima.topk(k + 1, dim=-1, sorted=False).indices, num_blocks, k + 1)
    tied_n = (values[:, 1:] == values[:, :-1]).any(-1)
    values, ids = values[:, :k], ids[:, :k]
    if bool(tied_n.any()):
        ids[tied_n] = _top_k_of_keys(values_nV[tied_n], k)
        values[tied_n] = values_nV[tied_n].gather(1, ids[tied_n])
    return values, ids


def _block_max(values_nV: Tensor, num_blocks: int) -> Tensor:
    return blocks_of(values_nV, num_blocks).amax(-1)


def blocks_of(values_nV: Tensor, num_blocks: int) -> Tensor:
    """A view [n, B, BLOCK] of the first columns."""
    row, column = values_nV.stride()
    shape = (len(values_nV), num_blocks, BLOCK)
    return values_nV.as_strided(shape, (row, BLOCK * column, column), values_nV.storage_offset())


def _search(values_nV: Tensor, chosen_nc: Tensor, num_blocks: int, k: int) -> tuple[Tensor, Tensor]:
    """Top-k of the chosen blocks and of the columns after the last whole block."""
    covered, num_chosen = num_blocks * BLOCK, chosen_nc.shape[1]
    blocks = blocks_of(values_nV, num_blocks)
    searched = blocks.gather(1, chosen_nc[:, :, None].expand(-1, -1, BLOCK)).flatten(1)
    if covered < values_nV.shape[1]:
        searched = torch.cat([searched, values_nV[:, covered:]], dim=-1)
    values, places = searched.topk(k, dim=-1)
    block = places.div(BLOCK, rounding_mode="floor")
    ids = chosen_nc.gather(1, block.clamp_max(num_chosen - 1)) * BLOCK + places % BLOCK
    return values, torch.where(block < num_chosen, ids, places - num_chosen * BLOCK + covered)


def _top_k_of_keys(values_nV: Tensor, k: int) -> Tensor:
    """Ids [n, k] by (value descending, id ascending), as integers that order the same.

    The same search by blocks holds: of blocks with equal maxima the first is taken, and an entry of a block that k
    others precede in (maximum, place) is itself preceded by k entries.
    """
    width = values_nV.shape[-1]
    num_blocks = width // BLOCK
    if 2 * (k + 1) < num_blocks:
        maxima = _block_max(values_nV, num_blocks)
        chosen = order_keys(maxima, torch.arange(num_blocks, device=maxima.device)).topk(k, dim=-1).indices
        blocks = chosen.sort(dim=-1).values  # places then ascend with ids
        inside = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=blocks.device)).flatten(1)
        after = torch.arange(num_blocks * BLOCK, width, device=blocks.device).expand(len(blocks), -1)
        ids = torch.cat([inside, after], dim=-1)
    else:
        ids = torch.arange(width, device=values_nV.device).expand(len(values_nV), -1)
    places = order_keys(values_nV.gather(1, ids), ids).topk(k, dim=-1).indices
    return ids.gather(1, places)


def order_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 that orders as (value ascending, id descending)."""
    bits = (values + 0.0).contiguous().view(torch.int32)  # + 0.0: -0 and 0 are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (0x7FFFFFFF - ids)
