"""Weights of the architectures that the worker knows, and of nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tests.fakes.artifacts import artifact_of

from model_worker import backends
from model_worker.backends import LoadOptions, architectures
from plait.errors import FailedPrecondition
from plait.registry.artifact import Architecture
from plait.registry.records import Batching, Signature, TensorSpec

MLP = Architecture(name="mlp", config={"in": 3, "hidden": (4,), "out": 2})
RANKER = Architecture(name="two_tower_ranker", config={"user": 3, "item": 2, "hidden": (4,), "out": 5, "activation": "gelu"})


def weights_of(architecture: Architecture) -> dict[str, torch.Tensor]:
    config = architectures.Config(architecture.config)
    return dict(architectures.BUILDERS[architecture.name](config).state_dict())


def refused(architecture: Architecture | None, content: bytes) -> FailedPrecondition:
    with pytest.raises(FailedPrecondition) as found:
        architectures.build(architecture, content)
    return found.value


def test_a_network_computes_what_its_weights_say() -> None:
    weights = weights_of(MLP)
    x = torch.randn(5, 3)
    found = architectures.build(MLP, save(weights))(x)
    hidden = torch.relu(x @ weights["layers.0.weight"].T + weights["layers.0.bias"])
    torch.testing.assert_close(found, hidden @ weights["layers.1.weight"].T + weights["layers.1.bias"])


def test_a_ranker_scores_each_item_for_its_own_user(tmp_path: Path) -> None:
    said = Signature(
        inputs=(
            TensorSpec(name="user", dtype="float32", shape=(1, 3), per="request"),
            TensorSpec(name="item", dtype="float32", shape=(-1, 2)),
        ),
        outputs=(TensorSpec(name="score", dtype="float32", shape=(-1,)),),
    )
    batching = Batching(row_splits="row_splits")
    content = save(weights_of(RANKER))
    model = backends.load(artifact_of(tmp_path, content, "safetensors", said, architecture=RANKER, batching=batching), LoadOptions())
    users, items = (np.random.default_rng(1).normal(size=shape).astype(np.float32) for shape in ((3, 3), (5, 2)))
    [together] = model([users, items, np.int64([0, 2, 2, 5])])
    [first] = model([users[:1], items[:2], np.int64([0, 2])])
    [last] = model([users[2:], items[2:], np.int64([0, 3])])
    np.testing.assert_allclose(together, np.concatenate([first, last]), rtol=1e-5)
    assert model.memory_bytes == sum(t.nbytes for t in weights_of(RANKER).values())


def test_half_precision_may_stand_for_float32() -> None:
    weights = {name: t.bfloat16() for name, t in weights_of(MLP).items()}
    assert architectures.build(MLP, save(weights))(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", [None, Architecture(name="os.system"), Architecture(name="torch.nn.Linear")])
def test_what_is_not_in_the_table_is_refused(architecture: Architecture | None) -> None:
    error = refused(architecture, save(weights_of(MLP)))
    assert error.reason == "ARCHITECTURE_UNKNOWN"
    assert "mlp, two_tower_ranker" in error.message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"in": 0}, ["in: expected", "out: expected"]),
        ({"in": True, "out": 1}, ["in: expected"]),
        ({"in": 1 << 40, "out": 1}, ["in: expected"]),
        ({"in": 3, "out": 2, "hidden": (0,)}, ["hidden: expected"]),
        ({"in": 3, "out": 2, "activation": "eval"}, ["activation: expected one of relu"]),
        ({"in": 3, "out": 2, "depth": 2}, ["depth: is no argument"]),
    ],
)
def test_every_problem_of_a_config_is_named(config: dict[str, Any], words: list[str]) -> None:
    error = refused(Architecture(name="mlp", config=config), save(weights_of(MLP)))
    assert error.reason == "ARTIFACT_INVALID"
    assert all(word in error.message for word in words)


def test_every_mismatch_of_the_weights_is_named() -> None:
    weights = weights_of(MLP)
    del weights["layers.0.bias"]
    weights["layers.0.weight"] = torch.zeros(4, 9)
    weights["layers.1.bias"] = torch.zeros(2, dtype=torch.int32)
    weights["more"] = torch.zeros(1)
    message = refused(MLP, save(weights)).message
    for words in (
        "layers.0.bias: is missing",
        "layers.0.weight: expected shape [4, 3], found [4, 9]",
        "layers.1.bias: expected float32, found int32",
        "more: is no weight of it",
    ):
        assert words in message


def test_types_are_not_mixed() -> None:
    weights = weights_of(MLP)
    weights["layers.0.bias"] = weights["layers.0.bias"].half()
    assert "layers.0.bias: expected float32, found float16" in refused(MLP, save(weights)).message


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x80\x04K\x01."])
def test_what_is_no_safetensors_file_is_refused(content: bytes) -> None:
    assert refused(MLP, content).reason == "ARTIFACT_INVALID"
