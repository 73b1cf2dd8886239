"""Our transport among vLLM's weight-transfer engines: chunks over gloo through the hosts' memory, on CPUs and between
machines without NCCL. Lives in vLLM's workers, one each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from student_trainer.rollout.transfer import Meta, Receiver, views
from student_trainer.rollout.vllm_side import worker


@dataclass
class GlooInitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Where the sender's store is, how many take part with it, and how long a silence may last."""

    address: str
    port: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What comes, in this order, in chunks of at most so many bytes."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    chunk_bytes: int

    @property
    def metas(self) -> list[Meta]:
        rows: Iterable[Any] = zip(self.names, self.dtypes, self.shapes, strict=True)
        return [Meta(name, dtype, tuple(shape)) for name, dtype, shape in rows]


class GlooWeightTransferEngine(WeightTransferEngine):  # type: ignore[misc]
    """Takes tensors as a checkpoint has them."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._receiver: Receiver | None = None
        self.digest = ""
        """SHA-256 of the bytes of the last update."""

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Joins the sender, in place of one that was before."""
        self.shutdown()
        parallel = self.parallel_config
        rank = 1 + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._receiver = Receiver(
            init_info.address, init_info.port, rank, init_info.world_size, timeout_s=init_info.timeout_s
        )

    def start_weight_update(self) -> None:
        worker.begin(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The base class would also wait for an accelerator, which a CPU hasn't."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """On failure the model has whole layers, old and new ones, so that another update may follow."""
        if self._receiver is None:
            raise RuntimeError("no sender: init_transfer_engine comes first")
        sha = sha256()
        self.digest = ""
        try:
            for buffer, members in self._receiver.chunks(update_info.metas, update_info.chunk_bytes):
                sha.update(buffer.numpy().data)
                worker.load(self.model, views(buffer, members))
        except BaseException:
            worker.abandon(self.model, self.model_config)
            raise
        self.digest = sha.hexdigest()

    def finish_weight_update(self) -> None:
        worker.finish(self.model, self.model_config)

    def shutdown(self) -> None:
        self._receiver = None
