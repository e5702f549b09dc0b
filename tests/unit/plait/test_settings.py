"""Settings: environment over file over defaults, and every wrong one refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, SecretStr
from pydantic_settings import SettingsConfigDict

from plait.settings import Group, ServiceSettings, SettingsError, fields, load


class Cache(Group):
    size_bytes: int = Field(1024, ge=0, description="memory for rows, bytes")
    password: SecretStr = Field(SecretStr("none"), min_length=4, description="what opens it")


class Shop(ServiceSettings):
    model_config = SettingsConfigDict(env_prefix="PLAIT_SHOP_")
    cache: Cache = Field(default_factory=Cache, description="the cache")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLAIT_SHOP_CONFIG", raising=False)


def read(monkeypatch: pytest.MonkeyPatch, **environ: str) -> Shop:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return load(Shop)


def test_defaults_are_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(monkeypatch)
    assert settings.rpc.host == "127.0.0.1"
    assert settings.rpc.require_auth
    assert settings.telemetry.trace_exporter == "none"


def test_environment_beats_file_beats_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text("cache: {size_bytes: 7}\nrpc: {port: 1234, grace_s: 2}\n")
    settings = read(monkeypatch, PLAIT_SHOP_CONFIG=str(file), PLAIT_SHOP_RPC__PORT="99")
    assert (settings.cache.size_bytes, settings.rpc.port, settings.rpc.grace_s) == (7, 99, 2.0)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PLAIT_SHOP_CACHE__SIZE_BYTES", "many", ["PLAIT_SHOP_CACHE__SIZE_BYTES='many'", "integer", "memory for rows, bytes"]),
        ("PLAIT_SHOP_CACHE__SIZE_BYTES", "-1", ["PLAIT_SHOP_CACHE__SIZE_BYTES='-1'", "greater than or equal to 0"]),
        ("PLAIT_SHOP_CACHE__SIZE_BITES", "1", ["PLAIT_SHOP_CACHE__SIZE_BITES", "no such setting", "PLAIT_SHOP_CACHE__SIZE_BYTES"]),
        ("PLAIT_SHOP_RPC__PORT", "70000", ["PLAIT_SHOP_RPC__PORT='70000'", "65535"]),
        ("PLAIT_SHOP_RPC__TLS_CERT", "/a.pem", ["PLAIT_SHOP_RPC", "tls_cert and tls_key go together"]),
        ("PLAIT_SHOP_TELEMETRY__LOG_LEVEL", "loud", ["PLAIT_SHOP_TELEMETRY__LOG_LEVEL='loud'", "'debug'"]),
        ("PLAIT_SHOP_CACHE", "{", ["cache"]),
    ],
)
def test_a_bad_setting_is_named_with_value_and_expectation(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        read(monkeypatch, **{name: value})
    for words in said:
        assert words in str(caught.value)


def test_every_problem_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as caught:
        read(monkeypatch, PLAIT_SHOP_RPC__PORT="x", PLAIT_SHOP_CACHE__SIZE_BYTES="y", PLAIT_SHOP_NOSUCH="z")
    assert str(caught.value).count("\n") == 3


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError) as caught:
        read(monkeypatch, PLAIT_SHOP_CACHE__PASSWORD="abc")
    assert "abc" not in str(caught.value)
    assert "PLAIT_SHOP_CACHE__PASSWORD=<hidden>" in str(caught.value)


def test_open_listener_without_auth_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="require_auth"):
        read(monkeypatch, PLAIT_SHOP_RPC__HOST="0.0.0.0", PLAIT_SHOP_RPC__REQUIRE_AUTH="false")  # noqa: S104


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "nosuch: 1"])
def test_a_bad_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError):
        read(monkeypatch, PLAIT_SHOP_CONFIG=str(file))


def test_a_missing_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="PLAIT_SHOP_CONFIG"):
        read(monkeypatch, PLAIT_SHOP_CONFIG=str(tmp_path / "none.yaml"))


def test_every_setting_has_a_meaning() -> None:
    for name, meaning in fields(Shop):
        assert name.startswith("PLAIT_SHOP_")
        assert len(meaning.split(" (default")[0]) > 8, name


def test_what_may_be_a_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "shop.yaml"
    for text in ("cache:\n  passwort: hunter2\n", "cache: hunter2\n", "cache: {password: hunter2: x\n", "cache: {password: *hunter2}\n"):
        file.write_text(text)
        with pytest.raises(SettingsError) as caught:
            read(monkeypatch, PLAIT_SHOP_CONFIG=str(file))
        assert "hunter2" not in str(caught.value)
    assert "line 1" in str(caught.value)
    monkeypatch.delenv("PLAIT_SHOP_CONFIG")
    with pytest.raises(SettingsError, match="PLAIT_SHOP_CACHE__PASWORD") as caught:  # a secret's name, mistyped
        read(monkeypatch, PLAIT_SHOP_CACHE__PASWORD="hunter2")
    assert "hunter2" not in str(caught.value)
