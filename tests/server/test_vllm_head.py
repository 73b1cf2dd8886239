"""Which tensors of a checkpoint make its output head, as read for an engine that keeps its own out of reach."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from teacher_server.backends.base import ModelFacts
from teacher_server.backends.vllm_head import read_output_head

WIDTH, HIDDEN = 12, 4


def facts(dtype: str = "float32") -> ModelFacts:
    return ModelFacts("m", WIDTH, WIDTH, HIDDEN, 128, "digest", "tokenizer", dtype=dtype)


def config(**values: Any) -> Any:
    return SimpleNamespace(model_type="made up", **values)


def read(path: Path, tensors: dict[str, torch.Tensor], *, dtype: str = "float32", **values: Any) -> Any:
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, path / f"model-{number}.safetensors")
    return read_output_head(path, config(**values), "MadeUpForCausalLM", facts(dtype))


def matrix(rows: int = WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(seed))


def test_an_untied_head_with_a_bias(tmp_path: Path) -> None:
    weight, bias = matrix(), torch.arange(WIDTH).float()
    tensors = {"model.embed_tokens.weight": matrix(seed=1), "lm_head.weight": weight, "lm_head.bias": bias}
    head = read(tmp_path, tensors, tie_word_embeddings=False, logit_scale=0.5)
    torch.testing.assert_close(head.weight, weight, rtol=0, atol=0)
    torch.testing.assert_close(head.bias, bias, rtol=0, atol=0)
    assert (head.scale, head.soft_cap) == (0.5, None)


def test_a_tied_head_is_the_embedding_whatever_lies_beside_it(tmp_path: Path) -> None:
    weight = matrix()
    tensors = {"model.embed_tokens.weight": weight, "lm_head.weight": matrix(seed=1)}
    head = read(tmp_path, tensors, tie_word_embeddings=True, final_logit_softcapping=30.0)
    torch.testing.assert_close(head.weight, weight, rtol=0, atol=0)
    assert head.bias is None
    assert (head.scale, head.soft_cap) == (1.0, 30.0)


def test_padding_rows_are_cut_and_the_engines_arithmetic_is_kept(tmp_path: Path) -> None:
    weight = matrix(WIDTH + 4)
    head = read(tmp_path, {"language_model.lm_head.weight": weight}, dtype="bfloat16")
    assert head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(head.weight, weight[:WIDTH].bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tensors", "values", "message"),
    [
        ({"model.embed_tokens.weight": matrix()}, {}, r"MadeUpForCausalLM is not understood.*found none"),
        (
            {"a.lm_head.weight": matrix(), "b.lm_head.weight": matrix()},
            {},
            r"found a\.lm_head\.weight, b\.lm_head\.weight",
        ),
        ({"lm_head.weight": matrix()}, {"tie_word_embeddings": True}, r"embed_tokens\.weight or .*found none"),
        ({"lm_head.weight": matrix(WIDTH - 1)}, {}, r"is torch\.float32\[11, 4\]; expected \[12, 4\]"),
        ({"lm_head.weight": matrix().to(torch.int8)}, {}, r"is torch\.int8\[12, 4\]"),
        ({"lm_head.qweight": matrix()}, {}, "found none"),
    ],
)
def test_a_head_that_is_not_understood_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, torch.Tensor], values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, tensors, **values)
