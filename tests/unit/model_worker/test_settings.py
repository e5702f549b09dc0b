"""The worker's settings by their environment names."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_worker.settings import ModelWorkerSettings
from plait.registry import signing
from plait.settings import SettingsError, fields, load

_, PUBLIC = signing.generate()


def test_defaults() -> None:
    settings = load(ModelWorkerSettings, {})
    assert settings.models.only == ()
    assert settings.models.repository_control is False
    assert settings.batching.max_rows is None


def test_every_setting_has_a_name_and_a_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MODELS__ONLY": '["ranker"]',
        "MODELS__ARTIFACT_ROOT": "/srv/models",
        "MODELS__NUM_THREADS": "4",
        "MODELS__UNLOAD_AFTER_S": "0",
        "ARTIFACTS__BUCKETS": '["models"]',
        "ARTIFACTS__REQUIRE_SIGNATURE": "true",
        "ARTIFACTS__TRUSTED_KEYS": f'["{PUBLIC}"]',
        "MODELS__READY_WHEN": "all",
        "MODELS__QUARANTINE__FAULTS": "4",
        "BATCHING__MAX_ROWS": "256",
        "BATCHING__MARGIN_MS": "1.5",
    }.items():
        monkeypatch.setenv(f"PLAIT_MODEL_WORKER_{name}", value)
    settings = load(ModelWorkerSettings)
    assert settings.models.only == ("ranker",)
    assert settings.models.artifact_root == Path("/srv/models")
    assert (settings.models.num_threads, settings.models.unload_after_s) == (4, 0.0)
    assert settings.artifacts.buckets == ("models",)
    assert (settings.artifacts.require_signature, settings.artifacts.trusted_keys) == (True, (str(PUBLIC),))
    assert (settings.models.ready_when, settings.models.quarantine.faults) == ("all", 4)
    assert (settings.batching.max_rows, settings.batching.margin_ms) == (256, 1.5)
    assert all(meaning.split(" (default")[0].strip() for _, meaning in fields(ModelWorkerSettings))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ARTIFACTS__SCHEMES", '["http"]'),
        ("ARTIFACTS__MAX_BYTES", "0"),
        ("ARTIFACTS__TRUSTED_KEYS", '["ed25519:AAAA"]'),
        ("MODELS__NUM_THREADS", "-1"),
        ("MODELS__RETRY_S", "0"),
        ("BATCHING__MAX_ROWS", "-1"),
        ("BATCHING__MAX_ROW", "1"),
        ("MODELS__READY_WHEN", "maybe"),
        ("MODELS__QUARANTINE__FAULTS", "1001"),
        ("MODELS__LOAD_CONCURRENCY", "0"),
    ],
)
def test_what_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"PLAIT_MODEL_WORKER_{name}", value)
    with pytest.raises(SettingsError, match=name):
        load(ModelWorkerSettings)


def test_a_worker_that_would_refuse_every_artifact_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_MODEL_WORKER_ARTIFACTS__REQUIRE_SIGNATURE", "true")
    with pytest.raises(SettingsError, match="list the public keys to trust"):
        load(ModelWorkerSettings)


@pytest.mark.parametrize(
    ("name", "value", "why"), [("FAULTS", "21", "larger than window"), ("BACKOFF_S", "301", "longer than max_backoff_s")]
)
def test_a_quarantine_that_could_not_work_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, why: str) -> None:
    monkeypatch.setenv(f"PLAIT_MODEL_WORKER_MODELS__QUARANTINE__{name}", value)
    with pytest.raises(SettingsError, match=why):
        load(ModelWorkerSettings)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "cuda:15"])
def test_models_compute_on_the_cpu_or_on_gpus(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("PLAIT_MODEL_WORKER_MODELS__DEVICE", device)
    assert load(ModelWorkerSettings).models.device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "mps", "cuda:0,1"])
def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("PLAIT_MODEL_WORKER_MODELS__DEVICE", device)
    with pytest.raises(SettingsError, match="MODELS__DEVICE"):
        load(ModelWorkerSettings)
