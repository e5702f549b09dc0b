"""Files of the skew log, whole, torn and foreign."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.api.feature_retrieval.v1 import served_row_pb2
from plait.cli.features import served_rows
from plait.errors import InvalidArgument


def delimited(request_id: str) -> bytes:
    data = served_row_pb2.ServedRow(request_id=request_id).SerializeToString()
    size, out = len(data), bytearray()
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*out, size]) + data


@given(st.lists(st.integers(0, 400), max_size=5), st.data())
def test_what_was_written_is_read_up_to_where_it_is_torn(sizes: list[int], data: st.DataObject) -> None:
    import tempfile

    pieces = [delimited("x" * size) for size in sizes]
    whole = b"".join(pieces)
    cut = data.draw(st.integers(0, len(whole)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "served-1-1-1.rows"
        path.write_bytes(whole[:cut])
        ends = [sum(map(len, pieces[: n + 1])) for n in range(len(pieces))]
        assert [len(row.request_id) for row in served_rows.read(path)] == [
            size for size, end in zip(sizes, ends, strict=True) if end <= cut
        ]


def test_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "served-1-1-1.rows"
    path.write_bytes(b"\3\xff\xff\xff")
    with pytest.raises(InvalidArgument, match="from byte 0 on") as caught:
        list(served_rows.read(path))
    assert caught.value.reason == "SKEW_LOG_UNREADABLE"


def test_files_are_found_in_a_folder_or_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"skew_log\.share above 0"):
        served_rows.paths_of(tmp_path)
    names = [f"served-{n}-1-1.rows" for n in (2, 1)]
    for name in (*names, "else.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in served_rows.paths_of(tmp_path)] == sorted(names)
    assert served_rows.paths_of(tmp_path / names[0]) == [tmp_path / names[0]]
