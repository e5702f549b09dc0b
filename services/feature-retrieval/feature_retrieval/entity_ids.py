"""The ids of a request: of the kind the entity type declares, each read once, and every caller's row found again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from feature_retrieval.views import EntityPlan, Plan
from plait.errors import InvalidArgument, Violation
from plait.registry.entity_ids import Id, composites, read_ids

MAX_ROWS: Final = 10_000  # of one entity type

Index = npt.NDArray[np.intp]


def ids_by_type(plan: Plan, entities: Any) -> dict[str, Sequence[Id]]:
    """Check a request's entities against the plan; return the ids by entity type. Raises InvalidArgument with every violation."""
    problems: list[Violation] = []
    needed = {entity.entity_type: entity for entity in plan.entities}
    found: dict[str, Sequence[Id]] = {}
    for at, rows in enumerate(entities):
        entity = needed.get(rows.entity_type)
        if entity is None or rows.entity_type in found:
            wrong = (
                "is given twice"
                if entity is not None
                else f"is not used by feature set {plan.feature_set.name!r}: it needs {sorted(needed)}"
            )
            problems.append(Violation(f"entities[{at}].entity_type", wrong))
            continue
        ids, problem = _ids_of(rows.ids, entity)
        if problem:
            problems.append(Violation(f"entities[{at}].ids", problem))
        elif len(ids) > MAX_ROWS:
            problems.append(Violation(f"entities[{at}].ids", f"{len(ids)} rows are asked for, at most {MAX_ROWS} of a type are allowed"))
        found[rows.entity_type] = ids
    problems += [Violation("entities", f"ids of entity type {missing!r} are missing") for missing in needed.keys() - found.keys()]
    if problems:
        raise InvalidArgument("the entities do not fit the feature set", violations=problems)
    return found


def unique(ids: Sequence[Id]) -> tuple[Sequence[Id], Index | None]:
    """Return each id once, and where each caller's row is among them (None = nothing was repeated)."""
    if len(set(ids)) == len(ids):
        return ids, None
    order = {entity_id: at for at, entity_id in enumerate(dict.fromkeys(ids))}
    return list(order), np.fromiter(map(order.__getitem__, ids), np.intp, len(ids))


def _ids_of(ids: Any, plan: EntityPlan) -> tuple[Sequence[Id], str]:
    if plan.entity is not None:
        return read_ids(ids, plan.entity)
    values: Sequence[Id] = ids.string_ids[:] or ids.int64_ids[:] or composites(ids)
    return values, "" if values else "at least one id is needed"
