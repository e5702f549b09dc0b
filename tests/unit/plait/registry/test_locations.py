"""Where an artifact reference points, and the references that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.errors import InvalidArgument
from plait.registry import locations
from plait.registry.locations import Prefix


@pytest.mark.parametrize(
    ("text", "path"),
    [("a", "/base/a"), ("./a/../b", "/base/b"), ("/abs", "/abs"), ("file:///abs/a", "/abs/a")],
)
def test_folders_are_made_absolute(text: str, path: str) -> None:
    assert locations.parse(text, Path("/base")) == Path(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://models/ranker/7", Prefix(scheme="s3", bucket="models", path="ranker/7")),
        ("s3://models/ranker/7/", Prefix(scheme="s3", bucket="models", path="ranker/7")),
        ("gs://my.models-1/a b/ü+%41", Prefix(scheme="gs", bucket="my.models-1", path="a b/ü+%41")),
    ],
)
def test_prefixes_are_taken_apart_and_written_back(text: str, expected: Prefix) -> None:
    found = locations.parse(text, Path("/base"))
    assert found == expected
    assert locations.parse(str(found), Path("/base")) == expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("http://h/x", "not a scheme"),
        ("file://rel", "absolute path"),
        ("s3://", "name of a bucket"),
        ("s3:///a", "name of a bucket"),
        ("s3://Bucket/a", "name of a bucket"),
        ("s3://key:secret@bucket/a", "name of a bucket"),
        ("s3://bucket", "whole bucket"),
        ("gs://bucket/", "whole bucket"),
        ("s3://bucket/a//b", "empty part"),
        ("s3://bucket/../b", "'..'"),
        ("s3://bucket/a?versionId=1", "'?'"),
        ("s3://bucket/a\nb", "control character"),
        ("s3://bucket/" + "a" * 901, "longer than 900"),
    ],
)
def test_other_references_are_refused(text: str, part: str) -> None:
    with pytest.raises(InvalidArgument, match=part.replace("?", "[?]")) as refused:
        locations.parse(text, Path("/base"))
    assert refused.value.reason == "ARTIFACT_LOCATION"
    assert "secret" not in str(refused.value)


@given(st.text(max_size=60))
def test_any_address_is_a_prefix_or_refused(rest: str) -> None:
    try:
        found = locations.parse("s3://" + rest, Path("/base"))
    except InvalidArgument:
        return
    assert isinstance(found, Prefix)
    assert locations.parse(str(found), Path("/base")) == found


def test_what_no_folder_can_be_called_is_refused(tmp_path: Path) -> None:
    (tmp_path / "around").symlink_to("around")
    for text in ("around", "a\0b", "file:///a\0b"):
        with pytest.raises(InvalidArgument, match="cannot be the name of a folder") as refused:
            locations.parse(text, tmp_path)
        assert refused.value.reason == "ARTIFACT_LOCATION"
