"""Does it all fit together? Views, feature sets, model signatures and routes are written by different people at different times.

Pure: a snapshot in, problems out. `plan` runs it on the registry as it would be, so that what does not fit is never stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from plait.registry import identity_rules, route_checks, rules, set_checks
from plait.registry.explain import suggestion
from plait.registry.findings import Finding, Steps
from plait.registry.policies import Retrieve
from plait.registry.problems import Problem, path
from plait.registry.records import Experiment, FeatureSet, Model, ModelInput, ModelVersion, Route, Signature, Snapshot, Tenant, TensorSpec
from plait.registry.references_of import models_of
from plait.registry.resources import Key, records_of
from plait.registry.rule_columns import RuleColumns, columns_named, rule_columns
from plait.registry.shapes import SetShape
from plait.registry.specs import kind_of

_FLOATS: Final = ("float16", "float32", "float64")


def check(snapshot: Snapshot) -> tuple[Problem, ...]:
    """Return every problem of the snapshot: of each record alone, and of what it refers to."""
    problems: list[Problem] = []
    for record in records_of(snapshot):
        found = [*rules.check(record)]
        match record:
            case FeatureSet():
                found += set_checks.check(record, snapshot)
            case Model():
                found += _model(record, snapshot)
            case Route():
                found += _route(record, snapshot)
                found += route_checks.check_route(record, snapshot)
            case Experiment():
                found += route_checks.check_experiment(record, snapshot)
            case Tenant():
                found += identity_rules.check_shared(record, snapshot)
            case _:
                pass
        where = f"{kind_of(record)} {record.name}"
        problems += [Problem(where=where, field=path(("spec", *steps)), message=message) for steps, message in found]
    return tuple(problems)


def users_of(snapshot: Snapshot, key: Key) -> tuple[str, ...]:
    """Return who refers to a resource ("FeatureSet home", …), and so keeps it from being deleted."""
    kind, name = key
    found: list[str] = []
    if kind == "FeatureView":
        sets = snapshot.feature_sets.values()
        found += [f"FeatureSet {s.name}" for s in sets if any(r.view == name for r in set_checks.views_read(s))]
    elif kind == "FeatureSet":
        models = snapshot.models.values()
        found += [f"Model {m.name}" for m in models if any(v.signature and v.signature.feature_set == name for v in m.versions)]
        found += [f"Route {r.name}" for r in snapshot.routes.values() if r.stages and r.stages.rules == name]
    elif kind == "Model":
        found += [f"Route {r.name}" for r in snapshot.routes.values() if any(model == name for model, _ in models_of(r))]
    elif kind == "Pool":
        found += [f"Model {m.name}" for m in snapshot.models.values() if m.pool == name]
    elif kind == "Route":
        found += [f"Experiment {e.name}" for e in snapshot.experiments.values() if e.route == name]
    elif kind == "Tenant":
        found += [
            f"Route {r.name}" for r in snapshot.routes.values() if name in r.tenants or any(name in rule.when.tenants for rule in r.rules)
        ]
        found += [f"Experiment {e.name}" for e in snapshot.experiments.values() if name in e.when.tenants]
        found += [f"API key {k.id}" for k in snapshot.keys.values() if k.tenant == name]
    return tuple(found)


def pinned(feature_sets: Iterable[FeatureSet]) -> frozenset[tuple[str, int]]:
    """Return which versions of views are read by number: (view, version)."""
    return frozenset((r.view, r.version) for s in feature_sets for r in set_checks.views_read(s) if r.version is not None)


def readers(snapshot: Snapshot, view: str) -> tuple[str, ...]:
    """Return who reads the current version of a view, whatever it is: each set without a pin, with the models and routes behind it."""
    found = []
    for feature_set in snapshot.feature_sets.values():
        if any(r.view == view and r.version is None for r in set_checks.views_read(feature_set)):
            behind = behind_set(snapshot, feature_set.name)
            found.append(f"FeatureSet {feature_set.name}" + (f" ({', '.join(behind)})" if behind else ""))
    return tuple(found)


def behind_set(snapshot: Snapshot, name: str) -> tuple[str, ...]:
    """Return the model versions that are fed by a feature set, and the routes that use one of them."""
    return (*_models_of(snapshot, name), *_routes_of(snapshot, name))


def _models_of(snapshot: Snapshot, set_name: str) -> list[str]:
    return [
        f"Model {model.name} version {version.version}"
        for model in snapshot.models.values()
        for version in model.versions
        if version.signature is not None and version.signature.feature_set == set_name
    ]


def _routes_of(snapshot: Snapshot, set_name: str) -> list[str]:
    found = []
    for route in snapshot.routes.values():
        used = [model.resolve(use) for name, use in models_of(route) if (model := snapshot.models.get(name)) is not None]
        if any(version and version.signature and version.signature.feature_set == set_name for version in used):
            found.append(f"Route {route.name}")
    return found


def misfits(route: Route, model: Model, version: ModelVersion, snapshot: Snapshot) -> tuple[str, ...]:
    """Return why a version cannot serve a route, empty when it can; the router asks so that one that does not fit hurts no other."""
    signature = version.signature
    if signature is None:
        return (f"model {model.name!r} version {version.version} has no signature; pin the artifact first (plait apply does)",)
    feature_set = snapshot.feature_sets.get(signature.feature_set)
    found = [*rules.check_signature(signature), *_fits(signature, snapshot)] if signature.feature_set else []
    found += [*rules.check(feature_set), *set_checks.check(feature_set, snapshot, strict=False)] if feature_set is not None else []
    return (*(message for _, message in found), *_serves(route, model, version, signature, snapshot))


def _model(model: Model, snapshot: Snapshot) -> Iterator[Finding]:
    pool = snapshot.pools.get(model.pool)
    if model.pool and pool is None:
        yield ("pool",), f"there is no pool {model.pool!r}{suggestion(model.pool, list(snapshot.pools))}"
    foreign = pool is not None and pool.protocol == "oip"
    for index, version in enumerate(model.versions):
        at: Steps = ("versions", index)
        if foreign:
            yield from _foreign(at, version)
        elif model.pool and not version.artifact:
            yield (*at, "artifact"), "expected the folder of the artifact: the model-workers of the pool load it"
        elif not version.digest:
            yield (*at, "digest"), "is missing; pin the artifact first (plait apply does)"
        if version.signature is None and not foreign:
            yield (*at, "signature"), "is missing; pin the artifact first (plait apply does)"
        elif version.signature is not None and version.signature.feature_set:
            for steps, message in _fits(version.signature, snapshot):
                yield (*at, "signature", *steps), f"version {version.version}: {message}"


def _foreign(at: Steps, version: ModelVersion) -> Iterator[Finding]:
    """A foreign server has its models from elsewhere: what would be ignored here is refused, and what cannot be read is to be written."""
    if version.artifact or version.digest:
        yield (*at, "artifact"), "would be ignored, as servers of an oip pool have their models from elsewhere; leave it and the digest out"
    if version.signature is None:
        yield (*at, "signature"), "is missing; write it down, as it cannot be read from a foreign server"


def _fits(signature: Signature, snapshot: Snapshot) -> Iterator[Finding]:
    """Compare a signature with its feature set: same inputs, same dtypes, as many columns."""
    name = signature.feature_set
    feature_set = snapshot.feature_sets.get(name)
    if feature_set is None:
        yield ("feature_set",), f"there is no feature set {name!r}{suggestion(name, list(snapshot.feature_sets))}"
        return
    shape = SetShape(feature_set, snapshot.feature_views)
    offered = {item.name: item for item in feature_set.inputs}
    wanted = {tensor.name: tensor for tensor in signature.inputs}
    for missing in offered.keys() - wanted.keys():
        yield ("inputs",), f"feature set {name!r} yields {missing!r}, which the model does not take"
    for index, tensor in enumerate(signature.inputs):
        item = offered.get(tensor.name)
        if item is None:
            yield ("inputs", index), f"feature set {name!r} yields no input {tensor.name!r}; it has {', '.join(offered)}"
        else:
            for message in _tensor_fits(tensor, item, name, shape):
                yield ("inputs", index), message


def _tensor_fits(tensor: TensorSpec, item: ModelInput, set_name: str, shape: SetShape) -> Iterator[str]:
    if tensor.dtype != item.dtype:
        yield f"{tensor.name!r} is {tensor.dtype}, but feature set {set_name!r} yields {item.dtype}"
    columns = shape.columns_of(item)
    if columns is None:
        return  # the set itself is told what it names that is not there
    if len(tensor.shape) != 2 or tensor.shape[1] != columns:
        yield f"{tensor.name!r} has shape {_shape(tensor)}, but feature set {set_name!r} yields {columns} columns: [rows, {columns}]"
        return
    rows = tensor.shape[0]
    if rows != -1 and not (tensor.per == "request" and rows == 1):
        allowed = "1 or -1" if tensor.per == "request" else "-1"
        yield f"{tensor.name!r} has shape {_shape(tensor)}; a tensor per {tensor.per} needs {allowed} as its first dimension"


def _shape(tensor: TensorSpec) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def _route(route: Route, snapshot: Snapshot) -> Iterator[Finding]:
    for index, variant in enumerate(route.variants):
        at: Steps = ("variants", index)
        model = snapshot.models.get(variant.model)
        if model is None:
            yield (*at, "model"), f"there is no model {variant.model!r}{suggestion(variant.model, list(snapshot.models))}"
            continue
        version = model.resolve(variant.use)
        if version is None:
            yield (*at, "use"), _no_version(model, variant.use)
        elif version.signature is not None:
            for message in _serves(route, model, version, version.signature, snapshot):
                yield at, message
    yield from _stages(route, snapshot)
    for index, tenant in enumerate(route.tenants):
        if tenant not in snapshot.tenants:
            yield ("tenants", index), f"there is no tenant {tenant!r}{suggestion(tenant, list(snapshot.tenants))}"


def _no_version(model: Model, use: str) -> str:
    known = [*model.aliases, *(v.version for v in model.versions)]
    listed = ", ".join(known[:10])
    return f"model {model.name!r} has neither a version nor an alias {use!r}; it has {listed}"


def _stages(route: Route, snapshot: Snapshot) -> Iterator[Finding]:
    stages = route.stages
    if stages is None:
        return
    if stages.retrieve is not None:
        found = retriever(route, stages.retrieve, snapshot)
        if isinstance(found, str):
            yield ("stages", "retrieve"), found
    if not stages.rules:
        return
    columns = rules_of(route, snapshot)
    if isinstance(columns, str):
        yield ("stages", "rules"), columns
        return
    for steps, column in columns_named(stages):
        if column not in columns.places:
            close = suggestion(column, list(columns.places)) or f"; it has {', '.join(columns.places)}"
            yield ("stages", *steps), f"feature set {stages.rules!r} has no column {column[:80]!r} of one number{close}"


def rules_of(route: Route, snapshot: Snapshot) -> RuleColumns | str:
    """Return the columns that a route's business rules look at, or why there are none; its stages name a rules feature set."""
    name = route.stages.rules if route.stages else ""
    feature_set = snapshot.feature_sets.get(name)
    if feature_set is None:
        return f"there is no feature set {name!r}{suggestion(name, list(snapshot.feature_sets))}"
    shape = SetShape(feature_set, snapshot.feature_views)
    columns = rule_columns(feature_set, shape, route.candidate)
    if not isinstance(columns, str):
        for other in set(shape.entities_of(columns.item)) - {route.subject, route.candidate}:
            return f"a transform of feature set {name!r} reads {other!r}, of which a request on this route has no ids"
    return columns


