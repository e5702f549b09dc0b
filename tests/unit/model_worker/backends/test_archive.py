"""Zips: only what is expected gets through, once, and in bounded size."""

from __future__ import annotations

import io
import re
import zipfile

import pytest

from model_worker.backends import archive
from plait.errors import FailedPrecondition

EXPECTED, LEFT_OUT = re.compile(r"data/\d+|code/.+"), re.compile(r"extra/.*")


def zipped(*members: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as opened:
        for name, content in members:
            opened.writestr(name, content)
    return target.getvalue()


def read(content: bytes) -> dict[str, archive.Content]:
    return archive.members(content, EXPECTED, LEFT_OUT, written_by="a test")


def refused(content: bytes) -> str:
    with pytest.raises(FailedPrecondition) as error:
        read(content)
    return error.value.reason


def test_members_come_through_and_back() -> None:
    found = read(zipped(("m/data/0", b"x"), ("m/code/a.py", b"y"), ("m/extra/note", b"z")))
    assert found == {"data/0": b"x", "code/a.py": b"y"}
    assert read(archive.zipped(found)) == found


def test_what_is_compressed_is_inflated_up_to_a_limit() -> None:
    assert read(zipped(("m/code/a.py", b"y" * 1000), compression=zipfile.ZIP_DEFLATED)) == {"code/a.py": b"y" * 1000}
    assert refused(zipped(("m/code/a.py", bytes(65 << 20)), compression=zipfile.ZIP_DEFLATED)) == "ARTIFACT_INVALID"


def test_what_is_not_expected_or_comes_twice_is_refused() -> None:
    assert refused(zipped(("m/data/0", b"x"), ("m/data/0.so", b"y"))) == "ARTIFACT_UNSAFE"
    assert refused(zipped(("m/data/0", b"x"), ("n/data/0", b"y"))) == "ARTIFACT_UNSAFE"
    assert refused(zipped(("version", b"1"))) == "ARTIFACT_UNSAFE"


def test_what_is_damaged_is_called_so() -> None:
    good = zipped(("m/data/0", b"content"))
    assert refused(good.replace(b"content", b"kontent")) == "ARTIFACT_INVALID"
    assert refused(good[:20]) == "ARTIFACT_INVALID"


def test_a_large_member_is_a_view_that_was_checked() -> None:
    content = bytes(range(256)) * 8192
    whole = zipped(("m/code/a.py", b"y"), ("m/data/0", content), ("m/data/1", b"x"))
    found = read(whole)
    assert isinstance(found["data/0"], memoryview)
    assert found["data/0"].obj is whole
    assert found == {"code/a.py": b"y", "data/0": content, "data/1": b"x"}
    assert read(archive.zipped(found)) == found
    damaged = bytearray(whole)
    damaged[whole.index(content) + 1_000_000] ^= 1
    assert refused(bytes(damaged)) == "ARTIFACT_INVALID"


def test_a_large_member_that_is_cut_off_is_damaged() -> None:
    whole = zipped(("m/data/0", bytes(2 << 20)))
    at = whole.index(b"PK\x01\x02")
    assert refused(whole[: at - 1000] + whole[at:]) == "ARTIFACT_INVALID"
