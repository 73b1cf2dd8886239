"""What the torch backend's tests open: tiny checkpoints made once, backends that are closed, a cache of their own.

Torch is imported when a test asks for one of them: most tests of this folder need none.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from teacher_server.backends.torch_backend import TorchBackend


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tinymodels import save_tiny

    @functools.cache
    def make(arch: str) -> Path:
        return save_tiny(tmp_path_factory.mktemp(arch) / "model", arch)

    return make


@pytest.fixture
def opened(own_cache: None) -> Iterator[Any]:
    """Makes loaded backends and closes them."""
    from teacher_server.backends.torch_backend import TorchBackend

    backends: list[TorchBackend] = []

    def make(model: Path | str, **settings: Any) -> TorchBackend:
        backend = TorchBackend(str(model), **{"threads": 1, **settings})
        backends.append(backend)
        backend.load()
        return backend

    yield make
    for backend in backends:
        asyncio.run(backend.close())
