"""Which strategy a run uses: what train.strategy names, held against the number of processes."""

from __future__ import annotations

from student_trainer.config import TrainSection
from student_trainer.distributed import Distributed
from student_trainer.parallel.base import Replicated
from student_trainer.parallel.ddp_sharded import DdpSharded
from student_trainer.parallel.fsdp2 import Fsdp2


def choose(config: TrainSection, dist: Distributed) -> Replicated:
    """The strategy of this run.

    Raises:
        ValueError: it doesn't go with the number of processes or the device.
    """
    name = config.strategy
    if dist.world == 1 and name not in ("auto", "ddp"):
        raise ValueError(
            f"train.strategy: got {name} with one process, expected auto or ddp: there is nothing to share"
        )
    if config.cpu_offload and (name != "fsdp2" or dist.device.type != "cuda"):
        raise ValueError(
            f"train.cpu_offload: got true with train.strategy {name} on {dist.device.type}, expected false: it is for "
            "fsdp2 on GPUs"
        )
    if name == "ddp_sharded":
        return DdpSharded(dist)
    if name == "fsdp2":
        return Fsdp2(dist, cpu_offload=config.cpu_offload)
    return Replicated(dist)
