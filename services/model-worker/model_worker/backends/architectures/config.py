"""The arguments of an architecture as a manifest gives them: asked for by name, checked, bounded, and none of them ignored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from torch import nn

from plait.errors import FailedPrecondition

MAX_SIZE: Final = 1 << 24  # of a layer
MAX_ROWS: Final = 1 << 31  # of a table
MAX_SIZES: Final = 256  # layers of a network, tables of a model
_ACTIVATIONS: Final = MappingProxyType({"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "identity": nn.Identity})
_MAX_LISTED: Final = 20


class Config:
    """What `architecture.config` of a model.yaml says. Each method takes one argument out and returns it, or remembers what is wrong with it
    and returns the smallest one that is right, so that a builder can go on and every problem is told at once (`finish`)."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._left = dict(values)
        self._problems: list[str] = []

    def size(self, name: str, *, largest: int = MAX_SIZE) -> int:
        """Return a required whole number from 1 to `largest`."""
        value = self._left.pop(name, None)
        if _is_size(value, largest):
            return int(value)
        self._wrong(name, f"a whole number from 1 to {largest}", value)
        return 1

    def sizes(self, name: str, *, least: int = 0, largest: int = MAX_SIZE) -> tuple[int, ...]:
        """Return a list of `least` to 256 whole numbers from 1 to `largest`; empty where it is left out and may be."""
        value = self._left.pop(name, ())
        if isinstance(value, list | tuple) and least <= len(value) <= MAX_SIZES and all(_is_size(item, largest) for item in value):
            return tuple(value)
        self._wrong(name, f"{f'{least} to' if least else 'at most'} {MAX_SIZES} whole numbers from 1 to {largest}", value)
        return (1,) * least

    def number(self, name: str, default: float, *, low: float, high: float) -> float:
        """Return a number from `low` to `high`; `default` where it is left out."""
        value = self._left.pop(name, default)
        if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
            return float(value)
        self._wrong(name, f"a number from {low:g} to {high:g}", value)
        return default

    def flag(self, name: str, *, default: bool = False) -> bool:
        """Return true or false; `default` where it is left out."""
        value = self._left.pop(name, default)
        if isinstance(value, bool):
            return value
        self._wrong(name, "true or false", value)
        return default

    def choice(self, name: str, options: Sequence[str]) -> str:
        """Return one of the options; the first one where it is left out."""
        value = self._left.pop(name, options[0])
        if isinstance(value, str) and value in options:
            return value
        self._wrong(name, f"one of {', '.join(options)}", value)
        return options[0]

    def activation(self, name: str = "activation") -> Callable[[], nn.Module]:
        """Return the class of an activation: relu (where it is left out), gelu, silu, tanh or identity."""
        return _ACTIVATIONS[self.choice(name, tuple(_ACTIVATIONS))]

    def finish(self, architecture: str) -> None:
        """Raise FailedPrecondition (ARTIFACT_INVALID) that lists everything wrong, once all arguments were asked for."""
        problems = [*self._problems, *(f"{name[:80]}: is no argument of it" for name in self._left)]
        if problems:
            raise invalid(f"the config of the architecture {architecture!r} is wrong", problems)

    def _wrong(self, name: str, expected: str, found: Any) -> None:
        self._problems.append(f"{name}: expected {expected}, found {'nothing' if found is None else repr(found)[:60]}")


def invalid(what: str, problems: Sequence[str]) -> FailedPrecondition:
    """Return the error for an artifact whose config or weights are not an architecture's, with the first problems of it."""
    more = [f"and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
    return FailedPrecondition(f"{what}: {'; '.join([*problems[:_MAX_LISTED], *more])}", reason="ARTIFACT_INVALID")


def _is_size(value: Any, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest
