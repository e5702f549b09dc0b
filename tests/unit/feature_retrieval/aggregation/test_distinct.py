"""HyperLogLog: its error, and its registers against the paper's definition in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_retrieval.aggregation.distinct import estimate, hash_of, registers_of


@given(
    hashes=st.lists(st.integers(0, (1 << 64) - 1) | st.sampled_from([0, 1, (1 << 64) - 1, 1 << 63, 1 << 32, (1 << 53) - 1]), min_size=1),
    precision=st.integers(4, 12),
)
def test_registers_and_ranks_are_the_papers(hashes: list[int], precision: int) -> None:
    index, rank = registers_of(np.array(hashes, np.uint64), precision)
    for n, value in enumerate(hashes):
        bits = f"{value:064b}"
        rest = bits[precision:]
        assert index[n] == int(bits[:precision], 2)
        assert rank[n] == (rest.index("1") + 1 if "1" in rest else len(rest) + 1)


@pytest.mark.parametrize(("precision", "count"), [(4, 30), (8, 10), (8, 1_000), (8, 50_000), (12, 3_000), (12, 100_000)])
def test_the_estimate_is_within_four_standard_errors(precision: int, count: int) -> None:
    registers = np.zeros((2, 1 << precision), np.uint8)
    index, rank = registers_of(np.fromiter((hash_of(b"%d" % n) for n in range(count)), np.uint64, count), precision)
    np.maximum.at(registers[1], index, rank)
    empty, found = estimate(registers)
    assert empty == 0
    assert found == pytest.approx(count, rel=4 * 1.04 / 2 ** (precision / 2))
