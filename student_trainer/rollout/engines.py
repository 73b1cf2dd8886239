"""Which engine samples for a run: the one place that knows all of them."""

from __future__ import annotations

from typing import Any

from student_trainer.config import TrainConfig
from student_trainer.distributed import Distributed
from student_trainer.guards import StopSignals
from student_trainer.rollout.base import RolloutEngine
from student_trainer.rollout.chat import Chat
from student_trainer.rollout.config import RolloutConfig
from student_trainer.rollout.environment import EnvironmentEngine
from student_trainer.rollout.servers.engine import ServersSampler
from student_trainer.rollout.torch_sampler import TorchSampler
from student_trainer.rollout.vllm_colocated import ColocatedSampler
from student_trainer.student import Student


def make(
    config: TrainConfig,
    student: Student,
    dist: Distributed,
    *,
    longest_tokens: int,
    stop: StopSignals | None = None,
) -> RolloutEngine:
    """The engine that rollout.engine names.

    Args:
        longest_tokens: longest prompt with its completion that can come up.
        stop: what may ask the run to stop.
    Raises:
        ValueError: it isn't there, or can't sample from this student. RolloutGone: its servers don't answer.
    """
    engine: RolloutEngine
    if config.rollout.engine == "vllm":
        engine = ColocatedSampler(config, student, longest_tokens=longest_tokens, world=dist.world)
    elif config.rollout.engine == "vllm-server":
        engine = ServersSampler(config, student, dist, longest_tokens=longest_tokens, stop=stop)
    else:
        engine = make_torch(config, student, {})
    return conversing(engine, config.rollout, student)


def conversing(engine: RolloutEngine, config: RolloutConfig, student: Student) -> RolloutEngine:
    """`engine`, or with rollout.environment conversations around it.

    Args:
        config: the engine's own.
    Raises:
        ValueError: the student's tokenizer has no chat template that conversations can be carried on with.
    """
    if not config.environment:
        return engine
    return EnvironmentEngine(engine, config, Chat(student.tokenizer, student.eos_token_ids))


def make_torch(config: TrainConfig, student: Student, changes: dict[str, Any]) -> TorchSampler:
    """A sampler from the training weights, with `changes` to the rollout section: for evaluation and planning as well,
    whatever the run samples with."""
    return TorchSampler(
        student.model,
        eos_token_ids=student.eos_token_ids,
        pad_token_id=student.pad_token_id,
        vocabulary_size=student.vocabulary_size,
        config=config.rollout.model_copy(update=changes),
        seed=config.train.seed,
    )
