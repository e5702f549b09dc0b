"""`plait features publish`, `dead-letters list`, `dead-letters redrive` and `status`: events in, what became of them, and how fresh a view is."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from plait.cli.features.calling import (
    AddressOption,
    ApiKeyOption,
    CaOption,
    InsecureOption,
    Target,
    TlsOption,
    ViewArgument,
    run,
    stub,
    target,
)
from plait.cli.options import DEFAULT_STATE, JsonOption, StateOption
from plait.cli.output import write_json, write_line, write_table

if TYPE_CHECKING:
    from plait.api.events.v1.events_pb2 import Event

_CALL: Final = 1_000  # events of one call
_TIMEOUT_S: Final = 30.0
_BACKLOG_PATIENCE_S: Final = 60.0


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(publish)
    app.command()(status)
    letters = typer.Typer(name="dead-letters", help="Events that could not be applied: look at them, try them again.", no_args_is_help=True)
    letters.command("list")(list_letters)
    letters.command("redrive")(redrive)
    app.add_typer(letters)


def publish(
    source: Annotated[
        Path, typer.Option("--from", allow_dash=True, help="File with one event per line, as JSON; - reads the standard input.")
    ],
    address: AddressOption = None,
    api_key: ApiKeyOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    insecure: InsecureOption = False,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Append events, from which aggregated views are computed. Sending a file twice changes nothing: events are told apart by event_id.

    A line is an Event of plait.api.events.v1 in protobuf's JSON; type may be short, and subject and object {"TYPE": ID}:

      {"event_id": "7", "type": "view", "event_time": "2026-11-24T12:00:00Z", "subject": {"user": "42"}, "object": {"item": "9"}}

    Example:  plait features publish --from events.jsonl
    """
    accepted, refused = run(_publish(target(address, api_key, tls, ca, insecure, state), source))
    if as_json:
        write_json({"accepted": accepted, "refused": [{"line": line, "reason": reason, "message": text} for line, reason, text in refused]})
    else:
        write_line(f"{accepted} events are in the stream")
        if refused:
            write_table(("line", "reason", "what to do"), refused)
    if refused:
        raise typer.Exit(1)


