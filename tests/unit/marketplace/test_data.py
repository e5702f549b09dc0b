"""MovieLens' files, read as a marketplace; fetched only when they are not there, and refused when they are not themselves."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from marketplace import data as data_module
from marketplace.data import Dataset, cache_folder, load, parse
from plait.errors import FailedPrecondition, Unavailable

INTER = """user_id:token\titem_id:token\trating:float\ttimestamp:float
2\t11\t3\t300
1\t10\t5\t100
2\t10\t4\t200
1\t12\t1\t200
"""
ITEM = """item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq
10\tToy Story\t1995\tAnimation Comedy
11\tunknown\tunknown\tunknown
12\tFargo\t1996\tCrime
"""
USER = """user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token
1\t24\tM\ttechnician\t85711
2\t53\tF\tartist\t94043
"""


def wheel(folder: Path, **files: str) -> Path:
    path = folder / "recbole-1.2.1-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"recbole/dataset_example/ml-100k/ml-100k.{name}", text)
    return path


def assert_same(one: Dataset, other: Dataset) -> None:
    for name in Dataset.__slots__:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_the_files_become_arrays() -> None:
    data = parse(INTER, ITEM, USER)
    assert (data.user_ids, data.item_ids) == (("1", "2"), ("10", "11", "12"))
    assert data.titles == ("Toy Story (1995)", "unknown", "Fargo (1996)")
    assert (data.age.tolist(), data.male.tolist()) == ([24, 53], [1, 0])
    assert [data.occupations[at] for at in data.occupation.tolist()] == ["technician", "artist"]
    assert data.genre_names == ("Animation", "Comedy", "Crime", "unknown")
    assert data.genres.tolist() == [[1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]
    assert data.year.tolist() == [1995, 0, 1996]


def test_events_are_in_time_order_and_those_of_one_second_as_they_were() -> None:
    data = parse(INTER, ITEM, USER)
    assert data.event_time_s.tolist() == [100, 200, 200, 300]
    assert [data.user_ids[at] for at in data.event_user.tolist()] == ["1", "2", "1", "2"]
    assert [data.item_ids[at] for at in data.event_item.tolist()] == ["10", "10", "12", "11"]
    assert data.rating.tolist() == [5, 4, 1, 3]


def test_dtypes_are_the_documented_ones(data: Dataset) -> None:
    for name in ("age", "male", "genres", "year", "rating"):
        assert getattr(data, name).dtype == np.float32, name
    for name in ("occupation", "event_user", "event_item", "event_time_s"):
        assert getattr(data, name).dtype == np.int64, name
    assert (np.diff(data.event_time_s) >= 0).all()


def test_a_wheel_in_the_cache_is_read_without_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: Any, data: Dataset) -> None:
    files = {name: getattr(texts, name) for name in ("inter", "item", "user")}
    wheel(tmp_path, **files)
    monkeypatch.setattr(data_module, "_DIGESTS", {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()})
    monkeypatch.setattr(data_module.subprocess, "run", lambda *_, **__: pytest.fail("it was there"))
    assert_same(load(tmp_path), data)
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    assert_same(load(), data)


def test_files_that_are_not_themselves_are_refused(tmp_path: Path) -> None:
    path = wheel(tmp_path / "changed", inter=INTER, item=ITEM, user=USER)
    cut = path.read_bytes()[:-40]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / path.name).write_bytes(cut)
    wheel(tmp_path / "empty")
    for folder in ("changed", "cut", "empty"):
        with pytest.raises(FailedPrecondition, match="delete the wheel and try again") as caught:
            load(tmp_path / folder)
        assert caught.value.reason == "DATA_CORRUPT"


def test_when_it_cannot_be_fetched_it_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # a real pip that may not use the network
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(Unavailable, match=r"recbole==1\.2\.1") as caught:
        load(tmp_path / "cache")
    assert caught.value.reason == "DATA_UNAVAILABLE"
    assert str(tmp_path / "cache") in caught.value.message


def test_where_fetched_data_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLAIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "plait"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "plait"
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
