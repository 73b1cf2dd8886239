"""Where the server's log lines go: stderr, for people on a terminal, JSON lines elsewhere, those of libraries too.
Called once, by app.py."""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import Processor


class _Named(structlog.PrintLogger):
    """Knows what it was asked for as, for `logger` in its lines."""

    def __init__(self, file: TextIO, name: str = "") -> None:
        super().__init__(file)
        self.name = name


def configure(form: Literal["auto", "console", "json"], level: str) -> None:
    if form == "auto":
        form = "console" if sys.stderr.isatty() else "json"
    number, stream = getattr(logging, level.upper()), sys.stderr
    render: Processor
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if form == "json":
        shared.append(structlog.processors.format_exc_info)
        render = structlog.processors.JSONRenderer()
    else:
        render = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())

    def named(*args: Any) -> _Named:
        return _Named(stream, *args)

    structlog.configure(
        processors=[*shared, render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=named,
        cache_logger_on_first_use=False,
    )
    lines = structlog.stdlib.ProcessorFormatter(
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, render], foreign_pre_chain=shared
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(lines)
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING))