def retriever(route: Route, retrieve: Retrieve, snapshot: Snapshot) -> ModelVersion | str:
    """Return the version that candidates come from, or why it cannot give any: its inputs are the subject's, its output is a list of ids."""
    model = snapshot.models.get(retrieve.model)
    if model is None:
        return f"there is no model {retrieve.model!r}{suggestion(retrieve.model, list(snapshot.models))}"
    version = model.resolve(retrieve.use)
    if version is None:
        return _no_version(model, retrieve.use)
    signature = version.signature
    feature_set = None if signature is None else snapshot.feature_sets.get(signature.feature_set)
    if signature is None or feature_set is None:
        return f"model {model.name!r} version {version.version} has no signature that names a feature set"
    output = next((tensor for tensor in signature.outputs if tensor.name == retrieve.output), None)
    if output is None or output.dtype not in ("int64", "bytes"):
        return f"model {model.name!r} has no output {retrieve.output!r} of ids (int64 or bytes)"
    shape = SetShape(feature_set, snapshot.feature_views)
    for item in feature_set.inputs:
        if set(shape.entities_of(item)) != {route.subject}:
            return f"input {item.name!r} of model {model.name!r} is not about {route.subject!r} alone, which is all that is known then"
    return version


def _serves(route: Route, model: Model, version: ModelVersion, signature: Signature, snapshot: Snapshot) -> Iterator[str]:
    label = f"model {model.name!r} version {version.version}"
    output = next((t for t in signature.outputs if t.name == route.score), None)
    if output is None:
        yield f"{label} has no output {route.score!r} to order by; it has {', '.join(t.name for t in signature.outputs)}"
    elif output.dtype not in _FLOATS or output.per != "row" or output.shape not in ((-1,), (-1, 1)):
        yield f"output {route.score!r} of {label} is {output.dtype} {_shape(output)}; expected one float per row: [-1]"
    if not signature.feature_set:
        yield f"{label} names no feature set, so a route cannot fill its inputs"
    feature_set = snapshot.feature_sets.get(signature.feature_set)
    if feature_set is not None:
        yield from _entities(route, feature_set, signature.inputs, label, snapshot)


