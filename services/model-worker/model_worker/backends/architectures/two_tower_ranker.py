"""Two towers and their dot product, the user's computed once per request."""

from __future__ import annotations

from torch import Tensor, nn

from model_worker.backends.architectures.config import Config
from model_worker.backends.architectures.mlp import MLP


class TwoTowerRanker(nn.Module):
    """user [R, Du], item [N, Di], row_splits int64 [R + 1] → score [N]: the dot product of two embeddings.

    The user's side is computed once per request, however many items it has. Source of the idea: Covington et al., "Deep Neural Networks
    for YouTube Recommendations" (2016), https://doi.org/10.1145/2959100.2959190. Weights: user.layers.<k>.* and item.layers.<k>.*.
    """

    def __init__(self, user: MLP, item: MLP) -> None:
        super().__init__()
        self.user = user
        self.item = item

    def forward(self, user: Tensor, item: Tensor, row_splits: Tensor) -> Tensor:
        """Score every item for the user of its request."""
        users = self.user(user).repeat_interleave(row_splits.diff(), dim=0)
        scores: Tensor = (users * self.item(item)).sum(dim=1)
        return scores


def build(config: Config) -> nn.Module:
    """`user`, `item` (sizes of a row), `hidden` (of both towers, may be left out), `out` (size of an embedding), `activation`."""
    user, item, hidden, out = config.size("user"), config.size("item"), config.sizes("hidden"), config.size("out")
    activation = config.activation()
    return TwoTowerRanker(MLP((user, *hidden, out), activation), MLP((item, *hidden, out), activation))
