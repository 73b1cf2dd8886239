"""A transformers causal language model cut in two: trunk (tokens -> hidden states) and head (hidden states -> logits).

Both programs run the head on chunks of chosen rows, so neither ever holds [tokens, vocabulary] logits. Duck-typed:
imports no torch. `verify` holds the cut against the model's own forward; a family it does not fit is refused by name.

Shape legend: B sequences, T tokens, N rows, H hidden size, W logit width (columns the model defines).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Config keys of c in z <- c·tanh(z / c), as Gemma, RecurrentGemma and xLSTM name it."""
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
"""Config keys of a factor on the logits: the Cohere family, Falcon-H1."""
_SCALING_MULTIPLIES = frozenset({"hyperclovax"})
"""Model types whose `logits_scaling` multiplies; elsewhere (Granite, MiniCPM3) it divides."""
_ROPE_OF_THE_LENGTH = frozenset({"dynamic", "longrope"})
_CACHE_NAMES = ("past_key_values", "cache_params", "state")
"""What trunks call the cache they take and give back: attention, Mamba, RWKV."""


@dataclass(frozen=True, slots=True)
class Parts:
    """A model's two halves. Both are differentiable and share the model's parameters.

    The head is ``logits = cap(scale · project(h))``; `project`, `scale` and `soft_cap` are public so that a caller can
    run the product in another precision and finish with `finish`.
    """

    body: Any  # module: tokens -> last hidden state
    project: Any  # module: the output embedding, [H] -> [W]
    logit_width: int  # W, without columns that pad the matrix
    hidden_size: int  # H, as the head takes it
    scale: float = 1.0
    soft_cap: float | None = None
    cache_name: str = ""  # keyword and output field of the trunk's cache; "" if it has none
    accepts: frozenset[str] = frozenset()  # keywords of the trunk's forward

    def trunk(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        """Last hidden states [B, T, H] of token ids [B, T], after the final norm, without a cache.

        Right padding needs no mask: attention and recurrence are causal. Left padding needs `attention_mask` and
        `position_ids`; the latter are dropped for trunks that know no positions (state-space models, ALiBi).
        """
        return self.step(input_ids, attention_mask, position_ids, use_cache=False, **kwargs)[0]

    def step(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        *,
        cache: Any = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Last hidden states [B, T, H] and the cache to hand to the next step (None without `use_cache`).

        `cache` is what the previous step returned, whatever the family calls it.
        """
        inputs = {"attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
        inputs = {name: value for name, value in inputs.items() if value is not None and name in self.accepts}
        if cache is not None:
            inputs[self.cache_name] = cache
        output = self.body(input_ids=input_ids, use_cache=use_cache, return_dict=True, **inputs)
        return output.last_hidden_state, getattr(output, self.cache_name, None) if use_cache else None

    def head(self, hidden: Any) -> Any:
        """Logits [..., W] of hidden states [..., H], in the dtype of the model's own head."""
        weight = getattr(self.project, "weight", None)
        if weight is not None and weight.is_floating_point() and hidden.dtype != weight.dtype:
            hidden = hidden.to(weight.dtype)
        return self.finish(self.project(hidden))

    def finish(self, logits: Any) -> Any:
        """What the family does after the product: drop padding columns, scale, soft-cap."""
        if logits.shape[-1] != self.logit_width:
            logits = logits[..., : self.logit_width]
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.soft_cap is not None:
            logits = (logits / self.soft_cap).tanh() * self.soft_cap
        return logits


def split(model: Any) -> Parts:
    """Cuts a transformers causal language model into trunk and head.

    Raises:
        ValueError: the model is an encoder-decoder, or has no separate trunk or output embedding.
    """
    name, config = type(model).__name__, text_config(model.config)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; expected a decoder-only causal language model")
    body, project = model.base_model, model.get_output_embeddings()
    if body is model:  # Llama 4's text model declares a prefix it does not use
        body = getattr(model, "model", model)
    if body is model or project is None:
        raise ValueError(f"{name} has no separate trunk and output embedding; expected a causal language model")
    accepts = frozenset(inspect.signature(body.forward).parameters)
    width, hidden_size = _shape_of(project, name)
    scale, soft_cap = scale_and_soft_cap(config)
    return Parts(
        body=body,
        project=project,
        logit_width=int(getattr(config, "unpadded_vocab_size", None) or width),
        hidden_size=hidden_size,
        scale=scale,
        soft_cap=soft_cap,
        cache_name=next((cache for cache in _CACHE_NAMES if cache in accepts), ""),
        accepts=accepts,
    )


def logit_width(model: Any) -> int:
    """Number of columns in the model's softmax: the rows of its output embedding, padding columns excluded."""
    return split(model).logit_width


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the language model (multimodal ones nest it)."""
    return config.get_text_config(decoder=True)


def verify(parts: Parts, model: Any, input_ids: Any) -> float:
    """Compares ``head(trunk(x))`` with ``model(x).logits`` on token ids [B, T]; call it under no_grad, in eval mode.

    Returns:
        The largest absolute difference, in logits.

    Raises:
        ValueError: they differ by more than rounding, so the model's head does something this file does not know.
    """
    name = f"{type(model).__name__} (model_type {getattr(model.config, 'model_type', '')!r})"
    expected = model(input_ids=input_ids, use_cache=False).logits.float()
    got = parts.head(parts.trunk(input_ids)).float()
    if got.shape != expected.shape:
        raise ValueError(f"{name}: trunk and head give logits {tuple(got.shape)}, the model {tuple(expected.shape)}")
    finite = expected.isfinite()
    if not bool(finite.any()):
        raise ValueError(f"{name}: the model itself gives no finite logit; its weights or its dtype are broken")
    difference = float((got - expected)[finite].abs().max())
    # Both sides run the same operations: they agree to the last bits of the head's own precision.
    weight_bits = getattr(getattr(parts.project, "weight", None), "itemsize", 2) * 8
    relative = 1e-5 if weight_bits >= 32 else 1e-2
    limit = relative * max(1.0, float(expected[finite].abs().max()))
    if not difference <= limit:
        raise ValueError(
            f"{name}: logits from trunk and head differ from the model's by {difference:.3g} (at most {limit:.3g} is "
            "rounding); its head does something beyond a product, a scale and a soft cap, so it can't be used here"
        )
    return difference


def scale_and_soft_cap(config: Any) -> tuple[float, float | None]:
    """What a head does after its product, of a language model's configuration (`text_config`)."""
    return _scale(config), _first(config, _SOFT_CAPS)


def rope_of_the_length(config: Any) -> str:
    """The type of rotary positions whose frequencies depend on the longest sequence of a forward; "" if none does."""
    rope = getattr(config, "rope_parameters", None) or {}
    types = {str(layer.get("rope_type")) for layer in (rope, *rope.values()) if isinstance(layer, dict)}
    return min(types & _ROPE_OF_THE_LENGTH, default="")


def _shape_of(project: Any, name: str) -> tuple[int, int]:
    """(columns, hidden size) of an output embedding; quantised ones state them, plain ones have a weight [W, H]."""
    if hasattr(project, "out_features") and hasattr(project, "in_features"):
        return int(project.out_features), int(project.in_features)
    weight = getattr(project, "weight", None)
    if weight is None or weight.ndim != 2:
        raise ValueError(f"{name}: output embedding {type(project).__name__} is not a linear layer")
    return int(weight.shape[0]), int(weight.shape[1])


def _scale(config: Any) -> float:
    factor = _first(config, _MULTIPLIERS)
    scale = 1.0 if factor is None else factor
    scaling = _first(config, ("logits_scaling",))
    if scaling is None:
        return scale
    return scale * scaling if config.model_type in _SCALING_MULTIPLIES else scale / scaling


def _first(config: Any, names: tuple[str, ...]) -> float | None:
    """The first of these keys that the configuration sets to a number."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int | float):
            return float(value)
    return None
