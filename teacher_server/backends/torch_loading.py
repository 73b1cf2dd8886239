"""Loads a checkpoint for the torch backend: files, tokenizer, model, and what the service must know of them.

Owns everything that can go wrong at a start; each failure is a ValueError of one line.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from torch import Tensor

from teacher_api import causal_lm
from teacher_api.info import tokenizer_fingerprint
from teacher_server.backends.base import ModelFacts, OutputHead
from teacher_server.backends.shared_prompt import can_share
from teacher_server.backends.weights import weights_digest

logger = logging.getLogger(__name__)

DEFAULT_MAX_TOKENS = 32_768
"""Limit for models that state none (state-space models, ALiBi), unless configured."""
HEAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WEIGHT_BLOCK_BYTES = 32 << 20
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError, SafetensorError)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to score."""

    parts: causal_lm.Parts
    head: Callable[[Tensor], Tensor]  # [n, H] -> float32 logits [n, W]
    facts: ModelFacts
    long_rope_after: int | None  # sequences longer than this turn with other frequencies; None: all turn alike
    shares_prompts: bool  # whether a prompt can run once for several sequences
    network: Any  # the whole model, of which `parts` are parts


def load(
    model: str,
    *,
    revision: str,
    dtype: str,
    device: torch.device,
    max_sequence_tokens: int,
    scoring_path: str,
) -> Loaded:
    """Loads and checks the checkpoint `model`, a directory or a hub id.

    Raises:
        ValueError: it is not there, not readable, incomplete, or not a causal language model this backend can cut.
    """
    directory, commit = find_checkpoint(model, revision)
    digest = weights_digest(directory)
    network = _load_network(directory, dtype, device)
    parts = causal_lm.split(network)
    config = causal_lm.text_config(network.config)
    shares_prompts = _verify(parts, network, config, device)
    head, head_dtype = float32_head(parts)
    size, fingerprint, tokenizer_parts = tokenizer_facts(directory, parts.logit_width)
    facts = ModelFacts(
        model_name=model,
        tokenizer_size=size,
        logit_width=parts.logit_width,
        hidden_size=parts.hidden_size,
        max_sequence_tokens=_max_tokens(config, max_sequence_tokens),
        weights_digest=digest,
        tokenizer_fingerprint=fingerprint,
        tokenizer_parts=tokenizer_parts,
        model_revision=commit,
        dtype=str(network.dtype).removeprefix("torch."),
        quantisation=_quantisation(network.config),
        head_dtype=head_dtype,
        engine="torch",
        engine_version=f"torch {torch.__version__}, transformers {transformers.__version__}",
        scoring_path=scoring_path,
    )
    return Loaded(parts, head, facts, _long_rope_after(config), shares_prompts, network)


def find_checkpoint(model: str, revision: str) -> tuple[Path, str]:
    """(local directory, resolved revision) of a directory or a hub id; fetches the latter unless HF_HUB_OFFLINE."""
    path = Path(model).expanduser()
    if path.is_dir():
        if revision:
            raise ValueError(f"revision {revision!r} given, but model {model!r} is a directory here, which has none")
        return path, ""
    if path.exists() or not _HUB_ID.fullmatch(model):
        raise ValueError(f"model {model!r} is not a directory here; expected a checkpoint directory or a hub id")
    try:
        snapshot = snapshot_download(
            model, revision=revision or None, allow_patterns=_HUB_FILES, ignore_patterns=["consolidated*", "*/*"]
        )
    except _LOAD_ERRORS as error:
        raise ValueError(
            f"model {model!r} is neither a directory here nor could it be fetched from the hub: {_one_line(error)}"
        ) from error
    return Path(snapshot), Path(snapshot).name


def output_head(parts: causal_lm.Parts) -> OutputHead:
    """The head as it stands in memory. Raises ValueError where its weight is not a plain matrix of numbers."""
    project = parts.project
    weight = getattr(project, "weight", None)
    if type(project) is not torch.nn.Linear or weight is None or weight.dtype not in HEAD_DTYPES:
        what = f"{type(project).__name__} of {getattr(weight, 'dtype', 'no weight')}"
        raise ValueError(f"the model's output head is a {what}; only a linear layer in float can be shared")
    width, bias = parts.logit_width, project.bias
    return OutputHead(weight[:width], None if bias is None else bias[:width], parts.scale, parts.soft_cap)


