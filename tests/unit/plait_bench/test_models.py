"""The networks: the same whenever and in whatever format they are made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from plait.registry import artifact
from plait_bench.models import HEAVY, MLP, Network, publish

SMALL = Network("small", (3, 5, 4, 1))


def test_weights_rows_and_scores_are_the_same_every_time() -> None:
    again = Network("small", (3, 5, 4, 1))
    rows = SMALL.rows(6)
    assert rows.shape == (6, 3)
    assert rows.dtype == np.float32
    assert np.array_equal(rows, again.rows(6))
    assert np.array_equal(SMALL.scores(rows), again.scores(rows))
    assert (MLP.widths, HEAVY.widths) == ((80, 256, 128, 1), (1024, 2048, 2048, 1))


def test_both_formats_hold_the_same_network(tmp_path: Path) -> None:
    rows = SMALL.rows(7)
    SMALL.save_torchscript(tmp_path / "m.pt")
    SMALL.save_onnx(tmp_path / "m.onnx")
    script = torch.jit.load(str(tmp_path / "m.pt"))(torch.from_numpy(rows)).detach().numpy()  # type: ignore[no-untyped-call]
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    (onnx,) = session.run(None, {"x": rows})
    np.testing.assert_allclose(script, SMALL.scores(rows), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(onnx, SMALL.scores(rows), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format_", ["torchscript", "onnx"])
def test_what_is_published_can_be_verified(tmp_path: Path, format_: str) -> None:
    model = publish(SMALL, "m", tmp_path / "m", format_=format_, max_rows=7)
    version = model.resolve("1")
    assert version is not None
    manifest = artifact.read_pinned(version.artifact, version.digest)
    artifact.verify_files(version.artifact, manifest)
    assert (manifest.format, manifest.batching.max_rows, manifest.inputs[0].shape) == (format_, 7, (-1, 3))
