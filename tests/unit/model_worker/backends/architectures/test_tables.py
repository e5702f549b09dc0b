"""Every id has an embedding, and it is the one that training gave it."""

from __future__ import annotations

import pytest
import torch

from model_worker.backends.architectures.tables import Tables


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ids_are_looked_up_each_in_its_own_table_modulo_its_rows(dtype: torch.dtype) -> None:
    tables = Tables((3, 5), 2)
    first, second = (t for _, t in sorted(tables.state_dict().items()))
    found = tables(torch.tensor([[0, 0], [2, 4], [3, 5], [-1, -1], [2**31 - 1, 7]], dtype=dtype))
    torch.testing.assert_close(found[0], first[[0, 2, 0, 2, (2**31 - 1) % 3]])
    torch.testing.assert_close(found[1], second[[0, 4, 0, 4, 2]])


def test_the_largest_and_smallest_ids_are_no_exception() -> None:
    extremes = torch.tensor([[2**63 - 1], [-(2**63)]])
    assert torch.isfinite(Tables((7,), 2)(extremes)[0]).all()


def test_as_many_columns_as_tables() -> None:
    with pytest.raises(ValueError, match="one column of ids for each of 2 tables, found 3"):
        Tables((3, 5), 2)(torch.zeros(1, 3, dtype=torch.int64))
