"""`python -m benchmarks.loss`: memory and time of the loss, hidden states to gradients, against the plain way: all
logits, log_softmax, gather, backward. Each in a process of its own; they take turns. Linux only.

What the keys mean is in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.scoring_memory import resident_bytes, set_back
from benchmarks.systems import Child

MIB = 1 << 20
NEED_CHUNK_BYTES = 64 * MIB  # one chunk of logits
PLAIN_COPIES = 4  # arrays [tokens, vocabulary]: logits, their log-softmax, and the gradients of both
LEARNING_RATE = 1e-3
KINDS = ("ours", "plain")


@dataclass(frozen=True)
class Shape:
    tokens: int = 4096
    hidden: int = 1024
    vocabulary: int = 151_936
    top_k: int = 64

    @property
    def need_bytes(self) -> int:
        """Head gradient, hidden gradient and a chunk of 64 MiB, float32."""
        return 4 * self.hidden * (self.vocabulary + self.tokens) + NEED_CHUNK_BYTES

    @property
    def wanted_bytes(self) -> int:
        """Of both processes: the plain way's logits, and twice a head with gradient and two moments."""
        return 4 * self.vocabulary * (PLAIN_COPIES * self.tokens + 8 * self.hidden)


@dataclass(frozen=True)
class Taken:
    seconds: float
    cpu_seconds: float
    peak_bytes: int  # of loss and backward, above what was resident before
    step_bytes: int  # of loss, backward and optimizer step, above weights, hidden states and scores
    loss: float
    grad_norm: float  # of the head's


class Case:
    """A head, hidden states and scores made up alike in every process, and AdamW on the head."""

    def __init__(self, kind: str, shape: Shape, threads: int) -> None:
        import torch

        if threads:
            torch.set_num_threads(threads)
        random = torch.Generator().manual_seed(0)
        weight = torch.empty(shape.vocabulary, shape.hidden).normal_(0.0, shape.hidden**-0.5, generator=random)
        self._head = torch.nn.Linear(1, 1, bias=False)
        self._head.weight = torch.nn.Parameter(weight)
        self._head.out_features, self._head.in_features = weight.shape
        self._hidden_NH = torch.randn(shape.tokens, shape.hidden, generator=random).requires_grad_()
        self._weights_N = torch.full((shape.tokens,), 1.0 / shape.tokens)
        self._ids_NK = torch.stack(
            [torch.randperm(shape.vocabulary, generator=random)[: shape.top_k] for _ in range(shape.tokens)]
        )
        # The teacher has 95 % of its mass in the top k.
        spread = torch.randn(shape.tokens, shape.top_k, generator=random)
        self._log_p_NK = torch.log_softmax(2.0 * spread, 1) + torch.tensor(0.95).log()
        self._optimizer = torch.optim.AdamW([self._head.weight], lr=LEARNING_RATE, fused=True)
        self._run = self._plain if kind == "plain" else self._ours()
        self._at_rest = _resident()

    def step(self) -> dict[str, Any]:
        before = _resident()
        wall, cpu = time.perf_counter(), time.process_time()
        loss = self._run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resident_bytes(os.getpid(), "VmHWM") - before
        norm = float(self._head.weight.grad.norm())
        self._optimizer.step()
        whole = resident_bytes(os.getpid(), "VmHWM") - self._at_rest
        self._optimizer.zero_grad()
        self._hidden_NH.grad = None
        return asdict(Taken(wall, cpu, peak, whole, loss, norm))

    def _plain(self) -> float:
        """D = Σ_S p (log p − log q), as one writes it down."""
        import torch

        logits_NV = self._head(self._hidden_NH)
        log_q_NK = torch.log_softmax(logits_NV, dim=-1).gather(1, self._ids_NK)
        value_N = (self._log_p_NK.exp() * (self._log_p_NK - log_q_NK)).sum(1)
        loss = (value_N * self._weights_N).sum()
        loss.backward()
        return loss.item()

    def _ours(self) -> Any:
        import torch

        from student_trainer import losses
        from student_trainer.losses import chunked
        from student_trainer.losses.base import LossRows, TeacherRows

        objective = losses.build(losses.parse_loss({"objective": "forward_kl", "support": "teacher", "tail": "none"}))
        num = len(self._weights_N)
        teacher = TeacherRows(
            support_ids=self._ids_NK,
            support_logprob=self._log_p_NK,
            support_mask=None,
            log_tail=torch.full((num,), 0.05).log(),
            token_logprob=self._log_p_NK[:, 0].clone(),
        )
        sampled = torch.ones(num, dtype=torch.bool)
        old_N = torch.zeros(num)
        rows = LossRows(self._ids_NK[:, 0].clone(), teacher, old_N, old_N, sampled=sampled, fixed=~sampled)
        chunk_rows = chunked.default_rows(self._head.out_features, "cpu")

        def run() -> float:
            return chunked.backward(self._head, self._hidden_NH, objective, rows, self._weights_N, chunk_rows)[0]

        return run


