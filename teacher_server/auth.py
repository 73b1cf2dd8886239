"""Who may call, and as which tenant: a bearer key compared in constant time. One object for both transports; keys are
never logged."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from teacher_api.errors import Unauthenticated
from teacher_server.caller import Caller
from teacher_server.config import ServerConfig

SCHEME = "bearer "


class KeyRing:
    """Holds digests, not keys, so that the time of a comparison tells nothing of a key's length either."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def of(cls, config: ServerConfig) -> KeyRing:
        """Of all who may call; without `api_keys` everybody may."""
        keys = (*config.api_keys, *config.head_keys) if config.api_keys else ()
        return cls([key.get_secret_value() for key in keys])

    def check(self, authorization: str | None) -> Caller:
        """Whose `authorization` is: `Bearer <one of the keys>`. Without keys, everybody's. Raises Unauthenticated."""
        if not self._digests:
            return Caller(is_admin=True)  # there is nobody else to see
        sent = authorization or ""
        key = sent[len(SCHEME) :].strip() if sent[: len(SCHEME)].lower() == SCHEME else ""
        digest = hashlib.sha256(key.encode()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, whichever matches
        if not key or not any(matches):
            what = "the key is not known here" if key else "no key was sent"
            raise Unauthenticated(f"{what}; expected the header `authorization: Bearer <key>`", field="authorization")
        return Caller()
