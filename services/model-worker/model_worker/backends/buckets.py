"""Batches padded to a few fixed sizes, for devices and compilers that are fast at shapes they have seen; pure, and undone exactly.

Padding repeats the last row, which the model is known to take: zeros may be no valid id, or divide to NaN. A model with row splits gets
the padding as one request more (the last one's side again), not as rows of the last request: what a model pools over a request's rows
would change, whereas a request beside others changes nothing, which is what the proof of joining shows. So only models that are proven
to join may be padded.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from model_worker.packed import Array
from model_worker.ragged import Layout


def choose(buckets: Sequence[int], rows: int) -> int:
    """Return the smallest of the ascending `buckets` that holds `rows`; `rows` itself where none does, or where rows is 0."""
    at = bisect.bisect_left(buckets, rows)
    return buckets[at] if rows and at < len(buckets) else rows


def pad(inputs: Sequence[Array], layout: Layout, rows: int, bucket: int) -> tuple[Array, ...]:
    """Return joined inputs (row splits last, where the layout has them) with rows [bucket, ...]; unchanged where they are that long.

    `rows`: how many there are, from 1 to `bucket`. Row splits [requests + 1] become [requests + 2].
    """
    more = bucket - rows
    if more <= 0:
        return tuple(inputs)
    sides = tuple(
        _longer(array, more) if by_row else _longer(array, int(layout.row_splits))
        for by_row, array in zip(layout.row_inputs, inputs, strict=False)
    )
    return (*sides, np.append(inputs[-1], inputs[-1].dtype.type(bucket))) if layout.row_splits else sides


def cut(outputs: Sequence[Array], layout: Layout, rows: int, requests: int) -> tuple[Array, ...]:
    """Return the outputs of a padded batch without the padding, as views."""
    return tuple(output[: rows if by_row else requests] for output, by_row in zip(outputs, layout.row_outputs, strict=True))


def _longer(array: Array, more: int) -> Array:
    return np.concatenate([array, np.repeat(array[-1:], more, axis=0)]) if more else array
