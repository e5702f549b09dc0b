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
    return replace(epochs, building=epochs.newest + 1, newest=epochs.newest + 1)


def flip(epochs: Epochs) -> Epochs:
    """Return the epochs with the built one served and the served one kept. Raises FailedPrecondition (EPOCH_NOT_FOUND)."""
    if epochs.building is None:
        raise FailedPrecondition("no epoch is being built: there is nothing to flip to", reason="EPOCH_NOT_FOUND")
    return replace(epochs, serving=epochs.building, building=None, previous=epochs.serving)


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
    return replace(epochs, building=None)


# --- SQL ----------------------------------------------------------------------------------------------------------------------------------


async def read(connection: Connection, key: EpochKey) -> Epochs | None:
    """Return the epochs of a view's version for a tenant, None where none was ever built."""
    row = await connection.fetchrow(
        "select serving, building, previous, newest from plait.view_epoch where tenant = $1 and view = $2 and version = $3", *key
    )
    return None if row is None else Epochs(**row)


async def write(connection: Connection, key: EpochKey, epochs: Epochs, *, begun: bool, flipped: bool) -> None:
    """Store the epochs; `begun` and `flipped` say which times to keep."""
    await connection.execute(
        """insert into plait.view_epoch (tenant, view, version, serving, building, previous, newest, started_at, flipped_at)
           values ($1, $2, $3, $4, $5, $6, $7, case when $8 then now() end, case when $9 then now() end)
           on conflict (tenant, view, version) do update
           set serving = excluded.serving, building = excluded.building, previous = excluded.previous, newest = excluded.newest,
               started_at = coalesce(excluded.started_at, view_epoch.started_at),
               flipped_at = coalesce(excluded.flipped_at, view_epoch.flipped_at)""",
        *key,
        epochs.serving,
        epochs.building,
        epochs.previous,
        epochs.newest,
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
