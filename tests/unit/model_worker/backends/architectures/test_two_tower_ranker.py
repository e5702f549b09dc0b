"""Each item is scored for the user of its own request."""

from __future__ import annotations

import torch
from torch import nn

from model_worker.backends.architectures import two_tower_ranker
from model_worker.backends.architectures.config import Config


def test_a_score_is_the_dot_product_of_two_embeddings() -> None:
    towers = {side: nn.Sequential(nn.Linear(size, 4), nn.GELU(), nn.Linear(4, 5)) for side, size in (("user", 3), ("item", 2))}
    module = two_tower_ranker.build(Config({"user": 3, "item": 2, "hidden": (4,), "out": 5, "activation": "gelu"}))
    module.load_state_dict(
        {
            f"{side}.layers.{k}.{name}": t
            for side, tower in towers.items()
            for k, at in enumerate((0, 2))
            for name, t in tower[at].state_dict().items()
        }
    )
    users, items = torch.randn(3, 3), torch.randn(5, 2)
    found = module(users, items, torch.tensor([0, 2, 2, 5]))
    expected = [towers["user"](users[u]) @ towers["item"](items[i]) for i, u in enumerate((0, 0, 2, 2, 2))]
    torch.testing.assert_close(found, torch.stack(expected))
