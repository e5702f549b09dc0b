"""One block for a batch's tensors: nothing overlaps, everything is aligned, and what is kept is bounded."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model_worker.backends import staging

SHAPES = st.lists(st.tuples(st.sampled_from(["bool", "int8", "float16", "float32", "int64"]), st.lists(st.integers(0, 9), max_size=3)))


@given(SHAPES)
def test_tensors_lie_apart_and_aligned(given_: list[tuple[str, list[int]]]) -> None:
    arrays = [np.zeros(shape, dtype) for dtype, shape in given_]
    laid = staging.places(arrays)
    end = 0
    for place, array in zip(laid, arrays, strict=True):
        assert (place.start % 256, place.stop - place.start) == (0, array.nbytes)
        assert place.start >= end
        assert (place.dtype, place.shape) == (array.dtype.name, array.shape)
        end = place.stop
    assert staging.size_bytes(laid) == end <= sum(array.nbytes + 255 for array in arrays)


@given(st.lists(st.integers(1, staging.LARGEST_BYTES)))
def test_a_block_grows_seldom_and_is_never_too_small(batches: list[int]) -> None:
    held = grown = 0
    for needed in batches:
        wanted = staging.grown_bytes(held, needed)
        assert needed <= wanted <= max(staging.LARGEST_BYTES, 64 * 1024)
        assert wanted >= held
        grown += wanted > held
        held = wanted
    assert grown <= 11  # from 64 KiB to 64 MiB by doubling


def test_a_giant_batch_does_not_keep_its_block() -> None:
    assert staging.keeps(staging.LARGEST_BYTES)
    assert not staging.keeps(staging.LARGEST_BYTES + 1)