def float32_head(parts: causal_lm.Parts) -> tuple[Callable[[Tensor], Tensor], str]:
    """(hidden rows [n, H] -> float32 logits [n, W], name of the head's precision).

    A half-precision linear head is multiplied with float32 accumulation and float32 result: rounding the logits to
    bfloat16 would leave the top 16 about a dozen distinct values. On CUDA the product reads the stored weights; on
    the CPU they are taken to float32 a block of columns at a time. Other heads (quantised) run as they are.
    """
    project = parts.project
    weight = getattr(project, "weight", None)
    if type(project) is not torch.nn.Linear or weight is None or not weight.is_floating_point():
        return (lambda hidden: parts.head(hidden).float()), "model"
    if weight.dtype not in (torch.bfloat16, torch.float16):
        return parts.head, str(weight.dtype).removeprefix("torch.")
    bias = project.bias

    def head(hidden_nH: Tensor) -> Tensor:
        logits_nW = _matmul_float32(hidden_nH.to(weight.dtype), weight)
        if bias is not None:
            logits_nW += bias.float()
        finished: Tensor = parts.finish(logits_nW)
        return finished

    return head, "float32"


def _matmul_float32(hidden_nH: Tensor, weight_WH: Tensor) -> Tensor:
    """hidden · weightᵀ [n, W] of half-precision operands, accumulated and returned in float32."""
    if hidden_nH.is_cuda:
        return torch.mm(hidden_nH, weight_WH.t(), out_dtype=torch.float32)
    width, hidden_size = weight_WH.shape
    step = max(1, _WEIGHT_BLOCK_BYTES // (4 * hidden_size))
    hidden_f32, logits_nW = hidden_nH.float(), hidden_nH.new_empty((len(hidden_nH), width), dtype=torch.float32)
    for start in range(0, width, step):
        logits_nW[:, start : start + step] = hidden_f32 @ weight_WH[start : start + step].float().t()
    return logits_nW


def _load_network(directory: Path, dtype: str, device: torch.device) -> Any:
    try:
        network, report = transformers.AutoModelForCausalLM.from_pretrained(
            directory,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            trust_remote_code=False,
        )
        network = network.to(device).eval()
    except _LOAD_ERRORS as error:
        raise ValueError(f"can't load the model in {directory}: {_one_line(error)}") from error
    for what in ("missing_keys", "mismatched_keys"):
        if report[what]:
            names = sorted(map(str, report[what]))
            raise ValueError(
                f"checkpoint {directory} has {what.replace('_', ' ')}: {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}; its teacher would be partly random"
            )
    return network.requires_grad_(False)


@torch.inference_mode()
def _verify(parts: causal_lm.Parts, network: Any, config: Any, device: torch.device) -> bool:
    """Refuses a model that can't be cut; whether it can share prompts."""
    ids = torch.arange(1, 9, device=device)[None] % parts.logit_width
    causal_lm.verify(parts, network, ids)
    return can_share(parts, config, device)


def tokenizer_facts(directory: Path, logit_width: int) -> tuple[int, str, dict[str, str]]:
    """(tokenizer size, fingerprint, digests of its parts). Without tokenizer files every column counts as an id."""
    if not any(any(directory.glob(pattern)) for pattern in _TOKENIZER_FILES):
        logger.warning(
            "%s has no tokenizer: its %d logit columns count as ids and clients can't compare tokenizers",
            directory,
            logit_width,
        )
        return logit_width, "", {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        size = 1 + max(tokenizer.get_vocab().values())
        fingerprint, digests = tokenizer_fingerprint(tokenizer)
    except _LOAD_ERRORS as error:
        raise ValueError(f"can't load the tokenizer in {directory}: {_one_line(error)}") from error
    if size > logit_width:
        logger.warning(
            "the tokenizer in %s knows %d ids, the model %d; ids from there on are refused",
            directory,
            size,
            logit_width,
        )
    return min(size, logit_width), fingerprint, digests


def _max_tokens(config: Any, configured: int) -> int:
    """The model's own limit, or the configured one below it."""
    stated = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len", "n_positions")]
    limit = next((value for value in stated if isinstance(value, int) and value > 0), None)
    if limit is None:
        return configured or DEFAULT_MAX_TOKENS
    if configured > limit:
        raise ValueError(f"max_sequence_tokens is {configured}, but the model has only {limit} positions")
    return configured or limit


def _long_rope_after(config: Any) -> int | None:
    """LongRoPE turns a whole batch with its long factors once its longest sequence passes this many tokens."""
    rope = getattr(config, "rope_parameters", None) or {}
    layers = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    own = getattr(config, "original_max_position_embeddings", None)
    lengths: set[Any] = {
        layer.get("original_max_position_embeddings") or own for layer in layers if layer.get("rope_type") == "longrope"
    }
    if len(lengths) > 1:
        raise ValueError(f"layers with different LongRoPE lengths ({sorted(lengths)}) are not supported")
    return lengths.pop() if lengths else None


def _quantisation(config: Any) -> str:
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return ""
    method = settings.get("quant_method", "") if isinstance(settings, dict) else getattr(settings, "quant_method", "")
    return str(getattr(method, "value", method))


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
