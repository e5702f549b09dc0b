from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plait.cli.features.parquet import Position
from plait.cli.features.resuming import Progress
from plait.errors import FailedPrecondition

KNOWN: dict[str, Any] = {"file": {"size": 5}, "tenant": "shop", "view": "stats", "version": 2}


def test_what_was_noted_is_found_again(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    Progress(**KNOWN, epoch=3).at(Position(4, 5), {"ID_INVALID": 2}).write(file)
    found = Progress.read(file, **KNOWN)
    assert (found.epoch, found.position, found.refused) == (3, Position(4, 5), {"ID_INVALID": 2})
    assert [f.name for f in tmp_path.iterdir()] == ["rows.parquet.plait-progress"]
    Progress.forget(file)
    Progress.forget(file)
    assert not list(tmp_path.iterdir())


def test_what_is_about_something_else_is_not_resumed(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    Progress(**KNOWN, epoch=3).write(file)
    with pytest.raises(FailedPrecondition, match="another file, tenant") as caught:
        Progress.read(file, **KNOWN | {"file": {"size": 6}, "tenant": "rival"})
    assert caught.value.reason == "RESUME_MISMATCH"


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"file": 1}', '{"unknown": 1}'])
def test_what_cannot_be_read_is_said(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "rows.parquet"
    if content is not None:
        Progress.path_of(file).write_text(content)
    with pytest.raises(FailedPrecondition) as caught:
        Progress.read(file)
    assert caught.value.reason == "RESUME_MISMATCH"
