"""The LM head of the loss: logits of a chunk of hidden rows, and from their gradient the hidden rows' and the head's
own, each in one product. A plain linear head runs without autograd, into memory that is used again; anything else
(LoRA, quantised, wrapped or hooked modules, functions) through autograd, a chunk at a time.

Shape legend: n rows of a chunk, H hidden, W logit width, R rows of the head's matrix (R >= W: some pad it).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from student_trainer.losses.base import as_float
from teacher_api import causal_lm

CPU_COLUMNS = 8192
"""Columns of the gradient in one product with the head's matrix on a CPU, where a few hundred rows times the whole
vocabulary are slower."""
PRODUCT_BYTES = 16 * 2**20
"""Of a head gradient in another precision than the parameter's, formed at a time."""


@dataclass(frozen=True, slots=True)
class Head:
    """A model's output head: logits = cap(scale · (W h + b)), in float32 or, with `autocast`, bfloat16 arithmetic."""

    parts: causal_lm.Parts
    autocast: bool = False

    def __call__(self, hidden_nH: Tensor) -> Tensor:
        """Logits [n, W], with graph."""
        with self._arithmetic(hidden_nH.device.type):
            return self.parts.head(hidden_nH)  # type: ignore[no-any-return]

    def _arithmetic(self, device: str) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device, dtype=torch.bfloat16) if self.autocast else contextlib.nullcontext()


class Projection(Protocol):
    """A head at work for one micro-batch. `logits` and `backward` alternate, chunk by chunk."""

    def logits(self, hidden_nH: Tensor) -> Tensor:
        """float32 (float64 stays) [n, W], without graph; the caller may overwrite them until `backward`."""

    def slope(self, logits_nW: Tensor) -> Tensor | float:
        """Derivative of logits by what `backward` takes the gradient of, elementwise; any number of rows."""

    def backward(self, grad_nW: Tensor) -> Tensor:
        """Adds the head's own gradients to the sink; returns that of the hidden rows [n, H]. May destroy its input."""


