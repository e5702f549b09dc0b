"""`plait version`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable

import pytest
from typer.testing import Result


def test_versions_in_either_form(plait: Callable[..., Result]) -> None:
    document = json.loads(plait("version", "--json").stdout)
    assert document["plait"] == importlib.metadata.version("plait")
    assert document["python"] == platform.python_version()
    assert plait("version").stdout.splitlines() == [f"{name} {version}" for name, version in document.items()]


def test_what_is_not_installed_is_left_out(plait: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "plait":
            return "1.2.3"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    assert set(json.loads(plait("version", "--json").stdout)) == {"plait", "python", "platform"}
