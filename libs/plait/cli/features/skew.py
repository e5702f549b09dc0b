"""`plait features skew`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plait.cli.features.calling import run
from plait.cli.options import DEFAULT_STATE, DsnOption, JsonOption, StateOption, registry_dsn
from plait.cli.output import write_json, write_line, write_note, write_table

if TYPE_CHECKING:
    from plait.cli.features.skew_compare import Offline, Skew
    from plait.registry.records import FeatureSet, FeatureView, Snapshot


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(skew)


def skew(
    feature_set: Annotated[str, typer.Option("--set", help="Name of the feature set.", show_default=False)],
    log: Annotated[Path, typer.Option("--log", exists=True, help="Folder of the skew log, or one of its files.", show_default=False)],
    offline: Annotated[
        list[str],
        typer.Option(
            "--offline",
            help="VIEW=FILE.parquet of recomputed rows, as 'plait features export' writes them; may be repeated. "
            "VIEW may be left out where the set reads one view.",
            show_default=False,
        ),
    ],
    tolerance: Annotated[float, typer.Option("--tolerance", min=0, help="Cells no further apart than this are the same.")] = 0.0,
    dsn: DsnOption = None,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Compare what was served with what is recomputed offline: the rate of mismatches of each feature.

    A served row is compared with the offline row of the same entity and event time.

    Example:  plait features skew --set home --log /var/lib/plait/skew --offline item-stats=recomputed.parquet
    """
    snapshot = run(_snapshot(registry_dsn(dsn, state)))
    found = _compare(snapshot, feature_set, log, offline, tolerance)
    if as_json:
        write_json(_document(found))
    else:
        _show(found)


async def _snapshot(dsn: str) -> Snapshot:
    from plait.registry.store import Store  # noqa: PLC0415

    async with await Store.open(dsn, max_connections=1) as store:
        return await store.snapshot()


def _compare(snapshot: Snapshot, name: str, log: Path, offline: list[str], tolerance: float) -> Skew:
    from plait.cli.features import served_rows, skew_compare  # noqa: PLC0415
    from plait.errors import NotFound  # noqa: PLC0415
    from plait.registry.explain import suggestion  # noqa: PLC0415

    feature_set = snapshot.feature_sets.get(name)
    if feature_set is None:
        raise NotFound(f"no feature set {name!r}{suggestion(name, list(snapshot.feature_sets))}", reason="FEATURE_SET_NOT_FOUND")
    read = {view.name: view for view in _views_of(feature_set, snapshot)}
    recomputed = [_offline(text, read, feature_set) for text in offline]
    rows = (row for path in served_rows.paths_of(log) for row in served_rows.read(path))
    return skew_compare.compare(rows, feature_set, snapshot.feature_views, recomputed, tolerance)


def _views_of(feature_set: FeatureSet, snapshot: Snapshot) -> list[FeatureView]:
    from plait.registry.references import parse  # noqa: PLC0415
    from plait.registry.shapes import view_of  # noqa: PLC0415

    references = [parse(text) for item in feature_set.inputs for text in item.features]
    found = [view_of(r, snapshot.feature_views) for r in references if r is not None and r.kind == "stored"]
    return [view for view in found if view is not None]


def _offline(text: str, views: dict[str, FeatureView], feature_set: FeatureSet) -> Offline:
    from plait.cli.features.parquet import ParquetRows, Position  # noqa: PLC0415
    from plait.cli.features.skew_compare import Offline  # noqa: PLC0415

    name, equals, path = text.partition("=")
    if not equals and len(views) == 1:
        name, path = next(iter(views)), text
    if name not in views or not path:
        raise typer.BadParameter(
            f"expected VIEW=FILE.parquet with one of {', '.join(views)}, which {feature_set.name} reads", param_hint="--offline"
        )
    recomputed = Offline(views[name])
    file = ParquetRows.open(Path(path), views[name], {})
    try:
        for _, batch in file.batches(Position()):
            recomputed.add(batch)
    finally:
        file.close()
    recomputed.finish()
    return recomputed


def _document(found: Skew) -> dict[str, object]:
    return {
        "rows": found.rows,
        "misfits": found.misfits,
        "left_out": list(found.left_out),
        "views": {
            name: {"matched": v.matched, "unmatched": v.unmatched, "behind": v.behind, "absent": v.absent}
            for name, v in found.views.items()
        },
        "features": {
            name: {"compared": f.compared, "mismatched": f.mismatched, "rate": f.rate, "largest": f.largest}
            for name, f in found.features.items()
        },
    }


def _show(found: Skew) -> None:
    write_table(
        ("feature", "compared", "mismatched", "rate", "largest difference"),
        [(name, f.compared, f.mismatched, f"{f.rate:.4%}", f"{f.largest:g}" if f.largest else "") for name, f in found.features.items()],
    )
    write_line("")
    write_table(
        ("view", "rows compared", "not offline", "older than offline", "not served, but offline"),
        [(name, v.matched, v.unmatched, v.behind, v.absent) for name, v in found.views.items()],
    )
    write_note(f"{found.rows} served rows of the set, {found.misfits} of them of an older shape of it or version of a view")
    if found.left_out:
        write_note(f"nothing to compare with: {', '.join(found.left_out)}")
