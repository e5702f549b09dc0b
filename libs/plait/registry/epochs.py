"""Which epoch of a view's rows is read, built and kept: the rules of moving between them, and the SQL beside them.

A backfill writes a new epoch beside the one that is served; one update of one row flips every reader. The numbers only grow, so what an
abandoned epoch left in the store is never taken for something newer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Final

from plait.errors import FailedPrecondition
from plait.registry.queries import Connection
from plait.registry.records import Epochs

KIND: Final = "FeatureEpoch"  # in the audit log

EpochKey = tuple[str, str, int]  # tenant, view, version


def begin(epochs: Epochs) -> Epochs:
    """Return the epochs with a new one being built. Raises FailedPrecondition (EPOCH_BUSY) while there is one."""
    if epochs.building is not None:
        raise FailedPrecondition(
            f"epoch {epochs.building} is being built: resume that materialize, or drop what it wrote with 'plait features abandon'",
            reason="EPOCH_BUSY",
        )
    return replace(epochs, building=epochs.newest + 1, newest=epochs.newest + 1, built=False)


def complete(epochs: Epochs, epoch: int) -> Epochs:
    """Return the epochs with the one being built complete. Raises FailedPrecondition (EPOCH_NOT_FOUND) where another one is built."""
    _check_built_is(epochs, epoch)
    return replace(epochs, built=True)


def flip(epochs: Epochs, epoch: int | None = None) -> Epochs:
    """Return the epochs with the built one served and the served one kept. `epoch`: which one is meant, None = whichever is built.

    Raises FailedPrecondition (EPOCH_NOT_FOUND) where none is built, or another than was meant.
    """
    if epochs.building is None:
        raise FailedPrecondition("no epoch is being built: there is nothing to flip to", reason="EPOCH_NOT_FOUND")
    if epoch is not None:
        _check_built_is(epochs, epoch)
    return replace(epochs, serving=epochs.building, building=None, previous=epochs.serving, built=False)


def rollback(epochs: Epochs) -> Epochs:
    """Return the epochs with the kept one served; the one served until now is kept. Raises FailedPrecondition (EPOCH_NOT_FOUND)."""
    if epochs.previous is None:
        raise FailedPrecondition("no epoch was kept: there is nothing to roll back to", reason="EPOCH_NOT_FOUND")
    return replace(epochs, serving=epochs.previous, previous=epochs.serving)


def retire(epochs: Epochs) -> Epochs:
    """Return the epochs without the kept one, which is written no more. Raises FailedPrecondition (EPOCH_NOT_FOUND)."""
    if epochs.previous is None:
        raise FailedPrecondition("no epoch is kept beside the one that is served", reason="EPOCH_NOT_FOUND")
    return replace(epochs, previous=None)


def abandon(epochs: Epochs) -> Epochs:
    """Return the epochs without the one being built. Raises FailedPrecondition (EPOCH_NOT_FOUND)."""
    if epochs.building is None:
        raise FailedPrecondition("no epoch is being built", reason="EPOCH_NOT_FOUND")
    return replace(epochs, building=None, built=False)


def _check_built_is(epochs: Epochs, epoch: int) -> None:
    if epochs.building != epoch:
        raise FailedPrecondition(
            f"epoch {epoch} is not being built any more: somebody gave it up or served it; see 'plait features epochs'",
            reason="EPOCH_NOT_FOUND",
        )


# --- SQL ----------------------------------------------------------------------------------------------------------------------------------


async def read(connection: Connection, key: EpochKey) -> Epochs | None:
    """Return the epochs of a view's version for a tenant, None where none was ever built."""
    row = await connection.fetchrow(
        "select serving, building, previous, newest, built from plait.view_epoch where tenant = $1 and view = $2 and version = $3", *key
    )
    return None if row is None else Epochs(**row)


async def write(connection: Connection, key: EpochKey, epochs: Epochs, *, begun: bool, flipped: bool) -> None:
    """Store the epochs; `begun` and `flipped` say which times to keep."""
    await connection.execute(
        """insert into plait.view_epoch (tenant, view, version, serving, building, previous, newest, built, started_at, flipped_at)
           values ($1, $2, $3, $4, $5, $6, $7, $8, case when $9 then now() end, case when $10 then now() end)
           on conflict (tenant, view, version) do update
           set serving = excluded.serving, building = excluded.building, previous = excluded.previous, newest = excluded.newest,
               built = excluded.built,
               started_at = coalesce(excluded.started_at, view_epoch.started_at),
               flipped_at = coalesce(excluded.flipped_at, view_epoch.flipped_at)""",
        *key,
        epochs.serving,
        epochs.building,
        epochs.previous,
        epochs.newest,
        epochs.built,
        begun,
        flipped,
    )


def name_of(key: EpochKey) -> str:
    """Return the name under which the audit log lists the epochs of a view's version."""
    tenant, view, version = key
    return f"{tenant}/{view}@{version}"


def described(epochs: Epochs | None) -> Mapping[str, Any] | None:
    """Return epochs as the audit log holds them."""
    return None if epochs is None else asdict(epochs)
