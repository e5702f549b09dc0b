"""Who may read and write which view: a manifest names tenants and API keys, an empty list means whoever may use the service at all."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Final

from plait.errors import PermissionDenied
from plait.registry.records import FeatureView
from plait.rpc.call import Call

ADMIN: Final = "admin"
SCOPES: Final = MappingProxyType(  # by method; what is not named is for administrators
    {
        "GetFeatures": "read",
        "StreamFeatures": "read",
        "DescribeFeatureSet": "read",
        "ExplainFeatures": "read",
        "GetViewStatus": "read",
        "WriteFeatures": "publish",
        "IngestFeatures": "publish",
        "PublishEvents": "publish",
    }
)


def may_read(view: FeatureView, call: Call) -> bool:
    """Say whether the caller may read the view: in answers, explanations and exports alike."""
    return _is_named(view.readers, call)


def may_write(view: FeatureView, call: Call) -> bool:
    """Say whether the caller may write the view: rows, backfills and deletes alike."""
    return _is_named(view.writers, call)


def publisher_of(call: Call) -> str:
    """Return the id of the API key that events are published with; '' = none, as for a service, which acts for a tenant."""
    return "" if call.is_service else call.caller


def may_feed(view: FeatureView, tenant: str, publisher: str) -> bool:
    """Say whether events of a tenant, published with this API key ('' = none), count in the view."""
    return not view.writers or tenant in view.writers or (bool(publisher) and publisher in view.writers)


def check_readable(view: FeatureView, call: Call) -> None:
    """Raise PermissionDenied (VIEW_NOT_READABLE) where the caller may not read the view."""
    if not may_read(view, call):
        raise PermissionDenied(
            f"feature view {view.name!r} is not for this caller: its owner has to add the tenant or the API key to spec.readers",
            reason="VIEW_NOT_READABLE",
        )


def check_writable(view: FeatureView, call: Call) -> None:
    """Raise PermissionDenied (VIEW_NOT_WRITABLE) where the caller may not write the view."""
    if not may_write(view, call):
        raise PermissionDenied(
            f"feature view {view.name!r} is not for this caller to write: its owner has to add the tenant or the API key to spec.writers",
            reason="VIEW_NOT_WRITABLE",
        )


def check_admin(call: Call) -> None:
    """Raise PermissionDenied (SCOPE_MISSING) where the caller is neither an administrator nor a plait service."""
    if not call.is_service and ADMIN not in call.scopes:
        raise PermissionDenied("the API key lacks the scope 'admin': ask for a key that has it", reason="SCOPE_MISSING")


def _is_named(names: Sequence[str], call: Call) -> bool:
    """A service acts for a tenant and has no key of its own, so only its tenant can be named."""
    return not names or call.tenant in names or (not call.is_service and call.caller in names)
