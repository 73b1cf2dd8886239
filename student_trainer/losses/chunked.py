"""Loss and gradients over row chunks, in one pass: the head's logits exist for `chunk_rows` positions at a time, never
for all; the gradient is written over them, and goes through the head while it is there.

Shape legend: N scored positions of a micro-batch, n those of a chunk, H hidden, W the student's logit width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student_trainer.losses.base import AnyObjective, LossRows
from student_trainer.losses.heads import Sink, projection
from student_trainer.losses.student_side import Tape

CHUNK_BYTES = 160 * 2**20
"""Of float32 logits that exist at a time, by default (docs/decisions/0015-loss-in-one-pass.md)."""
CPU_CHUNK_ROWS = 256
"""On a CPU no more: its products with the head get no faster, and what follows finds fewer logits in the cache."""
DENSE_BYTES = 8 * 2**20
"""Whole-vocabulary teacher rows that an objective gets at a time: it makes a dozen tensors of that size from them."""


def default_rows(logit_width: int, device_type: str) -> int:
    """Positions whose logits exist at a time where the user says nothing."""
    rows = max(1, CHUNK_BYTES // (4 * logit_width))
    return min(rows, CPU_CHUNK_ROWS) if device_type == "cpu" else rows


def backward(
    head: Callable[[Tensor], Tensor],
    hidden_NH: Tensor,
    objective: AnyObjective,
    rows: LossRows,
    weights_N: Tensor,
    chunk_rows: int,
    out_logprob_N: Tensor | None = None,
    *,
    deferred: bool = False,
) -> tuple[float, dict[str, float]]:
    """Adds the gradient of L = Σ_n w_n D_n to every parameter behind `hidden_NH` and `head`.

    Each chunk runs head, objective and backward on a detached copy of its hidden rows; their gradients are collected
    and sent through the trunk in one pass at the end. Rows of weight 0 are left out altogether, so whatever stands
    there can't reach a gradient. The result depends on `chunk_rows` only by rounding.

    Gradients of the head's own parameters are added to their `.grad` directly, before the trunk's backward: no second
    matrix of that size exists, and no autograd hook of these parameters fires. With tied weights the trunk's backward
    then adds the embedding's share. With `deferred` they are collected apart, and come through autograd together with
    the trunk's in one backward pass, so that whatever hooks them (DistributedDataParallel, ZeRO-2) sees each exactly
    once; from the second micro-batch on that costs another matrix of the head's size.

    Memory above the inputs: head gradient, hidden gradient, `chunk_rows` rows of float32 logits, and a few megabytes;
    for a head that isn't plain linear (heads.py) several times the chunk.

    Args:
        head: hidden rows [n, H] -> logits [n, W]; a `heads.Head` or an nn.Linear runs fastest.
        hidden_NH: last hidden states at the scored positions, with their graph.
        objective: gives D_n.
        rows: row n belongs to hidden row n.
        weights_N: already divided by global counts (normalise.token_weights), on any device.
        chunk_rows: at most so many rows of logits at once; >= 1.
        out_logprob_N: float32, takes log q_now(y) (T = 1) of the rows of non-zero weight, where the objective gives it.
        deferred: see above.

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
    sink = Sink(deferred)
    through = projection(head, sink, min(chunk_rows, len(index_N)))
    grad_NH = torch.zeros_like(hidden_NH, memory_format=torch.contiguous_format)
    sums: dict[str, Tensor] = {}
    for index_n in torch.split(index_N, chunk_rows):
        logits_nW = through.logits(hidden_NH.detach().index_select(0, index_n))
        if not sums:
            _check_ids(rows, logits_nW.shape[-1])
        for part in _parts(rows, len(index_n)):
            index = index_n[part]
            token_n = _differentiate(logits_nW[part], objective, rows, index, weights_N, through.slope, sums)
            if out_logprob_N is not None and token_n is not None:
                out_logprob_N.index_copy_(0, index.to(out_logprob_N.device), token_n.to(out_logprob_N))
        grad_NH.index_copy_(0, index_n, through.backward(logits_nW).to(grad_NH.dtype))
    del through, logits_nW  # their memory is the trunk's now
    _deliver(hidden_NH, grad_NH, sink)
    on_host = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
    return on_host.pop("loss"), on_host


def _differentiate(
    logits_nW: Tensor,
    objective: AnyObjective,
    rows: LossRows,
    index_n: Tensor,
    weights_N: Tensor,
    slope: Callable[[Tensor], Tensor | float],
    sums: dict[str, Tensor],
) -> Tensor | None:
    """Turns the logits of rows `index_n` into their gradient, in place; adds loss and metrics to `sums`. Returns the
    objective's log q_now(y)."""
    tape = Tape(logits_nW)
    result = objective.per_token(rows.inputs(index_n, tape.leaf, tape))
    loss = (result.value * weights_N.index_select(0, index_n)).sum()
    tape.backward_(loss, slope)
    value_n = result.value.detach()
    for name, metric_n in {**result.metrics, "nonfinite": ~value_n.isfinite(), "loss": loss.detach()}.items():
        amount = metric_n.double().sum()
        sums[name] = sums[name] + amount if name in sums else amount
    return result.token_logprob


def _deliver(hidden_NH: Tensor, grad_NH: Tensor, sink: Sink) -> None:
    """Sends what was collected through autograd: the hidden rows' gradient, and the head's if it was deferred."""
    if sink.held:
        parameters = list(sink.held)
        box = [grad_NH, *(sink.held.pop(p) for p in parameters)]
        _Delivery.apply(box, hidden_NH, *parameters).backward()  # type: ignore[no-untyped-call]
    elif hidden_NH.requires_grad:
        hidden_NH.backward(grad_NH)  # type: ignore[no-untyped-call]


class _Delivery(torch.autograd.Function):
    """A number whose gradient is what `box` holds, for each of the tensors; the box is emptied, so that autograd may
    keep the tensors themselves as `.grad`."""

    @staticmethod
    def forward(ctx: Any, box: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.box = box
        return tensors[0].new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = tuple(ctx.box)
        ctx.box.clear()
        return (None, *gradients)


def _parts(rows: LossRows, num_rows: int) -> Iterator[slice]:
    """A chunk's rows as the objective gets them: all, or with whole-vocabulary teacher rows few at a time."""
    step = num_rows
    if rows.teacher.support_ids is None:
        values = rows.teacher.support_logprob
        step = max(1, DENSE_BYTES // (values.shape[1] * values.element_size()))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _check_ids(rows: LossRows, logit_width: int) -> None:
    """An id outside the logits would be an unreadable device-side failure in `gather`."""
    if rows.teacher.support_ids is None:
        largest = rows.teacher.support_logprob.shape[1] - 1
    else:
        largest = int(rows.teacher.support_ids.max())
    largest = max(largest, int(rows.target.max()))
    if largest >= logit_width:
        raise ValueError(f"the student has {logit_width} logits, but the teacher scored token id {largest}")