def list_letters(
    reason: Annotated[str, typer.Option("--reason", help="Only those of this reason, for example VALUE_INVALID.")] = "",
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many at most, newest first.")] = 20,
    address: AddressOption = None,
    api_key: ApiKeyOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    insecure: InsecureOption = False,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Show events that could not be applied, newest first, and why; --json also shows each event. Needs an API key with the scope admin.

    Example:  plait features dead-letters list --reason VALUE_INVALID
    """
    letters, total = run(_letters(target(address, api_key, tls, ca, insecure, state), reason, limit))
    if as_json:
        write_json({"total": total, "dead_letters": [_letter(letter) for letter in letters]})
        return
    columns = ("id", "reason", "since", "redrives", "origin", "what to do")
    rows = [(each.id, each.reason, _time(each.dead_since.ToMicroseconds()), each.redrives, each.origin, each.message) for each in letters]
    write_table(columns, rows)
    write_line(f"{len(letters)} of {total}", "dim")


def redrive(
    ids: Annotated[list[str] | None, typer.Argument(help="Ids of dead letters; none: see --reason and --all.", show_default=False)] = None,
    reason: Annotated[str, typer.Option("--reason", help="All of this reason.")] = "",
    everything: Annotated[bool, typer.Option("--all", help="All there are.")] = False,
    address: AddressOption = None,
    api_key: ApiKeyOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    insecure: InsecureOption = False,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Append dead letters to the events again, once what was wrong is mended. An event counts once, however often it is redriven.

    Needs an API key with the scope admin.

    Example:  plait features dead-letters redrive --reason VALUE_INVALID
    """
    if sum((bool(ids), bool(reason), everything)) != 1:
        raise typer.BadParameter("give ids, or --reason, or --all")
    redriven = run(_redrive(target(address, api_key, tls, ca, insecure, state), ids or [], reason))
    if as_json:
        write_json({"redriven": redriven})
    else:
        write_line(f"{redriven} events were appended again")


def status(
    view: ViewArgument,
    address: AddressOption = None,
    api_key: ApiKeyOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    insecure: InsecureOption = False,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Show how fresh a view is: how many events wait, until when all were applied, the newest one, epochs and dead letters.

    Example:  plait features status item-activity
    """
    found = run(_status(target(address, api_key, tls, ca, insecure, state), view))
    if as_json:
        write_json(found)
    else:
        shown = {name: _time(value) if name.endswith("_us") else value for name, value in found.items()}
        write_table(("what", "value"), [(name.removesuffix("_us"), "-" if value is None else value) for name, value in shown.items()])


async def _publish(where: Target, source: Path) -> tuple[int, list[tuple[int, str, str]]]:
    """Append every event of a file; return how many, and those refused: line, reason, what to do."""
    from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb  # noqa: PLC0415

    accepted, refused = 0, []
    async with stub(where) as service:
        for lines in chunks(read_events(source)):
            answer = await _patiently(service, pb.PublishEventsRequest(events=[event for _, event in lines]), where)
            accepted += answer.accepted
            refused += [(lines[error.row][0], error.reason, error.message) for error in answer.errors]
    return accepted, refused


async def _patiently(service: Any, request: Any, where: Target) -> Any:
    """Publish; while the consumers are too far behind, wait for them."""
    import grpc  # noqa: PLC0415

    from plait.errors import from_rpc_error  # noqa: PLC0415

    give_up = time.monotonic() + _BACKLOG_PATIENCE_S
    while True:
        try:
            return await service.PublishEvents(request, metadata=where.metadata, timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as failed:
            error = from_rpc_error(failed)
            if error.reason != "EVENT_BACKLOG" or time.monotonic() > give_up:
                raise
            await asyncio.sleep(error.retry_after_s or 1.0)


async def _letters(where: Target, reason: str, limit: int) -> tuple[list[Any], int]:
    from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb  # noqa: PLC0415

    letters: list[Any] = []
    token, total = "", 0
    async with stub(where) as service:
        while len(letters) < limit:
            request = pb.ListDeadLettersRequest(page_size=min(1000, limit - len(letters)), page_token=token, reason=reason)
            answer = await service.ListDeadLetters(request, metadata=where.metadata, timeout=_TIMEOUT_S)
            letters += answer.dead_letters
            token, total = answer.next_page_token, answer.total
            if not token:
                break
    return letters, total


async def _redrive(where: Target, ids: list[str], reason: str) -> int:
    from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb  # noqa: PLC0415

    async with stub(where) as service:
        request = pb.RedriveDeadLettersRequest(ids=ids, reason=reason)
        answer = await service.RedriveDeadLetters(request, metadata=where.metadata, timeout=_TIMEOUT_S)
    return int(answer.redriven)


async def _status(where: Target, view: str) -> dict[str, Any]:
    from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb  # noqa: PLC0415

    async with stub(where) as service:
        found = await service.GetViewStatus(pb.GetViewStatusRequest(feature_view=view), metadata=where.metadata, timeout=_TIMEOUT_S)
    fields = {field.name: getattr(found, field.name) for field in found.DESCRIPTOR.fields}
    return fields | {name: None for name in ("building_epoch", "previous_epoch") if not found.HasField(name)}


class _TypeUnknown(ValueError):
    """An event has no type, or one that there is not; says which there are."""


def read_events(source: Path) -> Iterator[tuple[int, Event]]:
    """Yield line number and event of every line that is not empty. Raises InvalidArgument (EVENT_UNREADABLE) naming file and line."""
    from plait.errors import InvalidArgument  # noqa: PLC0415

    try:
        opened = sys.stdin if str(source) == "-" else source.open(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise typer.BadParameter(f"{source} cannot be read: {error.strerror}", param_hint="--from") from None
    with opened as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    line.encode()  # of bytes that are no UTF-8 this line is wrong, and named
                    yield number, event_of(json.loads(line))
                except _TypeUnknown as error:
                    raise InvalidArgument(f"{source}:{number}: an event's type is one of {error}", reason="EVENT_UNREADABLE") from error
                except (ValueError, TypeError, AttributeError) as error:
                    raise InvalidArgument(
                        f"{source}:{number}: this is not an event: see 'plait features publish --help' ({type(error).__name__})",
                        reason="EVENT_UNREADABLE",
                    ) from error


def event_of(document: dict[str, Any]) -> Event:
    """Return the event that a line says. Raises ValueError, TypeError, AttributeError for what is none."""
    from google.protobuf import json_format  # noqa: PLC0415

    from plait.api.events.v1 import events_pb2  # noqa: PLC0415

    kind = document.get("type")
    if isinstance(kind, str) and not kind.startswith("EVENT_TYPE_"):
        document["type"] = f"EVENT_TYPE_{kind.upper()}"
    known = list(events_pb2.EventType.keys())[1:]
    if not isinstance(kind, int) and document.get("type") not in known:  # a number is for the service to judge
        raise _TypeUnknown(", ".join(name.removeprefix("EVENT_TYPE_").lower() for name in known))
    for name in ("subject", "object"):
        about = document.get(name)
        if isinstance(about, dict) and len(about) == 1 and not {"entity_type", "entityType"} & about.keys():
            ((entity_type, entity_id),) = about.items()
            field = "int64_ids" if isinstance(entity_id, int) else "string_ids"
            document[name] = {"entity_type": entity_type, "ids": {field: [entity_id]}}
    try:
        return json_format.ParseDict(document, events_pb2.Event())
    except json_format.ParseError as error:
        raise ValueError(str(error)) from error


def chunks(events: Iterable[tuple[int, Event]]) -> Iterator[list[tuple[int, Event]]]:
    """Yield events as many at a time as one call takes."""
    chunk: list[tuple[int, Event]] = []
    for each in events:
        chunk.append(each)
        if len(chunk) == _CALL:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _letter(letter: Any) -> dict[str, Any]:
    """Return a dead letter as JSON types; `event` is None where its bytes are not one."""
    from google.protobuf import json_format  # noqa: PLC0415
    from google.protobuf.message import DecodeError  # noqa: PLC0415

    from plait.api.events.v1 import events_pb2  # noqa: PLC0415

    try:
        event = json_format.MessageToDict(events_pb2.Event.FromString(letter.payload), preserving_proto_field_name=True)
    except DecodeError:
        event = None
    return {
        "id": letter.id,
        "reason": letter.reason,
        "message": letter.message,
        "origin": letter.origin,
        "traceparent": letter.traceparent,
        "dead_since": letter.dead_since.ToJsonString(),
        "redrives": letter.redrives,
        "event": event,
        "payload": letter.payload.hex(),
    }


def _time(micros: int) -> str:
    return datetime.fromtimestamp(micros / 1e6, UTC).isoformat(timespec="milliseconds") if micros > 0 else "-"
