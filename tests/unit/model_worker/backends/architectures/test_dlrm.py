"""DLRM, compared with one that is written out here in plain torch, loops and all, from the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_worker.backends.architectures import dlrm
from model_worker.backends.architectures.config import Config

CONFIG = {"dense": 3, "dim": 4, "tables": (10, 7, 5), "bottom": (6,), "top": (8, 5)}


class Plain(nn.Module):
    """Bottom network with relu behind each layer, embedding bags of one id, explicit dot products, top network ending in a sigmoid."""

    def __init__(self, dim: int, rows: Sequence[int], *, interact_self: bool) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, dim), nn.ReLU())
        self.bags = nn.ModuleList(nn.EmbeddingBag(count, dim, mode="sum") for count in rows)
        self.interact_self = interact_self
        pairs = len(self.pairs)
        self.top = nn.Sequential(nn.Linear(dim + pairs, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 1), nn.Sigmoid())

    @property
    def pairs(self) -> list[tuple[int, int]]:
        count = len(self.bags) + 1
        return [(i, j) for i in range(count) for j in range(i + 1 if self.interact_self else i)]

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        vectors = [self.bottom(dense), *(bag(sparse[:, t : t + 1]) for t, bag in enumerate(self.bags))]
        products = [(vectors[i] * vectors[j]).sum(1, keepdim=True) for i, j in self.pairs]
        return self.top(torch.cat([vectors[0], *products], 1))[:, 0]

    def weights(self) -> dict[str, Tensor]:
        """Under our names."""
        names = {"bottom.0": "bottom.layers.0", "bottom.2": "bottom.layers.1"}
        names |= {f"top.{2 * k}": f"top.layers.{k}" for k in range(3)} | {f"bags.{t}": f"tables.{t}" for t in range(3)}
        return {f"{names[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": t for key, t in self.state_dict().items()}


@pytest.mark.parametrize("interact_self", [False, True])
def test_it_computes_what_the_paper_says(interact_self: bool) -> None:
    torch.manual_seed(1)
    plain = Plain(4, (10, 7, 5), interact_self=interact_self)
    module = dlrm.build(Config({**CONFIG, "interact_self": interact_self}))
    module.load_state_dict(plain.weights())
    dense, sparse = torch.randn(9, 3), torch.stack([torch.randint(rows, (9,)) for rows in (10, 7, 5)], 1)
    found = module(dense, sparse)
    assert found.shape == (9,)
    torch.testing.assert_close(found, plain(dense, sparse))
    logits = dlrm.build(Config({**CONFIG, "interact_self": interact_self, "output": "logit"}))
    logits.load_state_dict(plain.weights())
    torch.testing.assert_close(logits(dense, sparse).sigmoid(), found)


def test_a_row_does_not_depend_on_the_others() -> None:
    module = dlrm.build(Config(CONFIG))
    dense, sparse = torch.randn(5, 3), torch.randint(5, (5, 3))
    torch.testing.assert_close(module(dense, sparse)[3:4], module(dense[3:4], sparse[3:4]))


@pytest.mark.parametrize("more", [{}, {"tables": (2**31,) * 256, "dim": 1 << 24, "dense": 1 << 24, "top": (1 << 24,) * 256}])
def test_no_memory_is_taken_on_the_meta_device_however_large_it_is(more: dict[str, Any]) -> None:
    config = Config({**CONFIG, **more})
    with torch.device("meta"):
        module = dlrm.build(config)
    config.finish("dlrm")
    assert all(t.is_meta for t in module.state_dict().values())
