"""TorchScript whose loading would touch files: refused before it is loaded."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.fakes.artifacts import load
from tests.fakes.worker_world import scripted
from torch import Tensor, nn

from model_worker.backends import script_guard
from plait.errors import FailedPrecondition
from plait.registry.records import Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", shape=(-1,)),), outputs=(TensorSpec(name="y", dtype="float32", shape=(-1,)),)
)


class Restored(nn.Module):
    """Has a say in how it is restored, as quantized modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[Tensor, bool]) -> None:
        self.weight = state[0]
        self.training = state[1]


class Nested(nn.Module):
    """Sequential names its parts "0", "1", …, which TorchScript's code reaches through getattr."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Sequential(nn.Identity(), nn.ReLU()), nn.Flatten(0))
        self.more = nn.ModuleList([nn.Sequential(nn.ReLU()), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.more:
            x = module(x)
        return self.parts(x) + self.parts[0](x)


def archive(statement: str = "") -> bytes:
    """Return a TorchScript archive of Restored that also runs `statement` when it is loaded."""
    written = io.BytesIO()
    torch.jit.save(scripted(Restored()), written)
    target = io.BytesIO()
    with zipfile.ZipFile(written) as source, zipfile.ZipFile(target, "w") as changed:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith(".py") and statement:
                line = b"    self.training = (state)[1]\n"
                assert line in content
                content = content.replace(line, line + f"    {statement}\n".encode())
            if not name.endswith(".debug_pkl"):
                changed.writestr(name, content)
    return target.getvalue()


def test_plain_torchscript_is_loaded() -> None:
    [y] = load(archive(), "torchscript", SIGNATURE)([np.array([1, 2], np.float32)])
    assert y.tolist() == [2, 4]


def test_modules_within_modules_are_loaded() -> None:
    written = io.BytesIO()
    torch.jit.save(scripted(Nested()), written)
    with zipfile.ZipFile(io.BytesIO(written.getvalue())) as source:
        assert any(b"getattr" in source.read(name) for name in source.namelist())
    [y] = load(written.getvalue(), "torchscript", SIGNATURE)([np.array([1, -2], np.float32)])
    assert y.tolist() == [2, 0]


@pytest.mark.parametrize(
    "statement",
    [
        'torch.save((state)[0], "MARK")',
        'torch . save((state)[0], "MARK")',
        'ops.aten.save((state)[0], "MARK")',
        '_0 = torch.from_file("MARK", True, 1)',
        '_0 = getattr(torch, "sa\\x76e")((state)[0], "MARK")',
        '_0 = getattr(torch, "sa" "ve")((state)[0], "MARK")',
        '_0 = getattr(str(state, "a"), "sa\\x76e")((state)[0], "MARK")',
        '_0 = getattr(getattr(torch, "a"), "sa\\x76e")((state)[0], "MARK")',
        '_0 = getattr(torch, name)((state)[0], "MARK")',
    ],
)
def test_what_would_touch_a_file_while_it_is_loaded_is_refused(tmp_path: Path, statement: str) -> None:
    mark = tmp_path / "it-ran"
    with pytest.raises(FailedPrecondition) as refused:
        load(archive(statement.replace("MARK", str(mark))), "torchscript", SIGNATURE)
    assert refused.value.reason == "ARTIFACT_UNSAFE"
    assert not mark.exists()


def test_a_harmless_name_is_no_reason() -> None:
    assert script_guard.check(archive("_0 = (state)[0]"))


def test_an_archive_of_another_kind_is_refused() -> None:
    written = io.BytesIO()
    torch.save({"weight": torch.ones(1)}, written)
    with pytest.raises(FailedPrecondition) as refused:
        load(written.getvalue(), "torchscript", SIGNATURE)
    assert refused.value.reason in {"ARTIFACT_INVALID", "ARTIFACT_UNSAFE"}
