"""Wide & Deep, compared with one that is written out here in plain torch from the paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_worker.backends.architectures import wide_and_deep
from model_worker.backends.architectures.config import Config

CONFIG = {"dense": 3, "dim": 4, "tables": (10, 7), "hidden": (6, 5), "wide": 20}


class Plain(nn.Module):
    """sigmoid(w_wide · φ(x) + w_deep · a(x) + b): φ as a vector of zeros and ones, a through two layers with relu."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(20, 1, bias=False)
        self.first, self.second = nn.Embedding(10, 4), nn.Embedding(7, 4)
        self.deep = nn.Sequential(nn.Linear(3 + 8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1))

    def forward(self, dense: Tensor, sparse: Tensor, crossed: Tensor) -> Tensor:
        deep = self.deep(torch.cat([dense, self.first(sparse[:, 0]), self.second(sparse[:, 1])], 1))
        return (self.wide(crossed) + deep).sigmoid()[:, 0]

    def weights(self) -> dict[str, Tensor]:
        """Under our names."""
        deep = {f"deep.layers.{k}.{name}": t for k, at in enumerate((0, 2, 4)) for name, t in self.deep[at].state_dict().items()}
        return {**deep, "tables.0.weight": self.first.weight, "tables.1.weight": self.second.weight, "wide.weight": self.wide.weight.T}


def test_it_computes_what_the_paper_says() -> None:
    torch.manual_seed(1)
    plain, module = Plain(), wide_and_deep.build(Config(CONFIG))
    module.load_state_dict(plain.weights())
    dense, sparse = torch.randn(4, 3), torch.tensor([[0, 0], [9, 6], [3, 2], [1, 1]])
    wide = torch.tensor([[0, 5, -1], [19, -1, -1], [-1, -1, -1], [7, 8, 29]])  # 29 is 9 of 20
    crossed = torch.zeros(4, 20)
    for row, there in enumerate(([0, 5], [19], [], [7, 8, 9])):
        crossed[row, there] = 1
    found = module(dense, sparse, wide)
    torch.testing.assert_close(found, plain(dense, sparse, crossed))
    logits = wide_and_deep.build(Config({**CONFIG, "output": "logit"}))
    logits.load_state_dict(plain.weights())
    torch.testing.assert_close(logits(dense, sparse, wide).sigmoid(), found)


def test_a_row_without_crossed_features_is_only_deep() -> None:
    module = wide_and_deep.build(Config(CONFIG))
    dense, sparse = torch.randn(2, 3), torch.zeros(2, 2, dtype=torch.int64)
    none, some = (torch.full((2, width), -1) for width in (0, 4))
    torch.testing.assert_close(module(dense, sparse, none), module(dense, sparse, some))
