"""Structured logs: one JSON object a line, with the trace it belongs to. Secrets, ids of people and feature values are never logged."""

from __future__ import annotations

import logging
import sys
from typing import Any, Final

import structlog
from opentelemetry import trace
from structlog.tracebacks import ExceptionDictTransformer

from plait.errors import PlaitError
from plait.settings import TelemetrySettings

# structlog shows the local variables of every frame unless told otherwise: feature values and ids among them.
_TRACEBACK: Final = ExceptionDictTransformer(show_locals=False, max_frames=30)


def configure(settings: TelemetrySettings, service: str) -> None:
    """Send all logging of this process, ours and libraries', to stderr in the chosen form."""
    level = getattr(logging, settings.log_level.upper())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _with_service(service),
        _with_trace,
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    tail: list[structlog.typing.Processor] = (
        [structlog.processors.ExceptionRenderer(_TRACEBACK), structlog.processors.JSONRenderer()]
        if settings.log_format == "json"
        else [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)]
    )
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)


def level() -> str:
    """Return the least severe level this process logs: debug, info, warning or error."""
    return logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower()


def set_level(name: str) -> None:
    """Log from this level on, until the process ends or it is set again."""
    logging.getLogger().setLevel(name.upper())


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """Return the logger of one part, named like its module."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger


def without_words(error: BaseException) -> BaseException:
    """Return an exception of the same type, place and causes that says nothing, unless it is ours: a foreign one's words may hold an id,
    as a KeyError's do, or a value. For faults in code that works on requests and events."""
    return _silenced(error, {})


def _silenced(error: BaseException, seen: dict[int, BaseException]) -> BaseException:
    if id(error) in seen:
        return seen[id(error)]
    ours = isinstance(error, PlaitError)
    kind = type(type(error).__qualname__, (Exception,), {"__module__": type(error).__module__})
    silent: BaseException = kind(str(error) if ours else "(not told: it may hold an id or a value)")
    seen[id(error)] = silent
    silent.__traceback__ = error.__traceback__
    silent.__cause__ = None if error.__cause__ is None else _silenced(error.__cause__, seen)
    silent.__context__ = None if error.__context__ is None else _silenced(error.__context__, seen)
    silent.__suppress_context__ = error.__suppress_context__
    return silent


def _with_service(service: str) -> structlog.typing.Processor:
    def add(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event["service"] = service
        return event

    return add


def _with_trace(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = f"{context.trace_id:032x}"
        event["span_id"] = f"{context.span_id:016x}"
    return event
