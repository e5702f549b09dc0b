"""What callers may see and, where settings allow, change of a running worker's logs and traces, in the terms of Triton's extensions.

https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_logging.md
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_trace.md
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, Final

from model_worker.settings import ProtocolSettings
from plait.errors import FailedPrecondition, InvalidArgument, PermissionDenied, Unimplemented, Violation
from plait.telemetry import logging
from plait.telemetry.logging import get_logger
from plait.telemetry.tracing import Tracing

log = get_logger(__name__)

_VERBOSE: Final = "log_verbose_level"
_LOG_FLAGS: Final = ("log_error", "log_warning", "log_info")  # by falling severity
_AS_DOCUMENTED: Final = MappingProxyType({"log_errors": "log_error", "log_warnings": "log_warning"})  # Triton's page differs from its code
_LEVELS: Final = ("error", "warning", "info", "debug")
_MAX_RATE: Final = 1_000_000_000


class Controls:
    """Shows and changes the process's log level and the share of traces it records."""

    def __init__(self, settings: ProtocolSettings, tracing: Tracing) -> None:
        self._settings = settings
        self._tracing = tracing
        self._first_ratio = tracing.ratio

    def logs(self, request: Any, response: Any) -> None:
        """Answer LogSettings. Raises PermissionDenied (LOG_CONTROL_OFF), InvalidArgument."""
        if request.settings:
            if not self._settings.log_control:
                raise _off("the log's settings", "log_control", "LOG_CONTROL_OFF")
            level = _wanted_level(request.settings)
            logging.set_level(level)
            log.warning("the log level was changed by a call", level=level)
        at = _LEVELS.index(logging.level())
        for i, name in enumerate(_LOG_FLAGS):
            response.settings[name].bool_param = i <= at
        response.settings[_VERBOSE].uint32_param = int(at == len(_LOG_FLAGS))

    def traces(self, request: Any, response: Any, known: Callable[[str], object]) -> None:
        """Answer TraceSetting; `known` raises NotFound for a model there is not.

        Raises PermissionDenied (TRACE_CONTROL_OFF), FailedPrecondition (TRACING_OFF), Unimplemented, InvalidArgument.
        """
        if request.model_name:
            known(request.model_name)
        if request.settings:
            self._change_traces(request)
        ratio = self._tracing.ratio
        response.settings["trace_mode"].value.append("opentelemetry")
        response.settings["trace_level"].value.append("TIMESTAMPS" if ratio > 0 else "OFF")
        response.settings["trace_rate"].value.append(str(round(1 / ratio) if ratio > 0 else 0))

    def _change_traces(self, request: Any) -> None:
        if not self._settings.trace_control:
            raise _off("the settings of traces", "trace_control", "TRACE_CONTROL_OFF")
        if request.model_name:
            raise Unimplemented("traces are sampled alike for every model: leave model_name empty")
        ratio = _wanted_ratio(request.settings, self._tracing.ratio, self._first_ratio)
        if not self._tracing.enabled:
            raise FailedPrecondition(
                "this process exports no traces: start it with telemetry.trace_exporter set to otlp or console", reason="TRACING_OFF"
            )
        self._tracing.ratio = ratio
        log.warning("the share of recorded traces was changed by a call", ratio=ratio)


def _wanted_level(settings: Any) -> str:
    """Return the level that the given settings mean on top of the present one. Raises InvalidArgument with every violation."""
    at = _LEVELS.index(logging.level())
    flags = {name: i <= at for i, name in enumerate(_LOG_FLAGS)}
    verbose = at == len(_LOG_FLAGS)
    problems = []
    for given in sorted(settings):
        value, name = settings[given], _AS_DOCUMENTED.get(given, given)
        kind = value.WhichOneof("parameter_choice")
        if name in flags and kind == "bool_param":
            flags[name] = value.bool_param
        elif name == _VERBOSE and kind == "uint32_param":
            verbose = value.uint32_param > 0
        else:
            problems.append(_unknown(given, f"expected {', '.join(_LOG_FLAGS)} as bool_param or {_VERBOSE} as uint32_param"))
    if not flags["log_error"]:
        problems.append(_unknown("log_error", "errors are always logged"))
    _refuse(problems, "the log's settings")
    if verbose:
        return "debug"
    return next((level for level, name in (("info", "log_info"), ("warning", "log_warning")) if flags[name]), "error")


def _wanted_ratio(settings: Any, ratio: float, first_ratio: float) -> float:
    """Return the share of traces that the given settings mean; one without a value is set back to `first_ratio`. Raises InvalidArgument
    with every violation."""
    problems = []
    level = ""
    for name in sorted(settings):
        values = list(settings[name].value)
        if name in ("trace_rate", "trace_level") and not values:
            ratio = first_ratio
        elif name == "trace_rate" and len(values) == 1 and _is_rate(values[0]):
            ratio = 1 / int(values[0])
        elif name == "trace_level" and values in (["OFF"], ["TIMESTAMPS"]):
            level = values[0]
        elif name != "trace_mode" or values != ["opentelemetry"]:
            problems.append(_unknown(name, f"expected trace_rate (1 to {_MAX_RATE}: one in so many) or trace_level (TIMESTAMPS or OFF)"))
    _refuse(problems, "the settings of traces")
    if level == "OFF":
        return 0.0
    return ratio or (1.0 if level else 0.0)


def _is_rate(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= len(str(_MAX_RATE)) and 1 <= int(text) <= _MAX_RATE


def _unknown(name: str, expected: str) -> Violation:
    return Violation(f"settings[{name[:40]}]", expected)


def _refuse(problems: list[Violation], what: str) -> None:
    if problems:
        raise InvalidArgument(f"{what} were not changed: {problems[0].field}: {problems[0].description}", violations=problems[:10])


def _off(what: str, setting: str, reason: str) -> PermissionDenied:
    return PermissionDenied(f"changing {what} by call is switched off (setting protocol.{setting})", reason=reason)
