"""Adapters: low-rank matrices of peft beside frozen weights, injected into the model itself, so that the class, the cut
into trunk and head, and the sampler stay what they are. What is saved is peft's own format, or the merged weights.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from student_trainer.forms.config import ALL_LINEAR, LoraConfig

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"
"""peft's name for the only adapter of a model."""
_PREFIX = "base_model.model."
"""What peft writes before the names of an adapter's tensors."""


def add(model: Any, config: LoraConfig, *, seed: int, base: str, revision: str) -> None:
    """Freezes `model` and puts fresh adapters into it, a function of `seed`: A random, B zero, so that the model
    computes what it did.

    Args:
        base: name or path of the weights underneath, which the adapter's files will name.
    Raises:
        ValueError: a name that matches no linear layer, a tied output head, or a layer that peft can't adapt.
    """
    import peft
    from transformers.pytorch_utils import Conv1D

    if not hasattr(model, "add_adapter"):
        raise ValueError(
            f"student.lora: {type(model).__name__} has no add_adapter, expected a class of transformers' models"
        )
    targets = _targets(model, config)
    layers = dict(model.named_modules())
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.rslora,
        fan_in_fan_out=all(isinstance(layers[name], Conv1D) for name in targets),
        bias="none",
    )
    with _seeded(seed):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of layers that it adjusts to; ours are checked above
                model.add_adapter(settings, adapter_name=_NAME)
        except ValueError as error:
            raise ValueError(f"student.lora: peft can't adapt {type(model).__name__}: {error}") from error
    settings.base_model_name_or_path = base
    settings.revision = revision or None
    settings.target_modules = _short(targets, layers)  # a list: the set that peft makes is written in any order


def is_adapted(model: Any) -> bool:
    return bool(getattr(model, "_hf_peft_config_loaded", False))


class AdapterFiles:
    """Writes the adapters of a model alone, where the model's own save_pretrained would add an adapted output head's
    whole weights."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def save_pretrained(self, path: Path | str, /, *, state_dict: dict[str, Tensor] | None = None) -> None:
        """Leaves what plain peft loads on the base model. `state_dict`: the model's, where it isn't whole here."""
        directory = Path(path)
        whole = {name: t.cpu().contiguous() for name, t in tensors(self._model, state_dict).items()}
        save_file(whole, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        self._model.peft_config[_NAME].save_pretrained(str(directory))


def tensors(model: Any, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapters of `model` under the names of peft's files. `state_dict`: the model's, where it isn't whole here."""
    import peft

    own = peft.get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=_NAME, save_embedding_layers=False)
    return {_PREFIX + name: tensor.detach() for name, tensor in own.items()}


def settings(model: Any) -> dict[str, Any]:
    """What peft's files say of the adapters of `model`."""
    return dict(model.peft_config[_NAME].to_dict())


def train_dropout(model: Any) -> None:
    """Puts the adapters' own dropouts, and nothing else, into training mode."""
    for _, layer in _layers(model):
        layer.lora_dropout.train()


def dropouts(model: Any) -> Iterator[torch.nn.Module]:
    """The adapters' own dropouts."""
    for _, layer in _layers(model):
        yield from layer.lora_dropout.modules()


def load_weights(directory: Path, model: Any) -> None:
    """Copies the adapter saved in `directory` into the adapters of `model`, bit for bit.

    Raises:
        ValueError: it has other tensors than the model.
    """
    saved = {name.removeprefix(_PREFIX): tensor for name, tensor in load_file(directory / ADAPTER_WEIGHTS).items()}
    mine = {_saved_name(name): p for name, p in model.named_parameters() if ".lora_" in name}
    different = sorted(
        name for name in {*saved, *mine} if getattr(saved.get(name), "shape", 0) != getattr(mine.get(name), "shape", 1)
    )
    if different:
        raise ValueError(f"{directory} holds another adapter: {len(different)} tensors differ, such as {different[0]}")
    with torch.no_grad():
        for name, parameter in mine.items():
            parameter.copy_(saved[name])


