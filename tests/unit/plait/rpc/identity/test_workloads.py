"""Which tenant a SPIFFE id or a token's subject belongs to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from plait.registry.policies import WorkloadIdentity
from plait.registry.records import Tenant
from plait.rpc.identity.workloads import Workloads

PATHS = st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=3).map("/".join)


def tenant(name: str, *spiffe: str) -> Tenant:
    return Tenant(name=name, identities=tuple(WorkloadIdentity(spiffe=one, roles=("predict",)) for one in spiffe))


def test_the_id_itself_wins_over_prefixes_and_the_longest_of_these() -> None:
    known = Workloads(
        [tenant("wide", "spiffe://td/*"), tenant("narrow", "spiffe://td/ns/shop/*"), tenant("one", "spiffe://td/ns/shop/sa/feed")]
    )

    def owner(path: str, domain: str = "td") -> str:
        grant = known.by_spiffe(f"spiffe://{domain}/{path}")
        return grant.tenant if grant else ""

    assert [owner(path) for path in ("x", "ns/shop/sa/other", "ns/shop/sa/feed", "ns/shop/sa/feed2", "ns/shopping/sa/x")] == [
        "wide",
        "narrow",
        "one",
        "narrow",
        "wide",
    ]
    assert owner("ns/shop/sa/feed", "other") == owner("", "td2") == ""
    assert repr(known) == "<Workloads spiffe=3 subjects=0>"


@given(st.lists(PATHS, unique=True, max_size=6), PATHS)
def test_prefixes_are_as_a_plain_search_says(listed: list[str], asked: str) -> None:
    known = Workloads([tenant(path, f"spiffe://td/{path}*") for path in listed])
    fitting = [path for path in listed if asked.startswith(path)]
    grant = known.by_spiffe(f"spiffe://td/{asked}")
    assert (grant.tenant if grant else None) == max(fitting, key=len, default=None)
