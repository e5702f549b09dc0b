"""`plait features replay`: the events of the past into a new epoch of an aggregated view, and one flip at the end."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from plait.cli import progress
from plait.cli.author import author
from plait.cli.features.calling import (
    AddressOption,
    ApiKeyOption,
    CaOption,
    InsecureOption,
    ReasonOption,
    Target,
    TlsOption,
    VersionOption,
    ViewArgument,
    run,
    stub,
    target,
    tenant_of,
)
from plait.cli.options import DEFAULT_STATE, DsnOption, JsonOption, StateOption, registry_dsn
from plait.cli.output import write_json, write_line, write_note

if TYPE_CHECKING:
    from plait.cli.features.resuming import Progress
    from plait.registry.records import FeatureView
    from plait.registry.store import Store

_CALLS: Final = 4  # on their way at once
_EXPECTED_REFUSALS: Final = frozenset({"ENTITY_ERASED"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the command line asked for."""

    view: str
    file: Path
    version: int
    rate: float
    resume: bool
    flip: bool
    gap_ok: bool
    max_refused: int
    reason: str


@dataclass(slots=True)
class Outcome:
    """What became of it. `stream`: events that came out of the tenant's stream; `refused`: of the file, by reason."""

    view: str
    epoch: int = 0
    flipped: bool = False
    events: int = 0
    skipped: int = 0
    applied: int = 0
    unused: int = 0
    stream: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    newest_us: int = 0
    seconds: float = 0.0

    def add(self, numbers: list[int], answer: Any) -> None:
        """Count the answer for events with these numbers in the file."""
        self.events += len(numbers)
        self.applied += answer.applied
        self.unused += answer.unused
        for error in answer.errors:
            self.refused[error.reason] += 1
            self.first.setdefault(error.reason, numbers[error.row])


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(replay)


