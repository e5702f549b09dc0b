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
from tests.fakes.gpu import needs_gpu
from torch import nn

from plait.errors import FailedPrecondition
from plait.registry.records import Signature, TensorSpec

pytestmark = [
    pytest.mark.skipif(not os.environ.get("PLAIT_SLOW_TESTS"), reason="compiles for half a minute: set PLAIT_SLOW_TESTS=1"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++ to compile the test's model"),
]
SAID = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", shape=(-1, 4)),), outputs=(TensorSpec(name="y", dtype="float32", shape=(-1, 2)),)
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))


def compiled(folder: Path, device: str) -> tuple[nn.Module, bytes]:
    module = nn.Sequential(nn.Linear(4, 2), nn.ReLU()).eval().to(device)
    rows = torch.export.Dim("rows", min=1, max=64)
    program = torch.export.export(module, (torch.ones(2, 4, device=device),), dynamic_shapes=({0: rows},))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler uses what torch deprecates
        file = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    return module.cpu(), Path(file).read_bytes()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=needs_gpu)])
def test_a_package_answers_as_its_module_does(tmp_path: Path, device: str) -> None:
    module, package = compiled(tmp_path, device)
    model = load(package, "aotinductor", SAID, allow_native=True, device=device, buckets=(5,))
    x = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    for _ in range(2):
        [found] = model([x])
        np.testing.assert_allclose(found, module(torch.from_numpy(x)).detach().numpy(), rtol=1e-5, atol=1e-6)
    assert model.platform == "pytorch_aotinductor"


@needs_gpu
@pytest.mark.parametrize(("made_for", "served_on"), [("cpu", "cuda:0"), ("cuda:0", "cpu")])
def test_a_package_for_another_kind_of_device_is_refused(tmp_path: Path, made_for: str, served_on: str) -> None:
    _, package = compiled(tmp_path, made_for)
    with pytest.raises(FailedPrecondition, match=f"was compiled for {made_for.partition(':')[0]}") as refused:
        load(package, "aotinductor", SAID, allow_native=True, device=served_on)
    assert refused.value.reason == "DEVICE_UNAVAILABLE"
