"""Architectures of distributions that are really there, found by their metadata and imported only when asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.fakes.distribution import install

from model_worker.backends.architectures import installed
from model_worker.backends.architectures.installed import Installed
from plait.errors import FailedPrecondition


def find(folder: Path, monkeypatch: pytest.MonkeyPatch, entry: str, source: str = "") -> Installed:
    install(folder, "acme-models", installed.GROUP, {"acme": entry}, acme_models_under_test=source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "acme_models_under_test", raising=False)
    (found,) = (one for one in installed.find() if one.distribution == "acme-models")
    return found


def test_one_is_found_with_its_distribution_and_imported_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = find(tmp_path, monkeypatch, "acme_models_under_test:build", "def build(config): return config")
    assert str(found) == "the architecture 'acme' of the distribution acme-models (acme_models_under_test:build)"
    assert "acme_models_under_test" not in sys.modules
    assert found.load()("x") == "x"


@pytest.mark.parametrize(
    ("entry", "source", "says"),
    [
        ("acme_models_under_test:build", "import surely_not_there", "(ModuleNotFoundError: No module named 'surely_not_there')"),
        ("acme_models_under_test:build", "raise ValueError('a secret')", "cannot be imported (ValueError)"),
        ("acme_models_under_test:build", "raise SystemExit", "cannot be imported (SystemExit)"),
        ("acme_models_under_test:missing", "", "(AttributeError: module 'acme_models_under_test' has no attribute 'missing')"),
        ("acme_models_under_test:build", "build = 1", "is not callable: it must be a class or a function"),
    ],
)
def test_one_that_cannot_be_used_says_whose_it_is_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, source: str, says: str
) -> None:
    found = find(tmp_path, monkeypatch, entry, source)
    with pytest.raises(FailedPrecondition) as refused:
        found.load()
    assert refused.value.reason == "ARCHITECTURE_BROKEN"
    assert refused.value.metadata == {"architecture": "acme", "distribution": "acme-models"}
    assert says in refused.value.message
    assert "reinstall acme-models" in refused.value.message
    assert "secret" not in refused.value.message
