"""One small reader per kind of source, each giving (where, record) pairs: `where` names the record in error messages,
record is a mapping. Owns no keys, templates or tokens (render.py)."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from student_trainer.data.config import DataConfig
from student_trainer.data.errors import DataError

Record = Mapping[str, Any]
Records = Iterator[tuple[str, Record]]

TEXT_KEY = "text"  # the field a line of a .txt file becomes


def read(config: DataConfig) -> Records:
    """The records of `config.source` in its own order.

    Raises:
        DataError: there is no such file, module, class or dataset; or its content can't be read.
    """
    source = config.source
    if not source:
        raise DataError(
            "data.source is not set; expected a file (.txt .jsonl .json .parquet .csv), a hub dataset id "
            "`org/name`, or `package.module:Class`"
        )
    reader = FILE_READERS.get(Path(source).suffix.lower())
    if reader is not None or ":" in source:
        _refuse_hub_options(config)
    if reader is not None:
        path = Path(source).expanduser()
        if not path.is_file():
            raise DataError(f"data.source {source}: no such file")
        return reader(path)
    if Path(source).expanduser().exists():
        raise DataError(f"data.source {source}: unknown kind of file; expected one of {', '.join(FILE_READERS)}")
    if ":" in source:
        return from_class(source)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return from_hub(source, config.subset, config.split)
    raise DataError(
        f"data.source {source}: no such file, and neither a hub dataset id `org/name` nor `package.module:Class`"
    )


def _refuse_hub_options(config: DataConfig) -> None:
    for name in ("split", "subset"):
        value, default = getattr(config, name), DataConfig.model_fields[name].default
        if value != default:
            raise DataError(
                f"data.{name}: got {value!r} with data.source {config.source}, expected none: only a dataset of the "
                f"hub (`org/name`) has a {name}"
            )


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # line ends as they are: quoted CSV fields may hold some
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def from_lines(path: Path) -> Records:
    """One prompt per line; empty lines are skipped."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        line = line.removesuffix("\r")
        if line.strip():
            yield f"{path}:{number}", {TEXT_KEY: line}


def from_jsonl(path: Path) -> Records:
    """One JSON object per line; empty lines are skipped."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _mapping(where, _parse_json(where, line))


def from_json(path: Path) -> Records:
    """A JSON array of objects, or an object with one field that holds such an array."""
    value = _parse_json(str(path), _text(path))
    if isinstance(value, dict):
        arrays = [name for name, field in value.items() if isinstance(field, list)]
        if len(arrays) != 1:
            raise DataError(f"{path}: expected an array of objects; got an object with fields {_names(value)}")
        value = value[arrays[0]]
    if not isinstance(value, list):
        raise DataError(f"{path}: expected an array of objects; got {type(value).__name__}")
    for index, item in enumerate(value):
        where = f"{path}[{index}]"
        yield where, _mapping(where, item)


def from_csv(path: Path) -> Records:
    """Comma-separated values with a header line; quoted fields may hold line ends."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise DataError(f"{path}:1: column {repeated[0]!r} is there twice")
        for row in reader:
            if not row:
                continue
            where = f"{path}:{reader.line_num}"
            if len(row) != len(header):
                raise DataError(f"{where}: {len(row)} fields; the header has {len(header)}")
            yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}") from None


def from_parquet(path: Path) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = 0
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for record in batch.to_pylist():
                yield f"{path}[{rows}]", record
                rows += 1
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file: {_first_line(error)}") from None


def from_hub(name: str, subset: str | None, split: str) -> Records:
    """A dataset of the hub, or of its local cache when offline."""
    import datasets

    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data.source {name} (subset {subset}, split {split}): {type(error).__name__}: {_first_line(error)}"
        ) from error
    for index, record in enumerate(rows):
        yield f"{name}[{index}]", record


def from_class(path: str) -> Records:
    """A user's own source: `package.module:Class`, called without arguments, gives mappings when iterated over."""
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:  # a console script's path starts in its own folder, not where the user stands
        sys.path.append(os.getcwd())
    try:
        factory: Callable[[], Iterable[Any]] = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise DataError(f"data.source {path}: {error}; is it on PYTHONPATH?") from None
    except AttributeError:
        raise DataError(f"data.source {path}: module {module_name} has no {attribute}") from None
    if not callable(factory):
        raise DataError(f"data.source {path}: expected a class or function; got {type(factory).__name__}")
    items = factory()
    if not isinstance(items, Iterable):
        raise DataError(f"data.source {path}: {type(items).__name__} is not iterable; expected an iterable of mappings")
    for index, item in enumerate(items):
        where = f"{path}[{index}]"
        yield where, _mapping(where, item)


FILE_READERS: dict[str, Callable[[Path], Records]] = {
    ".txt": from_lines,
    ".jsonl": from_jsonl,
    ".json": from_json,
    ".parquet": from_parquet,
    ".csv": from_csv,
}


def _parse_json(where: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(where, pairs))
    except json.JSONDecodeError as error:
        place = f" line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{where}: not JSON: {error.msg} at{place} column {error.colno}") from None


def _unique(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{where}: field {repeated!r} is there twice")
    return found


def _mapping(where: str, value: Any) -> Record:
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: expected an object with named fields; got {type(value).__name__}")
    return cast(Record, value)


def _names(record: Record) -> str:
    return ", ".join(map(str, record)) or "none"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
