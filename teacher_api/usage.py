"""The command `teacher-usage`: what experiments used of a teacher, from its `GET /v1/usage`."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode, urlsplit

from teacher_api.endpoints import check_key
from teacher_api.tls import NO_TLS, ClientTls, add_arguments, of_arguments

OK, WRONG, UNREACHABLE = 0, 1, 3
BY = ("experiment", "tenant", "day")
COLUMNS = {
    "day": "day",
    "tenant": "tenant",
    "experiment": "experiment",
    "sequences": "sequences",
    "computed_tokens": "computed",
    "cached_tokens": "cached",
    "refused_tokens": "refused",
    "engine_s": "engine s",
}
MAX_BYTES = 256 << 20


def fetch(
    url: str, *, by: str, since: str, key: str | None, timeout_s: float, tls: ClientTls = NO_TLS
) -> list[dict[str, Any]]:
    """The rows.

    Raises:
        ValueError: the URL or the key is none, the server refuses, or answers something else.
        OSError: it can't be reached.
    """
    split = urlsplit(url)
    if split.scheme not in ("http", "https") or not split.hostname:
        raise ValueError(f"{url!r}: expected http://host:port or https://…")
    tls.check_url(url)
    check_key(key)
    asked = f"{url.rstrip('/')}/v1/usage?{urlencode({'by': by, 'since': since})}"
    request = urllib.request.Request(asked, headers={"accept": "application/json"})
    if key:
        request.add_unredirected_header("authorization", f"Bearer {key}")  # it is for this server alone
    try:
        context = tls.apply(ssl.create_default_context(cafile=tls.ca or None)) if tls else None
        with urllib.request.urlopen(request, timeout=timeout_s, context=context) as answer:
            rows: list[dict[str, Any]] = json.loads(answer.read(MAX_BYTES))["rows"]
            return rows
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url}: {_reason(error)}") from None
    except OSError:  # a connection that ends without an answer is an HTTPException as well
        raise
    except http.client.InvalidURL as error:
        raise ValueError(f"{url!r}: {error}; expected http://host:port or https://…") from None
    except (http.client.HTTPException, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{url}: answers no usage; expected the HTTP address of a teacher-serve") from None


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        problem = json.loads(error.read(1 << 16))
        field = f"{problem['field']}: " if problem.get("field") else ""
        return f"{problem['kind']}: {field}{problem['detail']}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows under a line of names; of the texts, those on the left."""
    if not rows:
        return "nothing was used"
    names = [name for name in COLUMNS if name in rows[0]]
    cells = [[COLUMNS[name] for name in names], *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[n]) for line in cells) for n in range(len(names))]
    texts = {"day", "tenant", "experiment"}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in texts else cell.rjust(width)
            for cell, width, name in zip(line, widths, names, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value) or "(none)"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="teacher-usage", description=__doc__)
    parser.add_argument("url", help="http://host:port or https://… of the server")
    parser.add_argument("--by", choices=BY, default=BY[0], help="what is added up (default experiment)")
    parser.add_argument("--since", default="", metavar="DAY", help="first day, YYYY-MM-DD in UTC (default: all)")
    parser.add_argument("--api-key", help="better in the environment: TEACHER_API_KEY; an admin's shows all tenants")
    parser.add_argument("--timeout-s", type=float, default=10.0, help="of the call (default 10)")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    add_arguments(parser)
    args = parser.parse_args(argv)
    key = args.api_key or os.environ.get("TEACHER_API_KEY") or None
    try:
        tls = of_arguments(args)
        rows = fetch(args.url, by=args.by, since=args.since, key=key, timeout_s=args.timeout_s, tls=tls)
    except ValueError as error:
        print(f"teacher-usage: {error}", file=sys.stderr)
        return WRONG
    except OSError as error:
        print(f"teacher-usage: {args.url}: {getattr(error, 'reason', error)}", file=sys.stderr)
        return UNREACHABLE
    print(json.dumps(rows) if args.json else table(rows))
    return OK


if __name__ == "__main__":
    sys.exit(main())
