"""The router's settings by their environment names, and each one that cannot be used told with its value and what was expected."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from plait.settings import SettingsError, fields, load
from router.settings import RouterSettings

NAMES = [
    "ADMISSION__ADAPTIVE",
    "QUOTAS__LEASE_S",
    "ADMISSION__LIMIT",
    "ADMISSION__MIN_LIMIT",
    "ADMISSION__START",
    "ADMISSION__MAX_CELLS",
    "ADMISSION__QUEUE",
    "ADMISSION__MAX_WAIT_S",
    "ADMISSION__MIN_BUDGET_S",
    "ADMISSION__RETRY_AFTER_S",
    "CACHE__BYTES",
    "CACHE__REDIS_BUDGET_S",
    "CACHE__SCORES_BYTES",
    "REPEATS__BYTES",
    "JOURNAL__KEY",
    "JOURNAL__QUEUE",
    "JOURNAL__MAX_ENTRIES",
    "JOURNAL__KNOWN_S",
    "FEATURES__ADDRESSES",
    "FEATURES__CONNECTIONS",
    "FEATURES__EJECTION_S",
    "FEATURES__MAX_EJECTION_S",
    "FEATURES__BUDGET_SHARE",
    "FEATURES__SLOW_START_S",
    "FEATURES__ZONE",
    "FEATURES__CHANNEL__SERVICE_TOKEN",
    "FEATURES__CHANNEL__MAX_MESSAGE_BYTES",
    "FEATURES__CHANNEL__TLS",
    "FEATURES__CHANNEL__TLS_CA",
    "FEATURES__CHANNEL__TLS_CERT",
    "FEATURES__CHANNEL__TLS_KEY",
    "REDIS__CONNECTIONS",
    "REDIS__CONNECT_TIMEOUT_S",
    "REDIS__MODE",
    "REDIS__NODES",
    "REDIS__SENTINEL_PASSWORD",
    "REDIS__SENTINEL_SERVICE",
    "REDIS__TLS_CA",
    "REDIS__TLS_CERT",
    "REDIS__TLS_KEY",
    "REDIS__URL",
    "REDIS__WRITE_TIMEOUT_S",
    "WORKERS__ADDRESSES",
    "WORKERS__CONNECTIONS",
    "WORKERS__EJECTION_S",
    "WORKERS__MAX_EJECTION_S",
    "WORKERS__SLOW_START_S",
    "WORKERS__ZONE",
    "WORKERS__KUBERNETES__NAMESPACE",
    "WORKERS__KUBERNETES__SERVICE",
    "WORKERS__KUBERNETES__PORT",
    "WORKERS__CHANNEL__SERVICE_TOKEN",
    "WORKERS__CHANNEL__MAX_MESSAGE_BYTES",
    "WORKERS__CHANNEL__TLS",
    "WORKERS__CHANNEL__TLS_CA",
    "WORKERS__CHANNEL__TLS_CERT",
    "WORKERS__CHANNEL__TLS_KEY",
]


def read(monkeypatch: pytest.MonkeyPatch, **environ: str) -> RouterSettings:
    for name, value in environ.items():
        monkeypatch.setenv(f"PLAIT_ROUTER_{name}", value)
    return load(RouterSettings)


def test_the_routers_own_names_are_these() -> None:
    """Deployments are written with them: one that is renamed breaks an upgrade."""
    shared = re.compile("PLAIT_ROUTER_(RPC|TELEMETRY|REGISTRY)__")
    assert sorted(name.removeprefix("PLAIT_ROUTER_") for name, _ in fields(RouterSettings) if not shared.match(name)) == sorted(NAMES)


def test_each_has_a_meaning_and_times_a_unit() -> None:
    for name, meaning in fields(RouterSettings):
        told = meaning.split(" (default")[0]
        assert len(told) > 8, name
        assert not name.endswith("_S") or "second" in told, name


def test_defaults_find_a_mesh_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(monkeypatch)
    assert (settings.features.addresses, settings.workers.addresses) == ("127.0.0.1:50052", "127.0.0.1:50053")
    assert settings.admission.limit <= settings.rpc.max_in_flight
    assert settings.rpc.require_auth


def test_they_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(
        monkeypatch,
        ADMISSION__LIMIT="7",
        ADMISSION__MAX_WAIT_S="0.5",
        FEATURES__ADDRESSES="a:1, b:2",
        FEATURES__BUDGET_SHARE="1",
        WORKERS__CONNECTIONS="3",
        WORKERS__CHANNEL__SERVICE_TOKEN="theirs",
    )
    assert (settings.admission.limit, settings.admission.max_wait_s) == (7, 0.5)
    assert (settings.features.addresses, settings.features.budget_share) == ("a:1, b:2", 1.0)
    assert settings.workers.connections == 3
    assert settings.workers.channel.service_token.get_secret_value() == "theirs"
    assert not settings.features.channel.service_token.get_secret_value()


def test_a_file_may_list_addresses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "router.yaml"
    file.write_text("workers: {addresses: ['a:1', 'b:2']}\nfeatures: {addresses: 'c:3,d:4'}\n")
    settings = read(monkeypatch, CONFIG=str(file))
    assert (settings.workers.addresses, settings.features.addresses) == ("a:1,b:2", "c:3,d:4")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ADMISSION__LIMIT", "0", "greater than or equal to 1"),
        ("ADMISSION__LIMIT", "many", "integer"),
        ("ADMISSION__QUEUE", "-1", "greater than or equal to 0"),
        ("ADMISSION__MAX_WAIT_S", "0", "greater than 0"),
        ("ADMISSION__MAX_WAIT_S", "61", "less than or equal to 60"),
        ("ADMISSION__MIN_BUDGET_S", "-0.1", "greater than or equal to 0"),
        ("ADMISSION__RETRY_AFTER_S", "0", "greater than 0"),
        ("FEATURES__BUDGET_SHARE", "0", "greater than 0"),
        ("FEATURES__BUDGET_SHARE", "1.01", "less than or equal to 1"),
        ("FEATURES__BUDGET_SHARE", "nan", "less than or equal to 1"),
        ("FEATURES__CONNECTIONS", "65", "less than or equal to 64"),
        ("WORKERS__EJECTION_S", "inf", "less than or equal to 60"),
        ("WORKERS__MAX_EJECTION_S", "0", "greater than 0"),
        ("WORKERS__ADDRESSES", "", "at least one host:port"),
        ("WORKERS__ADDRESSES", "worker", "'worker' is not host:port"),
        ("FEATURES__ADDRESSES", "a:1,a:1", "listed twice"),
    ],
)
def test_a_value_that_cannot_be_used_is_told_with_its_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(monkeypatch, **{name: value})
    assert f"PLAIT_ROUTER_{name}={value!r}: " in str(caught.value)
    assert expected in str(caught.value)


def test_a_misspelt_name_is_told_with_the_one_that_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as caught:
        read(monkeypatch, WORKERS__ADDRESS="a:1", ADMISSION__LIMITS="3")
    assert "PLAIT_ROUTER_WORKERS__ADDRESS: no such setting; did you mean PLAIT_ROUTER_WORKERS__ADDRESSES?" in str(caught.value)
    assert "PLAIT_ROUTER_ADMISSION__LIMITS: no such setting; did you mean PLAIT_ROUTER_ADMISSION__LIMIT?" in str(caught.value)


def test_a_token_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(monkeypatch, FEATURES__CHANNEL__SERVICE_TOKEN="hush-hush")
    assert "hush-hush" not in repr(settings)


def test_a_kubernetes_service_takes_the_place_of_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(monkeypatch, WORKERS__KUBERNETES__SERVICE="workers", WORKERS__KUBERNETES__NAMESPACE="ml")
    assert settings.workers.kubernetes.port == "grpc"
    with pytest.raises(SettingsError, match="addresses would be ignored"):
        read(monkeypatch, WORKERS__ADDRESSES="a:1")
