"""How the tensors of one batch lie in one block of bytes, so that one transfer takes all of them to a device; pure.

A transfer has a fixed cost of some microseconds, more than the tensors of a small batch take to travel; and only out of page-locked ("pinned")
memory does it run beside the CPU. Such memory is dear to get and cannot be swapped, so a block is kept, grows by doubling and has a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from model_worker.packed import Array

_ALIGN_BYTES: Final = (
    256  # what an allocation on a device is aligned to, so that what vectorised kernels expect of a tensor holds for a part
)
_SMALLEST_BYTES: Final = 64 * 1024
LARGEST_BYTES: Final = 64 * 1024 * 1024  # of a block that is kept: the default of batching.max_bytes


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes [start, stop) of a block, which hold an array of this type and shape."""

    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]


def places(arrays: Sequence[Array]) -> tuple[Place, ...]:
    """Return where each array lies: in order, apart from each other, each at a multiple of 256 bytes."""
    found: list[Place] = []
    at = 0
    for array in arrays:
        found.append(Place(at, at + array.nbytes, array.dtype.name, array.shape))
        at += -(-array.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
    return tuple(found)


def size_bytes(laid: Sequence[Place]) -> int:
    """Return how long a block must be."""
    return laid[-1].stop if laid else 0


def keeps(needed_bytes: int) -> bool:
    """Say whether a block of that size is kept for the next batch; a larger one is taken from ordinary memory and given back."""
    return needed_bytes <= LARGEST_BYTES


def grown_bytes(held_bytes: int, needed_bytes: int) -> int:
    """Return how long a kept block should be: as it is where that suffices, else the next power of two."""
    return held_bytes if needed_bytes <= held_bytes else max(_SMALLEST_BYTES, 1 << (needed_bytes - 1).bit_length())
