"""Demos and benchmarks of other packages, found by real entry points."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from plait.cli import extensions
from plait.errors import FailedPrecondition, NotFound


def install(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Let these be all the entry points there are."""
    found = EntryPoints(EntryPoint(name=name, value=value, group=extensions.DEMOS) for name, value in values.items())
    monkeypatch.setattr(extensions, "entry_points", found.select)


def test_one_is_found_with_and_without_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, shop="json:dumps")
    assert extensions.find(extensions.DEMOS, "shop")([1]) == "[1]"
    assert extensions.find(extensions.DEMOS, None)([1]) == "[1]"


def test_of_several_one_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, shop="json:dumps", bank="json:loads")
    assert extensions.find(extensions.DEMOS, "bank")("[1]") == [1]
    with pytest.raises(NotFound, match="several demos; name one of: bank, shop"):
        extensions.find(extensions.DEMOS, None)
    with pytest.raises(NotFound, match="no 'zoo' among the demos; there is: bank, shop"):
        extensions.find(extensions.DEMOS, "zoo")


@pytest.mark.parametrize("group", [extensions.DEMOS, extensions.BENCHES])
def test_none_says_what_to_install(monkeypatch: pytest.MonkeyPatch, group: str) -> None:
    install(monkeypatch)
    with pytest.raises(FailedPrecondition, match="pip install -e examples/marketplace") as caught:
        extensions.find(group, None)
    assert caught.value.reason == "EXTENSION_MISSING"


def test_a_broken_one_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, shop="no_such_module:run")
    with pytest.raises(FailedPrecondition, match=r"shop \(no_such_module:run\) cannot be loaded: No module named") as caught:
        extensions.find(extensions.DEMOS, None)
    assert caught.value.reason == "EXTENSION_BROKEN"


def test_names_for_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, shop="json:dumps", bank="json:loads")
    assert extensions.names(extensions.DEMOS, "") == ["bank", "shop"]
    assert extensions.names(extensions.DEMOS, "s") == ["shop"]
    assert extensions.names(extensions.BENCHES, "") == []
