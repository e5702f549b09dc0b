"""Resources and changes, as JSON and on a screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from plait.cli.output import when, write_line, write_table

if TYPE_CHECKING:
    from plait.registry.records import Kind, Model, Record
    from plait.registry.resources import Change, Resource

_ACTION_STYLE = {"created": "green", "updated": "yellow", "deleted": "red", "unchanged": "dim"}


def resource(found: Resource) -> dict[str, Any]:
    """Return a resource as its manifest, with what the registry knows under `status`."""
    from plait.registry.specs import to_manifest  # noqa: PLC0415

    status = {
        "generation": found.generation,
        "revision": found.revision,
        "etag": found.etag,
        "created_at": found.created_at,
        "updated_at": found.updated_at,
    }
    return {**to_manifest(found.record), "status": status}


def change(done: Change) -> dict[str, Any]:
    """Return a change with the fields that differ."""
    return {
        "action": done.action,
        "kind": done.kind,
        "name": done.name,
        "generation": done.generation,
        "revision": done.revision,
        "actor": done.actor,
        "reason": done.reason,
        "changed_at": done.changed_at,
        "differences": [{"field": d.field, "before": d.before, "after": d.after} for d in done.differences()],
    }


def show_changes(changes: Sequence[Change], *, dry_run: bool) -> None:
    """Print one line per resource, and for an update what differs."""
    for done in changes:
        would = "would be " if dry_run and done.action != "unchanged" else ""
        write_line(f"{done.kind}/{done.name} {would}{done.action} (generation {done.generation})", _ACTION_STYLE[done.action])
        if done.action == "updated":
            _show_differences(done, "  ")


def show_manifest(found: Resource) -> None:
    """Print YAML that `plait apply` takes."""
    from plait.registry.specs import to_manifest  # noqa: PLC0415

    write_line(_yaml(to_manifest(found.record)))


def show_list(kind: Kind, found: Sequence[Resource]) -> None:
    """Print a table of one kind."""
    if not found:
        write_line(f"there is no {kind} yet", "dim")
        return
    rows = [(r.name, _summary(r.record), r.generation, when(r.updated_at)) for r in found]
    write_table(("name", "what", "generation", "updated (UTC)"), rows)


def show_description(found: Resource, history: Sequence[Change]) -> None:
    """Print all there is to say about one resource."""
    from plait.registry.records import Model  # noqa: PLC0415
    from plait.registry.specs import to_spec  # noqa: PLC0415

    write_line(f"{found.kind} {found.name}", "bold")
    write_line(f"generation {found.generation} (etag {found.etag}), registry revision {found.revision}")
    write_line(f"created {when(found.created_at)} UTC, updated {when(found.updated_at)} UTC\n")
    if isinstance(found.record, Model):
        _show_versions(found.record)
    write_line("spec", "bold")
    write_line(_yaml(to_spec(found.record)) + "\n")
    write_line("history", "bold")
    for done in history:
        why = f": {done.reason}" if done.reason else ""
        write_line(
            f"  {when(done.changed_at)}  generation {done.generation}  {done.action} by {done.actor}{why}", _ACTION_STYLE[done.action]
        )
        if done.action == "updated":
            _show_differences(done, "    ")


def _show_versions(model: Model) -> None:
    write_line("versions", "bold")
    rows = []
    for version in model.versions:
        aliases = ", ".join(sorted(alias for alias, target in model.aliases.items() if target == version.version))
        metrics = ", ".join(f"{name}={value:.4g}" for name, value in version.metrics.items())
        rows.append((version.version, aliases, version.digest[:19], metrics, version.artifact))
    write_table(("version", "aliases", "digest", "metrics", "artifact"), rows)
    write_line(f"workers hold {_policy(model)}, and what routes and aliases refer to\n")


def _policy(model: Model) -> str:
    policy = model.version_policy
    if policy.all:
        return "every version"
    if policy.specific:
        return f"version(s) {', '.join(policy.specific)}"
    return "no version of themselves" if policy.latest == 0 else f"the newest {policy.latest} version(s)"


def _show_differences(done: Change, indent: str) -> None:
    for difference in done.differences():
        write_line(f"{indent}{difference.field}: {_short(difference.before)} → {_short(difference.after)}", "dim")


def _summary(record: Record) -> str:
    """Return in a few words what a resource is."""
    from plait.registry import records  # noqa: PLC0415

    match record:
        case records.Model():
            aliases = ", ".join(f"{alias}={target}" for alias, target in record.aliases.items())
            found = f"{len(record.versions)} version(s)" + (f"; {aliases}" if aliases else "")
        case records.FeatureView():
            kept = f" (and {', '.join(str(past.version) for past in record.versions)})" if record.versions else ""
            found = f"{len(record.features)} features of {record.entity.type}, version {record.version}{kept}"
        case records.FeatureSet():
            more = [f"{len(each)} {what}" for what, each in (("sent along", record.request), ("computed", record.transforms)) if each]
            found = ", ".join([*(f"{i.name}[{len(i.features)}]" for i in record.inputs), *more])
        case records.Route():
            found = ", ".join(f"{v.name}: {v.model}@{v.use} ×{v.weight:g}" for v in record.variants)
        case records.Tenant():
            found = record.description
        case records.Experiment():
            arms = ", ".join(f"{arm.variant} ×{arm.weight:g}" for arm in record.arms)
            found = f"{record.status} on {record.route}, {record.buckets.count / 100:g} % of layer {record.layer}: {arms}"
        case records.Pool():
            where = record.kubernetes
            found = f"{where.namespace}/{where.service}" if where else ", ".join(e.address for e in record.endpoints)
            found = f"{record.protocol}: {found}"
    return found


def _yaml(document: object) -> str:
    import yaml  # noqa: PLC0415

    return str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)).rstrip()


def _short(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "…"
