"""The floor: the same answer in one process with no RPC at all. One Redis MGET, one gather, one forward pass, on the same rows and model.

What plait's mesh is measured against: nothing that keeps features in Redis and scores with torch can do less.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import redis
import torch

from feature_retrieval.row_codec import HEADER_BYTES, KeySpace, RowCodec
from marketplace.features import Array
from plait.registry.records import FeatureSchema, Snapshot

USER_VIEWS: Final = ("user-profile", "user-behaviour")
ITEM_VIEWS: Final = ("item-content", "item-stats")


class Floor:
    """Scores candidates for a user. Every feature of the example is float32, so a view's columns are one block of its rows."""

    def __init__(self, redis_url: str, snapshot: Snapshot, model: Path, tenant: str = "default") -> None:
        self._redis = redis.Redis.from_url(redis_url)
        views = {name: snapshot.feature_views[name] for name in (*USER_VIEWS, *ITEM_VIEWS)}
        self._spaces = {n: KeySpace.of(tenant, v.entity.type, n, v.version) for n, v in views.items()}
        self._codecs = {n: RowCodec(v.schemas[-1] if v.schemas else FeatureSchema(id=1, features=v.features)) for n, v in views.items()}
        torch.set_num_threads(1)
        self._model = torch.jit.load(str(model)).eval()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()

    def rank(self, user: str, items: list[str]) -> Array:
        """Return float32 [items] scores."""
        keys = [key for name in USER_VIEWS for key in self._spaces[name].keys([user])]
        for name in ITEM_VIEWS:
            keys += self._spaces[name].keys(items)
        rows: list[bytes] = self._redis.mget(keys)  # type: ignore[assignment]  # every row is there, as bytes
        n = len(items)
        user_tensor = np.concatenate([self._columns(USER_VIEWS[0], rows[:1]), self._columns(USER_VIEWS[1], rows[1:2])], axis=1)
        item_tensor = np.concatenate([self._columns(ITEM_VIEWS[0], rows[2 : 2 + n]), self._columns(ITEM_VIEWS[1], rows[2 + n :])], axis=1)
        with torch.inference_mode():
            scores: Array = self._model(torch.from_numpy(user_tensor), torch.from_numpy(item_tensor), torch.tensor([0, n])).numpy()
        return scores

    def _columns(self, view: str, rows: list[bytes]) -> Array:
        codec = self._codecs[view]
        block = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), codec.row_bytes)
        start = next(iter(codec.columns.values())).offset
        assert start > HEADER_BYTES  # noqa: S101
        columns: Array = block[:, start:].view("<f4")
        return columns
