"""What a feature set's columns are named after: one grammar, read in one place by the registry, the router and feature-retrieval.

`view:feature` and `view@version:feature` are stored, `$request:name` is sent along by the caller, `$transform:name` is computed. No view
can be called like the latter two, because "$" is in no name, and none can be taken for a pinned one, because "@" is in none either.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Final, Literal

from plait.registry.records import Feature

_STORED: Final = re.compile(r"([^:@$\s]+)(?:@([1-9][0-9]{0,9}))?:([^:\s]+)\Z")
_COMPUTED: Final = re.compile(r"\$(request|transform):([^:\s]+)\Z")
_MAX_VERSION: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Reference:
    """One column, or several where the feature is wide. `view` is empty and `version` None unless it is stored; no version = the current."""

    kind: Literal["stored", "request", "transform"]
    view: str
    version: int | None
    feature: str

    def __str__(self) -> str:
        if self.kind != "stored":
            return f"${self.kind}:{self.feature}"
        return f"{self.view}:{self.feature}" if self.version is None else f"{self.view}@{self.version}:{self.feature}"


@functools.lru_cache(maxsize=16_384)  # a set names the same ones at every look at it
def parse(text: str) -> Reference | None:
    """Return what a reference says, None where it is none."""
    if found := _COMPUTED.match(text):
        return Reference("request" if found[1] == "request" else "transform", "", None, found[2])
    found = _STORED.match(text)
    if found is None:
        return None
    version = None if found[2] is None else int(found[2])
    if version is not None and version > _MAX_VERSION:
        return None
    return Reference("stored", found[1], version, found[3])


def width_of(feature: Feature) -> int:
    """Return how many columns of a tensor a feature takes: its width as an embedding, its longest length as a list, else 1."""
    return feature.width or feature.max_length or 1
