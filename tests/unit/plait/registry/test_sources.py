"""One contract for every place an artifact can lie in: a folder, S3 and Google Cloud Storage, the latter two spoken to by obstore itself."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.fakes.object_store import ObjectStore

from plait.errors import FailedPrecondition, InvalidArgument, PlaitError
from plait.registry import locations
from plait.registry.artifact import FileDigest
from plait.registry.locations import Prefix
from plait.registry.sources import CHUNK_BYTES, FolderSource, Source, StoreOptions, copy, open_source, read_manifest, read_signature

OPTIONS = StoreOptions(timeout_s=20, stall_s=5, connect_timeout_s=2, retries=1, allow_http=True)
NAMES = ("model.pt", "deep/er/vocab ü+%41.txt", "empty")
LARGE = bytes(range(256)) * (CHUNK_BYTES // 100)

Place = Callable[[dict[str, bytes]], Source]


@pytest.fixture(params=["folder", "s3", "gs"])
def place(request: pytest.FixtureRequest, tmp_path: Path, object_store: ObjectStore) -> Place:
    """Put files somewhere and return what reads them."""

    def put(files: dict[str, bytes]) -> Source:
        if request.param == "folder":
            for name, content in files.items():
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_bytes(content)
            return open_source(tmp_path, OPTIONS)
        object_store.objects.update({f"models/ranker/7/{name}": content for name, content in files.items()})
        return open_source(locations.parse(f"{request.param}://models/ranker/7", tmp_path), OPTIONS)

    return put


def digest(content: bytes) -> FileDigest:
    return FileDigest(sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))


def refusal(source: Source, name: str, expected: FileDigest) -> PlaitError:
    with pytest.raises(PlaitError) as refused:
        copy(source, name, expected, lambda _: None)
    return refused.value


@pytest.mark.parametrize("name", NAMES)
def test_a_file_arrives_whole_and_in_pieces(place: Place, name: str) -> None:
    content = b"" if name == "empty" else LARGE
    source, found = place({name: content}), bytearray()
    sizes: list[int] = []
    copy(source, name, digest(content), lambda chunk: (found.extend(chunk), sizes.append(len(chunk))))
    assert bytes(found) == content
    assert len(sizes) >= len(content) // (4 * CHUNK_BYTES)


def test_small_files_are_read_up_to_a_limit(place: Place) -> None:
    source = place({"model.yaml": b"0123456789"})
    assert source.read("model.yaml", 10) == b"0123456789"
    assert source.read("model.yaml", 4) == b"01234"
    assert read_manifest(source) == b"0123456789"


def test_what_is_not_there_is_named(place: Place) -> None:
    source = place({"other": b"x"})
    with pytest.raises(FailedPrecondition, match="there is no artifact at") as refused:
        read_manifest(source)
    assert refused.value.reason == "ARTIFACT_MISSING"
    assert str(source) in str(refused.value)
    assert read_signature(source) is None
    gone = refusal(source, "model.pt", digest(b"x"))
    assert (gone.reason, gone.metadata["file"]) == ("ARTIFACT_CORRUPT", "model.pt")
    assert "is missing" in str(gone)


@pytest.mark.parametrize("content", [b"weightz", b"weight", b""])
def test_other_bytes_are_refused_with_both_digests(place: Place, content: bytes) -> None:
    refused = refusal(place({"model.pt": content}), "model.pt", digest(b"weights"))
    assert refused.reason == "ARTIFACT_CORRUPT"
    assert digest(content).sha256 in str(refused)
    assert digest(b"weights").sha256 in str(refused)


def test_more_bytes_than_promised_are_not_read(place: Place) -> None:
    source, written = place({"model.pt": LARGE}), bytearray()
    with pytest.raises(FailedPrecondition, match="holds more than the 7 bytes"):
        copy(source, "model.pt", digest(b"weights"), written.extend)
    assert not written


def test_links_out_of_a_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "link").symlink_to(tmp_path / "secret")
    refused = refusal(FolderSource(tmp_path / "m"), "link", digest(b"secret"))
    assert refused.reason == "ARTIFACT_CORRUPT"
    assert "is not opened" in str(refused)


def test_folders_need_no_object_store_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plait.registry.object_store", None)
    assert isinstance(open_source(tmp_path, OPTIONS), FolderSource)
    with pytest.raises(FailedPrecondition, match=r"pip install 'plait\[artifacts\]'"):
        open_source(Prefix(scheme="s3", bucket="models", path="m"), OPTIONS)


@pytest.mark.parametrize("name", ["deep", "deep/vocab.txt"])
def test_a_file_that_may_not_be_read_is_told_from_one_that_is_not_there(tmp_path: Path, name: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "vocab.txt").write_bytes(b"a")
    before = (tmp_path / name).stat().st_mode
    (tmp_path / name).chmod(0)
    if os.access(tmp_path / name, os.R_OK):
        pytest.skip("this user, root, may read everything")
    assert refusal(FolderSource(tmp_path), "deep/vocab.txt", digest(b"a")).reason == "ARTIFACT_FORBIDDEN"
    (tmp_path / name).chmod(before)


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"weights")
    with pytest.raises(InvalidArgument, match=r"model\.onnx is a file: name the artifact's folder"):
        read_manifest(FolderSource(tmp_path / "model.onnx"))


def test_links_that_go_round_in_circles_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert refusal(FolderSource(tmp_path), "a", digest(b"x")).reason == "ARTIFACT_CORRUPT"
