"""Demos and benchmarks that other packages bring, found by their entry points, so that the CLI depends on none of them."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final

DEMOS: Final = "plait.demos"
BENCHES: Final = "plait.benches"
_INSTALL: Final = {
    DEMOS: "install the example: pip install -e examples/marketplace (or run: make demo)",
    BENCHES: "install them: pip install -e examples/marketplace -e tests/bench (or run: make bench)",
}


def find(group: str, name: str | None) -> Any:
    """Return what the entry point `name` of `group` names; without a name, the only one there is.

    Raises FailedPrecondition (EXTENSION_MISSING, EXTENSION_BROKEN), NotFound (EXTENSION_NOT_FOUND).
    """
    from plait.errors import FailedPrecondition, NotFound  # noqa: PLC0415

    found = {entry.name: entry for entry in entry_points(group=group)}
    what = group.removeprefix("plait.")
    if not found:
        raise FailedPrecondition(f"no {what} are installed; {_INSTALL[group]}", reason="EXTENSION_MISSING")
    names = ", ".join(sorted(found))
    if name is None and len(found) > 1:
        raise NotFound(f"there are several {what}; name one of: {names}", reason="EXTENSION_NOT_FOUND")
    if name is not None and name not in found:
        raise NotFound(f"there is no {name!r} among the {what}; there is: {names}", reason="EXTENSION_NOT_FOUND")
    return _load(found[name or next(iter(found))], group)


def names(group: str, incomplete: str) -> list[str]:
    """Return the names in `group` that start like this, for the shell."""
    return sorted({name for name in entry_points(group=group).names if name.startswith(incomplete)})


def _load(entry: EntryPoint, group: str) -> Any:
    from plait.errors import FailedPrecondition  # noqa: PLC0415

    try:
        return entry.load()
    except ImportError as error:
        message = f"{entry.name} ({entry.value}) cannot be loaded: {error}; {_INSTALL[group]}"
        raise FailedPrecondition(message, reason="EXTENSION_BROKEN") from error
