"""How Feast's Redis store names things: a hash per entity, a field per feature, and one for the time of each view.

Layout: feast 0.67, "Redis online store format" and `feast.infra.key_encoding_utils.serialize_entity_key` (serialization version 3). Tested
byte for byte against the package.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from feature_retrieval.row_codec import Id, IdPart
from plait.registry.records import FeastSource

_STRING: Final = struct.pack("<I", 2)  # numbers of feast.types.ValueType
_INT64: Final = struct.pack("<II", 4, 8)  # with the length of what follows
_MASK: Final = 0xFFFFFFFF


class EntityKeys:
    """Makes the keys of one view's entities. `source.join_keys` are parallel to the parts of an id; Feast sorts them by name."""

    def __init__(self, source: FeastSource) -> None:
        names = source.join_keys
        self._order = sorted(range(len(names)), key=names.__getitem__)
        encoded = [names[at].encode() for at in self._order]
        self._head = struct.pack("<I", len(names)) + b"".join(_STRING + struct.pack("<I", len(name)) + name for name in encoded)
        self._project = source.project.encode()

    def keys(self, ids: Sequence[Id]) -> list[bytes]:
        """Return the key of each id's hash."""
        return [self._head + b"".join(map(_value, self._parts(entity_id))) + self._project for entity_id in ids]

    def _parts(self, entity_id: Id) -> list[IdPart]:
        parts = entity_id if isinstance(entity_id, tuple) else (entity_id,)
        return [parts[at] for at in self._order]


def field_of(view: str, feature: str) -> bytes:
    """Return the field of a feature: the murmur3 hash of "view:feature", little-endian."""
    return struct.pack("<I", murmur3_32(f"{view}:{feature}".encode()))


def time_field_of(view: str) -> bytes:
    """Return the field of a view's event time."""
    return b"_ts:" + view.encode()


def murmur3_32(data: bytes, seed: int = 0) -> int:
    """Return MurmurHash3_x86_32 (Austin Appleby, 2011, public domain), unsigned."""
    value = seed
    whole = len(data) & ~3
    for (block,) in struct.iter_unpack("<I", data[:whole]):
        value ^= _scrambled(block)
        value = (((value << 13) | (value >> 19)) * 5 + 0xE6546B64) & _MASK
    value ^= _scrambled(int.from_bytes(data[whole:], "little")) ^ len(data)
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


def _scrambled(block: int) -> int:
    block = (block * 0xCC9E2D51) & _MASK
    return (((block << 15) | (block >> 17)) * 0x1B873593) & _MASK


def _value(part: IdPart) -> bytes:
    if isinstance(part, int):
        return _INT64 + part.to_bytes(8, "little", signed=True)
    data = part.encode()
    return _STRING + struct.pack("<I", len(data)) + data
