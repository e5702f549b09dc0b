"""Logs are one JSON object a line, whoever writes them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Literal

import pytest
import structlog
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from plait.errors import NotFound
from plait.settings import TelemetrySettings
from plait.telemetry import logging as plait_logging
from plait.telemetry.tracing import Tracing


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, str]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_ours_and_foreign_loggers_speak_json(capsys: pytest.CaptureFixture[str]) -> None:
    plait_logging.configure(TelemetrySettings(), "shop")
    plait_logging.get_logger("shop.page").info("opened", rows=3)
    logging.getLogger("library").warning("old %s", "style")
    plait_logging.get_logger("shop.page").debug("not at this level")
    ours, theirs = lines(capsys)
    assert (ours["event"], ours["rows"], ours["service"], ours["logger"], ours["level"]) == ("opened", 3, "shop", "shop.page", "info")
    assert (theirs["event"], theirs["service"]) == ("old style", "shop")


def test_an_exception_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    plait_logging.configure(TelemetrySettings(), "shop")
    try:
        raise ValueError("boom")
    except ValueError:
        plait_logging.get_logger("x").exception("failed")
    [line] = lines(capsys)
    assert "boom" in json.dumps(line["exception"])


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_traceback_shows_no_values(capsys: pytest.CaptureFixture[str], log_format: Literal["json", "console"]) -> None:
    def look_up(person: str) -> None:
        raise ValueError(f"not found, {len(person)} letters")

    plait_logging.configure(TelemetrySettings(log_format=log_format), "shop")
    secret = "-".join(["canary", "person"])  # put together here, so that no line of source shows it
    try:
        look_up(secret)
    except ValueError:
        plait_logging.get_logger("x").exception("failed")
        logging.getLogger("library").exception("failed too")
    written = capsys.readouterr().err
    assert written.count("look_up") >= 2
    assert secret not in written


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_fault_is_logged_without_the_words_of_foreign_exceptions(
    capsys: pytest.CaptureFixture[str], log_format: Literal["json", "console"]
) -> None:
    def look_up(person: str) -> None:
        try:
            {"somebody": 1}[person]
        except KeyError as error:
            try:
                raise NotFound("there is no such person")
            except NotFound:
                raise ValueError(person) from error

    plait_logging.configure(TelemetrySettings(log_format=log_format), "shop")
    secret = "-".join(["canary", "person"])
    with pytest.raises(ValueError, match=secret) as caught:
        look_up(secret)
    caught.value.__cause__.__context__ = caught.value  # type: ignore[union-attr]  # a ring, as re-raising makes them
    plait_logging.get_logger("x").error("failed", exc_info=plait_logging.without_words(caught.value))
    written = capsys.readouterr().err
    assert "ValueError" in written
    assert "KeyError" in written
    assert "look_up" in written
    assert secret not in written
    plait_logging.get_logger("x").error("failed", exc_info=plait_logging.without_words(NotFound("there is no such person")))
    assert "there is no such person" in capsys.readouterr().err


def test_a_line_inside_a_span_names_its_trace(capsys: pytest.CaptureFixture[str]) -> None:
    plait_logging.configure(TelemetrySettings(), "shop")
    tracing = Tracing(TelemetrySettings(trace_sample_ratio=1), "shop", InMemorySpanExporter())
    with tracing.span("work") as span:
        plait_logging.get_logger("x").info("inside")
    tracing.close()
    [line] = lines(capsys)
    assert line["trace_id"] == f"{span.get_span_context().trace_id:032x}"


def test_the_level_can_be_changed_while_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    plait_logging.configure(TelemetrySettings(), "shop")
    log = plait_logging.get_logger("shop.page")
    log.debug("before")
    plait_logging.set_level("debug")
    log.debug("while")
    assert plait_logging.level() == "debug"
    plait_logging.set_level("error")
    log.warning("after")
    assert [line["event"] for line in lines(capsys)] == ["while"]
