"""From what a user names as a teacher to transports: URLs, the addresses behind a name, and the transport for a scheme.
Knows no teacher; which of several is asked is replicas.py's.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from teacher_api import openai_info
from teacher_api.compression import Compression, check_available
from teacher_api.openai_info import OpenAIOptions
from teacher_api.tls import NO_TLS, ClientTls

if TYPE_CHECKING:
    from teacher_api.transport import Transport

SCHEMES = ("grpc", "grpcs", "http", "https")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server: a URL, and of a name with several addresses the one that is meant."""

    url: str
    address: str = ""

    def __str__(self) -> str:
        return f"{self.url} ({self.address})" if self.address else self.url


def urls_of(url: str | Sequence[str]) -> tuple[str, ...]:
    """The URLs in `url`: one, several with commas between them, or a sequence of those.

    Raises:
        ValueError: there are none, one is there twice, or one of several is a stock server's.
    """
    parts = [url] if isinstance(url, str) else list(url)
    urls = tuple(part.strip() for text in parts for part in text.split(",") if part.strip())
    if not urls:
        raise ValueError("no teacher URL; expected at least one")
    for one in urls:
        if urls.count(one) > 1:
            raise ValueError(f"teacher URL {one!r} is there twice; expected each replica once")
        if len(urls) > 1 and urlsplit(one).scheme in openai_info.SCHEMES:
            raise ValueError(
                f"teacher URL {one!r} is one of {len(urls)}; expected it alone: a stock server does not say which "
                "weights it has, so that nobody can tell whether several are the same teacher"
            )
    return urls


def check_key(api_key: str | None) -> None:
    """Raises ValueError, which does not repeat the key, where no header can hold it: read from a file with the end of
    its line, say."""
    if api_key and not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
        raise ValueError(
            "api_key holds white space at an end, or characters that a header can't hold; expected printable ASCII, "
            "without the end of a line"
        )


async def endpoints_of(url: str) -> list[Endpoint]:
    """The servers behind `url`: one for each address of its name where that has several of one family, otherwise one;
    none where the name can't be looked up now."""
    split = urlsplit(url)
    host = split.hostname or ""
    if split.scheme not in SCHEMES or not host or host == "localhost" or _is_address(host):
        return [Endpoint(url)]
    for family in (socket.AF_INET, socket.AF_INET6):  # of one family: a server has an address of each
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, None, family=family, type=socket.SOCK_STREAM)
        except OSError:
            continue
        addresses = sorted({str(sockaddr[0]) for *_, sockaddr in found})
        return [Endpoint(url, address) for address in addresses] if len(addresses) > 1 else [Endpoint(url)]
    return []


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def open_transport(
    endpoint: str | Endpoint,
    *,
    api_key: str | None,
    max_connections: int,
    stock: OpenAIOptions | None = None,
    compression: Compression = "none",
    tls: ClientTls = NO_TLS,
) -> Transport:
    """The transport for `grpc://host:port`, `grpcs://…`, `http://…`, `https://…` or, for a stock `vllm serve`,
    `openai+http://host:port/v1` or `openai+https://…`. Must run in an event loop.

    Raises:
        ValueError: the URL has another scheme or no host, or is in the clear beside files for TLS; options for a stock
            server and the URL of one of ours, or the other way round; `compression` is not installed; or no header can
            hold `api_key`.
    """
    check_available(compression)
    check_key(api_key)
    endpoint = Endpoint(endpoint) if isinstance(endpoint, str) else endpoint
    url, split = endpoint.url, urlsplit(endpoint.url)
    tls.check_url(url)
    if split.scheme in openai_info.SCHEMES:
        from teacher_api.transport_openai import OpenAITransport

        if compression != "none":
            raise ValueError(f"compression is {compression!r} with {url!r}; a stock server has none: expected 'none'")
        options = stock or OpenAIOptions()
        return OpenAITransport(url, api_key=api_key, max_connections=max_connections, options=options, tls=tls)
    if stock is not None:
        raise ValueError(f"teacher URL {url!r} with options for a stock server; expected {openai_info.EXPECTED_URL}")
    if split.scheme not in SCHEMES or not split.hostname:
        raise ValueError(
            f"teacher URL {url!r}: expected grpc://host:port, grpcs://…, http://… or https://…, or for a stock "
            f"vllm serve {openai_info.EXPECTED_URL}"
        )
    if split.scheme in ("grpc", "grpcs"):
        if split.port is None or split.path not in ("", "/"):
            raise ValueError(f"teacher URL {url!r}: expected {split.scheme}://host:port and nothing after it")
        from teacher_api.transport_grpc import GrpcTransport  # so that HTTP users need no grpc at work

        return GrpcTransport(
            split.netloc,
            secure=split.scheme == "grpcs",
            api_key=api_key,
            compression=compression,
            address=_joined(endpoint.address, split.port) if endpoint.address else "",
            tls=tls,
        )
    from teacher_api.transport_http import HttpTransport

    return HttpTransport(
        url,
        api_key=api_key,
        max_connections=max_connections,
        compression=compression,
        address=endpoint.address,
        tls=tls,
    )


def _joined(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
