"""A pickle is told from the formats that hold one inside, over files that the libraries themselves write."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from plait.registry import pickles

MODULE = torch.nn.Linear(2, 1).eval()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_what_pickle_writes_is_one(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "m.bin").write_bytes(pickle.dumps({"w": 1}, protocol=protocol))
    assert pickles.is_pickle(tmp_path / "m.bin")


def test_what_torch_save_writes_is_one(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save(MODULE.state_dict(), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        assert pickles.is_pickle(tmp_path / "m.pt")


def test_what_plait_loads_is_none(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(MODULE, (torch.ones(2, 2),)), tmp_path / "m.pt2")
    save_file(MODULE.state_dict(), tmp_path / "m.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(MODULE).save(tmp_path / "m.pt")
    (tmp_path / "m.zip").write_bytes(b"PK\x03\x04 and no archive")
    (tmp_path / "m.onnx").write_bytes(b"")
    assert [file.name for file in tmp_path.iterdir() if pickles.is_pickle(file)] == []
    assert not pickles.is_pickle(tmp_path / "nothing")
    assert not pickles.is_pickle(tmp_path)
