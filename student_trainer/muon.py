"""Muon in float32. torch.optim.Muon rounds every gradient to bfloat16 and iterates in it: gradients that ranks add up
in another order, 1e-7 apart, then end 4e-3 apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """Steps of matrices W [m, n] with gradients G, momentum μ, rate γ and decay λ (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon):

        B ← μ B + (1 − μ) G,   U = μ B + (1 − μ) G (without Nesterov: U = B),
        W ← (1 − γ λ) W − γ √max(1, m / n) · orthogonal(U)

    Arguments, defaults and state are torch.optim.Muon's; of `adjust_lr_fn` there is its default alone.

    Raises:
        ValueError: a parameter that is no matrix, or another `adjust_lr_fn`.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["adjust_lr_fn"] not in (None, "original"):
                raise ValueError(f"adjust_lr_fn: got {group['adjust_lr_fn']!r}, expected None")
            matrices, gradients, momenta = list[Tensor](), list[Tensor](), list[Tensor]()
            self._init_group(group, matrices, gradients, momenta)
            for matrix, gradient, momentum in zip(matrices, gradients, momenta, strict=True):
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
                rows, columns = matrix.shape
                rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
                direction = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(direction.to(matrix.dtype), alpha=-rate)
        return loss


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Nearly U Vᵀ of a matrix U S Vᵀ [m, n], in float32: X = M / max(‖M‖, eps) (Frobenius), then `steps` times

        X ← a X + (b A + c A²) X,   A = X Xᵀ

    on the side that is shorter. With the coefficients of Muon singular values end between 0.7 and 1.2, not at 1.
    """
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).float()
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x
