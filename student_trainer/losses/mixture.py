"""Logs of a mixture of two distributions relative to each of them, in forms that are exactly 0 where the two are equal
and finite where one of them is 0.

Shape legend: N positions, O outcomes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NEAR_NATS = 1.0
"""Up to this distance of the logs, log1p keeps the digits of a ratio close to 1; beyond, logaddexp those of a small
weight."""


def log_ratios(log_p_NO: Tensor, log_q_NO: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """(log r/p, log r/q), each [N, O], of r = weight·p + (1 − weight)·q, with q's gradient; weight in [0, 1]."""
    d_NO = log_q_NO - log_p_NO
    # Each branch sees only arguments at which it is finite: where() passes NaN gradients of the branch not taken on.
    below = _log_mixed(d_NO.clamp(max=0.0), weight)  # log r/p where q <= p
    above = _log_mixed((-d_NO).clamp(max=0.0), 1.0 - weight)  # log r/q where q > p
    q_is_less = d_NO <= 0.0
    return torch.where(q_is_less, below, above + d_NO), torch.where(q_is_less, below - d_NO, above)


def _log_mixed(x: Tensor, weight: float) -> Tensor:
    """log(w + (1 − w)·e^x) for x <= 0."""
    if weight == 0.0:
        return x
    if weight == 1.0:
        return torch.zeros_like(x)
    near = torch.log1p((1.0 - weight) * torch.expm1(x.clamp(min=-NEAR_NATS)))
    far = torch.logaddexp(x.new_tensor(math.log(weight)), x + math.log1p(-weight))
    return torch.where(x > -NEAR_NATS, near, far)
