"""TLS files: reading and checking them, for the server's side (teacher_server/tls.py) and for a client that has a
certificate of its own, or an authority that the system does not trust. Knows no transport."""

from __future__ import annotations

import argparse
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

SECURE_SCHEMES = ("grpcs", "https", "openai+https")


@dataclass(frozen=True, slots=True)
class ClientTls:
    """PEM files of a client. They are read when the client is made.

    Args:
        cert: the client's certificate, for a server that asks for one (its --tls-client-ca).
        key: the certificate's key, without a password.
        ca: authorities of which the server's certificate must be, in place of those that the system, or SSL_CERT_FILE
            and GRPC_DEFAULT_SSL_ROOTS_FILE_PATH, name.

    Raises:
        ValueError: one of cert and key without the other, a file can't be read, or does not fit; names tls_cert,
            tls_key or tls_ca.
    """

    cert: str = ""
    key: str = ""
    ca: str = ""

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            given, other = ("tls_cert", "tls_key") if self.cert else ("tls_key", "tls_cert")
            raise ValueError(f"{given} without {other}; expected both: a certificate and its key")
        for name in ("cert", "key", "ca"):
            self.pem(name)
        if self:
            self.apply(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def __bool__(self) -> bool:
        return bool(self.cert or self.ca)

    def pem(self, name: str) -> bytes | None:
        """What the file of `cert`, `key` or `ca` holds; None: there is none."""
        path: str = getattr(self, name)
        return read_file(f"tls_{name}", path) if path else None

    def apply(self, context: ssl.SSLContext) -> ssl.SSLContext:
        """Adds certificate and authorities to `context`."""
        if self.cert:
            load_pair(context, self.cert, self.key)
        if self.ca:
            load_authorities(context, "tls_ca", self.ca)
        return context

    def check_url(self, url: str) -> None:
        """Raises ValueError where `url` speaks in the clear and there are files for TLS."""
        if self and urlsplit(url).scheme not in SECURE_SCHEMES:
            given = "tls_cert" if self.cert else "tls_ca"
            raise ValueError(f"{given} with {url!r}, which is in the clear; expected grpcs:// or https://")


NO_TLS = ClientTls()
"""Of a client without a certificate, which trusts what the system trusts."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tls-cert", default="", metavar="FILE", help="own certificate (PEM), for a server with mTLS")
    parser.add_argument("--tls-key", default="", metavar="FILE", help="its key")
    parser.add_argument("--tls-ca", default="", metavar="FILE", help="authority of the server (default: the system's)")


def of_arguments(args: argparse.Namespace) -> ClientTls:
    """Raises ValueError as ClientTls does."""
    return ClientTls(args.tls_cert, args.tls_key, args.tls_ca)


def read_file(name: str, path: str) -> bytes:
    """Raises ValueError of one line that names the option `name`."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{name} {path!r}: {error.strerror or error}") from None


def load_pair(context: ssl.SSLContext, cert: str, key: str) -> None:
    """Raises ValueError unless they are a certificate and its own key."""
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise ValueError(
            f"tls_cert {cert!r} and tls_key {key!r}: expected a PEM certificate and its own key without a password "
            f"({error})"
        ) from None


def load_authorities(context: ssl.SSLContext, name: str, path: str) -> None:
    """Raises ValueError, which names the option `name`, unless the file holds certificates."""
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise ValueError(f"{name} {path!r}: expected PEM certificates ({error})") from None


def _no_password() -> str:
    raise ValueError("the key has a password")
