"""Log and trace settings: shown to all, changed only where allowed, refused whole."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from model_worker.controls import Controls
from model_worker.settings import ProtocolSettings
from plait.api.inference.v2 import inference_pb2 as pb
from plait.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unimplemented
from plait.settings import TelemetrySettings
from plait.telemetry.tracing import Tracing, off


@pytest.fixture(autouse=True)
def _info() -> Iterator[None]:
    root = logging.getLogger()
    before = root.level
    root.setLevel("INFO")
    yield
    root.setLevel(before)


def controls(tracing: Tracing | None = None, *, allowed: bool = True) -> Controls:
    return Controls(ProtocolSettings(log_control=allowed, trace_control=allowed), tracing or off())


def logs(made: Controls, **settings: Any) -> dict[str, Any]:
    request, response = pb.LogSettingsRequest(), pb.LogSettingsResponse()
    for name, value in settings.items():
        kind = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
        setattr(request.settings[name], kind, value)
    made.logs(request, response)
    return {name: getattr(value, str(value.WhichOneof("parameter_choice"))) for name, value in response.settings.items()}


def traces(made: Controls, model: str = "", **settings: str) -> dict[str, list[str]]:
    request, response = pb.TraceSettingRequest(model_name=model), pb.TraceSettingResponse()
    for name, value in settings.items():
        request.settings[name].value.extend([value] if value else [])
    made.traces(request, response, _known)
    return {name: list(value.value) for name, value in response.settings.items()}


def _known(model: str) -> None:
    if model != "m":
        raise NotFound("Request for unknown model")


@pytest.mark.parametrize(
    ("settings", "level"),
    [
        ({}, "INFO"),
        ({"log_verbose_level": 1}, "DEBUG"),
        ({"log_info": False}, "WARNING"),
        ({"log_info": False, "log_warning": False}, "ERROR"),
        ({"log_warning": False, "log_verbose_level": 2}, "DEBUG"),
        ({"log_info": False, "log_warnings": False, "log_errors": True}, "ERROR"),
    ],
)
def test_the_log_level_follows_and_is_told(settings: dict[str, Any], level: str) -> None:
    at = ["ERROR", "WARNING", "INFO", "DEBUG"].index(level)
    expected = {"log_error": True, "log_warning": at >= 1, "log_info": at >= 2, "log_verbose_level": int(at == 3)}
    assert logs(controls(), **settings) == expected
    assert logging.getLogger().level == getattr(logging, level)
    assert logs(controls(allowed=False)) == expected


def test_the_way_back_from_verbose() -> None:
    made = controls()
    logs(made, log_verbose_level=1)
    assert logs(made, log_verbose_level=0) == {"log_error": True, "log_warning": True, "log_info": True, "log_verbose_level": 0}


@pytest.mark.parametrize("settings", [{"log_file": "x"}, {"log_info": 1}, {"log_verbose_level": True}, {"log_error": False}])
def test_log_settings_there_are_not_change_nothing(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as refused:
        logs(controls(), log_warning=False, **settings)
    assert [v.field for v in refused.value.violations] == [f"settings[{name}]" for name in settings]
    assert logging.getLogger().level == logging.INFO


def test_nothing_is_changed_where_that_is_switched_off() -> None:
    with pytest.raises(PermissionDenied) as refused:
        logs(controls(allowed=False), log_info=False)
    assert refused.value.reason == "LOG_CONTROL_OFF"
    with pytest.raises(PermissionDenied) as refused:
        traces(controls(allowed=False), trace_rate="1")
    assert refused.value.reason == "TRACE_CONTROL_OFF"


def test_the_share_of_traces_follows_and_is_told() -> None:
    exporter = InMemorySpanExporter()
    tracing = Tracing(TelemetrySettings(trace_sample_ratio=0), "worker", exporter)
    made = controls(tracing)
    assert traces(made) == {"trace_mode": ["opentelemetry"], "trace_level": ["OFF"], "trace_rate": ["0"]}
    with tracing.span("before"):
        pass
    assert traces(made, trace_level="TIMESTAMPS")["trace_rate"] == ["1"]
    with tracing.span("recorded"):
        pass
    assert traces(made, trace_rate="100") == {"trace_mode": ["opentelemetry"], "trace_level": ["TIMESTAMPS"], "trace_rate": ["100"]}
    assert tracing.ratio == pytest.approx(0.01)
    assert traces(made, trace_rate="5", trace_level="OFF")["trace_level"] == ["OFF"]
    with tracing.span("after"):
        pass
    tracing.close()
    assert [span.name for span in exporter.get_finished_spans()] == ["recorded"]


@pytest.mark.parametrize("cleared", ["trace_rate", "trace_level"])
def test_a_setting_without_a_value_is_as_it_was_when_the_process_started(cleared: str) -> None:
    tracing = Tracing(TelemetrySettings(trace_sample_ratio=0.5), "worker", InMemorySpanExporter())
    made = controls(tracing)
    assert traces(made, trace_rate="100")["trace_rate"] == ["100"]
    assert traces(made, **{cleared: ""})["trace_rate"] == ["2"]
    tracing.close()


@pytest.mark.parametrize(
    "settings", [{"trace_rate": "0"}, {"trace_rate": "٣"}, {"trace_rate": "1" * 99}, {"trace_level": "TENSORS"}, {"trace_file": "x"}]
)
def test_trace_settings_there_are_not_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument):
        traces(controls(), **settings)


def test_traces_are_changed_only_for_all_models_and_where_they_are_exported() -> None:
    with pytest.raises(NotFound):
        traces(controls(), model="other")
    assert traces(controls(), model="m")["trace_level"] == ["OFF"]
    with pytest.raises(Unimplemented):
        traces(controls(), model="m", trace_rate="1")
    with pytest.raises(FailedPrecondition) as refused:
        traces(controls(), trace_rate="1")
    assert refused.value.reason == "TRACING_OFF"
