"""A compiled package, made and run by the real compiler."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.fakes.artifacts import load
from torch import nn

from plait.registry.records import Signature, TensorSpec


@pytest.mark.skipif(not os.environ.get("PLAIT_SLOW_TESTS"), reason="compiles for half a minute: set PLAIT_SLOW_TESTS=1")
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++ to compile the test's model")
def test_a_package_answers_as_its_module_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    module = nn.Sequential(nn.Linear(4, 2), nn.ReLU()).eval()
    program = torch.export.export(module, (torch.ones(2, 4),), dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=64)},))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler uses what torch deprecates
        file = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    said = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(-1, 4)),), outputs=(TensorSpec(name="y", dtype="float32", shape=(-1, 2)),)
    )
    model = load(Path(file).read_bytes(), "aotinductor", said, allow_native=True)
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    [found] = model([x])
    np.testing.assert_allclose(found, module(torch.from_numpy(x)).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert model.platform == "pytorch_aotinductor"
