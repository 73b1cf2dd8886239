"""Loss and gradients over row chunks: the head's logits exist for `chunk_rows` positions at a time, never for all.

Shape legend: N scored positions of a micro-batch, n those of a chunk, H hidden, W the student's logit width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from student_trainer.losses.base import AnyObjective, LossRows, as_float


def backward(
    head: Callable[[Tensor], Tensor],
    hidden_NH: Tensor,
    objective: AnyObjective,
    rows: LossRows,
    weights_N: Tensor,
    chunk_rows: int,
    out_logprob_N: Tensor | None = None,
) -> tuple[float, dict[str, float]]:
    """Adds the gradient of L = Σ_n w_n D_n to every parameter behind `hidden_NH` and `head`.

    Each chunk runs head, objective and backward on a detached copy of its hidden rows; their gradients are collected
    and sent through the trunk in one pass at the end. Rows of weight 0 are left out altogether, so whatever stands
    there can't reach a gradient. The result depends on `chunk_rows` only by rounding.

    Args:
        head: hidden rows [n, H] -> logits [n, W].
        hidden_NH: last hidden states at the scored positions, with their graph.
        objective: gives D_n.
        rows: row n belongs to hidden row n.
        weights_N: already divided by global counts (normalise.token_weights), on any device.
        chunk_rows: at most so many rows of logits at once; >= 1.
        out_logprob_N: float32, takes log q_now(y) (T = 1) of the rows of non-zero weight, where the objective gives it.

    Returns:
        L, and for each metric its plain sum over the rows of non-zero weight: divide by the global token count. Besides
        the objective's own there is `nonfinite`, the number of rows whose value isn't finite.

    Raises:
        ValueError: numbers of rows differ, or an id is outside the student's logits.
    """
    num_rows = len(hidden_NH)
    if not num_rows == rows.num_rows == len(weights_N):
        raise ValueError(f"{num_rows} hidden rows, {rows.num_rows} scored rows, {len(weights_N)} weights: must agree")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows: expected at least 1, got {chunk_rows}")
    weights_N = weights_N.to(hidden_NH.device)
    index_N = weights_N.nonzero().flatten()
    if len(index_N) == 0:
        return 0.0, {}
    grad_NH = torch.zeros_like(hidden_NH)
    sums: dict[str, Tensor] = {}
    for chunk, index in enumerate(torch.split(index_N, chunk_rows)):
        hidden = hidden_NH.detach().index_select(0, index).requires_grad_()
        logits = as_float(head(hidden))
        if chunk == 0:
            _check_ids(rows, logits.shape[-1])
        result = objective.per_token(rows.inputs(index, logits))
        loss = (result.value * weights_N.index_select(0, index)).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        if hidden.grad is not None:
            grad_NH.index_copy_(0, index, hidden.grad)
        if out_logprob_N is not None and result.token_logprob is not None:
            out_logprob_N.index_copy_(0, index.to(out_logprob_N.device), result.token_logprob.to(out_logprob_N))
        value = result.value.detach()
        per_row = {**result.metrics, "nonfinite": ~value.isfinite()}
        for name, metric in per_row.items():
            _add(sums, name, metric.double().sum())
        _add(sums, "loss", loss.detach().double())
    if hidden_NH.requires_grad:
        hidden_NH.backward(grad_NH)  # type: ignore[no-untyped-call]
    on_host = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
    return on_host.pop("loss"), on_host


def _add(sums: dict[str, Tensor], name: str, amount: Tensor) -> None:
    sums[name] = sums[name] + amount if name in sums else amount


def _check_ids(rows: LossRows, logit_width: int) -> None:
    """An id outside the logits would be an unreadable device-side failure in `gather`."""
    if rows.teacher.support_ids is None:
        largest = rows.teacher.support_logprob.shape[1] - 1
    else:
        largest = int(rows.teacher.support_ids.max())
    largest = max(largest, int(rows.target.max()))
    if largest >= logit_width:
        raise ValueError(f"the student has {logit_width} logits, but the teacher scored token id {largest}")
