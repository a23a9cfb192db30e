"""Log lines: a fixed message with structured fields, to standard error, for people or for machines."""

import logging
import sys
import time
from enum import StrEnum

import structlog


class LogFormat(StrEnum):
    """How a log line looks."""

    AUTO = "auto"
    """`console` on a terminal, else `json`."""
    JSON = "json"
    CONSOLE = "console"


def configure_logs(log_format: LogFormat, level: str = "info") -> None:
    """Send everything that is logged, by us and by libraries, to standard error in one format."""
    terminal = sys.stderr.isatty()
    if log_format is LogFormat.AUTO:
        log_format = LogFormat.CONSOLE if terminal else LogFormat.JSON
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,  # such as which worker it is
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[structlog.types.Processor]
    if log_format is LogFormat.JSON:
        # Without the variables of the frames, among which are payloads.
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        last = [structlog.processors.ExceptionRenderer(tracebacks), structlog.processors.JSONRenderer()]
    else:
        last = [structlog.dev.ConsoleRenderer(colors=terminal, exception_formatter=structlog.dev.plain_traceback)]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("collab_service").setLevel(level.upper())


class LineBudget:
    """Bounds the lines that tell of what may happen by the thousand; each tells how many it stands for."""

    def __init__(self, lines: int) -> None:
        """Let at most so many lines a second through."""
        self._lines = lines
        self._left = lines
        self._second = 0
        self._untold = 0

    def take(self) -> int:
        """Count one more; return how many the line to be written tells of, or 0 when none is to be written now."""
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._left = second, self._lines
        self._untold += 1
        if not self._left:
            return 0
        self._left -= 1
        untold, self._untold = self._untold, 0
        return untold
