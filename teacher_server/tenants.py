"""Who shares this server: each tenant's keys, as digests, and what it may take. From the configuration or from a file
that is read again when it changes; then a key that is no longer in it is refused from the next call on, its streams
end (stream.py), and so does its download of the head (service.py).

Owns neither the comparison of keys (auth.py) nor the queue (fair.py). A file that can't be read leaves those of before
in force, and the log says so.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from pathlib import Path

import structlog
import yaml
from pydantic import Field, ValidationError, field_validator

from teacher_api.settings import Section, UniqueKeys
from teacher_server.caller import DEFAULT_TENANT

log = structlog.get_logger("teacher_server.tenants")

CHECK_S = 1.0  # between two looks at the file
BURST_S = 1.0  # of a rate, where no burst is given
MAX_FILE_BYTES = 4 << 20
TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HASHED = re.compile(r"sha256:([0-9a-f]{64})")


class Tenant(Section):
    keys: tuple[str, ...] = ()
    """SHA-256 of each of its API keys, as sha256:… ; `teacher-key` makes both. Only the tenant called default, of
    `api_keys` and of everybody where there are no keys, may have none."""
    weight: float = Field(default=1.0, ge=1e-3, le=1e3)
    """Its share of the engine and of the queue, beside those of the others that want something."""
    tokens_per_s: float = Field(default=0.0, ge=0)
    """Most tokens that are computed for it, on average; 0: no limit of its own."""
    burst_tokens: int = Field(default=0, ge=0)
    """Tokens at once that the average allows; 0: those of a second."""
    admin: bool = False
    """Its callers may see what all tenants do."""

    @field_validator("keys")
    @classmethod
    def _hashed(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        if any(not HASHED.fullmatch(key) for key in keys):
            raise ValueError("a key that is not sha256: and 64 hexadecimal digits; expected what teacher-key prints")
        return keys

    @property
    def rate(self) -> tuple[float, float] | None:
        """Tokens per second, and at once."""
        if not self.tokens_per_s:
            return None
        return self.tokens_per_s, float(self.burst_tokens or BURST_S * self.tokens_per_s)


class _File(Section):
    tenants: dict[str, Tenant]


def check_tenants(tenants: Mapping[str, Tenant]) -> None:
    """Raises ValueError, in one line, where they can't be told apart or can't call."""
    owners: dict[str, str] = {}
    for name, tenant in tenants.items():
        if not TENANT_NAME.fullmatch(name):
            raise ValueError(
                f"tenants: got the name {name[:64]!r}; expected 1 to 64 letters, digits, dots, dashes or underscores"
            )
        if not tenant.keys and name != DEFAULT_TENANT:
            raise ValueError(f"tenants.{name}.keys: none; expected one at least")
        if tenant.burst_tokens and not tenant.tokens_per_s:
            raise ValueError(f"tenants.{name}.burst_tokens has no meaning without tokens_per_s")
        for key in tenant.keys:
            if key in owners:
                raise ValueError(f"tenants.{name}.keys: one of them is also a key of {owners[key]}")
            owners[key] = name


def read_tenants(path: Path) -> dict[str, Tenant]:
    """Raises ValueError, in one line that repeats no key."""
    try:
        data = path.read_bytes()
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"{path}: {len(data)} bytes; expected at most {MAX_FILE_BYTES}")
        found = _File.model_validate(yaml.load(data, UniqueKeys)).tenants
        check_tenants(found)
    except OSError as error:
        raise ValueError(f"{path}: can't be read: {error.strerror or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = (
            "a name that is there twice" if "is there twice" in str(getattr(error, "problem", "")) else "not valid YAML"
        )
        raise ValueError(f"{path}: {what}{f' at line {mark.line + 1}' if mark else ''}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    except (
        IndexError,
        KeyError,
        AttributeError,
        TypeError,
    ):  # PyYAML's, of a tag with a value not of its type
        raise ValueError(f"{path}: not valid YAML: a value does not fit its tag") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{path}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None
    return found


class Tenants:
    """Those of now.

    Args:
        given: from the configuration.
        path: instead, the file that names them.

    Raises:
        ValueError: the file can't be read.
    """

    def __init__(self, given: Mapping[str, Tenant], path: Path | None = None) -> None:
        self._path = path
        self._seen = self._mark()
        self._tenants = dict(given) if path is None else read_tenants(path)
        self._digests = _digests(self._tenants)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tenants)

    def of(self, name: str) -> Tenant:
        """What `name` may take; of one that is not configured, as of any."""
        return self._tenants.get(name) or Tenant()

    @property
    def digests(self) -> tuple[tuple[bytes, str, bool], ...]:
        """Of each key: its SHA-256, its tenant, and whether that one is an admin."""
        return self._digests

    def weight_of(self, name: str) -> float:
        return self.of(name).weight

    def rate_of(self, name: str) -> tuple[float, float] | None:
        return self.of(name).rate

    async def watch(self) -> None:
        """Reads the file again whenever it has changed, until cancelled."""
        while self._path is not None:
            await asyncio.sleep(CHECK_S)
            await asyncio.to_thread(self.read_again)

    def read_again(self) -> None:
        """Looks at the file, and reads it where it is another than the one read last."""
        mark = self._mark()
        if self._path is None or mark == self._seen:
            return
        self._seen = mark
        try:
            found = read_tenants(self._path)
        except ValueError as error:
            log.error("tenants_not_read", reason=str(error), in_force=len(self._tenants))
            return
        self._tenants, self._digests = found, _digests(found)
        log.info("tenants_read", tenants=len(found))

    def _mark(self) -> object:
        """What changes when the file does; a mounted secret is changed by another link."""
        if self._path is None:
            return None
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


def _digests(tenants: Mapping[str, Tenant]) -> tuple[tuple[bytes, str, bool], ...]:
    return tuple(
        (bytes.fromhex(key.removeprefix("sha256:")), name, tenant.admin)
        for name, tenant in tenants.items()
        for key in tenant.keys
    )
