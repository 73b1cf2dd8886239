"""Layers of another model in the student: putting them in, and checkpoints that say so. Such a checkpoint's config.json
has a model type of its own, so that a program that knows nothing of grafts refuses it instead of filling in random
layers; our entry in it holds the other model's configuration, which is all that building it again needs.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from student_trainer.forms.grafted import GraftedLayer, TrunkInputs, lacking, layer_kind
from teacher_api import causal_lm

ENTRY, MODEL_TYPE = "preceptor_graft", "preceptor_graft"
"""Our key in config.json, and what stands there as model_type."""
VERSION = 1
PROBE_TOKENS = 16
"""Length of the sequence on which a graft is held against the model it comes from."""
PROBE_ERROR = 1e-5
"""Largest difference there, as a share of the largest value."""
KINDS = ("full_attention", "sliding_attention", "linear_attention")
ANY_VALUE = frozenset(
    {
        "vocab_size", "num_hidden_layers", "layer_types", "max_window_layers", "tie_word_embeddings", "use_cache",
        "initializer_range", "dtype", "architectures", "transformers_version", "_name_or_path", "id2label", "label2id",
        "bos_token_id", "eos_token_id", "pad_token_id", "problem_type", "return_dict", "output_hidden_states",
    }
)  # fmt: skip
"""Keys of a configuration that say nothing of what one layer computes. (What kind a layer is, is compared apart.)"""


def graft(model: Any, donor: Any, layers: Sequence[int]) -> None:
    """Replaces layers of `model` by those of `donor` with the same numbers; both on the CPU, in evaluation mode or not.

    Where all of them are of the class and the configuration of the layers they replace, their weights are copied and
    the model stays what it was. Otherwise the modules themselves move over, and the model's class becomes one that
    saves and loads them.

    Raises:
        ValueError: sizes, layers or caches that don't fit, or a layer that computes something else in its new place.
    """
    if hasattr(model.config, ENTRY):
        raise ValueError(
            f"student.layers_from_teacher: got {list(layers)}, but student.model has layers of another model in it "
            "already; expected none"
        )
    _check_sizes(model, donor, layers)
    _, places = decoder_layers(model)
    seen = _Observed(donor, layers)
    if all(_is_alike(model, donor, index) for index in layers):
        for index in layers:
            places[index].load_state_dict(seen.layers[index].state_dict())
        return
    host = _Observed(model, layers, with_cache=True)
    entry = {
        "version": VERSION,
        "model_type": model.config.model_type,
        "layers": list(layers),
        "returns": [host.returns[index] for index in layers],
        "donor": donor.config.to_dict(),
    }
    _insert(model, donor, entry)
    _check_outputs(model, seen, layers)
    host_class: Any = type(model)
    model.__class__ = grafted_class(host_class)
    setattr(model.config, ENTRY, entry)


def decoder_layers(model: Any) -> tuple[str, torch.nn.ModuleList]:
    """The list of a causal language model's layers, and its name in the model.

    Raises:
        ValueError: there is none, or more than one.
    """
    body = causal_lm.split(model).body
    count = causal_lm.text_config(model.config).num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == count
        and any(module is child for child in body.children())
    ]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} has {len(found)} lists of {count} layers; expected one")
    return found[0]


def is_grafted(directory: Path) -> bool:
    """Whether `directory` holds a checkpoint with grafted layers."""
    path = directory / "config.json"
    return path.is_file() and ENTRY in json.loads(path.read_text())


@functools.cache
def grafted_class(host: Any) -> Any:
    """The class of `host` models with grafted layers, which its configurations describe under ENTRY."""

    class Grafted(host):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            entry = getattr(config, ENTRY)
            donor = _config(entry["donor"])
            with torch.device("meta"):
                skeleton = class_for(donor)(donor)
            _insert(self, skeleton, entry)

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            super().save_pretrained(save_directory, *args, **kwargs)
            path = Path(save_directory) / "config.json"
            content = {**json.loads(path.read_text()), "model_type": MODEL_TYPE}
            path.write_text(json.dumps(content, indent=2) + "\n")

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
            directory = Path(pretrained_model_name_or_path)
            loaded = super().from_pretrained(directory, *args, **{**kwargs, "config": read_config(directory)})
            _renew_rotary(loaded[0] if isinstance(loaded, tuple) else loaded)
            return loaded

    Grafted.__name__ = Grafted.__qualname__ = f"Grafted{Grafted.__base__.__name__}"
    return Grafted


def read_config(directory: Path) -> Any:
    """The host's configuration, with our entry, of a checkpoint with grafted layers.

    Raises:
        ValueError: another version wrote it.
    """
    import transformers

    content, _ = transformers.PreTrainedConfig.get_config_dict(directory)
    entry = content[ENTRY]
    if entry["version"] != VERSION:
        raise ValueError(f"{directory} has graft format {entry['version']}, this version reads {VERSION}")
    return _config({**content, "model_type": entry["model_type"]})


def class_for(config: Any) -> type[Any]:
    """transformers' own class of causal language models for `config`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{type(config).__name__} has no causal language model in transformers")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # type: ignore[no-any-return]