def _entities(route: Route, feature_set: FeatureSet, tensors: Sequence[TensorSpec], label: str, snapshot: Snapshot) -> Iterator[str]:
    """The subject's tensors come once per request, the candidates' once per row; no other entity has ids in a Rank call."""
    per = {tensor.name: tensor.per for tensor in tensors}
    shape = SetShape(feature_set, snapshot.feature_views)
    for item in feature_set.inputs:
        if item.entity not in (route.subject, route.candidate):
            known = f"the route's subject is {route.subject!r}, its candidate {route.candidate!r}"
            yield f"input {item.name!r} of feature set {feature_set.name!r} is about {item.entity!r}, but {known}"
            continue
        wanted = "request" if item.entity == route.subject else "row"
        crossed = shape.entities_of(item)
        if wanted == "request" and route.candidate in crossed:
            yield f"a transform of input {item.name!r} reads {route.candidate!r}, of which a request has many rows, for each {item.entity!r}"
        for other in set(crossed) - {route.subject, route.candidate}:
            yield f"a transform of input {item.name!r} reads {other!r}, of which a request on this route has no ids"
        if per.get(item.name, wanted) != wanted:
            yield f"input {item.name!r} of {label} is per {per[item.name]}, but features of {item.entity!r} come per {wanted}"
    if all(item.entity != route.candidate for item in feature_set.inputs):
        yield f"feature set {feature_set.name!r} has no input about the candidate {route.candidate!r}, so every score would be the same"
