"""A feed-forward network, alone and as a part of the other architectures."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from torch import Tensor, nn

from model_worker.backends.architectures.config import Config


class MLP(nn.Module):
    """x [N, in] → [N, out]. Weights: layers.<k>.weight and .bias, k = 0, 1, …, one per linear layer."""

    def __init__(self, sizes: tuple[int, ...], activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """Compute every layer, the activation between them."""
        last = len(self.layers) - 1
        for k, layer in enumerate(self.layers):
            x = layer(x) if k == last else self.activation(layer(x))
        return x


def build(config: Config) -> nn.Module:
    """`in`, `hidden` (sizes, may be left out), `out`, `activation`."""
    sizes = (config.size("in"), *config.sizes("hidden"), config.size("out"))
    return MLP(sizes, config.activation())
