"""Tiny random checkpoints of the architectures people bring, made locally: model and tokenizer in one directory."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

EOS, PAD = "<|end|>", "<|pad|>"
CORPUS = ["the quick brown fox jumps over the lazy dog 0123456789 + - = ? . , :"] * 4


@functools.cache
def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(
        {c for text in CORPUS for c in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)[0][0]}
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, EOS],
        initial_alphabet=alphabet if size < 258 else pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(CORPUS, trainer)
    missing = size - core.get_vocab_size()
    if missing > 0:
        core.add_tokens([f"<extra{i}>" for i in range(missing)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS, pad_token=PAD)


def tiny_tokenizer(size: int = 120) -> PreTrainedTokenizerFast:
    """A byte-level BPE of exactly `size` entries, ids 0 pad and 1 end."""
    return _tokenizer(size)


SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
ATTENTION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Config", {**ATTENTION, "head_dim": 8, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", {**ATTENTION}),
    "llama": ("LlamaConfig", {**ATTENTION}),
    "mistral": ("MistralConfig", {**ATTENTION, "sliding_window": None}),
    "gemma2": ("Gemma2Config", {**ATTENTION, "head_dim": 8, "final_logit_softcapping": 5.0, "sliding_window": 16}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "mixtral": (
        "MixtralConfig",
        {**ATTENTION, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "mamba2": (
        "Mamba2Config",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "expand": 2,
            "head_dim": 8,
            "num_heads": 8,
            "state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "bamba": (
        "BambaConfig",
        {
            **ATTENTION,
            "attn_layer_indices": [1],  # the other is a state-space layer
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
}


def tiny_model(
    arch: str = "qwen3", *, seed: int = 0, logit_width: int = 128, scale: float = 4.0, **overrides: Any
) -> Any:
    """A random float32 model; `scale` sharpens its weights so that distributions differ visibly from uniform."""
    config_name, settings = ARCHITECTURES[arch]
    config = getattr(transformers, config_name)(**{**SPECIAL_IDS, **settings, "vocab_size": logit_width, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model


def save_tiny(path: Path | str, arch: str = "qwen3", *, tokenizer_size: int = 120, **settings: Any) -> Path:
    """Writes model and tokenizer to `path`; tokenizer smaller than the logit width, as real families have it."""
    path = Path(path)
    tiny_model(arch, **settings).save_pretrained(path)
    tiny_tokenizer(tokenizer_size).save_pretrained(path)
    return path


LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_adapter(
    path: Path | str,
    model: torch.nn.Module,
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float = 8.0,
    modules: tuple[str, ...] = LINEAR,
    **config: Any,
) -> Path:
    """Writes a LoRA adapter on `model` in PEFT's layout: B·A for its linear layers of the names `modules`."""
    path = Path(path)
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.rsplit(".", 1)[-1] in modules:
            for part, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": list(modules), "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return path
