"""The registry of scoring engines: a name from the configuration becomes a backend. Engines are imported only when
asked for, so that a missing or slow one costs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from teacher_server.backends.base import ScoringBackend
from teacher_server.config import ServerConfig

if TYPE_CHECKING:
    from teacher_server.backends.vllm_backend import VllmBackend
    from teacher_server.backends.vllm_node import NodeWorkers


def create(config: ServerConfig) -> ScoringBackend:
    """The backend that `config` asks for, not loaded yet. Raises ValueError when its libraries are missing, or
    the model's directory is: before the seconds that importing an engine takes."""
    if config.model.startswith(("/", ".", "~")) and not Path(config.model).expanduser().is_dir():
        raise ValueError(f"model {config.model!r} is not a directory; expected a checkpoint directory or a hub id")
    makers = {"torch": _torch, "vllm": _vllm, "fake": _fake}
    try:
        backend = makers[config.backend](config)
    except ImportError as error:
        raise ValueError(
            f"backend {config.backend} needs a library that is not installed: {error}; "
            f"install the extra `{'vllm' if config.backend == 'vllm' else 'server'}`"
        ) from error
    if config.control != "none":
        from teacher_server.backends.control import ControlBackend

        return ControlBackend(backend, config.control)
    return backend


def create_node(config: ServerConfig) -> NodeWorkers:
    """The workers of a node other than the first, not started yet. Raises ValueError as `create` and `load` do."""
    from teacher_server.backends.vllm_node import NodeWorkers

    try:
        return NodeWorkers(*_vllm(config).node_arguments())
    except ImportError as error:
        raise ValueError(f"node_rank needs vLLM: {error}; install the extra `vllm`") from error


def _fake(config: ServerConfig) -> ScoringBackend:
    from teacher_server.backends.fake import FakeBackend, Faults

    return FakeBackend(
        config.model,
        vocabulary=config.fake_vocabulary,
        max_sequence_tokens=config.max_sequence_tokens,
        batch_tokens=config.batch_tokens,
        batch_sequences=1 if config.reference else config.batch_sequences,
        faults=Faults(
            latency_s=config.fake_latency_s,
            poison_token=config.fake_poison_token,
            nan_token=config.fake_nan_token,
            short_token=config.fake_short_token,
            hang_token=config.fake_hang_token,
            death_token=config.fake_death_token,
            restart_s=config.fake_restart_s,
        ),
        adapters=config.lora,
        generate=config.generate,
    )


def _torch(config: ServerConfig) -> ScoringBackend:
    from teacher_server.backends.torch_backend import TorchBackend

    return TorchBackend(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        threads=config.threads,
        reference=config.reference,
        batch_tokens=config.batch_tokens,
        batch_sequences=config.batch_sequences,
        head_chunk_rows=config.head_chunk_rows,
        max_sequence_tokens=config.max_sequence_tokens,
        generated_texts=config.max_generations if config.generate else 0,
    )


def _vllm(config: ServerConfig) -> VllmBackend:
    from teacher_server import logs
    from teacher_server.backends.vllm_backend import VllmBackend

    if logs.is_json(config.log_format):
        logs.vllm_in_json()

    return VllmBackend(
        config.model,
        revision=config.revision,
        dtype=config.dtype,
        max_sequence_tokens=config.max_sequence_tokens,
        max_top_k=config.max_top_k,
        head_chunk_rows=config.head_chunk_rows,
        scoring_path=config.scoring_path,
        engine_args=config.engine_arguments,
        adapters=config.lora,
        start_timeout_s=config.engine_start_timeout_s,
        generated_texts=config.max_generations if config.generate else 0,
        generator_args=dict(config.generate_vllm),
    )
