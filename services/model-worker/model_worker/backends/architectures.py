"""The model classes that a safetensors file may be the weights of: an explicit table, never an import of what a manifest names.

The weights are read without pickle, and every key, shape and dtype must be the architecture's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from plait.errors import FailedPrecondition
from plait.registry.artifact import Architecture

Builder = Callable[["Config"], nn.Module]

_ACTIVATIONS: Final = MappingProxyType({"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "identity": nn.Identity})
_MAX_SIZE: Final = 1 << 24
_MAX_LAYERS: Final = 256
_MAX_LISTED: Final = 20


class Config:
    """The arguments of an architecture, each asked for by name and checked; `finish` refuses what was not asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._left = dict(values)
        self._problems: list[str] = []

    def size(self, name: str) -> int:
        """Return a required whole number from 1 to 2^24."""
        value = self._left.pop(name, None)
        if _is_size(value):
            return int(value)
        self._problems.append(f"{name}: expected a whole number from 1 to {_MAX_SIZE}, found {_said(value)}")
        return 1

    def sizes(self, name: str) -> tuple[int, ...]:
        """Return a list of whole numbers from 1 to 2^24; empty where it is left out."""
        value = self._left.pop(name, ())
        if isinstance(value, list | tuple) and len(value) <= _MAX_LAYERS and all(map(_is_size, value)):
            return tuple(value)
        self._problems.append(f"{name}: expected at most {_MAX_LAYERS} whole numbers from 1 to {_MAX_SIZE}, found {_said(value)}")
        return ()

    def activation(self, name: str = "activation") -> Callable[[], nn.Module]:
        """Return the class of an activation; relu where it is left out."""
        value = self._left.pop(name, "relu")
        if isinstance(value, str) and value in _ACTIVATIONS:
            return _ACTIVATIONS[value]
        self._problems.append(f"{name}: expected one of {', '.join(_ACTIVATIONS)}, found {_said(value)}")
        return nn.Identity

    def finish(self, architecture: str) -> None:
        """Raise FailedPrecondition (ARTIFACT_INVALID) that lists everything wrong, once all arguments were asked for."""
        problems = [*self._problems, *(f"{name[:80]}: is no argument of it" for name in self._left)]
        if problems:
            raise _invalid(f"the config of the architecture {architecture!r} is wrong", problems)


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


def _mlp(config: Config) -> nn.Module:
    sizes = (config.size("in"), *config.sizes("hidden"), config.size("out"))
    return MLP(sizes, config.activation())


def _two_tower_ranker(config: Config) -> nn.Module:
    user, item, hidden, out = config.size("user"), config.size("item"), config.sizes("hidden"), config.size("out")
    activation = config.activation()
    return TwoTowerRanker(MLP((user, *hidden, out), activation), MLP((item, *hidden, out), activation))


BUILDERS: Final[Mapping[str, Builder]] = MappingProxyType({"mlp": _mlp, "two_tower_ranker": _two_tower_ranker})


def build(architecture: Architecture | None, content: bytes, builders: Mapping[str, Builder] = BUILDERS) -> nn.Module:
    """Return the architecture holding the weights of a safetensors file, in inference mode.

    Raises FailedPrecondition: ARCHITECTURE_UNKNOWN, ARTIFACT_INVALID with every problem of the config or the weights.
    """
    if architecture is None or architecture.name not in builders:
        named = "names no architecture" if architecture is None else f"names the architecture {architecture.name[:80]!r}"
        raise FailedPrecondition(f"model.yaml {named}; this worker has {', '.join(sorted(builders))}", reason="ARCHITECTURE_UNKNOWN")
    weights = _weights(content)
    config = Config(architecture.config)
    with torch.device("meta"):  # no memory before the config and every shape are known to be right
        module = builders[architecture.name](config)
    config.finish(architecture.name)
    expected = module.state_dict()
    problems = list(mismatches(expected, weights))
    if problems:
        raise _invalid(f"the weights are not those of the architecture {architecture.name!r} with this config", problems)
    module.load_state_dict(weights, strict=True, assign=True)
    return module.requires_grad_(requires_grad=False).eval()


def mismatches(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterable[str]:
    """Name every tensor that is missing, too much, or of another shape or dtype.

    One floating type may stand for float32, as long as all the weights have it: a model may be published in half precision.
    """
    kinds = {t.dtype for t in found.values() if t.is_floating_point()}
    narrower = kinds.pop() if len(kinds) == 1 else torch.float32
    for name, want in expected.items():
        if name not in found:
            yield f"{name}: is missing"
            continue
        has, dtype = found[name], narrower if want.is_floating_point() else want.dtype
        if has.shape != want.shape:
            yield f"{name}: expected shape {list(want.shape)}, found {list(has.shape)}"
        if has.dtype != dtype:
            yield f"{name}: expected {_name(dtype)}, found {_name(has.dtype)}"
    yield from (f"{name[:80]}: is no weight of it" for name in found if name not in expected)


def _weights(content: bytes) -> dict[str, Tensor]:
    try:
        return load_tensors(content)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise FailedPrecondition(
            f"this is no safetensors file ({type(error).__name__}): write it with safetensors.torch.save_file", reason="ARTIFACT_INVALID"
        ) from error


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_SIZE


def _said(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _invalid(what: str, problems: list[str]) -> FailedPrecondition:
    more = [f"and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
    return FailedPrecondition(f"{what}: {'; '.join([*problems[:_MAX_LISTED], *more])}", reason="ARTIFACT_INVALID")