@dataclass(slots=True)
class Sink:
    """Where the head's parameters collect their gradient: in `.grad`, or (`deferred`) here until it is delivered."""

    deferred: bool
    held: dict[nn.Parameter, Tensor] = field(default_factory=dict)

    def find(self, parameter: nn.Parameter) -> Tensor | None:
        return self.held.get(parameter) if self.deferred else parameter.grad

    def put(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        """The first gradient of a parameter that has none yet; the tensor is kept, not copied."""
        if self.deferred:
            self.held[parameter] = gradient
        else:
            parameter.grad = gradient

    def add(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        found = self.find(parameter)
        if found is None:
            self.put(parameter, gradient)
        else:
            found.add_(gradient)


def projection(head: Callable[[Tensor], Tensor], sink: Sink, chunk_rows: int) -> Projection:
    """The fastest way there is for this head.

    Raises:
        ValueError: gradients are to be deferred, and the head is a bare function, whose parameters nobody knows.
    """
    if isinstance(head, Head):
        if is_plain_linear(head.parts.project):
            return LinearProjection(head, sink, chunk_rows)
        return AutogradProjection(head, head.parts.project, sink)
    if is_plain_linear(head):
        parts = causal_lm.Parts(None, head, head.out_features, head.in_features)  # type: ignore[attr-defined]
        return LinearProjection(Head(parts), sink, chunk_rows)
    return AutogradProjection(head, head if isinstance(head, nn.Module) else None, sink)


def is_plain_linear(module: Any) -> bool:
    """Whether the module's output is W h + b of its own whole, ordinary parameters, and nobody listens in on it."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or not module.weight.numel():
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return module.weight.is_floating_point() and not any(getattr(module, name) for name in hooks)


class LinearProjection:
    """W h + b without autograd: all chunks share one buffer of logits, and gradients are added up by the products
    themselves, so that no second matrix of the head's size exists."""

    def __init__(self, head: Head, sink: Sink, chunk_rows: int) -> None:
        linear, self._parts, self._sink, self._rows = head.parts.project, head.parts, sink, chunk_rows
        self._weight, self._bias = linear.weight, linear.bias
        matrix_WH = linear.weight.detach()[: self._parts.logit_width]
        bias_W = None if linear.bias is None else linear.bias.detach()[: self._parts.logit_width]
        if head.autocast:
            matrix_WH, bias_W = matrix_WH.bfloat16(), None if bias_W is None else bias_W.bfloat16()
        self._matrix_WH, self._bias_W = matrix_WH, bias_W
        self._buffer: Tensor | None = None
        self._hidden_nH = self._matrix_WH[:0]

    def logits(self, hidden_nH: Tensor) -> Tensor:
        matrix_WH = self._matrix_WH
        self._hidden_nH = hidden_nH = hidden_nH.detach().to(matrix_WH.dtype)
        if self._buffer is None:
            dtype = as_float(matrix_WH[:0]).dtype
            self._buffer = torch.empty(self._rows, len(matrix_WH), dtype=dtype, device=hidden_nH.device)
        logits_nW = self._buffer[: len(hidden_nH)]
        if logits_nW.dtype != matrix_WH.dtype:
            logits_nW.copy_(nn.functional.linear(hidden_nH, matrix_WH, self._bias_W))
        elif self._bias_W is None:
            torch.mm(hidden_nH, matrix_WH.t(), out=logits_nW)
        else:
            torch.addmm(self._bias_W, hidden_nH, matrix_WH.t(), out=logits_nW)
        if self._parts.scale != 1.0:
            logits_nW.mul_(self._parts.scale)
        if self._parts.soft_cap is not None:
            logits_nW.div_(self._parts.soft_cap).tanh_().mul_(self._parts.soft_cap)
        return logits_nW

    def slope(self, logits_nW: Tensor) -> Tensor | float:
        """z = c·tanh(s·x / c), so dz/dx = s·(1 − (z / c)²)."""
        scale, cap = self._parts.scale, self._parts.soft_cap
        return scale if cap is None else (logits_nW / cap).square_().neg_().add_(1.0).mul_(scale)

    def backward(self, grad_nW: Tensor) -> Tensor:
        if self._bias is not None and self._bias.requires_grad:
            bias_R = torch.zeros_like(self._bias)
            bias_R[: grad_nW.shape[1]] = grad_nW.sum(0)
            self._sink.add(self._bias, bias_R)
        grad_nW = grad_nW.to(self._matrix_WH.dtype)
        if self._weight.requires_grad:
            self._add_product(grad_nW)
        if grad_nW.device.type != "cpu" or grad_nW.dtype not in (torch.float32, torch.float64):
            return torch.mm(grad_nW, self._matrix_WH)
        grad_nH = torch.zeros_like(self._hidden_nH)
        for start in range(0, grad_nW.shape[1], CPU_COLUMNS):
            columns = slice(start, start + CPU_COLUMNS)
            grad_nH.addmm_(grad_nW[:, columns], self._matrix_WH[columns])
        return grad_nH

    def _add_product(self, grad_nW: Tensor) -> None:
        """grad W += gradᵀ h, into the parameter's gradient itself."""
        weight_RH, width = self._weight, grad_nW.shape[1]
        total_RH = self._sink.find(weight_RH)
        same = weight_RH.dtype == grad_nW.dtype
        if total_RH is None:
            if same and len(weight_RH) == width:
                first_RH = torch.empty_like(weight_RH)
                torch.mm(grad_nW.t(), self._hidden_nH, out=first_RH)
                self._sink.put(weight_RH, first_RH)
                return
            total_RH = torch.zeros_like(weight_RH)
            self._sink.put(weight_RH, total_RH)
        if same:
            total_RH[:width].addmm_(grad_nW.t(), self._hidden_nH)
            return
        step = max(1, PRODUCT_BYTES // (weight_RH.shape[1] * grad_nW.element_size()))
        for start in range(0, width, step):
            columns = slice(start, min(start + step, width))
            total_RH[columns].add_(grad_nW[:, columns].t() @ self._hidden_nH)


class AutogradProjection:
    """Any differentiable head. Its parameters' gradients exist a second time while a chunk's are added."""

    def __init__(self, head: Callable[[Tensor], Tensor], module: nn.Module | None, sink: Sink) -> None:
        if module is None and sink.deferred:
            raise ValueError("a head that is a bare function can't defer its gradients; expected a module or a Head")
        self._head, self._sink = head, sink
        self._parameters = None if module is None else [p for p in module.parameters() if p.requires_grad]
        self._leaf_nH = self._output_nW = torch.empty(0)

    def logits(self, hidden_nH: Tensor) -> Tensor:
        self._leaf_nH = hidden_nH.detach().requires_grad_()
        with torch.enable_grad():
            self._output_nW = as_float(self._head(self._leaf_nH))
        return self._output_nW.detach().clone(memory_format=torch.contiguous_format)

    def slope(self, logits_nW: Tensor) -> Tensor | float:
        return 1.0

    def backward(self, grad_nW: Tensor) -> Tensor:
        if self._parameters is None:
            self._output_nW.backward(grad_nW)  # type: ignore[no-untyped-call]
            grad_nH = self._leaf_nH.grad
        else:
            grad_nH, *own = torch.autograd.grad(
                self._output_nW, [self._leaf_nH, *self._parameters], grad_nW, allow_unused=True
            )
            for parameter, gradient in zip(self._parameters, own, strict=True):
                if gradient is not None:
                    self._sink.add(parameter, gradient)
        return torch.zeros_like(self._leaf_nH) if grad_nH is None else grad_nH
