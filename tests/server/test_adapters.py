"""LoRA adapters on disk: what is read of them; what does not fit the base is refused before an engine starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tinymodels import save_adapter, save_tiny, tiny_model

from teacher_server.backends.adapters import Adapter, read_adapters

pytestmark = pytest.mark.usefixtures("own_cache")
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("plain") / "math", tiny_model(), rank=3, alpha=6.0)


def read(path: Path, base: Path) -> Adapter:
    return read_adapters({"math": str(path)}, base)["math"]


def test_what_is_read(plain: Path, base: Path):
    adapter = read(plain, base)
    assert (adapter.name, adapter.directory, adapter.rank, adapter.scale) == ("math", plain, 3, 2.0)
    assert adapter.modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    pairs = adapter.pairs()
    assert len(pairs) == 14
    a, b = pairs["model.layers.0.self_attn.q_proj"]
    stored = load_file(plain / "adapter_model.safetensors")
    assert torch.equal(a, stored[Q.format("A")])
    assert torch.equal(b, stored[Q.format("B")])


def test_scales_of_their_own(tmp_path: Path, base: Path):
    model = tiny_model()
    stabilised = save_adapter(tmp_path / "a", model, rank=4, alpha=6.0, use_rslora=True)
    assert read(stabilised, base).scale == 3.0
    patterned = save_adapter(tmp_path / "b", model, rank_pattern={"q_proj": 8})
    assert read(patterned, base).scale is None


def test_the_digest_follows_weights_and_configuration(plain: Path, base: Path, tmp_path: Path):
    copied = Path(shutil.copytree(plain, tmp_path / "copy"))
    (copied / "README.md").write_text("trained on sums")
    assert read(copied, base).digest == read(plain, base).digest
    other = save_adapter(tmp_path / "other", tiny_model(), seed=1, rank=3, alpha=6.0)
    stronger = save_adapter(tmp_path / "stronger", tiny_model(), rank=3, alpha=12.0)
    assert len({read(path, base).digest for path in (plain, other, stronger)}) == 3


def change_config(**changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))

    return change


def change_tensors(**changes: torch.Tensor | None) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        tensors: dict[str, Any] = {**load_file(path / "adapter_model.safetensors"), **changes}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, path / "adapter_model.safetensors")

    return change


def pair(module: str, rank: int = 3, inputs: int = 32, outputs: int = 32) -> dict[str, torch.Tensor]:
    name = f"base_model.model.{module}.lora_"
    return {f"{name}A.weight": torch.zeros(rank, inputs), f"{name}B.weight": torch.zeros(outputs, rank)}


SPOILED: dict[str, Callable[[Path], Any]] = {
    "has no adapter_config.json; expected the directory of a PEFT adapter": shutil.rmtree,
    "has no adapter_model.safetensors": lambda path: (path / "adapter_model.safetensors").unlink(),
    "can't be read: Expecting value": lambda path: (path / "adapter_config.json").write_text("no json"),
    "can't be read: adapter_model.safetensors": lambda path: (path / "adapter_model.safetensors").write_bytes(
        b"?" * 99
    ),
    "is of 'LOHA'; expected peft_type LORA": change_config(peft_type="LOHA"),
    "is of 'list'; expected": lambda path: (path / "adapter_config.json").write_text("[]"),
    "has r 0; expected a number above 0": change_config(r=0),
    "has lora_alpha None; expected": change_config(lora_alpha=None),
    "is a DoRA adapter": change_config(use_dora=True),
    "holds 'base_model.model.model.embed_tokens.lora_embedding_A'": change_tensors(
        **{"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(3, 32)}
    ),
    "q_proj has lora_A alone": change_tensors(**{Q.format("B"): None}),
    "q_proj has A [3, 32] and B [32, 2]; expected [r, I] and [O, r]": change_tensors(
        **{Q.format("B"): torch.zeros(32, 2)}
    ),
    "changes the output head lm_head": change_tensors(**pair("lm_head", outputs=128)),
    "changes model.layers.9.self_attn.q_proj, which the base lacks": change_tensors(
        **pair("model.layers.9.self_attn.q_proj")
    ),
    "k_proj is made for a weight of [64, 32], the base has [16, 32]": change_tensors(
        **pair("model.layers.0.self_attn.k_proj", outputs=64)
    ),
    "holds no tensors": lambda path: save_file({}, path / "adapter_model.safetensors"),
}


@pytest.mark.parametrize("cause", SPOILED)
def test_what_does_not_fit_is_one_line_that_names_the_adapter(plain: Path, base: Path, tmp_path: Path, cause: str):
    path = Path(shutil.copytree(plain, tmp_path / "spoiled"))
    SPOILED[cause](path)
    with pytest.raises(ValueError, match=r"^lora\.math: ") as refused:
        read(path, base)
    assert cause in str(refused.value)
    assert "\n" not in str(refused.value)
