"""The cut into trunk and head, against the model's own forward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from tinymodels import ARCHITECTURES, ATTENTION, SPECIAL_IDS, tiny_model
from transformers import AutoModelForCausalLM

from teacher_api import causal_lm

SMALL = {**SPECIAL_IDS, **ATTENTION, "vocab_size": 128}
# Families whose head is more than a product, or whose parts have other names.
FAMILIES: dict[str, dict[str, Any]] = {
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {},
    "Granite": {"logits_scaling": 3.0},
    "GraniteMoe": {"logits_scaling": 3.0, "num_local_experts": 4},
    "Gemma3Text": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "HyperCLOVAX": {"logits_scaling": 2.0},
    "MiniCPM3": {
        "dim_model_base": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
    },
    "RecurrentGemma": {"num_hidden_layers": 3, "logits_soft_cap": 0.5},
    "FalconH1": {
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_chunk_size": 16,
    },
    "NanoChat": {},
    "Llama4Text": {"num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 48},
    "OPT": {"word_embed_proj_dim": 16, "ffn_dim": 48},
    "Rwkv": {},
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2},
    "GPTJ": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},
}


def family(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **FAMILIES[name]})
    return AutoModelForCausalLM.from_config(config).float().eval()


def ids(rows: int = 3, tokens: int = 17) -> torch.Tensor:
    return torch.randint(2, 120, (rows, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_head_of_trunk_is_the_model(arch: str) -> None:
    model = tiny_model(arch)
    parts = causal_lm.split(model)
    with torch.inference_mode():
        expected = model(ids()).logits
        hidden = parts.trunk(ids())
        assert hidden.shape == (3, 17, parts.hidden_size)
        torch.testing.assert_close(parts.head(hidden), expected, rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(parts.head(hidden[1, 5:9]), expected[1, 5:9], rtol=1e-5, atol=1e-4)
        assert causal_lm.verify(parts, model, ids()) <= 1e-4
    assert parts.logit_width == causal_lm.logit_width(model) == expected.shape[-1] == 128


@pytest.mark.parametrize("name", FAMILIES)
def test_families_with_their_own_head(name: str) -> None:
    model = family(name)
    parts = causal_lm.split(model)
    with torch.inference_mode():
        torch.testing.assert_close(parts.head(parts.trunk(ids())), model(ids()).logits, rtol=1e-6, atol=1e-6)
        causal_lm.verify(parts, model, ids())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_steps_with_a_cache_over_a_left_padded_batch(arch: str) -> None:
    """The sampler's use: prompts of two lengths, then token by token, against each sequence alone and whole."""
    model = tiny_model(arch)
    parts = causal_lm.split(model)
    tokens, lengths, prompt = ids(2, 12), (9, 6), 9
    mask_BT = torch.ones(2, 12, dtype=torch.long)
    mask_BT[1, :3] = 0
    position_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)
    with torch.inference_mode():
        hidden, cache = parts.step(tokens[:, :prompt], mask_BT[:, :prompt], position_BT[:, :prompt])
        got = [hidden[:, -1]]
        for t in range(prompt, 12):
            hidden, cache = parts.step(
                tokens[:, t : t + 1], mask_BT[:, : t + 1], position_BT[:, t : t + 1], cache=cache
            )
            got.append(hidden[:, -1])
        for row, length in enumerate(lengths):
            alone = model(tokens[row : row + 1, prompt - length :]).logits[0, length - 1 :]
            mine = parts.head(torch.stack([h[row] for h in got]))
            torch.testing.assert_close(mine, alone, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("arch", ["qwen3", "gemma2", "mamba2"])
def test_gradients_are_the_models(arch: str) -> None:
    model = tiny_model(arch).double()
    parts = causal_lm.split(model)
    weight = torch.randn(3, 17, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (model(ids(), use_cache=False).logits * weight).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (parts.head(parts.trunk(ids())) * weight).sum().backward()
    assert expected
    for name, parameter in model.named_parameters():
        if name in expected:
            # Mamba 2 rounds its logits and scan to float32 inside a float64 model.
            limit = (1e-5 if arch == "mamba2" else 1e-12) * float(expected[name].abs().max())
            torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=limit)


def test_head_takes_hidden_states_of_another_precision() -> None:
    model = tiny_model("qwen3")
    parts = causal_lm.split(model)
    with torch.inference_mode():
        hidden = parts.trunk(ids())
        assert parts.head(hidden.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("change", [{"soft_cap": None}, {"scale": 1.01}, {"soft_cap": 5.1}])
def test_a_head_that_does_not_fit_is_refused_by_name(change: dict[str, Any]) -> None:
    model = tiny_model("gemma2")
    parts = replace(causal_lm.split(model), **change)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"Gemma2ForCausalLM.*differ from the model's by"):
        causal_lm.verify(parts, model, ids())


def test_an_unknown_head_is_refused_by_name() -> None:
    config = transformers.BertConfig(**{**SMALL, "is_decoder": True})
    model = transformers.BertLMHeadModel(config).eval()  # a transform between trunk and output embedding
    with torch.inference_mode(), pytest.raises(ValueError, match=r"BertLMHeadModel \(model_type 'bert'\)"):
        causal_lm.verify(causal_lm.split(model), model, ids())


def test_a_broken_model_is_refused() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with torch.inference_mode(), pytest.raises(ValueError, match=r"LlamaForCausalLM.*no finite logit"):
        causal_lm.verify(causal_lm.split(model), model, ids())


def test_models_that_cannot_be_cut_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Qwen3Model has no separate trunk"):
        causal_lm.split(tiny_model("qwen3").model)
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder"):
        causal_lm.split(t5)
