"""How many different values: HyperLogLog registers, whose merge is a maximum and so forgets every order and repetition.

P. Flajolet, É. Fusy, O. Gandouet, F. Meunier: HyperLogLog: the analysis of a near-optimal cardinality estimation algorithm (AofA 2007), with
its small-range correction; the large-range one is not needed with 64-bit hashes. The standard error is 1.04 / sqrt(2 ** precision).
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from feature_retrieval.aggregation.rings import Ints

Hashes = npt.NDArray[np.uint64]


def hash_of(data: bytes) -> int:
    """Return 64 bits of a value."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def registers_of(hashes: Hashes, precision: int) -> tuple[Ints, npt.NDArray[np.uint8]]:
    """Return for each hash its register (the top `precision` bits) and rank (1 + the zeros before the first one of the other bits)."""
    index = (hashes >> np.uint64(64 - precision)).astype(np.int64)
    rest = hashes << np.uint64(precision)
    width = 64 - precision
    # frexp of the top 32 bits first, then of the lower ones: a double cannot hold 64 bits, and rounding up would add a zero.
    high, low = (rest >> np.uint64(32)).astype(np.float64), (rest & np.uint64(0xFFFFFFFF)).astype(np.float64)
    length = np.where(high > 0, 32 + np.frexp(high)[1], np.frexp(low)[1])
    rank = np.where(rest == 0, width + 1, 64 - length + 1)
    return index, rank.astype(np.uint8)


def estimate(registers: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Return how many different values [rows, 2 ** precision] registers saw."""
    count = registers.shape[1]
    alpha = {16: 0.673, 32: 0.697, 64: 0.709}.get(count, 0.7213 / (1 + 1.079 / count))
    raw = alpha * count * count / np.ldexp(1.0, -registers.astype(np.int32)).sum(axis=1)
    empty = (registers == 0).sum(axis=1)
    small = (raw <= 2.5 * count) & (empty > 0)
    found: npt.NDArray[np.float64] = np.where(small, count * np.log(count / np.maximum(empty, 1)), raw)
    return found
