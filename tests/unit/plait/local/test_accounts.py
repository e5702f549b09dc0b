"""Who may reach what."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from plait.local.accounts import Account, own, reaches, unprivileged

STRANGER = Account(name="stranger", uid=54321, gid=54321)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of ours below folders that everybody may enter, as far as we can make them so."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    return inner


def test_we_reach_everything_of_ours(tree: Path) -> None:
    tree.parent.chmod(0o700)
    assert reaches(None, tree / "file")


def test_a_private_folder_on_the_way_keeps_others_out(tree: Path) -> None:
    tree.parent.chmod(0o700)
    assert not reaches(STRANGER, tree / "file")


@pytest.mark.parametrize(
    ("mode", "uid", "gid", "expected"), [(0o100, True, False, True), (0o011, True, True, False), (0o010, False, True, True)]
)
def test_owner_then_group_then_others_decide(
    tree: Path, monkeypatch: pytest.MonkeyPatch, mode: int, uid: bool, gid: bool, expected: bool
) -> None:
    account = Account(name="x", uid=os.getuid() if uid else 54321, gid=os.getgid() if gid else 54321)
    tree.chmod(mode)
    monkeypatch.setattr(Path, "parents", property(lambda _: [tree]))  # what lies above is the machine's, not the test's
    assert reaches(account, tree / "file") is expected


def test_only_root_needs_another_account() -> None:
    account = unprivileged()
    assert (account is None) == (os.geteuid() != 0)
    assert account is None or account.uid != 0


def test_files_are_handed_over(tmp_path: Path) -> None:
    own(None, tmp_path)
    account = unprivileged()
    own(account, tmp_path)
    assert tmp_path.stat().st_uid == (account.uid if account else os.getuid())
