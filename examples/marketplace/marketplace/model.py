"""The ranker: a user tower that runs once per request, an item tower that runs once per candidate, and an MLP over both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CROSS = 32


class Ranker(nn.Module):
    """Scores items for users. First layers of both sides are added before the non-linearity, which is the same as one layer over the
    concatenation [user, item] but never copies the user; a small product of projections lets tastes meet genres.

    `user` float32 [requests, Du], `item` float32 [rows, Di], `row_splits` int64 [requests + 1]: rows row_splits[r] to row_splits[r + 1] belong
    to request r. Returns float32 [rows] logits.
    """

    def __init__(self, user_features: int, item_features: int, hidden: int = 256, top: int = 128) -> None:
        super().__init__()
        for side, width in (("user", user_features), ("item", item_features)):
            self.register_buffer(f"{side}_mean", torch.zeros(width))
            self.register_buffer(f"{side}_scale", torch.ones(width))
        self.user_mean: Tensor
        self.user_scale: Tensor
        self.item_mean: Tensor
        self.item_scale: Tensor
        self.user_tower = nn.Sequential(nn.Linear(user_features, hidden), nn.ReLU(), nn.Linear(hidden, hidden + CROSS))
        self.item_tower = nn.Linear(item_features, hidden + CROSS, bias=False)
        self.mlp = nn.Sequential(nn.Linear(hidden + CROSS, top), nn.ReLU(), nn.Linear(top, 1))

    def standardise(self, user: Tensor, item: Tensor) -> None:
        """Learn the features' means and scales, which become part of the model."""
        for side, values in (("user", user), ("item", item)):
            getattr(self, f"{side}_mean").copy_(values.mean(0))
            getattr(self, f"{side}_scale").copy_(1 / values.std(0).clamp_min(0.05))

    def forward(self, user: Tensor, item: Tensor, row_splits: Tensor) -> Tensor:
        """Return one logit per row."""
        users = self.user_tower((user - self.user_mean) * self.user_scale)
        items = self.item_tower((item - self.item_mean) * self.item_scale)
        if user.shape[0] != 1:  # a lone request is broadcast
            users = users.repeat_interleave(row_splits[1:] - row_splits[:-1], dim=0)
        added = torch.relu(users[:, :-32] + items[:, :-32])
        crossed = users[:, -32:] * items[:, -32:]
        scores: Tensor = self.mlp(torch.cat([added, crossed], dim=1)).squeeze(1)
        return scores
