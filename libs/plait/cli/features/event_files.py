"""Logs of events as files: one event per line as JSON, or one per row of a Parquet file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from plait.cli.features.events import event_of, read_events
from plait.errors import InvalidArgument

if TYPE_CHECKING:
    from plait.api.events.v1.events_pb2 import Event

_NEEDED: Final = ("event_id", "type", "event_time")


def events_in(file: Path) -> Iterator[tuple[int, Event]]:
    """Yield number (a line from 1, a row from 0) and event of all that a file holds, whichever kind it is.

    Raises InvalidArgument (EVENT_UNREADABLE naming file and place, PARQUET_UNREADABLE).
    """
    if file.suffix != ".parquet":
        yield from read_events(file)
        return
    from plait.cli.features.parquet import records  # noqa: PLC0415

    for number, record in enumerate(records(file)):
        try:
            yield number, event_of(_document(record))
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise InvalidArgument(
                f"{file}: row {number} (from 0) is not an event: the columns are {', '.join(_NEEDED)}, subject_type, subject_id, object_type, "
                f"object_id, value, values ({type(error).__name__})",
                reason="EVENT_UNREADABLE",
            ) from error


def _document(record: dict[str, Any]) -> dict[str, Any]:
    """Return a row as the JSON of an event. `values` may be a map (pairs) or a struct; what is null is left out."""
    found: dict[str, Any] = {name: record[name] for name in _NEEDED}
    at = found["event_time"]
    if isinstance(at, int):
        at = datetime.fromtimestamp(at // 1_000_000, UTC).replace(microsecond=at % 1_000_000)
    found["event_time"] = at.astimezone(UTC).isoformat().replace("+00:00", "Z")
    for name in ("subject", "object"):
        if record.get(f"{name}_id") is not None:
            found[name] = {record[f"{name}_type"]: record[f"{name}_id"]}
    if record.get("value") is not None:
        found["value"] = _number(record["value"])
    values = dict(record.get("values") or {})
    found["values"] = {name: _number(value) for name, value in values.items() if value is not None}
    return found


def _number(value: float) -> float | str:
    """Return a number as protobuf's JSON has it: the service says what is wrong with one that is not finite."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
