"""What callers of the router's methods need; who they are is told by the registry's newest snapshot."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

SCOPE: Final = "rank"
OTHER_SCOPES: Final = MappingProxyType({"InvalidateCache": "operate"})
