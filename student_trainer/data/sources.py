"""One small reader per kind of source, each giving (where, record) pairs: `where` names the record in error messages,
record is a mapping. Files are read as they are asked for, never whole (a .json array excepted). Owns no keys, templates
or tokens (render.py).
"""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from student_trainer.data import hub
from student_trainer.data.config import PromptConfig
from student_trainer.data.errors import DataError, first_line

Record = Mapping[str, Any]
Records = Iterator[tuple[str, Record]]
Opened = Callable[[int], Records]
"""The records of a source from the n-th on, counted from 0; as often as wanted."""

TEXT_KEY = "text"  # the field a line of a .txt file becomes
BOM = b"\xef\xbb\xbf"
LONGEST_CSV_FIELD = 2**31 - 1
"""Characters. The csv module's own limit of 131,072 would refuse long documents."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read(config: PromptConfig) -> Records:
    """The records of `config.source` in its own order; see `open_source`."""
    return open_source(config)(0)


def open_source(config: PromptConfig) -> Opened:
    """What reads the records of `config.source` in its own order.

    Raises:
        DataError: there is no such file, module, class or dataset, or it can't be read. Also raised while reading:
            content that can't be read.
    """
    try:
        return _opened(config)
    except OSError as error:  # of looking whether it is there
        raise unreadable("data.source", config.source, error) from None


def _opened(config: PromptConfig) -> Opened:
    source = config.source
    if not source:
        raise DataError(
            "data.source is not set; expected a file (.txt .jsonl .json .parquet .csv), a directory of them, a hub "
            "dataset id `org/name`, or `package.module:Class`"
        )
    path = Path(source).expanduser()
    reader = FILE_READERS.get(path.suffix.lower())
    if reader is not None or ":" in source or path.exists():
        _refuse_hub_options(config)
    if path.is_dir():
        return _limited(_in_order(_files_of(path)), config.limit)
    if reader is not None:
        if not path.is_file():
            raise DataError(f"data.source {source}: no such file")
        return _limited(_skipping(lambda: from_file(path, "data.source")), config.limit)
    if path.exists():
        raise DataError(f"data.source {source}: unknown kind of file; expected one of {', '.join(FILE_READERS)}")
    if ":" in source:
        return _limited(_skipping(lambda: from_class(source)), config.limit)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _limited(hub.open_dataset(config), config.limit)
    raise DataError(
        f"data.source {source}: no such file, and neither a hub dataset id `org/name` nor `package.module:Class`"
    )


def _limited(opened: Opened, limit: int | None) -> Opened:
    """Of the first `limit` records only."""
    if limit is None:
        return opened
    return lambda start: itertools.islice(opened(start), max(limit - start, 0))


def _skipping(fresh: Callable[[], Records]) -> Opened:
    """For sources that can only be read from their beginning."""
    return lambda start: itertools.islice(fresh(), start, None)


def _in_order(files: list[Path]) -> Opened:
    """One file after the other."""
    return _skipping(lambda: (pair for file in files for pair in from_file(file, "data.source")))


def _files_of(directory: Path) -> list[Path]:
    """The data files of a directory and of those below it, in the order of their paths."""
    files = sorted(f for f in directory.rglob("*") if f.suffix.lower() in FILE_READERS and f.is_file())
    kinds = sorted({file.suffix.lower() for file in files})
    if len(kinds) != 1:
        got = f"files of several kinds ({', '.join(kinds)})" if kinds else "none"
        raise DataError(f"data.source {directory}: {got}; expected files of one kind, of {', '.join(FILE_READERS)}")
    return files


def _refuse_hub_options(config: PromptConfig) -> None:
    for name in ("split", "subset", "local_files_only"):
        value, default = getattr(config, name), PromptConfig.model_fields[name].default
        if value != default:
            raise DataError(
                f"data.{name}: got {value!r} with data.source {config.source}, expected none: only a dataset of the "
                f"hub (`org/name`) has {'a cache' if name == 'local_files_only' else f'a {name}'}"
            )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 text, without their ends; only a line feed ends one."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = (line.removeprefix(BOM) if number == 1 else line).decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: not UTF-8 text: {error.reason} at byte {error.start} of the line"
                ) from None
            yield number, text.removesuffix("\n").removesuffix("\r")


def from_lines(path: Path) -> Records:
    """One prompt per line; empty lines are skipped."""
    for number, line in _lines(path):
        if line.strip():
            yield f"{path}:{number}", {TEXT_KEY: line}


def from_jsonl(path: Path) -> Records:
    """One JSON object per line; empty lines are skipped."""
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}:{number}"
            yield where, _mapping(where, _parse_json(where, line))


def from_json(path: Path) -> Records:
    """A JSON array of objects, or an object with one field that holds such an array."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    value = _parse_json(str(path), text)
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
    with path.open(encoding="utf-8-sig", newline="") as file:  # line ends as they are: quoted fields may hold some
        csv.field_size_limit(LONGEST_CSV_FIELD)  # of the process: there is none of a reader
        reader = csv.reader(file, strict=True)
        try:
            yield from _csv_rows(path, reader)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text after line {reader.line_num}: {error.reason}") from None


def _csv_rows(path: Path, reader: Any) -> Records:
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
        raise DataError(f"{path}: not a Parquet file: {first_line(error)}") from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the system's own, not of what is in the file
            raise
        raise DataError(f"{path}: a damaged Parquet file: {first_line(error)}") from None


def from_class(path: str) -> Records:
    """A user's own source: `package.module:Class`, called without arguments, gives mappings when iterated over."""
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:  # a console script's path starts in its own folder, not where the user stands
        sys.path.append(os.getcwd())
    try:
        factory: Callable[[], Iterable[Any]] = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise DataError(f"data.source {path}: {error}; is it on PYTHONPATH?") from None
    except ValueError as error:  # an empty name
        raise DataError(f"data.source {path}: {error}; expected package.module:Class") from None
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


def from_file(path: Path, key: str) -> Records:
    """The records of a file whose kind its name tells.

    Args:
        key: the option that names the file.
    Raises:
        DataError: content that can't be read, or the file itself: no permission, not there any more, a disk's error.
    """
    try:
        yield from FILE_READERS[path.suffix.lower()](path)
    except OSError as error:
        raise unreadable(key, path, error) from None


def unreadable(key: str, path: Path | str, error: OSError) -> DataError:
    """What to raise for a file that can't be read."""
    return DataError(f"{key} {path}: can't be read: {error.strerror or first_line(error)}")


def _parse_json(where: str, text: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _unique(where, pairs))
    except json.JSONDecodeError as error:
        place = f" line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(f"{where}: not JSON: {error.msg} at{place} column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{where}: JSON that is nested too deeply to be read") from None
    except DataError:
        raise
    except ValueError as error:  # a number with thousands of digits
        raise DataError(f"{where}: {first_line(error)}") from None
    if _SURROGATE.search(text):
        _require_whole_characters(where, value)
    return value


def _require_whole_characters(where: str, value: Any) -> None:
    """Half of a surrogate pair is an escape that JSON allows, but no text that a tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise DataError(f"{where}: the text has {half}, half of a character; expected both halves or none") from None


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
