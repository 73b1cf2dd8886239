"""Adaptive KL: forward and reverse KL, weighed at each position by where the student is off: among the teacher's likely
ids (forward) or the others (reverse)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from student_trainer.losses.config import DivergenceConfig
from student_trainer.losses.divergence import Divergence, forward_kl, reverse_kl
from student_trainer.losses.registry import register


class AdaptiveKLConfig(DivergenceConfig):
    objective: Literal["adaptive_kl"] = "adaptive_kl"

    adaptive_alpha: float = Field(0.5, gt=0.0, lt=1.0)
    """α: the teacher's likeliest ids that together reach this mass are the head. A threshold, no weight."""


@register(AdaptiveKLConfig)
class AdaptiveKL(Divergence[AdaptiveKLConfig]):
    """D = w KL(p‖q) + (1 − w) KL(q‖p), w = g_head / (g_head + g_rest) without gradient, g = Σ|p − q| over the head and
    over the rest (arXiv 2404.02657). The head is the smallest prefix of p, sorted descending, with mass >= α; the tail
    bucket sorts last. Where both gaps are 0 (teacher and student are equal) w is ½.

    w depends on what the tail lumps together: unlike an f-divergence, D with the bucket may exceed the full one.
    """

    def divergence(self, log_p_NO: Tensor, log_q_NO: Tensor) -> Tensor:
        weight_N = self.forward_weight(log_p_NO, log_q_NO)
        return weight_N * forward_kl(log_p_NO, log_q_NO) + (1.0 - weight_N) * reverse_kl(log_p_NO, log_q_NO)

    @torch.no_grad()
    def forward_weight(self, log_p_NO: Tensor, log_q_NO: Tensor) -> Tensor:
        """w [N]."""
        p_NO = log_p_NO.double().exp()  # whether a prefix reaches α must not hang on float32 sums
        gap_NO = (p_NO - log_q_NO.double().exp()).abs()
        num_sorted = p_NO.shape[1] - (self.config.tail == "bucket")
        order = torch.argsort(p_NO[:, :num_sorted], dim=1, descending=True, stable=True)
        sorted_p = p_NO.gather(1, order)
        in_head = sorted_p.cumsum(1) - sorted_p < self.config.adaptive_alpha
        head_N = (gap_NO.gather(1, order) * in_head).sum(1)
        if num_sorted < p_NO.shape[1]:  # the bucket follows all others
            head_N = head_N + gap_NO[:, -1] * (sorted_p.sum(1) < self.config.adaptive_alpha)
        total_N = gap_NO.sum(1)
        share_N = head_N / total_N.clamp(min=torch.finfo(total_N.dtype).tiny)
        return torch.where(total_N > 0, share_N, 0.5).to(log_p_NO.dtype)
