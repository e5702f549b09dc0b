"""The model classes that a safetensors file may be the weights of: a table of ours and the entry points of what is installed beside the worker,
never an import of what a manifest names.

The weights are read without pickle, and every key, shape and dtype must be the architecture's own. No memory is taken for a model before its
config and all of that were found right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from model_worker.backends.architectures import dlrm, installed, mlp, two_tower_ranker, wide_and_deep
from model_worker.backends.architectures.config import Config, invalid
from model_worker.backends.architectures.installed import Installed
from model_worker.backends.architectures.mlp import MLP
from plait.errors import FailedPrecondition
from plait.registry.artifact import Architecture

__all__ = ["BUILDERS", "MLP", "Builder", "Config", "build", "mismatches"]

Builder = Callable[[Config], nn.Module]

BUILDERS: Final[Mapping[str, Builder]] = MappingProxyType(
    {"dlrm": dlrm.build, "mlp": mlp.build, "two_tower_ranker": two_tower_ranker.build, "wide_and_deep": wide_and_deep.build}
)
_OURS: Final = "plait-model-worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """What a name stands for; `origin` is None where it is ours."""

    name: str
    builder: Builder
    origin: Installed | None

    def make(self, values: Mapping[str, Any]) -> nn.Module:
        """Return the module without its weights, which take no memory. Raises FailedPrecondition: ARTIFACT_INVALID, ARCHITECTURE_BROKEN."""
        config = Config(values)
        try:
            with torch.device("meta"):
                module = self.builder(config)
        except Exception as error:
            config.finish(self.name)  # a config that is wrong explains it better
            if self.origin is None:
                raise
            raise self.origin.broken(f"cannot be made with this config ({type(error).__name__})") from error
        config.finish(self.name)
        if self.origin is not None and not isinstance(module, nn.Module):
            raise self.origin.broken(f"made {type(module).__name__}, not a torch.nn.Module")
        return module

    def fill(self, module: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Give it its weights. Raises FailedPrecondition (ARCHITECTURE_BROKEN) where it does not take them, or something is left without."""
        try:
            module.load_state_dict(weights, strict=True, assign=True)
        except Exception as error:
            if self.origin is None:
                raise
            raise self.origin.broken(f"does not take its own weights ({type(error).__name__})") from error
        empty = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
        if empty and self.origin is not None:
            raise self.origin.broken(
                f"keeps {', '.join(empty[:10])} out of its state_dict: make buffers persistent, or compute them in forward"
            )

    def state_of(self, module: nn.Module) -> dict[str, Tensor]:
        """Return what weights it takes. Raises FailedPrecondition (ARCHITECTURE_BROKEN) where those are not tensors only."""
        state = module.state_dict()
        strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
        if strange and self.origin is not None:
            raise self.origin.broken(f"has {', '.join(strange[:10])} in its state_dict, which a safetensors file cannot hold")
        return state


def build(architecture: Architecture | None, content: bytes) -> nn.Module:
    """Return the architecture holding the weights of a safetensors file, in inference mode.

    Raises FailedPrecondition: ARCHITECTURE_UNKNOWN, ARCHITECTURE_AMBIGUOUS (two bring it), ARCHITECTURE_BROKEN (an installed one cannot be
    used), ARTIFACT_INVALID with every problem of the config or the weights.
    """
    if architecture is None:
        raise FailedPrecondition(f"model.yaml names no architecture; {_known(installed.find())}", reason="ARCHITECTURE_UNKNOWN")
    chosen = _choose(architecture.name)
    module = chosen.make(architecture.config)
    expected = chosen.state_of(module)
    weights = _weights(content)
    problems = list(mismatches(expected, weights))
    if problems:
        raise invalid(f"the weights are not those of the architecture {architecture.name!r} with this config", problems)
    chosen.fill(module, weights)
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


def _choose(name: str) -> _Chosen:
    """Return what brings an architecture, if exactly one does: which of two a model was trained for is nothing to guess."""
    everything = installed.find()
    found = [one for one in everything if one.entry.name == name]
    origins = [_OURS] * (name in BUILDERS) + sorted(one.distribution for one in found)
    if not origins:
        raise FailedPrecondition(f"model.yaml names the architecture {name[:80]!r}; {_known(everything)}", reason="ARCHITECTURE_UNKNOWN")
    if len(origins) > 1:
        message = f"the architecture {name!r} is brought by {' and by '.join(origins)}: uninstall one, or rename its entry point in {installed.GROUP}"
        raise FailedPrecondition(message, reason="ARCHITECTURE_AMBIGUOUS", metadata={"architecture": name})
    if found:
        return _Chosen(name=name, builder=found[0].load(), origin=found[0])
    return _Chosen(name=name, builder=BUILDERS[name], origin=None)


def _known(everything: Iterable[Installed]) -> str:
    more = sorted(f"{one.entry.name} ({one.distribution})" for one in everything)
    return f"this worker has {', '.join([*BUILDERS, *more])}; others are brought by entry points in {installed.GROUP}"


def _weights(content: bytes) -> dict[str, Tensor]:
    try:
        return load_tensors(content)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise FailedPrecondition(
            f"this is no safetensors file ({type(error).__name__}): write it with safetensors.torch.save_file", reason="ARTIFACT_INVALID"
        ) from error


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