def _config(content: dict[str, Any]) -> Any:
    import transformers

    return type(transformers.AutoConfig.for_model(content["model_type"])).from_dict(content)


def _insert(model: Any, donor: Any, entry: dict[str, Any]) -> None:
    """Moves layers from `donor` to their places in `model`."""
    (_, places), (_, sources) = decoder_layers(model), decoder_layers(donor)
    rotary = getattr(causal_lm.split(donor).body, "rotary_emb", None)
    config = causal_lm.text_config(donor.config)
    inputs = TrunkInputs(causal_lm.split(model).body)
    for index, returns in zip(entry["layers"], entry["returns"], strict=True):
        missing = lacking(sources[index], rotary)
        if missing:
            raise ValueError(
                f"student.graft_from: layer {index} of {type(donor).__name__} needs {', '.join(missing)} from its own "
                "model, which no other can give it; expected layers that take hidden states, positions and a cache"
            )
        places[index] = GraftedLayer(sources[index], rotary, config, index, places[index], returns, inputs)
        if places[index].kind == "linear_attention":
            model._is_stateful = True


def _renew_rotary(model: Any) -> None:
    """Rotary tables are in no checkpoint: they are made from the configuration."""
    fresh = None
    for module in model.modules():
        if isinstance(module, GraftedLayer) and module.rotary is not None:
            device = next(module.layer.parameters()).device
            fresh = fresh or type(module.rotary)(config=module.donor_config).to(device)
            module.rotary = fresh


def _check_sizes(model: Any, donor: Any, layers: Sequence[int]) -> None:
    mine, theirs = (causal_lm.text_config(m.config) for m in (model, donor))
    if mine.hidden_size != theirs.hidden_size:
        raise ValueError(
            f"student.graft_from: its layers have hidden size {theirs.hidden_size}, the student's "
            f"{mine.hidden_size}; expected the same"
        )
    for whose, config in (("the student", mine), ("student.graft_from", theirs)):
        if max(layers) >= config.num_hidden_layers:
            raise ValueError(
                f"student.layers_from_teacher: got {max(layers)}, but {whose} has layers 0 to "
                f"{config.num_hidden_layers - 1}; layers are replaced by those of the same number"
            )
    for index in layers:
        kind = layer_kind(theirs, index)
        if kind not in KINDS:
            raise ValueError(
                f"student.graft_from: its layer {index} is of kind {kind}, whose cache no other model keeps; expected "
                f"one of {', '.join(KINDS)}"
            )


def _is_alike(model: Any, donor: Any, index: int) -> bool:
    """Whether the weights are all that layers `index` of the two differ in."""
    (_, mine), (_, theirs) = decoder_layers(model), decoder_layers(donor)
    if type(mine[index]) is not type(theirs[index]):
        return False
    configs = [causal_lm.text_config(m.config) for m in (model, donor)]
    if layer_kind(configs[0], index) != layer_kind(configs[1], index):
        return False
    shapes = [{n: t.shape for n, t in layers[index].state_dict().items()} for layers in (mine, theirs)]
    settings = [{k: v for k, v in config.to_dict().items() if k not in ANY_VALUE} for config in configs]
    return shapes[0] == shapes[1] and settings[0] == settings[1]


class _Observed:
    """One forward pass of a model with a look at some of its layers: what goes in and comes out."""

    @torch.no_grad()
    def __init__(self, model: Any, layers: Sequence[int], *, with_cache: bool = False) -> None:
        self.layers = decoder_layers(model)[1]
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}
        self.returns: dict[int, int] = {}
        self._training = model.training
        hooks = [self.layers[i].register_forward_hook(functools.partial(self._note, i)) for i in layers]
        try:
            model.eval()
            parts = causal_lm.split(model)
            ids = torch.arange(PROBE_TOKENS)[None] % parts.logit_width
            cache = parts.step(ids, use_cache=with_cache)[1]
        finally:
            model.train(self._training)
            for hook in hooks:
                hook.remove()
        if with_cache and cache is not None and not hasattr(cache, "layers"):
            raise ValueError(
                f"{type(model).__name__} keeps its cache in a {type(cache).__name__} of its own; expected one with a "
                "place for each layer, which grafted layers can use"
            )

    def _note(self, index: int, _layer: Any, args: tuple[Any, ...], output: Any) -> None:
        self.inputs[index] = args[0]
        self.outputs[index] = output[0] if isinstance(output, tuple) else output
        self.returns[index] = len(output) if isinstance(output, tuple) else 0


@torch.no_grad()
def _check_outputs(model: Any, seen: _Observed, layers: Sequence[int]) -> None:
    """Each graft, given what its own model gave it, must answer what it answered there."""
    _, places = decoder_layers(model)
    for index in layers:
        got = places[index](seen.inputs[index])
        got, expected = got[0] if isinstance(got, tuple) else got, seen.outputs[index]
        error = float((got - expected).abs().max() / expected.abs().max())
        if not error <= PROBE_ERROR:
            raise ValueError(
                f"student.graft_from: its layer {index} computes something else outside its model (by {error:.2g} of "
                "the largest value), so that model gives its layers more than hidden states, positions and a cache"
            )
