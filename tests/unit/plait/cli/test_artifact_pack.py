"""What the flags of `plait artifact pack` mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from plait.cli import artifact_pack
from plait.errors import Violation


@pytest.mark.parametrize(
    ("text", "value"),
    [("8", 8), ("0.5", 0.5), ("true", True), ("relu", "relu"), ("[256, 128]", (256, 128)), ("[", "["), ("'8'", "8")],
)
def test_arguments_are_read_as_yaml_reads_them(text: str, value: object) -> None:
    assert artifact_pack._value(text) == value
    assert type(artifact_pack._value(text)) is type(value)


@pytest.mark.parametrize("text", ["x", "x:float32", "x:float32:1:column", "x:float32:1:request:2"])
def test_a_tensor_needs_its_parts(text: str) -> None:
    problems: list[Violation] = []
    assert artifact_pack._tensor("--input", text, problems) is None
    assert [p.field for p in problems] == ["--input"]


def test_an_empty_folder_is_said_to_be_empty(tmp_path: Path) -> None:
    assert "put the model's files in it" in artifact_pack._what_is_missing("--entry", tmp_path)
    for number in range(12):
        (tmp_path / f"{number:02}.bin").write_bytes(b"")
    assert artifact_pack._what_is_missing("--entry", tmp_path).endswith("09.bin, …")
