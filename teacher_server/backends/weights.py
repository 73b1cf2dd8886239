"""Digest of a checkpoint's weights: which numbers this teacher computes with.

Owns the digest of a local Hugging Face directory, or of a LoRA adapter's, and the small cache that spares a start from
reading 64 GB again.
The cache is an accelerator only: missing, corrupt or unwritable, it changes no digest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

_DIGEST = "blake2b-256"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_READERS = 4  # hashing releases the GIL; more readers than this no longer help one disk

_Stamp = list[int]  # [size, mtime_ns, ctime_ns, inode]
_Cache = dict[str, tuple[_Stamp, str]]  # resolved path -> (stamp, hex digest)


def weights_digest(directory: Path, *, cache_file: Path | None = None) -> str:
    """Hex digest over the names and contents of the weight files and config.json of a checkpoint directory.

    Weight files are the safetensors (pytorch_model*.bin where there are none). Tokenizer and generation settings have
    no part in it. A file's digest is cached under its resolved path, size and times.

    Args:
        cache_file: the cache; the user's cache directory by default.

    Raises:
        ValueError: the directory has no config.json or no weights.
    """
    return _digest_of(_weight_files(directory), cache_file)


def adapter_digest(directory: Path, *, cache_file: Path | None = None) -> str:
    """As `weights_digest`, over what makes a LoRA adapter: adapter_config.json and adapter_model.safetensors."""
    return _digest_of([directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS], cache_file)


def adapted_digest(base: str, adapter: str) -> str:
    """Digest of the weights that an adapter on a base makes, from the digests of the two."""
    return f"{_DIGEST}:{hashlib.blake2b(f'{base}+{adapter}'.encode(), digest_size=32).hexdigest()}"


def _digest_of(files: list[Path], cache_file: Path | None) -> str:
    cache_file = default_cache_file() if cache_file is None else cache_file
    cache = _read_cache(cache_file)
    resolved = [path.resolve() for path in files]
    stamps = [_stamp(path) for path in resolved]
    unknown = [i for i, path in enumerate(resolved) if cache.get(str(path), (None, ""))[0] != stamps[i]]
    with ThreadPoolExecutor(_READERS) as pool:
        digests = list(pool.map(_file_digest, [resolved[i] for i in unknown]))
    cache |= {str(resolved[i]): (stamps[i], digest) for i, digest in zip(unknown, digests, strict=True)}
    if unknown:
        _write_cache(cache_file, cache)
    total = hashlib.blake2b(digest_size=32)
    for path, real in zip(files, resolved, strict=True):
        total.update(f"{path.name}\0{cache[str(real)][1]}\n".encode())
    return f"{_DIGEST}:{total.hexdigest()}"


def default_cache_file() -> Path:
    """`preceptor/weights.json` under XDG_CACHE_HOME, which defaults to ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "preceptor" / "weights.json"


def _weight_files(directory: Path) -> list[Path]:
    config = directory / "config.json"
    if not config.is_file():
        raise ValueError(f"{directory} has no config.json; expected a Hugging Face checkpoint directory")
    # Some repositories carry a second copy of the weights in the publisher's own format; it is never loaded.
    weights = [path for path in sorted(directory.glob("*.safetensors")) if not path.name.startswith("consolidated")]
    weights = weights or sorted(directory.glob("pytorch_model*.bin"))
    if not weights:
        raise ValueError(f"{directory} has no weights; expected *.safetensors (or pytorch_model*.bin)")
    return [config, *weights]


def _stamp(path: Path) -> _Stamp:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _read_cache(path: Path) -> _Cache:
    """The cache without entries of files that are gone; empty if it can't be read or is not one of ours."""
    try:
        entries = json.loads(path.read_text("utf-8"))["files"]
        cache = {str(name): ([int(n) for n in stamp], str(digest)) for name, (stamp, digest) in entries.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("weights digest cache %s ignored: %s", path, error)
        return {}
    return {name: entry for name, entry in cache.items() if os.path.exists(name)}


def _write_cache(path: Path, cache: _Cache) -> None:
    """Writes beside and renames, so that a reader sees the old cache or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name) as scratch:
            written = Path(scratch) / path.name
            written.write_text(json.dumps({"files": cache}), "utf-8")
            os.replace(written, path)
    except OSError as error:
        logger.warning("weights digest cache %s not written: %s", path, error)
