"""Methods that vLLM's worker gets from us (`worker_extension_cls`), called through collective_rpc: our sampler in place
of the runner's; and weights from the trainer, loaded under a checkpoint's names and packed for this machine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

EXTENSION = "student_trainer.rollout.vllm_side.worker.RolloutWorker"
"""What `worker_extension_cls` is set to."""


class RolloutWorker:
    """Mixed into vLLM's worker; `self` is that worker."""

    def rollout_install(self) -> str:
        """Puts our sampler in place. Raises RuntimeError where the runner is not one it knows. Returns the dtype."""
        from student_trainer.rollout.vllm_side.sampler import RolloutSampler

        worker: Any = self
        runner = worker.model_runner
        missing = [
            n for n in ("sampler", "input_batch", "requests", "optimistic_seq_lens_cpu") if not hasattr(runner, n)
        ]
        if missing:
            raise RuntimeError(
                f"{type(runner).__module__}.{type(runner).__name__} has no {', '.join(missing)}: set "
                "VLLM_USE_V2_MODEL_RUNNER=0, with vLLM 0.32"
            )
        if not isinstance(runner.sampler, RolloutSampler):
            runner.sampler = RolloutSampler(runner)
        return str(worker.model_config.dtype).removeprefix("torch.")

    def rollout_set_version(self, version: int) -> None:
        """Tokens from here on are recorded as made by these weights."""
        worker: Any = self
        worker.model_runner.sampler.version = version

    def rollout_weights_digest(self) -> str:
        """Of the bytes that the last update brought; empty where the transport computes none."""
        worker: Any = self
        return str(getattr(worker.weight_transfer_engine, "digest", ""))


def begin(model: Any) -> None:
    """Makes the model ready for `load`."""
    from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

    initialize_layerwise_reload(model)


def load(model: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Takes tensors under the names that a checkpoint has; they are kept by reference until a layer is complete.

    Returns:
        vLLM's own names of what was loaded.
    """
    return set(model.load_weights(weights))


def finish(model: Any, model_config: Any) -> None:
    """Puts complete layers in place, packed for this machine as after any load."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

    # It warns of layers that got no weights: those that have none, and a tied head, which is packed below. Whether
    # everything arrived, logprobs show.
    logger = logging.getLogger(finalize_layerwise_reload.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        finalize_layerwise_reload(model, model_config)
    finally:
        logger.setLevel(level)
    _repack_tied_head(model)


@torch.no_grad()
def _repack_tied_head(model: Any) -> None:
    """On a CPU the head's packed copy is made when its own weight is loaded, which a tied one never is."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        head, embedding = getattr(module, "lm_head", None), getattr(module, "model", None)
        embedding = getattr(embedding, "embed_tokens", None)
        if head is not None and hasattr(head, "cpu_linear") and getattr(embedding, "weight", None) is not None:
            dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def abandon(model: Any, model_config: Any) -> None:
    """After `begin` and part of the tensors: layers that are not complete become what they were before."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0
    finish(model, model_config)
