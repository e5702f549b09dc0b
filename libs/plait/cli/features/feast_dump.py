"""What a Feast repository holds, as JSON. Run by `plait features import-feast` under a Python that has feast, which plait's own has not.

It uses feast's own API, so that it works whatever the registry is kept in, and imports nothing of plait.
"""

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any


def dump(repo: str) -> dict[str, Any]:
    """Return entities, views, services and the name of everything else."""
    feast: Any = importlib.import_module("feast")
    store = feast.FeatureStore(repo_path=repo)
    entities = {entity.name: entity for entity in store.list_entities()}
    views: list[Any] = []
    on_demand: list[Any] = []
    for view in store.list_all_feature_views():
        if isinstance(view, feast.OnDemandFeatureView):
            on_demand.append(_on_demand(view))
        else:
            views.append(_view(view, entities))
    return {
        "project": store.project,
        "entity_key_serialization_version": store.config.entity_key_serialization_version,
        "online_store": getattr(store.config.online_store, "type", ""),
        "versioned": bool(getattr(store.config.registry, "enable_online_feature_view_versioning", False)),
        "views": views,
        "on_demand": on_demand,
        "services": [_service(service) for service in store.list_feature_services()],
    }


def _field(field: Any) -> dict[str, Any]:
    return {
        "name": field.name,
        "type": str(field.dtype),
        "description": getattr(field, "description", "") or "",
        "tags": dict(getattr(field, "tags", None) or {}),
        "vector_length": int(getattr(field, "vector_length", 0) or 0),
    }


def _view(view: Any, entities: dict[str, Any]) -> dict[str, Any]:
    known = {field.name: str(field.dtype) for field in getattr(view, "entity_columns", None) or ()}
    keys = [
        {
            "entity": name,
            "name": entities[name].join_key,
            # Feast takes the type from the source when it can, else what the entity says, else a string.
            "type": known.get(entities[name].join_key) or entities[name].value_type.name.title(),
        }
        for name in view.entities
        if name in entities
    ]
    ttl = getattr(view, "ttl", None)
    return {
        "name": view.name,
        "kind": type(view).__name__,
        "keys": keys,
        "features": [_field(field) for field in view.features],
        "ttl_s": ttl.total_seconds() if ttl else 0.0,
        "description": getattr(view, "description", "") or "",
        "online": bool(getattr(view, "online", True)),
    }


def _on_demand(view: Any) -> dict[str, Any]:
    sources = getattr(view, "source_feature_view_projections", None) or {}
    requests = getattr(view, "source_request_sources", None) or {}
    transformation = getattr(view, "feature_transformation", None)
    return {
        "name": view.name,
        "features": [_field(field) for field in view.features],
        "inputs": [f"{source.name}:{field.name}" for source in sources.values() for field in source.features],
        "request": [_field(field) for request in requests.values() for field in request.schema],
        "code": getattr(transformation, "udf_string", "") or "",
    }


def _service(service: Any) -> dict[str, Any]:
    return {
        "name": service.name,
        "description": service.description or "",
        "views": [
            {
                "name": projection.name,
                "features": [field.name for field in projection.features],
                "join_key_map": dict(projection.join_key_map or {}),
            }
            for projection in service.feature_view_projections
        ],
    }


def main() -> None:
    """Write the JSON to the file named second; what feast and the repository's own modules print goes to stderr."""
    repo, target = sys.argv[1:3]
    with contextlib.redirect_stdout(sys.stderr):
        found = dump(repo)
    Path(target).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
