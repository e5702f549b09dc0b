"""Which models a route has run: asked by those who load them, those who call them, and those who would delete them."""

from __future__ import annotations

from plait.registry.records import Route


def models_of(route: Route) -> tuple[tuple[str, str], ...]:
    """Return (model, version or alias) of everything the route may ask, in the order of its manifest. Its ladder, shadows, rules and
    experiments name variants, which are all here."""
    found = [(variant.model, variant.use) for variant in route.variants]
    if route.stages is not None and route.stages.retrieve is not None and route.stages.retrieve.model:
        found.append((route.stages.retrieve.model, route.stages.retrieve.use))
    return tuple(found)
