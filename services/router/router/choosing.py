"""Which variant answers a request: the first rule that matches, else the experiments of the route, else its weights.

Pure. What was meant but cannot serve gives way to the weights, and says so: nobody is sent to a model that is not there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from plait.api.router.v1 import explanation_pb2
from plait.registry.entity_ids import Id
from router.experiments import ServingExperiment, assign, bucket_of
from router.route_table import Arm, ServingRoute
from router.rules import Facts, first_failing
from router.trail import Trail

NOT_READY: Final = "variant_not_ready"

Ready = Callable[[str, str], bool]  # model, version → whether some worker holds it, as far as is known


@dataclass(slots=True, kw_only=True)
class Choice:
    """The variant of a request, the `assignments` its `unit` has, and stable words for what is not as it was meant."""

    arm: Arm
    assignments: tuple[explanation_pb2.Assignment, ...] = ()
    unit: Id | None = None
    reasons: tuple[str, ...] = ()


def choose(route: ServingRoute, facts: Facts, trail: Trail | None = None) -> Choice:
    """Return the variant of a request; the `trail`, where there is one, learns why."""
    meant = _by_rule(route, facts, trail)
    if meant is not None:
        if trail is not None:
            trail.not_in.update((e.name, "rule") for e in route.experiments)
        arm = route.by_name.get(meant)
        return Choice(arm=arm) if arm is not None else _by_weight(route, facts, (NOT_READY,))
    return _by_experiment(route, facts, trail)


def give_way(route: ServingRoute, unit: Id, choice: Choice, ready: Ready, trail: Trail | None = None) -> Choice:
    """Return the choice, or, where no worker holds its version, the unit's variant by weight among those that some worker holds.

    Where none is held the choice stays: the call then says what is missing. Who was moved is in no experiment.
    """
    if ready(choice.arm.model, choice.arm.version):
        return choice
    held = tuple(arm for arm in route.weighted if ready(arm.model, arm.version))
    if not held:
        return choice
    if trail is not None:
        trail.not_in.update((given.experiment, "not_ready") for given in choice.assignments if given.experiment)
    return Choice(arm=assign(route.name, unit, held), reasons=tuple(dict.fromkeys((*choice.reasons, NOT_READY))))


def _by_rule(route: ServingRoute, facts: Facts, trail: Trail | None) -> str | None:
    for rule in route.rules:
        failed = first_failing(rule.tests, facts)
        if trail is not None:
            trail.rules.append(explanation_pb2.RuleReport(rule=rule.name, matched=not failed, failed_condition=failed))
        if not failed:
            return rule.variant
    return None


def _by_experiment(route: ServingRoute, facts: Facts, trail: Trail | None) -> Choice:
    """The first experiment that takes the unit decides; the others are asked only where somebody wants to know."""
    chosen: Choice | None = None
    for experiment in route.experiments:
        unit = facts.unit(experiment.unit)
        bucket = bucket_of(experiment.layer, unit)
        why_not = _why_not(experiment, bucket, facts, taken=chosen is not None)
        if not why_not:
            variant = experiment.variant_of(unit)
            arm = route.by_name.get(variant)
            if arm is None:
                why_not = "not_ready"
                chosen = _by_weight(route, facts, (NOT_READY,))
            else:
                chosen = Choice(arm=arm, assignments=(_assignment(experiment, variant, bucket),), unit=unit)
        if why_not and trail is not None:
            trail.not_in[experiment.name] = why_not
        if chosen is not None and trail is None:
            break
    return chosen or _by_weight(route, facts, ())


def _why_not(experiment: ServingExperiment, bucket: int, facts: Facts, *, taken: bool) -> str:
    """Return why a unit is not in an experiment, an empty string where it is."""
    if bucket not in experiment.buckets or taken:
        return "layer"
    return "condition" if first_failing(experiment.tests, facts) else ""


def _by_weight(route: ServingRoute, facts: Facts, reasons: tuple[str, ...]) -> Choice:
    unit = facts.unit(route.sticky)
    arm = route.assign(unit)
    return Choice(arm=arm, assignments=() if reasons else route.by_weight.get(arm.name, ()), unit=unit, reasons=reasons)


def _assignment(experiment: ServingExperiment, variant: str, bucket: int) -> explanation_pb2.Assignment:
    return explanation_pb2.Assignment(experiment=experiment.name, layer=experiment.layer, variant=variant, bucket=bucket)