def replay(
    view: ViewArgument,
    file: Annotated[
        Path,
        typer.Option("--from", metavar="FILE", dir_okay=False, exists=True, help="Events: .parquet, or JSON lines.", show_default=False),
    ],
    rate: Annotated[float, typer.Option("--rate", min=0, help="Events a second at most; 0 = as fast as they are taken.")] = 0.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run of this file ended.")] = False,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Serve the new epoch at the end.")] = True,
    gap_ok: Annotated[
        bool, typer.Option("--gap-ok", help="Take the epoch as complete although events may lie between file and stream.")
    ] = False,
    max_refused: Annotated[int, typer.Option("--max-refused", min=0, help="Take it as complete although so many events were refused.")] = 0,
    version: VersionOption = 0,
    reason: ReasonOption = "",
    address: AddressOption = None,
    api_key: ApiKeyOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    insecure: InsecureOption = False,
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Count an aggregated view anew from a log of events, after its declaration changed or to give it a past.

    The events go to a new epoch beside the one that is served, and live ones to both. At the end what the tenant's stream still holds is
    replayed, too, so that nothing is missing between the log and now; then one flip. Each event counts once, whichever way it comes.

    Example:  plait features replay item-activity --from events.parquet
    """
    wanted = Wanted(
        view=view,
        file=file,
        version=version,
        rate=rate,
        resume=resume,
        flip=flip,
        gap_ok=gap_ok,
        max_refused=max_refused,
        reason=reason,
    )
    outcome = run(_replay(wanted, target(address, api_key, tls, ca, insecure, state), registry_dsn(dsn, state)))
    if as_json:
        write_json(dataclasses.asdict(outcome) | {"refused": dict(outcome.refused)})
    else:
        _tell(outcome)


async def _replay(wanted: Wanted, where: Target, dsn: str) -> Outcome:
    from plait.registry.store import Store  # noqa: PLC0415

    began = time.monotonic()
    async with await Store.open(dsn, max_connections=1) as store, stub(where) as service:
        view = await _view(store, wanted)
        outcome = await _Work(wanted, store, service, where, await tenant_of(store, where.api_key), view).run()
    outcome.seconds = time.monotonic() - began
    return outcome


async def _view(store: Store, wanted: Wanted) -> FeatureView:
    from plait.errors import FailedPrecondition, NotFound  # noqa: PLC0415
    from plait.registry.records import FeatureView  # noqa: PLC0415

    record = (await store.get("FeatureView", wanted.view)).record
    view = record.at(wanted.version) if isinstance(record, FeatureView) else None
    if view is None:
        raise NotFound(f"FeatureView {wanted.view} has no version {wanted.version} any more", reason="VIEW_VERSION_NOT_FOUND")
    if view.aggregation is None:
        message = f"the rows of {view.name} are not counted from events: fill it with 'plait features materialize'"
        raise FailedPrecondition(message, reason="VIEW_NOT_AGGREGATED")
    return view


class _Work:
    """One run of the command."""

    def __init__(self, wanted: Wanted, store: Store, service: Any, where: Target, tenant: str, view: FeatureView) -> None:
        self._wanted = wanted
        self._store = store
        self._service = service
        self._metadata = where.metadata
        self._tenant = tenant
        self._view = view
        self._outcome = Outcome(view=view.name)

    async def run(self) -> Outcome:
        """Begin an epoch, fill it from the file and the stream, and flip."""
        from plait.cli.features.flipping import Flip  # noqa: PLC0415
        from plait.cli.features.resuming import Progress  # noqa: PLC0415

        wanted, outcome = self._wanted, self._outcome
        at = await self._begin()
        outcome.epoch, outcome.skipped = at.epoch, at.row
        flip = Flip(self._store, self._service, self._metadata, self._tenant, self._view.name, self._view.version)
        if at.epoch == (await flip.epochs()).building:
            await self._fill_or_give_up(at)
            oldest_us = await self._replay_stream(at.epoch)
            self._check_refused(at)
            self._check_gap(oldest_us)
            await flip.complete(at.epoch, reason=wanted.reason)
            if not wanted.flip:
                return outcome
            await flip.flip(at.epoch, reason=wanted.reason)
        outcome.flipped = True
        Progress.forget(wanted.file)
        return outcome

    async def _begin(self) -> Progress:
        """Begin an epoch, or find the one that an earlier run of this file began."""
        from plait.cli.features.resuming import Progress  # noqa: PLC0415
        from plait.errors import FailedPrecondition  # noqa: PLC0415

        wanted, view, status = self._wanted, self._view, self._wanted.file.stat()
        fingerprint = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        known: dict[str, Any] = {"file": fingerprint, "tenant": self._tenant, "view": view.name, "version": view.version}
        if wanted.resume:
            found = Progress.read(wanted.file, **known)
            epochs = await self._store.epochs(self._tenant, view.name, version=view.version)
            if found.epoch not in (epochs.building, epochs.serving):
                message = f"epoch {found.epoch} is neither being built nor served any more: begin anew without --resume"
                raise FailedPrecondition(message, reason="RESUME_MISMATCH")
            return found
        epochs = await self._store.begin_epoch(self._tenant, view.name, version=view.version, actor=author(), reason=wanted.reason)
        begun = Progress(**known, epoch=epochs.newest)
        begun.write(wanted.file)
        return begun

    async def _fill_or_give_up(self, at: Progress) -> None:
        """Where nothing was taken at all, the epoch is given up: there is nothing to resume."""
        from plait.cli.features.resuming import Progress  # noqa: PLC0415
        from plait.errors import PlaitError  # noqa: PLC0415

        try:
            await self._fill(at)
        except PlaitError:
            if not (self._outcome.events or self._wanted.resume):
                await self._store.abandon_epoch(
                    self._tenant, self._view.name, version=self._view.version, actor=author(), reason="nothing was replayed"
                )
                Progress.forget(self._wanted.file)
            raise

    async def _fill(self, at: Progress) -> None:
        """Replay the rest of the file; note beside it what is done after each few calls."""
        from plait.cli.features.event_files import events_in  # noqa: PLC0415
        from plait.cli.features.parquet import Position  # noqa: PLC0415
        from plait.rpc.pace import Pace  # noqa: PLC0415

        pace = Pace(self._wanted.rate)
        with progress.rows(f"replaying into {self._view.name}", 0, at.row) as show:
            for calls in _several(self._numbered(events_in(self._wanted.file), at.row)):
                await pace.take(sum(map(len, calls)))
                answers = await asyncio.gather(*(self._ask(at.epoch, [event for _, event in call]) for call in calls))
                for call, answer in zip(calls, answers, strict=True):
                    self._outcome.add([number for number, _ in call], answer)
                done = at.row + self._outcome.events
                at.at(Position(0, done), Counter(at.refused) + self._outcome.refused).write(self._wanted.file)
                show(done, done)

    def _numbered(self, events: Iterator[tuple[int, Any]], skip: int) -> Iterator[tuple[int, Any]]:
        """Yield the events after the first few; note the newest time of all."""
        for at, (number, event) in enumerate(events):
            self._outcome.newest_us = max(self._outcome.newest_us, event.event_time.ToMicroseconds())
            if at >= skip:
                yield number, event

    async def _replay_stream(self, epoch: int) -> int:
        """Replay what the stream holds; return when its oldest event was appended, µs since the epoch, 0 = it holds none."""
        answer = await self._ask(epoch, [])
        oldest_us: int = answer.oldest_us
        while True:
            self._outcome.stream += answer.applied
            if not answer.cursor:
                return oldest_us
            answer = await self._ask(epoch, [], answer.cursor)

    async def _ask(self, epoch: int, events: list[Any], cursor: bytes = b"") -> Any:
        from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb  # noqa: PLC0415
        from plait.cli.features.uploading import patiently  # noqa: PLC0415

        request = pb.ReplayEventsRequest(
            feature_view=self._view.name, view_version=self._view.version, epoch=epoch, events=events, cursor=cursor
        )
        return await patiently(lambda asked: self._service.ReplayEvents(asked, metadata=self._metadata), request)

    def _check_refused(self, at: Progress) -> None:
        from plait.errors import FailedPrecondition  # noqa: PLC0415

        everything = Counter(at.refused) + self._outcome.refused  # of earlier runs, too
        refused = {reason: count for reason, count in everything.items() if reason not in _EXPECTED_REFUSALS}
        if sum(refused.values()) <= self._wanted.max_refused:
            return
        told = ", ".join(
            f"{count:,} {reason}" + (f" (first: {self._outcome.first[reason]:,})" if reason in self._outcome.first else "")
            for reason, count in sorted(refused.items())
        )
        raise FailedPrecondition(
            f"events were refused, so the epoch is not complete: {told}; take it all the same with --resume --max-refused "
            f"{sum(refused.values())}, or give it up with 'plait features abandon {self._view.name}'",
            reason="EVENTS_REFUSED",
        )

    def _check_gap(self, oldest_us: int) -> None:
        """Refuse where events may be in neither the file nor the stream."""
        from plait.errors import FailedPrecondition  # noqa: PLC0415

        if self._wanted.gap_ok or (oldest_us and oldest_us <= self._outcome.newest_us):
            return
        begins = f"begins at {_time(oldest_us)}" if oldest_us else "holds none"
        raise FailedPrecondition(
            f"the file's newest event is of {_time(self._outcome.newest_us)} and the stream {begins}: what was published between is in neither. "
            f"Give the epoch up ('plait features abandon {self._view.name}') and replay a newer log; or, where there was nothing between, go on "
            "with --resume --gap-ok",
            reason="REPLAY_GAP",
        )


def _several(events: Iterator[tuple[int, Any]]) -> Iterator[list[list[tuple[int, Any]]]]:
    """Yield as many calls as go at once."""
    from plait.cli.features.events import chunks  # noqa: PLC0415

    calls = chunks(events)
    while several := list(islice(calls, _CALLS)):
        yield several


def _time(micros: int) -> str:
    from datetime import UTC, datetime  # noqa: PLC0415

    return datetime.fromtimestamp(micros / 1e6, UTC).isoformat(timespec="seconds")


def _tell(outcome: Outcome) -> None:
    rate = outcome.events / outcome.seconds if outcome.seconds else 0.0
    write_line(
        f"{outcome.events:,} events in {outcome.seconds:,.1f} s ({rate:,.0f} events/s): {outcome.applied:,} applied, "
        f"{outcome.unused:,} of no use to the view; {outcome.stream:,} more were in the stream"
    )
    for reason, count in sorted(outcome.refused.items()):
        write_line(f"{count:,} refused: {reason}, the first is {outcome.first[reason]:,} of the file", "yellow")
    if not outcome.flipped:
        write_line(f"epoch {outcome.epoch} is complete and not served; serve it with: plait features flip {outcome.view}")
        return
    write_line(f"epoch {outcome.epoch} is served")
    write_note(f"the epoch before is kept and counted: 'plait features rollback {outcome.view}' goes back, 'retire' lets it go")
