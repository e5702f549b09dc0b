"""Names for people and things that logs, spans and certificates may hold: the same for the same id, and of no use without the key.

A plain hash would not do: ids are few and guessable, so whoever has the logs could hash them all and look them up.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Final

_BYTES: Final = 6  # 12 hex digits: told apart among millions at a glance, too short to matter as a secret


class Pseudonyms:
    """Gives pseudonyms under one key; with an empty one, under a key that is forgotten with this process."""

    def __init__(self, key: bytes = b"") -> None:
        self._key = hashlib.blake2b(key or secrets.token_bytes(32)).digest()  # of the length that BLAKE2b takes at most

    def __repr__(self) -> str:
        return "<Pseudonyms>"

    def of(self, tenant: str, entity_type: str, typed_id: bytes) -> str:
        """Return the pseudonym of an entity as 12 hex digits. BLAKE2b keyed (RFC 7693) over length-prefixed parts, so none run together."""
        digest = hashlib.blake2b(key=self._key, digest_size=_BYTES, person=b"plait-pseudonym")
        for part in (tenant.encode(), entity_type.encode(), typed_id):
            digest.update(len(part).to_bytes(4, "big"))
            digest.update(part)
        return digest.hexdigest()
