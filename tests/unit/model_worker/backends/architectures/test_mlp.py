"""A network computes what its weights say."""

from __future__ import annotations

import torch
from torch import nn

from model_worker.backends.architectures import mlp
from model_worker.backends.architectures.config import Config


def test_it_is_linear_layers_with_activations_between_them() -> None:
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    module = mlp.build(Config({"in": 3, "hidden": (4, 5), "out": 2, "activation": "tanh"}))
    module.load_state_dict({f"layers.{k}.{name}": t for k, at in enumerate((0, 2, 4)) for name, t in plain[at].state_dict().items()})
    x = torch.randn(6, 3)
    torch.testing.assert_close(module(x), plain(x))


def test_without_hidden_layers_it_is_one_linear_layer() -> None:
    assert sorted(mlp.build(Config({"in": 3, "out": 2})).state_dict()) == ["layers.0.bias", "layers.0.weight"]
