"""What the formulas need to know of a model: sizes, read from its modules, which need no weights (meta device)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from student_trainer.config import StudentConfig
from student_trainer.forms import lora
from student_trainer.forms.config import LoraConfig
from student_trainer.forms.freeze import freeze
from student_trainer.forms.loading import LOAD_ERRORS, StudentError, locate
from student_trainer.rollout import slots
from teacher_api import causal_lm

_NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a causal language model. Parameters are counted once where they are tied."""

    name: str
    parameters: int
    trained: int
    embeddings: int  # parameters of the embeddings and of the head
    active: int  # parameters of the trunk that a token is multiplied with: of experts, those it is routed to
    largest_layer: int  # parameters of the largest of the repeated layers
    largest_parameter: int
    layers: int
    hidden: int
    queries: int  # width of all query heads together
    keys: int  # width of all key heads together
    inner: int  # width of the feed-forward's middle, of the experts a token is routed to
    width: int  # columns of the logits
    dtype_bytes: int  # of a weight, as the checkpoint says
    continuous: bool  # sampled by continuous batching; its attention may yet turn out to have more to it

    @classmethod
    def of(cls, model: Any, parts: causal_lm.Parts) -> Shape:
        """Of a model, with or without its weights."""
        config = causal_lm.text_config(model.config)
        hidden, heads = parts.hidden_size, int(getattr(config, "num_attention_heads", 0) or 1)
        head_dim = int(getattr(config, "head_dim", 0) or hidden // heads)
        key_heads = int(getattr(config, "num_key_value_heads", 0) or heads)
        routed = int(getattr(config, "num_experts_per_tok", 0) or 1)
        inner = getattr(config, "moe_intermediate_size", 0) or getattr(config, "intermediate_size", 0)
        inner = int(inner or getattr(config, "n_inner", 0) or 4 * hidden)
        counts = {name: p.numel() for name, p in model.named_parameters()}
        tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
        ends = {id(p): p.numel() for m in (*tables, parts.project) for p in m.parameters() if p.ndim > 1}
        experts = sum(num for name, num in counts.items() if ".experts." in name)
        num_experts = next((int(getattr(config, n)) for n in _NUM_EXPERTS if getattr(config, n, None)), 1)
        total = sum(counts.values())
        matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
        stored = getattr(config, "dtype", None)
        lists = [m for m in parts.body.modules() if isinstance(m, torch.nn.ModuleList)]
        sizes = [sum(p.numel() for p in layer.parameters()) for layers in lists for layer in layers]
        return cls(
            name=type(model).__name__,
            parameters=total,
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            embeddings=sum(ends.values()),
            active=matrices - sum(ends.values()) - experts + experts * routed // max(num_experts, routed),
            largest_layer=max(sizes, default=0),
            largest_parameter=max(counts.values()),
            layers=int(getattr(config, "num_hidden_layers", 1)),
            hidden=hidden,
            queries=heads * head_dim,
            keys=key_heads * head_dim,
            inner=inner * routed,
            width=parts.logit_width,
            dtype_bytes=stored.itemsize if isinstance(stored, torch.dtype) else 2,
            continuous=slots.keeps_every_key(config),
        )


def of_student(config: StudentConfig) -> Shape:
    """Of the student, in its form, from its configuration alone.

    Raises:
        StudentError: no such model, or one whose modules can't be made from a configuration.
    """
    if config.model_class:
        raise StudentError(
            f"plan.device_memory_gib: got student.model_class {config.model_class!r}, expected none: such a class is "
            "made from weights only; plan on this machine"
        )
    if config.layers_from_teacher:
        raise StudentError(
            f"plan.device_memory_gib: got student.layers_from_teacher {list(config.layers_from_teacher)}, expected "
            "none: they are put together from weights only; plan on this machine"
        )
    model = _skeleton("student.model", config.model, config.revision)
    try:
        if config.lora.r:
            with torch.device("meta"):
                lora.add(model, config.lora, seed=0, base=config.model, revision=config.revision)
        freeze(model, config.freeze, ())
    except ValueError as error:
        raise StudentError(str(error)) from error
    return Shape.of(model, causal_lm.split(model))


def of_teacher(model: str) -> Shape:
    """Of a teacher, from its configuration alone."""
    skeleton = _skeleton("plan.teacher_model", model, "")
    return Shape.of(skeleton, causal_lm.split(skeleton))


def of_past(config: StudentConfig) -> Shape:
    """Of the student as it teaches itself: whole weights in float32, adapters merged."""
    plain = of_student(config.model_copy(update={"lora": LoraConfig(), "freeze": ()}))
    return dataclasses.replace(plain, dtype_bytes=4)


def _skeleton(key: str, model: str, revision: str) -> Any:
    import transformers

    where = locate(key, model, revision)
    directory = Path(where["pretrained_model_name_or_path"])
    try:
        if (directory / lora.ADAPTER_CONFIG).is_file():
            base, base_revision = lora.base_of(directory)
            return _skeleton(f"the base of {key}", base, base_revision)
        config = transformers.AutoConfig.from_pretrained(**where)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config)
    except LOAD_ERRORS as error:
        if isinstance(error, StudentError):
            raise
        cause = " ".join(str(error).split())[:300]
        raise StudentError(f"{key} {model!r} can't be read: {cause}") from error
