"""`plait features rebuild`: the rows of a lost Redis, out of the durable copy in Postgres."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from plait.cli.features.calling import AddressOption, ApiKeyOption, CaOption, InsecureOption, TlsOption, run, stub, target
from plait.cli.options import DEFAULT_STATE, JsonOption, StateOption
from plait.cli.output import write_json, write_line

if TYPE_CHECKING:
    from plait.cli.features.calling import Target

_TRIES: Final = 5  # in a row, without getting any further
_PAUSE_S: Final = 1.0

OneViewArgument = Annotated[str, typer.Argument(metavar="[VIEW]", help="Name of one feature view; default: every view that has a copy.")]
RateOption = Annotated[float, typer.Option("--rate", min=0, help="At most this many rows a second; 0 = as fast as it goes.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(rebuild)


def rebuild(
    view: OneViewArgument = "",
    rate: RateOption = 0.0,
    address: AddressOption = None,
    api_key: ApiKeyOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    insecure: InsecureOption = False,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Write the rows of the durable copy back into Redis: erasures first, then rows, each where it is newer.

    May run beside writers, be stopped and be run again.

    Example:  plait features rebuild item-stats --rate 20000
    """
    done = run(_rebuild(target(address, api_key, tls, ca, insecure, state), view, rate))
    if as_json:
        write_json(done)
        return
    write_line(f"{done['read']} rows read, {done['applied']} of them written; {done['erasures']} erasures are in force")


async def _rebuild(where: Target, view: str, rate: float) -> dict[str, int]:
    """Rebuild, going on from the last cursor over short outages; return what was done."""
    import asyncio  # noqa: PLC0415

    import grpc  # noqa: PLC0415

    from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb  # noqa: PLC0415
    from plait.cli import progress  # noqa: PLC0415

    done = {"read": 0, "applied": 0, "erasures": 0}
    cursor, tries = b"", 0
    with progress.rows("rebuild", 0) as tell:
        while True:
            before, answer = dict(done), pb.RebuildFeaturesResponse()
            request = pb.RebuildFeaturesRequest(feature_view=view, cursor=cursor, max_rows_per_s=rate)
            try:
                async with stub(where) as service:
                    async for answer in service.RebuildFeatures(request, metadata=where.metadata):
                        done = _added(before, answer)
                        tell(done["read"], answer.total)
            except grpc.aio.AioRpcError as error:
                tries = 0 if answer.cursor and answer.cursor != cursor else tries + 1
                if error.code() is not grpc.StatusCode.UNAVAILABLE or tries >= _TRIES:
                    raise
                cursor = answer.cursor or cursor
                await asyncio.sleep(_PAUSE_S)
            else:
                return done


def _added(before: dict[str, int], answer: Any) -> dict[str, int]:
    return {"read": before["read"] + answer.read, "applied": before["applied"] + answer.applied, "erasures": answer.erasures}
