"""Who may call, and as which tenant: a bearer key compared in constant time. One object for both transports; keys are
never logged."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from teacher_api.errors import Unauthenticated
from teacher_server.caller import DEFAULT_TENANT, Caller
from teacher_server.config import ServerConfig
from teacher_server.tenants import Tenants

SCHEME = "bearer "


class KeyRing:
    """Holds digests, not keys, so that the time of a comparison tells nothing of a key's length either.

    Args:
        keys: those of the default tenant.
        tenants: who else has keys.
        is_open: everybody may call, and is the default tenant.
    """

    def __init__(self, keys: Sequence[str], tenants: Tenants | None = None, *, is_open: bool = False) -> None:
        self._own = tuple(hashlib.sha256(key.encode()).digest() for key in keys)
        self._tenants = tenants or Tenants({})
        self._open = is_open  # whatever becomes of the keys: a file that loses them opens nothing

    @classmethod
    def of(cls, config: ServerConfig, tenants: Tenants | None = None) -> KeyRing:
        """Of all who may call; where there are no keys everybody may."""
        keys = (*config.api_keys, *config.head_keys) if config.needs_key else ()
        return cls(
            [key.get_secret_value() for key in keys], tenants or tenants_of(config), is_open=not config.needs_key
        )

    def check(self, authorization: str | None) -> Caller:
        """Whose `authorization` is: `Bearer <one of the keys>`. Without keys, everybody's. Raises Unauthenticated."""
        if self._open:
            return Caller(is_admin=True)  # there is nobody else to see
        sent = authorization or ""
        key = sent[len(SCHEME) :].strip() if sent[: len(SCHEME)].lower() == SCHEME else ""
        digest = hashlib.sha256(key.encode()).digest()
        found: Caller | None = None
        is_own_admin = self._tenants.of(DEFAULT_TENANT).admin
        own = ((known, DEFAULT_TENANT, is_own_admin) for known in self._own)
        for known, tenant, is_admin in (*own, *self._tenants.digests):  # all of them, whichever matches
            if hmac.compare_digest(digest, known):
                found = Caller(tenant, is_admin=is_admin)
        if not key or found is None:
            what = "the key is not known here" if key else "no key was sent"
            raise Unauthenticated(f"{what}; expected the header `authorization: Bearer <key>`", field="authorization")
        return found


def tenants_of(config: ServerConfig) -> Tenants:
    """Raises ValueError, in one line, where the file that names them can't be read."""
    return Tenants(config.tenants, Path(config.tenants_file) if config.tenants_file else None)
