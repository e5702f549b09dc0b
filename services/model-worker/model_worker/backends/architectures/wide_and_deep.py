"""Google Play's model: a linear one that memorizes beside a deep one that generalizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model_worker.backends.architectures.config import MAX_ROWS, Config
from model_worker.backends.architectures.mlp import MLP
from model_worker.backends.architectures.tables import Tables


class WideAndDeep(nn.Module):
    """dense [N, D] (the weights' type), sparse int64 [N, T], wide int64 [N, W] → score [N], a probability or a logit.

    Deep: the dense features and the embeddings of the sparse ids through a network. Wide: the sum of the weights of W crossed features,
    given by their ids; a negative id is a feature that is not there, others are taken modulo the number of weights. The two are summed;
    their common bias is that of the network's last layer. Source: Cheng et al., "Wide & Deep Learning for Recommender Systems" (2016),
    https://arxiv.org/abs/1606.07792. Weights: deep.layers.<k>.*, tables.<t>.weight, wide.weight [rows, 1]. Ids: see `Tables`.
    """

    def __init__(self, deep: MLP, tables: Tables, wide_rows: int, *, probability: bool) -> None:
        super().__init__()
        self.deep = deep
        self.tables = tables
        self.wide = nn.Embedding(wide_rows, 1)
        self._probability = probability

    def forward(self, dense: Tensor, sparse: Tensor, wide: Tensor) -> Tensor:
        """Score every row."""
        deep = self.deep(torch.cat([dense, *self.tables(sparse)], dim=1)).squeeze(1)
        crossed = self.wide(wide.remainder(self.wide.num_embeddings)).squeeze(2)
        logit: Tensor = deep + crossed.masked_fill(wide < 0, 0).sum(dim=1)
        return logit.sigmoid() if self._probability else logit


def build(config: Config) -> nn.Module:
    """`dense` (size of a row), `tables` (rows of each), `dim` (of an embedding), `hidden` (of the deep part, may be left out), `wide` (number of
    weights of crossed features), optional `activation`, `output` (probability or logit)."""
    dense, dim = config.size("dense"), config.size("dim")
    rows, hidden = config.sizes("tables", least=1, largest=MAX_ROWS), config.sizes("hidden")
    return WideAndDeep(
        MLP((dense + len(rows) * dim, *hidden, 1), config.activation()),
        Tables(rows, dim),
        config.size("wide", largest=MAX_ROWS),
        probability=config.choice("output", ("probability", "logit")) == "probability",
    )
