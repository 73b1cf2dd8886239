"""Random-weight models of a stated size, made on the spot: Hugging Face directories with a byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INITIAL_STD = 0.02  # of transformers' random embeddings


def make(
    path: Path,
    *,
    vocabulary: int,
    hidden: int,
    layers: int,
    seed: int = 0,
    intermediate: int | None = None,
    dtype: str = "float32",
    logit_std: float | None = None,
    positions: int = 2048,
) -> Path:
    """A Qwen3 model with tied embeddings and a tokenizer of `vocabulary` entries under `path`.

    Args:
        intermediate: width of the MLPs; twice `hidden` if not given.
        logit_std: spread of the logits in nats, set by the weight of the last norm. Fresh models have a spread of
            0.02 * sqrt(hidden) and so are almost uniform.
        positions: the longest sequence.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate or 2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    if logit_std is not None:
        torch.nn.init.constant_(model.model.norm.weight, logit_std / (INITIAL_STD * hidden**0.5))
    model.to(getattr(torch, dtype)).save_pretrained(path)
    _tokenizer(vocabulary).save_pretrained(path)
    return path


def _tokenizer(size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *sorted(alphabet)])}
    vocabulary |= {f"<filler {i}>": i for i in range(len(vocabulary), size)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>")
