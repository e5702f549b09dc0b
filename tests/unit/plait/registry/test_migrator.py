from __future__ import annotations

from pathlib import Path

import pytest

from plait.errors import FailedPrecondition, Internal
from plait.registry.migrator import Migration, load, pending, shipped

ONE = Migration(version=1, name="one", sql="create table a (b int);\n")
TWO = Migration(version=2, name="two", sql="create table c (d int);\n")


def test_the_shipped_migrations_are_numbered_without_gaps() -> None:
    assert [m.version for m in shipped()] == list(range(1, len(shipped()) + 1))
    assert str(shipped()[0]) == "0001_registry"


def test_files_are_read_in_order_of_their_numbers_and_others_passed_over(tmp_path: Path) -> None:
    for migration in (TWO, ONE):
        (tmp_path / f"{migration}.sql").write_text(migration.sql)
    (tmp_path / "README.md").write_text("not a migration")
    assert load(tmp_path) == (ONE, TWO)


@pytest.mark.parametrize("names", [["0002_two.sql"], ["0001_a.sql", "0001_b.sql"], ["0001_a.sql", "0003_c.sql"]])
def test_gaps_and_doubles_are_refused(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("select 1")
    with pytest.raises(Internal, match="not numbered"):
        load(tmp_path)


def test_what_is_pending_is_what_was_not_applied() -> None:
    assert pending([ONE, TWO], {}) == (ONE, TWO)
    assert pending([ONE, TWO], {1: ONE.sha256}) == (TWO,)
    assert pending([ONE], {1: ONE.sha256, 2: "of a newer build"}) == ()


def test_an_edited_one_is_refused_even_if_nothing_is_pending() -> None:
    with pytest.raises(FailedPrecondition, match="0001_one was edited") as caught:
        pending([ONE, TWO], {1: "other", 2: TWO.sha256})
    assert caught.value.reason == "MIGRATION_EDITED"


def test_line_ends_do_not_change_a_migration() -> None:
    assert Migration(version=1, name="one", sql=ONE.sql.replace("\n", "\r\n")).sha256 == ONE.sha256
