"""The server's certificate, and whose certificates callers must have. Knows no transport: HTTP gets a context of the
standard library, gRPC the bytes of the same files."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from teacher_server.config import ServerConfig

SUITES_FROM = ssl.TLSVersion.TLSv1_2


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM. `client_ca` is empty where callers need no certificate."""

    certificate: bytes
    key: bytes
    client_ca: bytes
    context: ssl.SSLContext

    @classmethod
    def of(cls, config: ServerConfig) -> Tls | None:
        """None where the server speaks in the clear. Raises ValueError naming the option whose file is of no use."""
        if not config.tls_cert:
            return None
        certificate, key = (_read(config, name) for name in ("tls_cert", "tls_key"))
        client_ca = _read(config, "tls_client_ca") if config.tls_client_ca else b""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = SUITES_FROM
        context.set_alpn_protocols(["http/1.1"])
        try:
            context.load_cert_chain(config.tls_cert, config.tls_key, password=_no_password)
        except (ssl.SSLError, ValueError) as error:
            raise ValueError(
                f"tls_cert {config.tls_cert!r} and tls_key {config.tls_key!r}: expected a PEM certificate and its "
                f"own key without a password ({error})"
            ) from None
        if client_ca:
            try:
                context.load_verify_locations(config.tls_client_ca)
            except ssl.SSLError as error:
                raise ValueError(
                    f"tls_client_ca {config.tls_client_ca!r}: expected PEM certificates ({error})"
                ) from None
            context.verify_mode = ssl.CERT_REQUIRED
        return cls(certificate, key, client_ca, context)


def _no_password() -> str:
    raise ValueError("the key has a password")


def _read(config: ServerConfig, name: str) -> bytes:
    path = getattr(config, name)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{name} {path!r}: {error.strerror or error}") from None
