"""What an engine with weights of its own gets from the trainer, and whether it computes the same afterwards: both sides
say how likely they find a known text.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from student_trainer.losses.student_side import logprob_of
from student_trainer.rollout.base import RolloutError
from student_trainer.rollout.torch_sampler import evaluating
from student_trainer.student import Student
from student_trainer.types import Prompt, Rollout
from teacher_api.types import FloatArray, IntArray

TEXT_TOKENS = 32
_TOLERANCE = {"float32": 2e-3}
_LOW_PRECISION_TOLERANCE = 0.3
"""In nats, for one token: what rounding leaves is far below, weights that did not arrive are far above."""


def tolerance(configured: float, dtype: str) -> float:
    """Largest difference that a hand-over may leave, in nats; `configured`, where that is not 0."""
    return configured or _TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE)


@torch.no_grad()
def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's weights under the names of its checkpoints, tied ones once, without adapters. Tensors are the
    model's own where a checkpoint has them in the same shape."""
    from transformers.core_model_loading import revert_weight_conversion

    saved = model.state_dict().keys()
    named = {name: p.detach() for name, p in model.named_parameters()}
    named |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
    plain = {n.replace(".base_layer.", "."): tensor for n, tensor in named.items() if ".lora_" not in n}
    return revert_weight_conversion(model, plain)  # type: ignore[no-any-return, arg-type]


def known_text(vocabulary_size: int, max_tokens: int) -> IntArray:
    """Ids in no order that means anything: every position tells apart weights that differ."""
    size = min(TEXT_TOKENS, max_tokens)
    return np.random.default_rng(0).integers(0, vocabulary_size, size).astype(np.int32)


@torch.no_grad()
def logprobs(student: Student, ids: IntArray) -> FloatArray:
    """log q(ids[n + 1]) given those before it, [N - 1], float32: the trainer's own forward pass."""
    undefined = np.full(len(ids) - 1, np.nan, dtype=np.float32)
    text = Rollout(0, Prompt(0, ids[:1]), ids[1:], "length", behaviour_logprob=undefined, full_logprob=undefined)
    with evaluating(student.model), student.arithmetic():
        logits = student.head(student.hidden_rows([text]))
    targets = torch.from_numpy(ids[1:].astype(np.int64)).to(logits.device)
    return logprob_of(logits.float(), targets).cpu().numpy()  # type: ignore[no-any-return]


def difference(mine: FloatArray, theirs: FloatArray, allowed: float, whose: str, version: int) -> float:
    """Largest |log q_trainer − log q_engine|, in nats.

    Raises:
        RolloutError: it is not finite, or above `allowed`: the engine does not have the weights it was given.
    """
    found = float(np.abs(mine.astype(np.float64) - theirs).max())
    if not found <= allowed:
        raise RolloutError(
            f"{whose} does not compute what the trainer does with the weights of step {version}: logprobs of a known "
            f"text differ by {found:.3g} nats, at most {allowed:g} may be (logprob_tolerance)"
        )
    return found
