"""What the torch backend says of a checkpoint, and how it refuses a broken one or wrong settings in one line."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tinymodels import save_tiny, tiny_model
from torch_jobs import WIDTH

from teacher_server.backends.base import FEATURES
from teacher_server.backends.torch_backend import TorchBackend

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_cache")]


def test_facts_and_features(checkpoint: Any, opened: Any) -> None:
    backend = opened(checkpoint("mamba2"), reference=True, threads=0)
    facts = backend.load()
    assert backend.features == {*FEATURES, "exact_tail"}
    assert facts.max_sequence_tokens == 32_768
    assert facts.hidden_size == 32
    assert facts.scoring_path == "cpu, reference, 1 threads"
    assert facts.engine_version == f"torch {torch.__version__}, transformers {transformers.__version__}"
    assert facts.tokenizer_fingerprint
    chunked = opened(checkpoint("mamba2"), reference=True, threads=0, head_chunk_rows=3)
    assert chunked.load().scoring_path == "cpu, reference, 1 threads, head in chunks of 3 rows"
    assert facts.weights_digest


def test_a_directory_without_tokenizer_counts_every_column(
    tmp_path: Path, opened: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    facts = opened(tmp_path / "bare").load()
    assert (facts.tokenizer_size, facts.tokenizer_fingerprint) == (WIDTH, "")
    assert "has no tokenizer" in caplog.text


def _drop_a_weight(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _cut_the_weights(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_drop_a_weight, r"missing keys: model\.layers\.1\.mlp\.up_proj\.weight; its teacher would be partly random"),
        (_cut_the_weights, "can't load the model in"),
        (lambda path: (path / "config.json").unlink(), r"has no config\.json"),
        (lambda path: (path / "config.json").write_text('{"model_type": "unheard"}'), "can't load the model in"),
        (lambda path: (path / "tokenizer.json").write_text("{"), "can't load the tokenizer in"),
    ],
)
def test_a_broken_checkpoint_is_one_clear_line(tmp_path: Path, break_it: Any, message: str) -> None:
    path = save_tiny(tmp_path / "model", "llama")
    break_it(path)
    backend = TorchBackend(str(path))
    with pytest.raises(ValueError, match=message) as error:
        backend.load()
    assert "\n" not in str(error.value)
    asyncio.run(backend.close())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "runs/nothing/here"}, "model 'runs/nothing/here' is not a directory here"),
        ({"max_sequence_tokens": 129}, "max_sequence_tokens is 129, but the model has only 128 positions"),
        ({"device": "cuda:7"}, "device 'cuda:7' can't be used"),
        ({"device": "gpu"}, "device 'gpu' can't be used"),
        ({"revision": "main"}, "revision 'main' given, but model .* is a directory"),
    ],
)
def test_wrong_settings_are_one_clear_line(settings: dict[str, Any], message: str, checkpoint: Any) -> None:
    backend = TorchBackend(**{"model": str(checkpoint("llama")), **settings})
    with pytest.raises(ValueError, match=message) as error:
        backend.load()
    assert "\n" not in str(error.value)
    asyncio.run(backend.close())


def test_close_twice(checkpoint: Any) -> None:
    backend = TorchBackend(str(checkpoint("llama")), threads=1)
    backend.load()
    asyncio.run(backend.close())
    asyncio.run(backend.close())
