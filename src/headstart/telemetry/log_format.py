"""The format of the server's log: lines for a terminal, or JSON objects."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.types import Processor

from headstart.config.settings import LogFormat


def configure_logging(level: str, log_format: LogFormat) -> None:
    """Writes all records of this process from `level` on to the standard error output. A record has the id of
    its request and the fields that it was logged with."""
    renderer: list[Processor] = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0)]
    if log_format == "json":
        renderer = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.contextvars.merge_contextvars,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.add_log_level,
                structlog.stdlib.ExtraAdder(),
                structlog.processors.TimeStamper(fmt="iso"),
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler])
