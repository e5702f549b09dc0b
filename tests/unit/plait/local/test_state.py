"""The state folder: one mesh at a time, secrets for the owner only."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from plait.errors import FailedPrecondition
from plait.local.state import StateFolder, write_private


def test_only_one_at_a_time(tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state")
    with state.locked():
        with pytest.raises(FailedPrecondition, match=rf"process {os.getpid()}\) uses .*--state") as failed, state.locked():
            pass
        assert failed.value.reason == "STATE_IN_USE"
        assert state.log("router").parent.is_dir()
    with state.locked():
        pass


def test_the_lock_of_a_dead_process_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("4194304000")
    with StateFolder(tmp_path).locked():
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FailedPrecondition, match="cannot be used: Not a directory"), StateFolder(tmp_path / "file" / "state").locked():
        pass


def test_secrets_are_the_owners(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    path.chmod(0o644)
    write_private(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
