"""Facebook's recommendation model: dense features and ids meet in dot products."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_worker.backends.architectures.config import MAX_ROWS, Config
from model_worker.backends.architectures.mlp import MLP
from model_worker.backends.architectures.tables import Tables


class DLRM(nn.Module):
    """dense [N, D] (the weights' type), sparse int64 [N, T] → score [N], a probability or a logit.

    A bottom network turns the dense features into a vector of an embedding's size, an activation behind its last layer too; the dot
    products of each pair of vectors (below the diagonal, row by row; with it where `interact_self`) and that vector itself go through the
    top network. Source: Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems" (2019),
    https://arxiv.org/abs/1906.00091. Weights: bottom.layers.<k>.*, tables.<t>.weight, top.layers.<k>.*. Ids: see `Tables`.
    """

    def __init__(self, bottom: MLP, tables: Tables, top: MLP, *, interact_self: bool, probability: bool) -> None:
        super().__init__()
        self.bottom = bottom
        self.tables = tables
        self.top = top
        self._diagonal = 0 if interact_self else -1
        self._probability = probability

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """Score every row."""
        vector = self.bottom.activation(self.bottom(dense))
        vectors = torch.stack([vector, *self.tables(sparse)], dim=1)
        count = vectors.shape[1]
        row, column = torch.tril_indices(count, count, self._diagonal, device=vectors.device)
        products = torch.bmm(vectors, vectors.transpose(1, 2))[:, row, column]
        logit: Tensor = self.top(torch.cat([vector, products], dim=1)).squeeze(1)
        return logit.sigmoid() if self._probability else logit


def build(config: Config) -> nn.Module:
    """`dense` (size of a row), `bottom` and `top` (hidden sizes, may be left out), `dim` (of an embedding), `tables` (rows of each), optional
    `interact_self` (false), `activation`, `output` (probability or logit)."""
    dense, dim = config.size("dense"), config.size("dim")
    rows = config.sizes("tables", least=1, largest=MAX_ROWS)
    bottom, top = config.sizes("bottom"), config.sizes("top")
    interact_self, activation = config.flag("interact_self"), config.activation()
    vectors = len(rows) + 1
    pairs = vectors * (vectors + 1 if interact_self else vectors - 1) // 2
    return DLRM(
        MLP((dense, *bottom, dim), activation),
        Tables(rows, dim),
        MLP((dim + pairs, *top, 1), activation),
        interact_self=interact_self,
        probability=config.choice("output", ("probability", "logit")) == "probability",
    )
