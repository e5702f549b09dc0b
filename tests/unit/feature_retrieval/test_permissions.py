from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.fakes.calls import ADMIN, call_of

from feature_retrieval.permissions import check_admin, check_readable, check_writable, may_read, may_write
from plait.errors import PermissionDenied
from plait.registry.records import Entity, FeatureView

KEY, OTHER_KEY, OTHER_TENANT = call_of("shop"), call_of("shop", "key-2"), call_of("rival", "key-3")
SERVICE, RIVAL_SERVICE = call_of("shop", "service", service=True), call_of("rival", "service", service=True)


@pytest.mark.parametrize(
    ("names", "allowed"),
    [
        ((), (True, True, True, True, True)),
        (("shop",), (True, True, False, True, False)),
        (("key-1",), (True, False, False, False, False)),
        (("rival", "key-1"), (True, False, True, False, True)),
        (("service",), (False, False, False, False, False)),  # a service is told by its tenant, never by a name that a key could have
    ],
)
def test_who_may(names: tuple[str, ...], allowed: tuple[bool, ...]) -> None:
    calls = (KEY, OTHER_KEY, OTHER_TENANT, SERVICE, RIVAL_SERVICE)
    reads = FeatureView(name="v", entity=Entity(type="user"), features=(), readers=names)
    writes = FeatureView(name="v", entity=Entity(type="user"), features=(), writers=names)
    assert tuple(may_read(reads, c) for c in calls) == tuple(may_write(writes, c) for c in calls) == allowed
    assert all(may_write(reads, c) and may_read(writes, c) for c in calls)
    for check, view, reason in ((check_readable, reads, "VIEW_NOT_READABLE"), (check_writable, writes, "VIEW_NOT_WRITABLE")):
        assert tuple(reason_of(lambda c=c, check=check, view=view: check(view, c)) for c in calls) == tuple(
            "" if may else reason for may in allowed
        )


def reason_of(check: Callable[[], None]) -> str:
    try:
        check()
    except PermissionDenied as error:
        return error.reason
    return ""


def test_administrators_and_services_are_admins() -> None:
    assert reason_of(lambda: check_admin(ADMIN)) == ""
    assert reason_of(lambda: check_admin(SERVICE)) == ""
    assert reason_of(lambda: check_admin(KEY)) == "SCOPE_MISSING"
