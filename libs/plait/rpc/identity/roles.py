"""What a caller may do: methods ask for scopes, people hand out roles.

A role is only a name for scopes at the moment a key is made; what is stored with the key are the scopes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from plait.errors import InvalidArgument

# rank: Rank, Predict and what belongs to them. infer: the Open Inference Protocol. read, publish: features; "features" is both, as keys had
# it before the two were told apart. operate: caches and the inside of a mesh. admin: epochs, backfills, exports and erasures.
SCOPES: Final = ("rank", "infer", "read", "publish", "features", "operate", "admin")
ROLES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "predict": ("rank", "infer", "read"),
        "publish": ("publish",),
        "operate": ("operate", "read"),
        "admin": SCOPES,
    }
)
_IMPLIED: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({"features": ("read", "publish"), "admin": ("operate",)})


def scopes_of(roles: Collection[str]) -> tuple[str, ...]:
    """Return the scopes of some roles, each once. Raises InvalidArgument (ROLE_UNKNOWN)."""
    unknown = sorted(set(roles) - set(ROLES))
    if unknown or not roles:
        raise InvalidArgument(f"expected roles out of {', '.join(ROLES)}; found {', '.join(unknown) or 'none'}", reason="ROLE_UNKNOWN")
    return tuple(dict.fromkeys(scope for role in roles for scope in ROLES[role]))


def check_scopes(scopes: Collection[str]) -> None:
    """Raise InvalidArgument (SCOPE_UNKNOWN) unless there are scopes and all are known."""
    unknown = sorted(set(scopes) - set(SCOPES))
    if unknown or not scopes:
        raise InvalidArgument(f"expected scopes out of {', '.join(SCOPES)}; found {', '.join(unknown) or 'none'}", reason="SCOPE_UNKNOWN")


def granted(scopes: Collection[str]) -> frozenset[str]:
    """Return the scopes with all that they imply."""
    return _granted(tuple(scopes))


@lru_cache(maxsize=1024)  # asked at each call, and there are only so many different ones
def _granted(scopes: tuple[str, ...]) -> frozenset[str]:
    return frozenset(scopes).union(*(_IMPLIED[scope] for scope in scopes if scope in _IMPLIED))


def roles_with(scope: str) -> tuple[str, ...]:
    """Return the roles that have a scope, the narrowest first."""
    return tuple(sorted((role for role in ROLES if scope in granted(ROLES[role])), key=lambda role: len(ROLES[role])))


def held_by(scopes: Collection[str]) -> tuple[str, ...]:
    """Return the roles whose scopes are all among these; none for scopes that were picked by hand."""
    have = granted(scopes)
    return tuple(role for role in ROLES if have.issuperset(ROLES[role]))
