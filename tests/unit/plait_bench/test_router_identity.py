"""Each credential is let in, and told with what it costs."""

from __future__ import annotations

from plait_bench.router_identity import measure


def test_every_credential_has_its_figure() -> None:
    found = measure(2)
    assert {*found} == {"a service token", "an API key", "a token", "a certificate", "a new token"}
    assert all(took_us > 0 for took_us in found.values())
