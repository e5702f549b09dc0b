"""`plait features materialize`: a Parquet file into a new epoch of a view, beside the one that is served, and one flip at the end."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

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
    from plait.cli.features.parquet import ParquetRows, Position
    from plait.cli.features.resuming import Progress
    from plait.cli.features.uploading import Totals
    from plait.registry.records import FeatureView
    from plait.registry.store import Store

_SAVED_EVERY_S: Final = 1.0
_EXPECTED_REFUSALS: Final = frozenset({"ENTITY_ERASED"})

RateOption = Annotated[float, typer.Option("--rate", min=0, help="Rows a second at most; 0 = as fast as they are taken.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the command line asked for."""

    view: str
    file: Path
    version: int
    epoch: Literal["new", "current"]
    rate: float
    resume: bool
    flip: bool
    max_refused: int
    names: dict[str, str]
    reason: str


@dataclass(slots=True)
class Outcome:
    """What became of it."""

    view: str
    version: int
    epoch: int | None
    flipped: bool
    totals: Totals
    skipped: int
    carried_over: int
    seconds: float

    def document(self) -> dict[str, Any]:
        """Return it as JSON types."""
        totals = dataclasses.asdict(self.totals)
        totals["refused"] = dict(self.totals.refused)
        rate = self.totals.rows / self.seconds if self.seconds else 0.0
        found = {name: getattr(self, name) for name in ("view", "version", "epoch", "flipped", "skipped", "carried_over", "seconds")}
        return found | totals | {"rows_per_s": rate}


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(materialize)


def materialize(
    view: ViewArgument,
    file: Annotated[Path, typer.Option("--from", metavar="FILE", dir_okay=False, help="Parquet file.", show_default=False)],
    epoch: Annotated[
        Literal["new", "current"], typer.Option("--epoch", help="new: replaces what is served by one flip; current: adds to it.")
    ] = "new",
    rate: RateOption = 0.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a run of this file ended.")] = False,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Serve the new epoch at the end.")] = True,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="NAME=COLUMN", help="The column of a feature, of id or of event_time; may be repeated.", show_default=False
        ),
    ] = None,
    max_refused: Annotated[
        int, typer.Option("--max-refused", min=0, help="Take the epoch as complete although so many rows were refused.")
    ] = 0,
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
    """Fill a feature view from a Parquet file, without anybody reading half of it.

    The rows go to a new epoch beside the one that is served; what is streamed meanwhile goes to both, and what was streamed before is carried
    over where it is newer. Then one flip makes every reader read the new epoch; the old one is kept for 'plait features rollback'.

    Example:  plait features materialize item-stats --from history.parquet

    Example:  plait features materialize item-stats --from history.parquet --rate 20000 --map id=sku --map event_time=ts --resume
    """
    wanted = Wanted(
        view=view,
        file=file,
        version=version,
        epoch=epoch,
        rate=rate,
        resume=resume,
        flip=flip,
        max_refused=max_refused,
        names=_names(names or []),
        reason=reason,
    )
    where = target(address, api_key, tls, ca, insecure, state)
    outcome = run(_materialize(wanted, where, registry_dsn(dsn, state)))
    if as_json:
        write_json(outcome.document())
    else:
        _tell(outcome)


def _names(given: list[str]) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in given]
    if any(not (name and equals and column) for name, equals, column in pairs):
        raise typer.BadParameter("give NAME=COLUMN, for example id=user_id", param_hint="--map")
    return {name: column for name, _, column in pairs}


async def _materialize(wanted: Wanted, where: Target, dsn: str) -> Outcome:
    from plait.cli.features.parquet import ParquetRows  # noqa: PLC0415
    from plait.registry.store import Store  # noqa: PLC0415

    began = time.monotonic()
    async with await Store.open(dsn, max_connections=1) as store, stub(where) as service:
        tenant = await tenant_of(store, where.api_key)
        view = await _view(store, wanted)
        source = ParquetRows.open(wanted.file, view, wanted.names)
        try:
            _check_rows(wanted, source.rows)
            work = _Work(wanted, store, service, where, tenant, view, source)
            outcome = await (work.into_new_epoch() if wanted.epoch == "new" else work.into_current_epochs())
        finally:
            source.close()
        outcome.seconds = time.monotonic() - began
        return outcome


