"""The server's certificate, and whose certificates callers must have. Knows no transport: HTTP gets a context of the
standard library, gRPC the bytes of the same files."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from teacher_api.tls import load_authorities, load_pair, read_file
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
        certificate, key = (read_file(name, getattr(config, name)) for name in ("tls_cert", "tls_key"))
        client_ca = read_file("tls_client_ca", config.tls_client_ca) if config.tls_client_ca else b""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = SUITES_FROM
        context.set_alpn_protocols(["http/1.1"])
        load_pair(context, config.tls_cert, config.tls_key)
        if client_ca:
            load_authorities(context, "tls_client_ca", config.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return cls(certificate, key, client_ca, context)
