"""How weights get from this process to one server: a link per server and start of it, over the transport that the
server was started with. Links block; they live in threads of the pool.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from torch import Tensor

from student_trainer.rollout.transfer import Packed, Sender, TransferError

Ask = Callable[[Mapping[str, Any]], "Future[dict[str, Any]]"]
"""Posts parameters to the server; the future is its answer."""


class Link(Protocol):
    def open(self, connect: Ask) -> None:
        """Has the server's workers join. Raises TransferError, or what the server answered."""
        ...

    def send(self, packed: Packed, take: Ask) -> str:
        """Returns the digest of what arrived, or "" where the transport computes none. Raises as `open`."""
        ...


class GlooLink:
    """Args:
    address: of this machine, as the server reaches it.
    """

    def __init__(self, address: str, num_workers: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._world = num_workers + 1
        self._sender = Sender(address, num_workers, timeout_s)

    def open(self, connect: Ask) -> None:
        where = {"address": self._sender.address, "port": self._sender.port, "world_size": self._world}
        answer = connect({**where, "timeout_s": self._timeout_s})
        try:
            self._sender.open(answer.done)
        except TransferError:
            _raise_refusal(answer)
            raise
        answer.result()

    def send(self, packed: Packed, take: Ask) -> str:
        answer = take(described(packed))
        try:
            self._sender.send(packed, answer.done)
        except TransferError:
            _raise_refusal(answer)
            raise
        return str(answer.result()["digest"])


def described(packed: Packed) -> dict[str, Any]:
    """What comes over gloo, for GlooUpdateInfo."""
    return {
        "names": [meta.name for meta in packed.metas],
        "dtypes": [meta.dtype for meta in packed.metas],
        "shapes": [list(meta.shape) for meta in packed.metas],
        "chunk_bytes": packed.chunk_bytes,
    }


class NcclLink:
    """vLLM's own NCCL sender, with the server's routes in place of its client's. vLLM must be installed here, too.

    Args:
        device: the GPU that sends; not one of the server's.
    """

    def __init__(self, address: str, port: int, num_workers: int, device: torch.device) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        self._init = NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=num_workers + 1, rank=0)
        self._device = device
        self._source = _Source(device)
        self._client = _Client()
        self._engine: Any = None

    def open(self, connect: Ask) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        torch.cuda.set_device(self._device)  # of this thread
        self._client.connect = connect
        self._engine = WeightTransferTrainerFactory.trainer_init(self._init, client=self._client, source=self._source)

    def send(self, packed: Packed, take: Ask) -> str:
        torch.cuda.set_device(self._device)
        self._source.packed, self._client.take = packed, take
        self._engine.send_weights()
        return ""


class _Client:
    """vLLM's VLLMWeightSyncClient; the server's one route begins and ends an update by itself."""

    connect: Ask
    take: Ask

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.connect(init_info).result()

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: Any) -> None:
        self.take(update_info).result()

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class _Source:
    """vLLM's WeightSource: tensors from the host, one at a time."""

    packed: Packed

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def metadata(self) -> list[Any]:
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(m.name, getattr(torch, m.dtype), m.shape) for m in self.packed.metas]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.packed.tensors():
            yield name, tensor.to(self._device)


def _raise_refusal(answer: Future[dict[str, Any]]) -> None:
    """Why the server did not come, where it has said so."""
    if answer.done():
        answer.result()


def free_port(address: str) -> int:
    """A port at which nobody listens; vLLM's sender wants one named."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