def _check_rows(wanted: Wanted, rows: int) -> None:
    """Refuse a file that would leave a view with nothing: whoever made it failed more likely than meant it."""
    from plait.errors import InvalidArgument  # noqa: PLC0415

    if not rows and wanted.flip and wanted.epoch == "new":
        raise InvalidArgument(
            f"{wanted.file} has no rows: nothing but what was streamed would be served. If that is meant, materialize it with --no-flip "
            f"and run 'plait features flip {wanted.view}'",
            reason="PARQUET_EMPTY",
        )


async def _view(store: Store, wanted: Wanted) -> FeatureView:
    """Return the view as the rows shall be. What cannot be filled from a file is refused before anything is begun."""
    from plait.errors import FailedPrecondition, NotFound  # noqa: PLC0415
    from plait.registry.records import FeatureView  # noqa: PLC0415

    record = (await store.get("FeatureView", wanted.view)).record
    view = record.at(wanted.version) if isinstance(record, FeatureView) else None
    if view is None:
        raise NotFound(f"FeatureView {wanted.view} has no version {wanted.version} any more", reason="VIEW_VERSION_NOT_FOUND")
    if view.aggregation is not None:
        message = f"the rows of {view.name} are computed from events: replay the events with 'plait features replay'"
        raise FailedPrecondition(message, reason="VIEW_IS_AGGREGATED")
    if view.feast is not None:
        raise FailedPrecondition(f"the rows of {view.name} are Feast's: materialize with Feast", reason="VIEW_IS_FOREIGN")
    return view


class _Work:
    """One run of the command."""

    def __init__(
        self, wanted: Wanted, store: Store, service: Any, where: Target, tenant: str, view: FeatureView, source: ParquetRows
    ) -> None:
        from plait.cli.features.uploading import Totals  # noqa: PLC0415

        self._wanted = wanted
        self._store = store
        self._service = service
        self._metadata = where.metadata
        self._tenant = tenant
        self._view = view
        self._source = source
        self._totals = Totals()

    async def into_current_epochs(self) -> Outcome:
        """Add rows to what is served, each where it is newer."""
        from plait.cli.features.parquet import Position  # noqa: PLC0415

        self._preview("every epoch in use")
        await self._upload(None, Position(), lambda _: None)
        return self._outcome(None, flipped=False, skipped=0, carried_over=0)

    async def into_new_epoch(self) -> Outcome:
        """Build an epoch, carry over what was streamed, and flip."""
        from plait.cli.features.flipping import Flip  # noqa: PLC0415
        from plait.cli.features.resuming import Progress  # noqa: PLC0415

        wanted = self._wanted
        at = await self._begin()
        self._preview(f"epoch {at.epoch}")
        skipped = self._source.rows_before(at.position)
        if skipped:
            write_note(f"going on after row {skipped:,} of {self._source.rows:,}")
        flip = Flip(self._store, self._service, self._metadata, self._tenant, self._view.name, self._view.version)
        if at.epoch == (await flip.epochs()).building:
            await self._fill(at)
            self._check_refused(at)
            await flip.complete(at.epoch, reason=wanted.reason)
            if not wanted.flip:
                return self._outcome(at.epoch, flipped=False, skipped=skipped, carried_over=0)
            copied = await flip.flip(at.epoch, reason=wanted.reason)
        else:  # an earlier run ended after its flip
            copied = await flip.carry_over_again()
        Progress.forget(wanted.file)
        return self._outcome(at.epoch, flipped=True, skipped=skipped, carried_over=copied)

    async def _begin(self) -> Progress:
        """Begin an epoch, or find the one that an earlier run of this file began."""
        from plait.cli.features.resuming import Progress  # noqa: PLC0415
        from plait.errors import FailedPrecondition  # noqa: PLC0415

        wanted, view = self._wanted, self._view
        known: dict[str, Any] = {"file": self._source.fingerprint(), "tenant": self._tenant, "view": view.name, "version": view.version}
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

    async def _fill(self, at: Progress) -> None:
        """Send the rest of the file. Where nothing was taken at all, the epoch is given up: there is nothing to resume."""
        from plait.cli.features.resuming import Progress  # noqa: PLC0415
        from plait.errors import PlaitError  # noqa: PLC0415

        saved_at, last = time.monotonic(), at.position

        def save(position: Position) -> None:
            nonlocal saved_at, last
            last = position
            if time.monotonic() - saved_at >= _SAVED_EVERY_S:
                self._save(at, position)
                saved_at = time.monotonic()

        try:
            await self._upload(at.epoch, at.position, save)
        except PlaitError:
            if not self._totals.rows and not self._wanted.resume:
                await self._store.abandon_epoch(
                    self._tenant, self._view.name, version=self._view.version, actor=author(), reason="nothing was written"
                )
                Progress.forget(self._wanted.file)
            raise
        finally:
            if self._totals.rows:
                self._save(at, last)

    def _save(self, at: Progress, position: Position) -> None:
        refused = Counter(at.refused) + self._totals.refused
        at.at(position, refused).write(self._wanted.file)

    async def _upload(self, epoch: int | None, start: Position, save: Callable[[Position], None]) -> None:
        from plait.cli.features.uploading import Upload  # noqa: PLC0415
        from plait.rpc.pace import Pace  # noqa: PLC0415

        def marked() -> Any:
            for position, batch in self._source.batches(start):
                batch.backfill = True
                if epoch is not None:
                    batch.epoch = epoch
                yield position, batch

        done = self._source.rows_before(start)
        with progress.rows(f"materializing {self._view.name}", self._source.rows, done) as show:

            def acked(sent: Any, result: Any) -> None:
                self._totals.add(sent.first_row, sent.rows, result)
                save(sent.position)
                show(done + self._totals.rows, self._source.rows)

            upload = Upload(self._service, self._metadata, marked(), acked, first_row=done, pace=Pace(self._wanted.rate))
            await upload.run()

    def _check_refused(self, at: Progress) -> None:
        from plait.errors import FailedPrecondition  # noqa: PLC0415

        everything = Counter(at.refused) + self._totals.refused  # of earlier runs, too
        refused = {reason: count for reason, count in everything.items() if reason not in _EXPECTED_REFUSALS}
        if sum(refused.values()) <= self._wanted.max_refused:
            return
        first = self._totals.first
        told = ", ".join(
            f"{count:,} {reason}" + (f" (first: row {first[reason]:,})" if reason in first else "")
            for reason, count in sorted(refused.items())
        )
        raise FailedPrecondition(
            f"rows were refused, so the epoch is not complete: {told}; take it all the same with --resume --max-refused {sum(refused.values())}, "
            f"or give it up with 'plait features abandon {self._view.name}'",
            reason="ROWS_REFUSED",
        )

    def _preview(self, where: str) -> None:
        view = self._view
        write_note(
            f"{self._source.rows:,} rows of {self._wanted.file.name} go to {where} of {view.name} version {view.version}, tenant {self._tenant}"
        )
        if self._source.ignored:
            write_note(f"columns that are not of the view and ignored: {', '.join(self._source.ignored)}")
        if view.retention_s:
            write_note(f"rows older than retention_s = {view.retention_s:g} s are refused (EVENT_TIME_TOO_OLD)")

    def _outcome(self, epoch: int | None, *, flipped: bool, skipped: int, carried_over: int) -> Outcome:
        return Outcome(
            view=self._view.name,
            version=self._view.version,
            epoch=epoch,
            flipped=flipped,
            totals=self._totals,
            skipped=skipped,
            carried_over=carried_over,
            seconds=0.0,
        )


def _tell(outcome: Outcome) -> None:
    totals = outcome.totals
    rate = totals.rows / outcome.seconds if outcome.seconds else 0.0
    write_line(
        f"{totals.rows:,} rows in {outcome.seconds:,.1f} s ({rate:,.0f} rows/s): {totals.applied:,} applied, {totals.ignored:,} not newer"
    )
    for reason, count in sorted(totals.refused.items()):
        write_line(f"{count:,} refused: {reason}, the first is row {totals.first[reason]:,} of the file", "yellow")
    if outcome.epoch is None:
        return
    if not outcome.flipped:
        write_line(f"epoch {outcome.epoch} is built and not served; serve it with: plait features flip {outcome.view}")
        return
    write_line(f"epoch {outcome.epoch} is served; {outcome.carried_over:,} streamed rows were carried over")
    write_note(f"the epoch before is kept and written: 'plait features rollback {outcome.view}' goes back, 'retire' lets it go")
