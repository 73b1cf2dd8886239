"""Ranks, and the few collectives the loop needs. Rank r of W owns the prompt rows with row % W == r; losses are
weighted by global counts before the backward pass: the sum of the ranks' gradients is that of the global batch.

Works alone (world 1, no process group), under our own launcher, torchrun and accelerate launch: all of them set RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from student_trainer.types import MAXIMUM

BUCKET_BYTES = 64 * 2**20
"""Gradients are summed in flat pieces of about this size: few collectives, little extra memory."""


GLOO_SIGN = "gloo/"
"""In every message of gloo, which has no exception of its own: the file that raised it."""


class RankLost(RuntimeError):
    """Another process of this run ended, or did not answer in time, while this one waited for it."""


@dataclass(frozen=True, slots=True)
class Distributed:
    """This process' place among the training processes."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def owns(self, row: int) -> bool:
        return row % self.world == self.rank

    def all_reduce_sum(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """The sum of `values` over the ranks, in float64; every rank passes the same shape."""
        array = np.asarray(values, dtype=np.float64)
        if self.world == 1:
            return array.copy()
        tensor = torch.from_numpy(array.copy())  # on the host: gloo
        with waiting():
            dist.all_reduce(tensor)
        return tensor.numpy()

    def all_reduce_max(self, value: float) -> float:
        """The largest of the ranks' values."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64)
        with waiting():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return float(tensor)

    def sum_metrics(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums every metric over the ranks, or takes the largest of those that say so. Ranks may know different names
        (one without tokens knows none)."""
        if self.world == 1:
            return dict(values)
        names = sorted({name for held in self.gather(sorted(values)) for name in held})
        sums = self.all_reduce_sum(np.array([values.get(name, 0.0) for name in names]))
        found = dict(zip(names, sums.tolist(), strict=True))
        for name in names:
            if name.startswith(MAXIMUM):
                found[name] = self.all_reduce_max(values.get(name, -math.inf))
        return found

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order. For small plain data between processes of one run."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        with waiting():
            dist.all_gather_object(gathered, value)
        return gathered

    def first(self, text: str) -> str:
        """The first rank's text that is not empty."""
        return next((t for t in self.gather(text) if t), "")

    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replaces each gradient by the ranks' sum. A rank where a parameter got none contributes zeros, so that every
        rank takes part in the same collectives; a parameter that got none anywhere keeps zeros on all. One process has
        zeros there, too: an optimizer passes over what has no gradient, but lets momentum and decay move what has 0."""
        if self.world == 1:
            for parameter in parameters:
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            return
        for bucket in _buckets([p for p in parameters if p.requires_grad]):
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
            flat = torch.cat([g.reshape(-1) for g in gradients])
            with waiting():
                dist.all_reduce(flat)
            pieces = torch.split(flat, [p.numel() for p in bucket])
            for parameter, piece in zip(bucket, pieces, strict=True):
                parameter.grad = piece.view_as(parameter).clone()

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All ranks' tensors on the main rank, on the host; the others get nothing. No name on two ranks."""
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        described = self.gather([(name, tensor.shape, tensor.dtype) for name, tensor in own.items()])
        collected = own if self.is_main else {}
        with waiting():
            for rank, names in enumerate(described[1:], start=1):
                for name, shape, dtype in names:
                    if self.is_main:
                        collected[name] = torch.empty(shape, dtype=dtype)
                        dist.recv(collected[name], src=rank)
                    elif self.rank == rank:
                        dist.send(own[name], dst=0)
        return collected

    def require_equal(self, what: str, value: str) -> None:
        """Raises ValueError unless `value` is the same on all ranks."""
        values = self.gather(value)
        if len(set(values)) > 1:
            raise ValueError(f"{what} differs between ranks: {dict(enumerate(values))}; expected the same on all")

    def barrier(self) -> None:
        if self.world > 1:
            with waiting():
                dist.barrier()

    def close(self) -> None:
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Around collectives: what gloo and NCCL raise becomes RankLost."""
    try:
        yield
    except (torch.OutOfMemoryError, RankLost):
        raise
    except RuntimeError as error:
        raise RankLost(f"another process of this run ended or does not answer: {_cause(error)}") from error


@contextlib.contextmanager
def noticing_losses() -> Iterator[None]:
    """Around work that has collectives somewhere inside: an error that is theirs becomes RankLost, others pass."""
    try:
        yield
    except RankLost:
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and GLOO_SIGN not in str(error):
            raise
        raise RankLost(f"another process of this run ended or does not answer: {_cause(error)}") from error


def _cause(error: RuntimeError) -> str:
    return str(error).partition("\n")[0].partition(". ")[0]


def join(device: str, timeout_s: float) -> Distributed:
    """Joins the process group that the environment names, or stays alone where it names none.

    Args:
        device: student.device of the configuration.
        timeout_s: longest wait in one collective; a rank may sit out a teacher's outage while the others wait.
    """
    world, rank = _environment("WORLD_SIZE", 1), _environment("RANK", 0)
    local_rank = _environment("LOCAL_RANK", rank)
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=timeout_s))
    return Distributed(rank, world, local_rank, chosen)


def under_launcher() -> bool:
    """Whether somebody else (torchrun, accelerate launch, our own launcher) started this process as one of a group."""
    return "WORLD_SIZE" in os.environ


def set_arithmetic(threads: int, *, reference: bool) -> None:
    """Threads and kernels of this process.

    Args:
        threads: 0 is torch's own choice, or one in reference mode: the split of a sum over threads changes its bits.
        reference: deterministic kernels only; one that has no deterministic form raises.
    """
    if threads or reference:
        torch.set_num_threads(threads or 1)
    if reference:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for to be deterministic
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


def weights_digest(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of names, dtypes, shapes and bits, equal exactly where two models hold the same weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in parameters:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _environment(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdigit():
        raise ValueError(f"environment variable {name} is {text!r}; expected a whole number, as torchrun sets it")
    return int(text)


def choose_device(name: str, local_rank: int) -> torch.device:
    """The device that student.device means for the process `local_rank` of this machine.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"student.device is {name!r}; expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"student.device is {name!r}, but this machine shows no CUDA device")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"process {local_rank} asks for cuda:{index}, but {torch.cuda.device_count()} are visible")
        return torch.device("cuda", index)
    return device


def _buckets(parameters: list[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Consecutive parameters of one dtype in groups of about BUCKET_BYTES; a larger one is a group of its own."""
    buckets: list[list[torch.nn.Parameter]] = []
    size = BUCKET_BYTES
    for parameter in parameters:
        num_bytes = parameter.numel() * parameter.element_size()
        if size + num_bytes > BUCKET_BYTES or buckets[-1][-1].dtype != parameter.dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += num_bytes
    return buckets
