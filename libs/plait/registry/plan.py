"""Decides what an apply, a rollback or a delete would do; the store then does it. Pure, so that a dry run is the same decision."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from plait.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound
from plait.registry import crosschecks, rules
from plait.registry.evolution import evolve
from plait.registry.explain import suggestion
from plait.registry.manifests import MAX_MANIFESTS, Manifest
from plait.registry.problems import Problem, path, refusal
from plait.registry.records import FeatureSet, FeatureView, Model, Record, Snapshot
from plait.registry.resources import Action, Key, Past, Resource, records_of, snapshot_of
from plait.registry.specs import kind_of

_MAX_TOLD: Final = 10  # readers of a view, in one sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One resource before and after; `after` is what is to be stored, None to delete it."""

    action: Action
    key: Key
    before: Resource | None
    after: Record | None


def apply(manifests: Sequence[Manifest], current: Mapping[Key, Resource], snapshot: Snapshot, past: Past) -> tuple[Step, ...]:
    """Return one step per manifest, in order.

    `current` holds the stored resources, `snapshot` the same world as one value. Raises InvalidArgument (MANIFEST_INVALID), Aborted
    (ETAG_MISMATCH), FailedPrecondition (CROSS_CHECK_FAILED) with every problem that this apply would bring about.
    """
    _refuse_invalid(manifests)
    _refuse_stale(manifests, current)
    problems: list[Problem] = []
    pinned = crosschecks.pinned(_sets_after(manifests, snapshot))
    steps = [_step(manifest, current.get((manifest.kind, manifest.name)), past, pinned, problems) for manifest in manifests]
    problems = _for_whom(problems, snapshot)
    after = _after(snapshot, steps)
    problems += _emptied(steps, past, after)
    problems += _for_whom(_brought_about(snapshot, after, steps), after)
    if problems:
        located = _located(problems, manifests)
        raise refusal(FailedPrecondition, located, "the registry stays as it is", reason="CROSS_CHECK_FAILED")
    return tuple(steps)


def missing(key: Key, known: Iterable[Key]) -> NotFound:
    """Return the error (RESOURCE_NOT_FOUND) for a resource that is not among those there are, with the one that was perhaps meant."""
    kind, name = key
    hint = suggestion(name, [other for of, other in known if of == kind])
    return NotFound(f"there is no {kind} {name[:80]}{hint}: see 'plait get {kind.lower()}' for what there is", reason="RESOURCE_NOT_FOUND")


def delete(key: Key, etag: str, current: Mapping[Key, Resource], snapshot: Snapshot) -> Step:
    """Return the step that deletes. Raises NotFound, Aborted (ETAG_MISMATCH), FailedPrecondition (STILL_USED) listing the users."""
    kind, name = key
    stored = current.get(key)
    if stored is None:
        raise missing(key, current)
    if etag and etag != stored.etag:
        raise Aborted(f"{kind} {name} was changed meanwhile: its etag is {stored.etag}, not {etag}; read it again", reason="ETAG_MISMATCH")
    users = crosschecks.users_of(snapshot, key)
    if users:
        problems = [Problem(where=user, message="uses it") for user in users]
        raise refusal(FailedPrecondition, problems, f"{kind} {name} is still used", reason="STILL_USED")
    return Step(action="deleted", key=key, before=stored, after=None)


def names_with_past(manifests: Sequence[Manifest]) -> tuple[list[str], list[str]]:
    """Return the names of the views and of the models whose past decides."""
    views = [m.name for m in manifests if isinstance(m.record, FeatureView)]
    return views, [m.name for m in manifests if isinstance(m.record, Model)]


def _refuse_invalid(manifests: Sequence[Manifest]) -> None:
    problems = [
        Problem(where=m.where, field=path(("spec", *steps)), message=message) for m in manifests for steps, message in rules.check(m.record)
    ]
    times = Counter((m.kind, m.name) for m in manifests)
    problems += [Problem(where=m.where, message=f"{m.kind} {m.name} is given twice") for m in manifests if times[m.kind, m.name] > 1]
    if not 1 <= len(manifests) <= MAX_MANIFESTS:
        problems.append(Problem(where="manifests", message=f"expected 1 to {MAX_MANIFESTS}, found {len(manifests)}"))
    if problems:
        raise refusal(InvalidArgument, problems, "the manifests cannot be applied", reason="MANIFEST_INVALID")


