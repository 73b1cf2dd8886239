"""Where the server's log lines go: stderr, for people on a terminal, JSON lines elsewhere, those of libraries and of
vLLM's processes too. `configure` is called once, by app.py."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import Processor


class _Named(structlog.PrintLogger):
    """Knows what it was asked for as, for `logger` in its lines."""

    def __init__(self, file: TextIO, name: str = "") -> None:
        super().__init__(file)
        self.name = name


SHARED: tuple[Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
)
"""What every line gets, in either form."""
Form = Literal["auto", "console", "json"]


def is_json(form: Form) -> bool:
    return form == "json" or (form == "auto" and not sys.stderr.isatty())


def configure(form: Form, level: str) -> None:
    number, stream = getattr(logging, level.upper()), sys.stderr
    render: Processor
    shared = list(SHARED)
    if is_json(form):
        shared.append(structlog.processors.format_exc_info)
        render = structlog.processors.JSONRenderer()
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read by huggingface_hub as it is imported
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


def json_lines() -> logging.Formatter:
    """For a process that logs by the standard library alone, such as vLLM's: vllm_logging.json names it."""
    kept = structlog.stdlib.ExtraAdder(allow=["vllm_process_name"])
    return structlog.stdlib.ProcessorFormatter(
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.JSONRenderer()],
        foreign_pre_chain=[*SHARED, kept, structlog.processors.format_exc_info],
    )


def vllm_in_json() -> None:
    """Makes vLLM, in this process and those that it starts, write JSON lines; where the environment says how it is to
    log, that holds."""
    own = {"VLLM_LOGGING_CONFIG_PATH", "VLLM_CONFIGURE_LOGGING"} & set(os.environ)
    if not own and os.environ.get("VLLM_LOGGING_LEVEL", "WARNING") == "WARNING":
        os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(Path(__file__).with_name("vllm_logging.json"))
