"""Weights of the architectures that the worker knows, and of nothing else."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tests.fakes.artifacts import artifact_of
from tests.fakes.distribution import install

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
    assert "dlrm, mlp, two_tower_ranker, wide_and_deep" in error.message


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


DLRM = Architecture(name="dlrm", config={"dense": 3, "dim": 4, "tables": (10, 7), "bottom": (6,), "top": (8,)})
WIDE = Architecture(name="wide_and_deep", config={"dense": 3, "dim": 4, "tables": (10, 7), "hidden": (6,), "wide": 20})


@pytest.mark.parametrize("architecture", [DLRM, WIDE], ids=["dlrm", "wide_and_deep"])
@pytest.mark.parametrize("narrow", [False, True])
def test_architectures_with_ids_are_loaded_from_weights_alone(architecture: Architecture, narrow: bool) -> None:
    weights = {name: t.half() if narrow else t for name, t in weights_of(architecture).items()}
    dense, sparse = torch.ones(2, 3, dtype=torch.float16 if narrow else torch.float32), torch.zeros(2, 2, dtype=torch.int64)
    found = architectures.build(architecture, save(weights))(dense, sparse, *([sparse] if architecture is WIDE else []))
    assert (found.shape, found.dtype) == ((2,), dense.dtype)


@pytest.mark.parametrize("architecture", [DLRM, WIDE], ids=["dlrm", "wide_and_deep"])
def test_a_config_larger_than_its_weights_is_refused_before_memory_is_taken(architecture: Architecture) -> None:
    hostile = Architecture(name=architecture.name, config={**architecture.config, "tables": (2**31,) * 256, "dim": 1 << 24})
    content = save(weights_of(architecture))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = refused(hostile, content)
    assert error.reason == "ARTIFACT_INVALID"
    assert "tables.0.weight: expected shape [2147483648, 16777216], found [10, 4]" in error.message
    assert "more" in error.message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB, of the exbibytes it asks for


# --- brought by other distributions

ACME = """
    import torch
    from torch import nn
    from model_worker.backends.architectures import MLP, Config

    class Scaled(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.scale = config.number("scale", 1.0, low=0.0, high=10.0)
            self.inner = MLP((config.size("in"), 1), config.activation())

        def forward(self, x):
            return self.inner(x) * self.scale

    class Forgetful(Scaled):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.register_buffer("mean", torch.zeros(3), persistent=False)

    class Stateful(Scaled):
        def get_extra_state(self):
            return {"a": 1}

    class Stubborn(Scaled):
        def load_state_dict(self, *args, **more):
            raise ValueError("a secret")

    def picky(config: Config) -> nn.Module:
        raise ValueError(f"{config.size('in')} is a secret")

    def wrong(config: Config) -> list:
        return [config.size("in")]
"""
ENTRIES = {name.lower(): f"acme_architectures:{name}" for name in ("Scaled", "Forgetful", "Stateful", "Stubborn", "picky", "wrong")}


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sys.path with the distribution acme-models."""
    install(tmp_path, "acme-models", "plait.architectures", ENTRIES, acme_architectures=ACME)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "acme_architectures", raising=False)
    return tmp_path


SCALED = {"inner.layers.0.weight": torch.ones(1, 3), "inner.layers.0.bias": torch.zeros(1)}


def test_an_installed_architecture_is_served(acme: Path) -> None:
    module = architectures.build(Architecture(name="scaled", config={"in": 3, "scale": 2}), save(SCALED))
    assert module(torch.ones(2, 3)).tolist() == [[6], [6]]
    assert not module.training
    error = refused(Architecture(name="scaled", config={"in": 3, "scale": 11, "depth": 1}), save(SCALED))
    assert error.reason == "ARTIFACT_INVALID"
    assert "scale: expected a number from 0 to 10, found 11; depth: is no argument of it" in error.message


def test_nothing_is_imported_before_a_manifest_asks_for_it(acme: Path) -> None:
    architectures.build(MLP, save(weights_of(MLP)))
    assert "scaled (acme-models)" in refused(Architecture(name="nothing"), b"").message
    assert "acme_architectures" not in sys.modules


def test_two_of_one_name_are_refused_with_both_names(acme: Path) -> None:
    install(acme, "beta-models", "plait.architectures", {"scaled": "nowhere:build", "mlp": "nowhere:build"})
    error = refused(Architecture(name="scaled", config={"in": 3}), save(SCALED))
    assert error.reason == "ARCHITECTURE_AMBIGUOUS"
    assert "acme-models and by beta-models" in error.message
    error = refused(MLP, save(weights_of(MLP)))
    assert error.reason == "ARCHITECTURE_AMBIGUOUS"
    assert "plait-model-worker and by beta-models" in error.message
    architectures.build(RANKER, save(weights_of(RANKER)))  # what nobody else brings is not touched by that


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("forgetful", "keeps mean out of its state_dict"),
        ("stateful", "has _extra_state in its state_dict"),
        ("stubborn", "does not take its own weights (ValueError)"),
        ("picky", "cannot be made with this config (ValueError)"),
        ("wrong", "made list, not a torch.nn.Module"),
    ],
)
def test_an_installed_architecture_that_does_not_work_is_told_with_its_distribution(acme: Path, name: str, says: str) -> None:
    error = refused(Architecture(name=name, config={"in": 3}), save(SCALED))
    assert error.reason == "ARCHITECTURE_BROKEN"
    assert says in error.message
    assert "acme-models" in error.message
    assert "secret" not in error.message


def test_a_config_that_is_wrong_is_told_rather_than_what_the_architecture_made_of_it(acme: Path) -> None:
    assert "in: expected a whole number" in refused(Architecture(name="picky", config={"in": -1}), save(SCALED)).message


VALUES = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.booleans(),
    st.text(max_size=8),
    st.lists(st.integers(-1, 2**40), max_size=300).map(tuple),
    st.sampled_from(["relu", "probability", "logit", (1, 2), (2**31,), 1, 3]),
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([MLP, RANKER, DLRM, WIDE]), st.data())
def test_any_config_is_right_or_refused(architecture: Architecture, data: st.DataObject) -> None:
    changed = data.draw(st.dictionaries(st.sampled_from([*architecture.config, "activation", "output", "more"]), VALUES, max_size=4))
    content = save(weights_of(architecture))
    try:
        architectures.build(Architecture(name=architecture.name, config={**architecture.config, **changed}), content)
    except FailedPrecondition as error:
        assert error.reason == "ARTIFACT_INVALID"  # noqa: PT017 - what was drawn may be right
