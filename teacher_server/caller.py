"""Who calls: the tenant that a key belongs to (auth.py), and what the call says of itself. Carried with each job from
the transports to the scheduler; knows neither keys nor queues.

Invariant: `tenant` is the key's, never the call's word; a call that names another tenant is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from teacher_api.errors import InvalidRequest, PermissionDenied
from teacher_api.types import CallMetadata
from teacher_api.wire import MAX_METADATA_CHARS

DEFAULT_TENANT = "default"
"""Of everybody where there are no keys, and of the keys that name no tenant."""
PRIORITIES = ("interactive", "bulk")
"""In the order in which a tenant's work is done."""
SAID = ("experiment", "run", "priority")
"""What a call says of itself; where it does not, what was said before holds."""
HEADERS = {name: f"preceptor-{name}" for name in ("tenant", "experiment", "run", "priority")}
"""HTTP headers and gRPC metadata by which a call says who it is for; the request's own `metadata` goes before them."""


@dataclass(frozen=True, slots=True)
class Caller:
    tenant: str = DEFAULT_TENANT
    experiment: str = ""
    run: str = ""
    is_admin: bool = False
    """May see what other tenants do."""
    priority: str = "bulk"
    """One of PRIORITIES: whether its own tenant's other work waits for it."""

    def named(self, metadata: CallMetadata) -> Caller:
        """This caller, in the experiment and run and with the priority that `metadata` names.

        Raises:
            InvalidRequest: a name is too long, or holds characters that can't be shown; or there is no such priority.
            PermissionDenied: it names another tenant.
        """
        for name in ("tenant", "experiment", "run"):
            value = getattr(metadata, name)
            if len(value) > MAX_METADATA_CHARS:
                raise InvalidRequest(f"longer than {MAX_METADATA_CHARS} characters", field=f"metadata.{name}")
            if not value.isprintable():
                raise InvalidRequest("holds characters that can't be shown; expected text", field=f"metadata.{name}")
        if metadata.tenant not in ("", self.tenant):
            raise PermissionDenied(
                f"the key is of another tenant than the call names; expected {self.tenant!r}, or none",
                field="metadata.tenant",
            )
        if metadata.priority not in ("", *PRIORITIES):
            raise InvalidRequest(
                f"got {metadata.priority!r:.40}; expected {' or '.join(PRIORITIES)}", field="metadata.priority"
            )
        said = {name: value for name in SAID if (value := getattr(metadata, name))}
        return replace(self, **said) if said else self

    def from_headers(self, headers: Mapping[str, str]) -> Caller:
        """As `named`, from headers or gRPC metadata with lower-case names."""
        return self.named(CallMetadata(**{name: headers.get(header, "") for name, header in HEADERS.items()}))


SERVER = Caller("(server)")
"""Whose the server's own checks are; no tenant can be called so."""
