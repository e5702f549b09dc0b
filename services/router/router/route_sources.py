"""What each route is made of, so that a new snapshot makes anew only the routes of which something changed.

A registry of a thousand routes takes a quarter of a second to compile, in which nobody is answered; a change of one of them must not.
"""

from __future__ import annotations

from collections.abc import Sequence

from plait.registry.records import Experiment, FeatureSet, Model, Route, Snapshot
from plait.registry.set_checks import views_read

Sources = tuple[object, ...]


class Reading:
    """Finds the sources of routes in one snapshot. `before`: the reading of the snapshot before, whose feature sets are not read again.

    `views`: each feature set that was read, and the names of its views.
    """

    def __init__(self, snapshot: Snapshot, before: Reading | None = None) -> None:
        self._snapshot = snapshot
        self._before: dict[str, tuple[FeatureSet, tuple[str, ...]]] = {} if before is None else before.views
        self.views: dict[str, tuple[FeatureSet, tuple[str, ...]]] = {}

    def sources(self, route: Route, experiments: Sequence[Experiment]) -> Sources:
        """Return all records that a route's meaning depends on. A record that did not change is the same object in the next snapshot, so
        comparing two of these is mostly comparing addresses."""
        stages = route.stages
        retrieved = (stages.retrieve.model,) if stages is not None and stages.retrieve is not None else ()
        models = [self._snapshot.models.get(name) for name in dict.fromkeys((*(v.model for v in route.variants), *retrieved))]
        names = dict.fromkeys(name for model in models if model is not None for name in _sets_of(model))
        if stages is not None and stages.rules:
            names[stages.rules] = None
        sets = [self._snapshot.feature_sets.get(name) for name in names]
        views = dict.fromkeys(view for found in sets if found is not None for view in self._views_of(found))
        return (route, *experiments, None, *models, *sets, *map(self._snapshot.feature_views.get, views))

    def _views_of(self, feature_set: FeatureSet) -> tuple[str, ...]:
        known = self.views.get(feature_set.name) or self._before.get(feature_set.name)
        if known is None or known[0] is not feature_set:
            known = (feature_set, tuple(dict.fromkeys(reference.view for reference in views_read(feature_set))))
        self.views[feature_set.name] = known
        return known[1]


def _sets_of(model: Model) -> list[str]:
    return [version.signature.feature_set for version in model.versions if version.signature is not None]
