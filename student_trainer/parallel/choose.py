"""Which strategy a run uses: what train.strategy names, held against the launcher, the device and the number of
processes.
"""

from __future__ import annotations

import importlib.util
import os

from student_trainer.config import StrategyName, TrainConfig
from student_trainer.distributed import Distributed
from student_trainer.parallel.base import Replicated
from student_trainer.parallel.ddp_sharded import DdpSharded
from student_trainer.parallel.fsdp2 import Fsdp2
from student_trainer.parallel.launchers import asked_strategy
from student_trainer.parallel.zero import Zero


def choose(config: TrainConfig, dist: Distributed) -> Replicated:
    """The strategy of this run.

    Raises:
        ValueError: it doesn't go with the launcher, the number of processes or the device.
    """
    name, offload = _name(config), config.train.cpu_offload
    if dist.world == 1 and name != "ddp":
        raise ValueError(
            f"train.strategy: got {name} with one process, expected auto or ddp: there is nothing to share"
        )
    if offload and (name != "fsdp2" or dist.device.type != "cuda"):
        raise ValueError(
            f"train.cpu_offload: got true with train.strategy {name} on {dist.device.type}, expected false: it is for "
            "fsdp2 on GPUs"
        )
    if name in ("zero2", "zero3") and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"train.strategy: {name} needs deepspeed; install 'preceptor[deepspeed]', or use fsdp2")
    match name:
        case "ddp_sharded":
            return DdpSharded(dist)
        case "fsdp2":
            return Fsdp2(dist, cpu_offload=offload)
        case "zero2" | "zero3":
            return Zero(dist, int(name[-1]))
        case _:
            return Replicated(dist)


def _name(config: TrainConfig) -> StrategyName:
    named, asked = config.train.strategy, asked_strategy(config, os.environ)
    if asked and named not in ("auto", asked):
        raise ValueError(
            f"train.strategy: got {named}, but accelerate launch asks for {asked}; expected auto or {asked}"
        )
    return asked or ("ddp" if named == "auto" else named)
