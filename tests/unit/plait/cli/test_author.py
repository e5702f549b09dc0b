from __future__ import annotations

import pytest

from plait.cli.author import author


def test_an_account_without_a_name_is_still_an_author(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert author().startswith("unknown@")
