"""How an answer came to be, put together from its trail, with one sentence for people."""

from __future__ import annotations

from typing import Final

from plait.api.router.v1 import router_service_pb2 as pb
from router.question import TIER_FULL, TIER_POPULARITY, Question, Response
from router.trail import Trail

_PASSED: Final = {
    "failed": "failed",
    "overloaded": "was overloaded",
    "budget_too_small": "would have taken too long",
    "nothing_cached": "knew too little",
}


def explain(response: Response, question: Question, trail: Trail) -> pb.ExplainResponse:
    """Return the answer and what its trail tells."""
    told = pb.ExplainResponse(
        rules=trail.rules,
        cache_would_be=trail.cache,
        ages=trail.ages,
        tiers=trail.tiers,
        stages=trail.stages,
        attempts=trail.attempts,
        not_in=trail.not_in,
        summary=summary(response, question, trail),
    )
    if isinstance(response, pb.RankResponse):
        told.rank.CopyFrom(response)
    else:
        told.predict.CopyFrom(response)
    return told


def summary(response: Response, question: Question, trail: Trail) -> str:
    """Return who answered, why, on which tier, and what is not the best possible: names and stable words only."""
    who = f"Variant {response.variant!r} ({response.model} version {response.model_version}) answered"
    if question.tier == TIER_POPULARITY:
        who = "The popularity of the candidates answered, without a model"
    words = [who]
    if question.tier == TIER_FULL:
        words.append(_why(question, trail))
    if question.tier != TIER_FULL:
        passed = [f"{tier.tier} {_PASSED[tier.reason]}" for tier in trail.tiers if tier.reason in _PASSED]
        words.append(f"on tier {question.tier}, because {' and '.join(passed)}")
    others = [reason for reason in question.reasons if not reason.startswith("tier_")]
    if others:
        words.append(f"with {', '.join(others)}")
    return ", ".join(words) + "."


def _why(question: Question, trail: Trail) -> str:
    matched = next((rule.rule for rule in trail.rules if rule.matched), None)
    if matched is not None:
        return f"by rule {matched!r}"
    for given in question.assignments:
        if given.experiment:
            return f"by experiment {given.experiment!r} (bucket {given.bucket} of layer {given.layer!r})"
    return "by the weights of the route" if len(question.route.weighted) > 1 else "as the route's only variant with a weight"
