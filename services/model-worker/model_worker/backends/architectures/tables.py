"""Embeddings of categorical features, one table each, as the architectures with ids share them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Tables(nn.ModuleList):
    """ids int64 or int32 [N, T], one of each table → T embeddings [N, dim]. Weights: <t>.weight [rows of table t, dim].

    An id is taken modulo the rows of its table: training commonly hashes ids so, ids below that are left as they are, and no id that a
    caller sends can lie outside, which on an accelerator would end the process and not only the request.
    """

    def __init__(self, rows: Sequence[int], dim: int) -> None:
        super().__init__(nn.Embedding(count, dim) for count in rows)
        self._rows = tuple(rows)

    def forward(self, ids: Tensor) -> list[Tensor]:
        """Return the embeddings of each table. Raises ValueError where there is not one column of ids per table."""
        if ids.shape[1] != len(self):
            raise ValueError(f"expected one column of ids for each of {len(self)} tables, found {ids.shape[1]}")
        return [table(column.remainder(rows)) for table, rows, column in zip(self, self._rows, ids.unbind(dim=1), strict=True)]
