"""Data lent out and brought back, whole whatever happens."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from plait.local import data_home
from plait.local.accounts import Account
from plait.local.data_home import DataHome

US = Account(name="us", uid=os.getuid(), gid=os.getgid())


@pytest.fixture
def given(tmp_path: Path) -> Path:
    folder = tmp_path / "state" / "postgres"
    (folder / "pgdata" / "base").mkdir(parents=True)
    (folder / "pgdata" / "base" / "1").write_text("rows")
    (folder / "password").write_text("hush")
    return folder


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch, given: Path) -> None:
    """Make the given folder one that the account cannot reach."""
    monkeypatch.setattr(data_home, "reaches", lambda _account, path: not path.is_relative_to(given))


@pytest.fixture(params=["same file system", "another file system"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, given: Path) -> None:
    rename = Path.rename

    def rename_within(self: Path, target: Path) -> Path:
        if self.is_relative_to(given) != target.is_relative_to(given):
            raise OSError(18, "Invalid cross-device link")
        return rename(self, target)

    if request.param == "another file system":
        monkeypatch.setattr(Path, "rename", rename_within)


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


WHOLE = {"pgdata/base/1": "rows", "password": "hush"}


def test_where_the_account_reaches_it_nothing_moves(given: Path, shared: Path) -> None:
    home = DataHome(given, None, prefix="x-", shared=shared)
    home.move_in()
    assert home.path == given
    home.move_out()
    assert tree(given) == WHOLE
    assert [*shared.iterdir()] == []


def test_a_temporary_one_is_removed() -> None:
    home = DataHome(None, US, prefix="x-")
    home.move_in()
    (home.path / "file").touch()
    home.move_out()
    assert not home.path.exists()


@pytest.mark.usefixtures("closed", "file_system")
def test_what_is_out_of_reach_is_lent_and_brought_back(given: Path, shared: Path) -> None:
    for turn in range(2):
        home = DataHome(given, US, prefix="x-", shared=shared)
        home.move_in()
        assert home.path.parent == shared
        assert tree(home.path) == {**WHOLE, **({"new": "0"} if turn else {})}
        assert "lent to" in repr(home)
        assert [p.name for p in given.iterdir()] == ["location"]
        (home.path / "new").write_text("0")
        home.move_out()
        assert tree(given) == {**WHOLE, "new": "0"}
        assert [*shared.iterdir()] == []


@pytest.mark.usefixtures("closed", "file_system")
def test_after_a_crash_it_is_found_where_it_was(given: Path, shared: Path) -> None:
    crashed = DataHome(given, US, prefix="x-", shared=shared)
    crashed.move_in()
    home = DataHome(given, US, prefix="x-", shared=shared)
    assert home.path == crashed.path
    home.move_in()
    assert tree(home.path) == WHOLE
    home.move_out()
    assert tree(given) == WHOLE


@pytest.mark.usefixtures("closed")
@pytest.mark.parametrize("rest", ["pgdata.part", "pgdata.old"])
def test_moves_cut_off_midway_are_tidied(given: Path, shared: Path, rest: str) -> None:
    home = DataHome(given, US, prefix="x-", shared=shared)
    for folder in (given, home.path):
        (folder / rest).mkdir()
        (folder / rest / "half").touch()
    home.move_in()
    assert tree(home.path) == WHOLE
    (given / "pgdata").mkdir()  # copied home and renamed, but not yet removed where it came from
    home.move_out()
    assert not home.path.exists()
