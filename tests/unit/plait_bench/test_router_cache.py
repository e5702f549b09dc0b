"""The cache's figures are of what they say."""

from __future__ import annotations

import pytest

from plait_bench.router_cache import Scale, main, measure


def test_what_is_measured() -> None:
    figures = measure(Scale(rounds=1, calls=20, users=50, asked=400))
    assert figures["stampede_model_calls"] == 1
    assert 0.8 < figures["zipf_hit_ratio"] < 1
    assert figures["hit_p50_us"] > 0
    assert figures["miss_overhead_us"] == figures["miss_p50_us"] - figures["plain_p50_us"]


def test_it_prints_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plait_bench.router_cache.QUICK", Scale(rounds=1, calls=5, users=10, asked=20))
    main(["--quick"])
    assert "zipf_hit_ratio" in capsys.readouterr().out
