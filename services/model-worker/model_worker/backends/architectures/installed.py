"""Architectures that other distributions bring, by their entry points in the group "plait.architectures".

An entry point is code the operator has installed beside the worker; a manifest can choose among them and name nothing else. None is imported
before a manifest asks for it. What is found is looked up anew each time: a worker need not be restarted into seeing what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

from plait.errors import FailedPrecondition

GROUP: Final = "plait.architectures"


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """One entry point and the distribution it came with."""

    entry: EntryPoint
    distribution: str

    def __str__(self) -> str:
        return f"the architecture {self.entry.name!r} of the distribution {self.distribution} ({self.entry.value})"

    def load(self) -> Any:
        """Import it. Raises FailedPrecondition (ARCHITECTURE_BROKEN)."""
        try:
            found = self.entry.load()
        except (Exception, SystemExit) as error:
            why = f": {error}" if isinstance(error, ImportError | AttributeError) else ""
            raise self.broken(f"cannot be imported ({type(error).__name__}{why})") from error
        if not callable(found):
            raise self.broken("is not callable: it must be a class or a function that makes a torch.nn.Module from a Config")
        return found

    def broken(self, why: str) -> FailedPrecondition:
        """Return the error for one that cannot be used, and whose mending is the distribution's."""
        return FailedPrecondition(
            f"{self} {why}; mend or reinstall {self.distribution} where the worker runs",
            reason="ARCHITECTURE_BROKEN",
            metadata={"architecture": self.entry.name, "distribution": self.distribution},
        )


def find() -> Sequence[Installed]:
    """Return all of them, in no order that means anything."""
    return [Installed(entry=entry, distribution=entry.dist.name if entry.dist else "unknown") for entry in entry_points(group=GROUP)]
