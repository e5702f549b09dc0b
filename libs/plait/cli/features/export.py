"""`plait features export`: the rows of an epoch as a Parquet file that materialize reads back."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from plait.cli import progress
from plait.cli.features.calling import (
    AddressOption,
    ApiKeyOption,
    CaOption,
    InsecureOption,
    Target,
    TlsOption,
    VersionOption,
    ViewArgument,
    run,
    stub,
    target,
)
from plait.cli.options import DEFAULT_STATE, DsnOption, JsonOption, StateOption, registry_dsn
from plait.cli.output import write_json, write_line

if TYPE_CHECKING:
    from plait.registry.records import FeatureView


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(export)


def export(
    view: ViewArgument,
    file: Annotated[Path, typer.Option("--to", metavar="FILE", dir_okay=False, help="Parquet file to write.", show_default=False)],
    epoch: Annotated[int | None, typer.Option("--epoch", min=0, help="Default: the one that is served.", show_default=False)] = None,
    rate: Annotated[float, typer.Option("--rate", min=0, help="Rows a second at most; 0 = as fast as they come.")] = 0.0,
    version: VersionOption = 0,
    address: AddressOption = None,
    api_key: ApiKeyOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    insecure: InsecureOption = False,
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Write the rows of a feature view to a Parquet file: ids, event times, deletions and every feature, as they are stored.

    It is no snapshot: a row that is written meanwhile may be in the file as it was, as it is, or twice.

    Example:  plait features export item-stats --to item-stats.parquet
    """
    where = target(address, api_key, tls, ca, insecure, state)
    began = time.monotonic()
    rows = run(_export(view, version, epoch, rate, file, where, registry_dsn(dsn, state)))
    seconds = time.monotonic() - began
    if as_json:
        write_json({"view": view, "rows": rows, "seconds": seconds, "rows_per_s": rows / seconds})
    else:
        write_line(f"{rows:,} rows of {view} are in {file} ({rows / seconds:,.0f} rows/s)")


async def _export(view: str, version: int, epoch: int | None, rate: float, file: Path, where: Target, dsn: str) -> int:
    from plait.cli.features.parquet import ParquetWriter  # noqa: PLC0415
    from plait.registry.store import Store  # noqa: PLC0415

    async with await Store.open(dsn, max_connections=1) as store:
        record = await _view(store, view, version)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with ParquetWriter(beside, record) as writer:
            await _write_all(writer, record, epoch, rate, where)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
    return writer.rows


async def _view(store: Any, name: str, version: int) -> FeatureView:
    from plait.errors import NotFound  # noqa: PLC0415
    from plait.registry.records import FeatureView  # noqa: PLC0415

    record = (await store.get("FeatureView", name)).record
    view = record.at(version) if isinstance(record, FeatureView) else None
    if view is None:
        raise NotFound(f"FeatureView {name} has no version {version} any more", reason="VIEW_VERSION_NOT_FOUND")
    return view


async def _write_all(writer: Any, view: FeatureView, epoch: int | None, rate: float, where: Target) -> None:
    from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb  # noqa: PLC0415
    from plait.cli.features.uploading import follow  # noqa: PLC0415

    request = pb.ExportFeaturesRequest(feature_view=view.name, view_version=view.version, epoch=epoch, max_rows_per_s=rate)
    page: list[Any] = []  # batches of a page that is not complete: after a break it comes again
    with progress.rows(f"exporting {view.name}", 0) as show:

        def told(answer: Any) -> None:
            if answer.HasField("batch"):
                page.append(answer.batch)
                return
            for batch in page:
                writer.append(batch)
            page.clear()
            show(answer.scanned, answer.total)

        async with stub(where) as service:

            def start(asked: Any) -> Any:
                page.clear()
                return service.ExportFeatures(asked, metadata=where.metadata)

            await follow(start, request, told, passing=frozenset())
