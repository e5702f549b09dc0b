"""Roles and scopes: what each may do, and that old keys may do what they could."""

from __future__ import annotations

import pytest

from plait.errors import InvalidArgument
from plait.rpc.identity.roles import ROLES, SCOPES, check_scopes, granted, held_by, roles_with, scopes_of


@pytest.mark.parametrize(
    ("role", "may", "may_not"),
    [
        ("predict", {"rank", "infer", "read"}, {"publish", "operate", "admin"}),
        ("publish", {"publish"}, {"rank", "infer", "read", "operate", "admin"}),
        ("operate", {"operate", "read"}, {"rank", "infer", "publish", "admin"}),
        ("admin", set(SCOPES), set()),
    ],
)
def test_what_a_role_may(role: str, may: set[str], may_not: set[str]) -> None:
    assert granted(scopes_of([role])) >= may
    assert not granted(scopes_of([role])) & may_not


def test_a_key_from_before_roles_still_reads_and_writes_features() -> None:
    assert granted(("rank", "features", "infer")) == {"rank", "features", "infer", "read", "publish"}
    assert "operate" in granted(("admin",))


def test_roles_add_up_and_are_found_again() -> None:
    assert scopes_of(["predict", "publish", "predict"]) == ("rank", "infer", "read", "publish")
    assert held_by(scopes_of(["predict", "publish"])) == ("predict", "publish")
    assert held_by(("rank",)) == ()
    assert set(held_by(scopes_of(["admin"]))) == set(ROLES)


def test_every_scope_belongs_to_a_role_the_narrowest_first() -> None:
    assert all(roles_with(scope) for scope in SCOPES)
    assert roles_with("publish") == ("publish", "admin")
    assert roles_with("read") == ("operate", "predict", "admin")


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="found root"):
        scopes_of(["root"])
    with pytest.raises(InvalidArgument, match="found none"):
        scopes_of([])
    with pytest.raises(InvalidArgument, match="found predict"):
        check_scopes(["predict"])
