"""The command `teacher-key`: makes an API key and what the server is told of it."""

from __future__ import annotations

import argparse
import hashlib
import secrets
import sys
from collections.abc import Sequence

KEY_BYTES = 32  # of chance: a digest of them can't be turned back by trying


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="teacher-key",
        description="Prints a new API key on its first line, for the caller, and its digest on the second, for `keys` "
        "in the server's tenants. The key is kept nowhere.",
    )
    parser.add_argument("--stdin", action="store_true", help="print the digest of the key on the first line of stdin")
    if parser.parse_args(argv).stdin:
        key = sys.stdin.readline().strip()
        if len(key) < KEY_BYTES:
            print(f"teacher-key: error: {len(key)} characters; expected {KEY_BYTES} or more", file=sys.stderr)
            return 2
    else:
        key = f"pk_{secrets.token_urlsafe(KEY_BYTES)}"
        print(key)
    print(f"sha256:{hashlib.sha256(key.encode()).hexdigest()}")
    return 0
