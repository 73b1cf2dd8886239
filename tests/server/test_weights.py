"""The weights digest: what it covers, and that its cache never changes it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from teacher_server.backends import weights
from teacher_server.backends.weights import default_cache_file, weights_digest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    for part in (1, 2):
        save_file({f"w{part}": np.arange(part * 4, dtype=np.float32)}, directory / f"model-0000{part}.safetensors")
    (directory / "generation_config.json").write_text("{}")
    return directory


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "weights.json"


def test_digest_follows_the_numbers_and_the_config_alone(checkpoint: Path, cache: Path) -> None:
    first = weights_digest(checkpoint, cache_file=cache)
    (checkpoint / "generation_config.json").write_text('{"temperature": 0.5}')
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "consolidated.safetensors").write_bytes(b"the same again")
    assert weights_digest(checkpoint, cache_file=cache) == first

    (checkpoint / "config.json").write_text('{"model_type": "qwen3"}')
    second = weights_digest(checkpoint, cache_file=cache)
    save_file({"w2": np.arange(8, dtype=np.float32)[::-1].copy()}, checkpoint / "model-00002.safetensors")
    third = weights_digest(checkpoint, cache_file=cache)
    (checkpoint / "model-00002.safetensors").rename(checkpoint / "model-00003.safetensors")
    fourth = weights_digest(checkpoint, cache_file=cache)
    assert len({first, second, third, fourth}) == 4


def test_a_copy_elsewhere_has_the_same_digest(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"  # as hub snapshots are: links to files of other names
    linked.mkdir()
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        blob = tmp_path / f"blob{number}"
        blob.write_bytes(file.read_bytes())
        (linked / file.name).symlink_to(blob)
    assert weights_digest(linked, cache_file=cache) == weights_digest(checkpoint, cache_file=cache)


def test_unchanged_files_are_not_read_again(checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weights_digest(checkpoint, cache_file=cache)
    read: list[str] = []
    original = weights._file_digest
    monkeypatch.setattr(weights, "_file_digest", lambda path: (read.append(path.name), original(path))[1])
    assert weights_digest(checkpoint, cache_file=cache) == first
    assert read == []
    stat = (checkpoint / "model-00001.safetensors").stat()
    os.utime(checkpoint / "model-00001.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert weights_digest(checkpoint, cache_file=cache) == first
    assert read == ["model-00001.safetensors"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"files": {"a": 1}}', '{"files": []}', '{"other": 1}'])
def test_a_corrupt_cache_is_ignored_and_replaced(checkpoint: Path, cache: Path, content: str) -> None:
    expected = weights_digest(checkpoint, cache_file=cache)
    cache.write_text(content)
    assert weights_digest(checkpoint, cache_file=cache) == expected
    assert len(json.loads(cache.read_text())["files"]) == 3
    assert [path.name for path in cache.parent.iterdir()] == ["weights.json"]


def test_an_unwritable_cache_costs_only_time(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way of a directory")
    blocked = tmp_path / "file" / "weights.json"
    assert weights_digest(checkpoint, cache_file=blocked) == weights_digest(checkpoint, cache_file=cache)


def test_files_that_are_gone_leave_the_cache(checkpoint: Path, cache: Path) -> None:
    weights_digest(checkpoint, cache_file=cache)
    (checkpoint / "model-00002.safetensors").unlink()
    (checkpoint / "config.json").write_text("{}")
    weights_digest(checkpoint, cache_file=cache)
    names = {Path(name).name for name in json.loads(cache.read_text())["files"]}
    assert names == {"config.json", "model-00001.safetensors"}


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_file() == tmp_path / "preceptor" / "weights.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_file() == tmp_path / ".cache" / "preceptor" / "weights.json"


def test_what_is_no_checkpoint_is_refused(checkpoint: Path, cache: Path) -> None:
    for file in checkpoint.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="has no weights"):
        weights_digest(checkpoint, cache_file=cache)
    (checkpoint / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        weights_digest(checkpoint, cache_file=cache)