def _resident() -> int:
    """Bytes resident now, from which VmHWM counts on."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed must not hide what is taken
    set_back(os.getpid())
    return resident_bytes(os.getpid(), "VmRSS")


def liger() -> str:
    """Whether Liger's fused kernels could be measured here, in words."""
    import torch

    if importlib.util.find_spec("liger_kernel") is None:
        return "not measured: liger-kernel is not installed"
    if not torch.cuda.is_available():
        return "not measured: its fused kernels are Triton's and need a GPU"
    return "not measured: it has no loss on a support of k ids; see docs/decisions/0016-no-fused-gpu-kernel.md"


def measure(shape: Shape, steps: int, threads: int) -> dict[str, Any]:
    taken: dict[str, list[Taken]] = {kind: [] for kind in KINDS}
    with Child(Case, "ours", shape, threads) as ours, Child(Case, "plain", shape, threads) as plain:
        for step in range(steps):
            order = [("ours", ours), ("plain", plain)]
            for kind, child in order if step % 2 == 0 else reversed(order):
                taken[kind].append(Taken(**child.call("step")))
    _same(taken["ours"], taken["plain"])
    peaks = {kind: max(t.peak_bytes for t in all_) for kind, all_ in taken.items()}
    pairs = list(zip(taken["ours"], taken["plain"], strict=True))
    figures: dict[str, Any] = {
        "peak_vs_theory": peaks["ours"] / shape.need_bytes,
        "peak_vs_plain": peaks["ours"] / peaks["plain"],
        "time_vs_plain": statistics.median(a.seconds / b.seconds for a, b in pairs),
        "cpu_vs_plain": statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in pairs),
        "need_mib": shape.need_bytes / MIB,
    }
    for kind, all_ in taken.items():
        figures[f"{kind}_peak_mib"] = peaks[kind] / MIB
        figures[f"{kind}_step_peak_mib"] = max(t.step_bytes for t in all_) / MIB
        figures[f"{kind}_seconds"] = statistics.median(t.seconds for t in all_)
        figures[f"{kind}_cpu_seconds"] = statistics.median(t.cpu_seconds for t in all_)
    return {**figures, "steps": steps, **asdict(shape), "load": os.getloadavg()[0], "liger": liger()}


def _same(ours: list[Taken], plain: list[Taken]) -> None:
    """Both computed the same thing, at every step of the optimizer."""
    for a, b in zip(ours, plain, strict=True):
        for mine, theirs in ((a.loss, b.loss), (a.grad_norm, b.grad_norm)):
            if abs(mine - theirs) > 1e-4 * abs(theirs):
                raise RuntimeError(f"the two ways differ: {a} and {b}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the size, to see that it works")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of each (default 3)")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    options = parser.parse_args()
    shape = Shape(tokens=1024, hidden=256, vocabulary=37_984) if options.quick else Shape()
    wanted, available = shape.wanted_bytes, psutil.virtual_memory().available
    if wanted > available:
        parser.error(f"takes about {wanted / 2**30:.1f} GiB, available are {available / 2**30:.1f} GiB")
    figures = measure(shape, options.steps, options.threads)
    for name, value in figures.items():
        print(f"{name:24} {value:.4g}" if isinstance(value, float) else f"{name:24} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
