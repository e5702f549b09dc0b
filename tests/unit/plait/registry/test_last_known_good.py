from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.registry_world import FEATURES, HOME, ITEMS, RANKER, SHOP, USERS, WORLD

from plait.registry import last_known_good
from plait.registry.last_known_good import Unusable
from plait.registry.records import ApiKey, Epochs, FeatureSchema
from plait.registry.resources import snapshot_of

KEY = ApiKey(id="key-1", tenant="shop", sha256="0" * 64, scopes=("rank",), expires_at=5.0)
EPOCHS = {("shop", "item-stats", 2): Epochs(serving=3, previous=2, newest=4), ("shop", "user-profile", 1): Epochs(building=1, newest=1)}
SNAPSHOT = snapshot_of(42, WORLD, [KEY], EPOCHS)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "registry.json"
    last_known_good.write(file, SNAPSHOT)
    assert last_known_good.read(file) == SNAPSHOT
    assert file.stat().st_mode & 0o777 == 0o600
    assert [f.name for f in file.parent.iterdir()] == ["registry.json"]


def test_no_file_is_no_snapshot(tmp_path: Path) -> None:
    assert last_known_good.read(tmp_path / "nothing") is None


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "registry.json"
    last_known_good.write(file, SNAPSHOT)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        last_known_good.write(file, snapshot_of(43, [], []))
    assert last_known_good.read(file) == SNAPSHOT
    assert [f.name for f in tmp_path.iterdir()] == ["registry.json"]


def test_a_folder_in_its_place_is_unusable(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="cannot be read"):
        last_known_good.read(tmp_path)


def change(**fields: Any) -> bytes:
    return json.dumps({**json.loads(last_known_good.encode(SNAPSHOT)), **fields}).encode()


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "JSONDecodeError"),
        (b"[]", "TypeError"),
        (b"null", "TypeError"),
        (b"{}", "KeyError"),
        (b"\xff\xfe\xfd", "damaged"),
        (b"[" * 100_000, "RecursionError"),
        (change(version=2), "version 1"),
        (change(format="something"), "not a plait-registry-snapshot"),
        (change(sha256="0" * 64), "checksum"),
        (change(body="{}"), "checksum"),
        (change(body=5), "AttributeError"),
    ],
)
def test_each_way_to_be_unusable_is_said(content: bytes, part: str) -> None:
    with pytest.raises(Unusable, match=part):
        last_known_good.decode(content)


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_no_flipped_byte_goes_unnoticed(position: int, value: int) -> None:
    content = bytearray(last_known_good.encode(SNAPSHOT))
    content[position % len(content)] = value
    try:
        found = last_known_good.decode(bytes(content))
    except Unusable:
        return
    assert found == SNAPSHOT  # the byte was the same, or in the time stamp


def test_kinds_of_a_newer_build_are_passed_over() -> None:
    body = json.loads(json.loads(last_known_good.encode(SNAPSHOT))["body"])
    body["resources"].append({"kind": "Rollout", "name": "x", "spec": {}})
    assert last_known_good._snapshot(body) == SNAPSHOT


def test_a_file_of_the_build_before_epochs_and_wide_features_still_loads() -> None:
    """The file was written by the commit before `Feature.width`, `FeatureView.versions` and `Snapshot.epochs` came."""
    snapshot = last_known_good.decode(Path("tests/contracts/last-known-good.json").read_bytes())
    views = [dataclasses.replace(view, schemas=(FeatureSchema(id=1, features=view.features),)) for view in (USERS, ITEMS)]
    assert snapshot == snapshot_of(42, [*views, FEATURES, RANKER, HOME, SHOP], [KEY])
