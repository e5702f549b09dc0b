"""The command line, run as a person would, in an empty folder and without anybody's settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from plait.cli.main import app


@pytest.fixture
def plait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `plait …`; the result has exit_code, stdout and stderr. Wide enough that no message is broken into lines."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith("PLAIT_") or name in {"GITHUB_ACTIONS", "FORCE_COLOR", "PY_COLORS"}:
            monkeypatch.delenv(name)

    def run(*words: object, **options: Any) -> Result:
        env = {"COLUMNS": "400", "TERM": "dumb", "NO_COLOR": "1", **options.pop("env", {})}
        return CliRunner().invoke(app, [str(word) for word in words], env=env, **options)

    return run
