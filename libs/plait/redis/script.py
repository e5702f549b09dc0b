"""A Lua script as Redis knows it: by the hash of its body."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from plait.redis.commands import pack


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and the name Redis gives it."""

    body: bytes
    sha: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha", hashlib.sha1(self.body).hexdigest().encode())  # noqa: S324  (the name Redis gives a script)

    def call(self, keys: Sequence[bytes], arguments: Sequence[bytes]) -> bytes:
        """Return the packed call."""
        return pack(b"EVALSHA", [self.sha, b"%d" % len(keys), *keys, *arguments])

    def load(self) -> bytes:
        """Return the packed command that makes it known to a server."""
        return pack(b"SCRIPT", [b"LOAD", self.body])
