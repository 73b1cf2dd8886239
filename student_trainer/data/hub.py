"""Datasets of the Hugging Face hub: downloaded, streamed, or from the local cache alone. The one module that imports
`datasets`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from student_trainer.data.config import PromptConfig, SourceConfig
from student_trainer.data.errors import DataError, first_line

Records = Iterator[tuple[str, Mapping[str, Any]]]


def open_dataset(config: PromptConfig) -> Callable[[int], Records]:
    """Loads the dataset once, or opens it for streaming; what is returned reads its records from the n-th on.

    Raises:
        DataError: there is no such dataset, subset or split, it can't be reached, or, with `local_files_only`, it is
            not in the cache.
    """
    import datasets

    failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    named = f"data.source {config.source} (subset {config.subset}, split {config.split})"
    # What is in the cache is mapped from disk: as good as a stream, which the cache doesn't give.
    streams = isinstance(config, SourceConfig) and config.streaming and not config.local_files_only
    try:
        with _offline() if config.local_files_only else contextlib.nullcontext():
            rows = datasets.load_dataset(config.source, config.subset, split=config.split, streaming=streams)
    except failures as error:
        where = " in the local cache" if config.local_files_only else ""
        raise DataError(f"{named}{where}: {type(error).__name__}: {first_line(error)}") from error

    def records(start: int) -> Records:
        index = start
        try:
            for record in rows.skip(start) if start else rows:
                yield f"{config.source}[{index}]", record
                index += 1
        except failures as error:
            raise DataError(f"{named}, record {index}: {type(error).__name__}: {first_line(error)}") from error

    return records


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """As if HF_HUB_OFFLINE=1 had been set before the start: both libraries read it once, when they are imported."""
    import datasets
    import huggingface_hub

    places = ((datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE"))
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)