def _refuse_stale(manifests: Sequence[Manifest], current: Mapping[Key, Resource]) -> None:
    problems = []
    for manifest in manifests:
        stored = current.get((manifest.kind, manifest.name))
        found = stored.etag if stored else "none"
        if manifest.etag and manifest.etag != found:
            message = f"was changed meanwhile: the stored etag is {found}, not {manifest.etag}; read it again"
            problems.append(Problem(where=manifest.where, field="metadata.etag", message=message))
    if problems:
        raise refusal(Aborted, problems, "the manifests are older than the registry", reason="ETAG_MISMATCH")


def _sets_after(manifests: Sequence[Manifest], snapshot: Snapshot) -> list[FeatureSet]:
    """Return the feature sets as they would be."""
    given = {m.name: m.record for m in manifests if isinstance(m.record, FeatureSet)}
    return list({**snapshot.feature_sets, **given}.values())


def _step(manifest: Manifest, stored: Resource | None, past: Past, pinned: Collection[tuple[str, int]], problems: list[Problem]) -> Step:
    record, found = evolve(manifest.record, past, pinned)
    where = f"{manifest.kind} {manifest.name}"
    problems += [Problem(where=where, field=path(("spec", *steps)), message=message) for steps, message in found]
    action: Action = "created" if stored is None else "unchanged" if stored.record == record else "updated"
    return Step(action=action, key=(manifest.kind, manifest.name), before=stored, after=record)


def _for_whom(problems: Sequence[Problem], snapshot: Snapshot) -> list[Problem]:
    """Add to what is wrong with a view who reads it, and to what is wrong with a set whom it feeds."""
    return [dataclasses.replace(problem, message=problem.message + _whom(problem.where, snapshot)) for problem in problems]


def _whom(where: str, snapshot: Snapshot) -> str:
    kind, _, name = where.partition(" ")
    if kind == "FeatureView" and (readers := crosschecks.readers(snapshot, name)):
        return f"; it is read by {_listed(readers)}"
    if kind == "FeatureSet" and (behind := crosschecks.behind_set(snapshot, name)):
        return f"; it feeds {_listed(behind)}"
    return ""


def _emptied(steps: Sequence[Step], past: Past, after: Snapshot) -> list[Problem]:
    """Return a problem for every view that would go to a version without rows under the feet of a model, and for whom."""
    problems = []
    for step in steps:
        before = None if step.before is None else step.before.record
        view = step.after
        if not (isinstance(view, FeatureView) and isinstance(before, FeatureView)):
            continue
        if view.version == before.version or (view.name, view.version) in past.views:
            continue
        readers = [reader for reader in crosschecks.readers(after, view.name) if "Model " in reader]
        if readers:
            message = (
                f"version {view.version} has no rows yet and would be read at once by {_listed(readers)}: pin {view.name}@{before.version} there "
                f"until it is filled, or {view.name}@{view.version} to begin with defaults"
            )
            problems.append(Problem(where=f"FeatureView {view.name}", field="spec.version", message=message))
    return problems


def _listed(names: Sequence[str]) -> str:
    return "; ".join(names[:_MAX_TOLD]) + (f" and {len(names) - _MAX_TOLD} more" if len(names) > _MAX_TOLD else "")


def _after(snapshot: Snapshot, steps: Sequence[Step]) -> Snapshot:
    records: dict[Key, Record] = {(kind_of(record), record.name): record for record in records_of(snapshot)}
    records |= {step.key: step.after for step in steps if step.after is not None}
    return snapshot_of(snapshot.revision, records.values(), snapshot.keys.values())


def _brought_about(snapshot: Snapshot, after: Snapshot, steps: Sequence[Step]) -> list[Problem]:
    """Return the problems of the world after, less those of resources not touched here that were there before."""
    touched = {f"{kind} {name}" for kind, name in (step.key for step in steps)}
    before = set(crosschecks.check(snapshot))
    return [problem for problem in crosschecks.check(after) if problem.where in touched or problem not in before]


def _located(problems: Sequence[Problem], manifests: Sequence[Manifest]) -> list[Problem]:
    """Put the place in a file in front of the resources that came from one."""
    sources = {f"{m.kind} {m.name}": m.source for m in manifests if m.source}
    return [dataclasses.replace(p, where=f"{sources[p.where]} {p.where}") if p.where in sources else p for p in problems]
