"""The command `teacher-serve`: reads the configuration, then hands over to app.py. Imports nothing slow: the server
must answer its probes within a second of the process's start."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from teacher_api import settings
from teacher_server import app
from teacher_server.config import SHORTCUTS, ServerConfig

USAGE_ERROR = 2
DESCRIPTION = "Serves per-token log-probabilities of a teacher model over gRPC and HTTP."
SWITCHES = {"print-config": "print the configuration that would be used, and stop"}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 after a drain, 1 when the server can't start, 2 for a wrong configuration."""
    try:
        config, extras = settings.load(
            ServerConfig,
            list(sys.argv[1:] if argv is None else argv),
            prog="teacher-serve",
            description=DESCRIPTION,
            env_prefix="TEACHER_",
            shortcuts=SHORTCUTS,
            switches=SWITCHES,
            flat=True,
        )
    except settings.SettingsError as error:
        print(f"teacher-serve: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    if "print-config" in extras:
        print(settings.dump_yaml(config), end="")
        return 0
    if config.node_rank:
        from teacher_server import node

        node.run(config)
    return app.run(config)