@torch.no_grad()
def merged(model: Any) -> Any:
    """A model of the same class without adapters, W + (alpha / r) · B A in their place. Layers without an adapter share
    their weights with `model`."""
    weights: dict[str, Tensor] = {}
    adapted = dict(_layers(model))
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        owner, _, attribute = name.rpartition(".base_layer.")
        if owner and attribute == "weight":
            layer = adapted[owner]
            tensor = tensor + layer.get_delta_weight(_NAME).to(tensor.dtype)
        weights[f"{owner}.{attribute}" if owner else name] = tensor
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain


def merge_saved(base: Any, directory: Path) -> Any:
    """`base` with the adapter of `directory`, of ours or of anybody else's, merged into its weights.

    Raises:
        ValueError: it is an adapter for another model, or has other tensors than its configuration says.
    """
    import peft

    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise ValueError(f"{directory} has no {ADAPTER_WEIGHTS}; expected an adapter's weights in safetensors")
    settings = peft.PeftConfig.from_pretrained(str(directory))
    settings.inference_mode = True
    try:
        adapted = peft.PeftModel(base, settings, _NAME)
        report = adapted.load_adapter(str(directory), _NAME)
    except RuntimeError as error:
        raise ValueError(f"the adapter in {directory} does not fit its base: {error}") from error
    # peft leaves what it finds no tensor for at random and zero, and passes over tensors that it has no place for.
    unlike = [*report.missing_keys, *(name for name in report.unexpected_keys if ".lora_" in name)]
    if unlike:
        raise ValueError(
            f"the adapter in {directory} does not fit its base: {len(unlike)} tensors are missing or have no place, "
            f"such as {unlike[0]}"
        )
    return adapted.merge_and_unload()


def base_of(directory: Path) -> tuple[str, str]:
    """(name or path, revision) of the weights under the adapter saved in `directory`.

    Raises:
        ValueError: its configuration names none, or is no LoRA's.
    """
    path = directory / ADAPTER_CONFIG
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: got {type(settings).__name__}, expected an adapter's settings by name")
    base, kind = settings.get("base_model_name_or_path"), settings.get("peft_type")
    if kind != "LORA" or not base:
        raise ValueError(f"{path}: got peft_type {kind!r} on {base!r}, expected LORA on a model")
    if Path(str(base)).resolve() == directory.resolve():
        raise ValueError(f"{path}: got its own directory as base_model_name_or_path, expected the model underneath")
    return str(base), str(settings.get("revision") or "")


def _targets(model: Any, config: LoraConfig) -> list[str]:
    """Full names of the layers that get adapters, in the model's order."""
    from transformers.pytorch_utils import Conv1D

    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    head = next((n for n, m in layers.items() if m is model.get_output_embeddings()), "")
    if config.target_modules == (ALL_LINEAR,):
        chosen = [name for name in layers if name != head]
    else:
        chosen = [name for name in layers if _ends(name, config.target_modules)]
        _refuse_unmatched("target_modules", config.target_modules, layers, type(model).__name__)
    _refuse_unmatched("exclude_modules", config.exclude_modules, chosen, type(model).__name__)
    targets = [name for name in chosen if not _ends(name, config.exclude_modules)]
    if head in targets and _is_tied(model):
        raise ValueError(
            f"student.lora.target_modules: got {head}, whose weights are also the input embedding's "
            "(tie_word_embeddings), expected layers with weights of their own: merging would change the embedding too"
        )
    if not targets:
        raise ValueError("student.lora.exclude_modules: leaves no layer of target_modules, expected one at least")
    return targets


def _short(targets: list[str], layers: dict[str, Any]) -> list[str]:
    """Ends of names that say `targets` and nothing else, as adapters' configurations have them; else all of them."""
    ends = sorted({name.rpartition(".")[2] for name in targets})
    return ends if all(name in targets for name in layers if _ends(name, tuple(ends))) else targets


def _refuse_unmatched(key: str, words: tuple[str, ...], names: Any, model: str) -> None:
    for word in words:
        if not any(_ends(name, (word,)) for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise ValueError(
                f"student.lora.{key}: {word!r} matches no linear layer of {model}; expected the end of a name: "
                f"{', '.join(known)}"
            )


def _ends(name: str, words: tuple[str, ...]) -> bool:
    return any(name == word or name.endswith(f".{word}") for word in words)


def _is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _saved_name(name: str) -> str:
    return name.replace(f".{_NAME}.", ".")


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch's CPU generator from `seed`; the state before comes back."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        yield
