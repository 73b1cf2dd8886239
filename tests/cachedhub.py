"""A hub cache of tiny models and data sets under the names that people use, as the libraries leave it after a download:
commands that name hub ids run as they stand, offline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest


def cached_dataset(root: Path, name: str, subset: str, records: Sequence[Mapping[str, Any]]) -> None:
    """`name` (org/name), configuration `subset`, split train, in the cache of `datasets` at `root`."""
    rows = root / "rows.jsonl"
    root.mkdir(parents=True, exist_ok=True)
    rows.write_text("".join(json.dumps(record) + "\n" for record in records))
    datasets.load_dataset("json", data_files={"train": str(rows)}, cache_dir=str(root))
    (made,) = (p for p in (root / "json").glob("*/*/*") if p.is_dir())
    owner, short = name.split("/")
    short = datasets.naming.camelcase_to_snakecase(short)
    cached = root / f"{owner}___{short}" / subset / made.parent.name / made.name
    cached.parent.mkdir(parents=True)
    made.rename(cached)
    info = json.loads((cached / "dataset_info.json").read_text())
    (cached / "dataset_info.json").write_text(json.dumps({**info, "config_name": subset, "dataset_name": short}))
    (cached / "json-train.arrow").rename(cached / f"{short}-train.arrow")


def cached_model(root: Path, name: str, model: Path) -> None:
    """The directory `model` as `name` (org/name) in the cache of huggingface_hub at `root`."""
    folder = root / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / ("0" * 40)).symlink_to(model.resolve(), target_is_directory=True)


def use(patch: pytest.MonkeyPatch, *, models: Path | None = None, data: Path | None = None) -> None:
    """Both libraries look there, in this process, and never reach out."""
    for module in (datasets.config, huggingface_hub.constants):
        patch.setattr(module, "HF_HUB_OFFLINE", True)
    if models is not None:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(models))
    if data is not None:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", data)
