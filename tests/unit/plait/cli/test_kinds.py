"""How kinds may be spelled."""

from __future__ import annotations

import pytest
import typer

from plait.cli import kinds
from plait.registry.specs import KINDS


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("model", "Model"),
        ("models", "Model"),
        ("Model", "Model"),
        ("ROUTES", "Route"),
        ("FeatureView", "FeatureView"),
        ("feature-views", "FeatureView"),
        ("feature_view", "FeatureView"),
        ("views", "FeatureView"),
        ("fv", "FeatureView"),
        ("fs", "FeatureSet"),
        ("sets", "FeatureSet"),
        ("tenants", "Tenant"),
    ],
)
def test_many_spellings_are_understood(text: str, kind: str) -> None:
    assert kinds.parse(text) == kind


def test_every_kind_of_the_registry_has_a_name() -> None:
    assert {kinds.parse(name) for name in kinds.NAMES} == set(KINDS)


@pytest.mark.parametrize(
    ("text", "hint"), [("modle", "did you mean models?"), ("rout", "did you mean routes?"), ("xyz", "there are: models, ")]
)
def test_a_wrong_one_gets_a_hint(text: str, hint: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        kinds.parse(text)
    assert hint in str(caught.value)


def test_completion() -> None:
    assert kinds.complete("F") == ["featureviews", "featuresets"]
    assert kinds.complete("") == list(kinds.NAMES)
    assert kinds.complete("x") == []
