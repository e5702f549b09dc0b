"""`plait apply`, `get` and `describe` on a real PostgreSQL."""

from __future__ import annotations

import getpass
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.fakes.object_store import ObjectStore
from typer.testing import Result

Plait = Callable[..., Result]

VIEW = """
apiVersion: plait.dev/v1
kind: FeatureView
metadata: {name: item-stats}
spec:
  entity: {type: item}
  features: [{name: price}, {name: views, dtype: int64}]
"""
TENANT = """
apiVersion: plait.dev/v1
kind: Tenant
metadata: {name: shop}
spec: {description: a shop}
"""
MODEL = """
apiVersion: plait.dev/v1
kind: Model
metadata: {name: m}
spec:
  versions: [{version: "1", artifact: "s3://models/m/1"}]
"""


@pytest.fixture
def plait(plait: Callable[..., Result], postgres_dsn: str) -> Callable[..., Result]:
    """The command line with a registry behind it, and two manifests in the folder."""
    Path("manifests").mkdir()
    Path("manifests/view.yaml").write_text(VIEW)
    Path("manifests/tenant.yaml").write_text(TENANT)

    def run(*words: object, **options: Any) -> Result:
        return plait(*words, **{"env": {"PLAIT_POSTGRES_DSN": postgres_dsn}, **options})

    assert run("migrate").exit_code == 0
    return run


def test_apply_get_describe(plait: Plait) -> None:
    result = plait("apply", "-f", "manifests", "--reason", "first")
    assert (result.exit_code, result.stderr) == (0, "")
    assert sorted(result.stdout.splitlines()) == ["FeatureView/item-stats created (generation 1)", "Tenant/shop created (generation 1)"]

    listed = plait("get", "views")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["NAME", "item-stats"]
    assert "2 features of item, version 1" in listed.stdout

    described = plait("describe", "view", "item-stats").stdout
    assert "FeatureView item-stats" in described
    assert f"created by {getpass.getuser()}@" in described
    assert ": first" in described


def test_what_get_prints_can_be_applied_again(plait: Plait) -> None:
    plait("apply", "manifests")
    manifest = plait("get", "view", "item-stats").stdout
    assert yaml.safe_load(manifest)["metadata"]["name"] == "item-stats"
    assert plait("apply", "-f", "-", input=manifest).stdout == "FeatureView/item-stats unchanged (generation 1)\n"


def test_a_model_in_an_object_store_is_pinned(plait: Plait, object_store: ObjectStore) -> None:
    Path("m").mkdir()
    Path("m/model.onnx").write_bytes(b"weights")
    packed = plait(
        *("artifact", "pack", "m", "--name", "m", "--format", "onnx", "--entry", "model.onnx"),
        *("--input", "x:float32:-1,2", "--output", "score:float32:-1", "--json"),
    )
    assert plait("artifact", "push", "m", "s3://models/m/1", "--allow-http").exit_code == 0
    Path("model.yaml").write_text(MODEL)
    assert "[ARTIFACT_INVALID]" in plait("apply", "-f", "model.yaml").stderr
    assert "Model/m created" in plait("apply", "-f", "model.yaml", "--allow-http").stdout
    (version,) = json.loads(plait("get", "model", "m", "--json").stdout)["spec"]["versions"]
    assert (version["artifact"], version["digest"]) == ("s3://models/m/1", json.loads(packed.stdout)["digest"])


def test_a_dry_run_changes_nothing(plait: Plait) -> None:
    result = plait("apply", "manifests/tenant.yaml", "--dry-run")
    assert result.stdout == "Tenant/shop would be created (generation 1)\n"
    assert "RESOURCE_NOT_FOUND" in plait("get", "tenant", "shop").stderr


def test_an_update_shows_what_differs(plait: Plait) -> None:
    plait("apply", "manifests")
    Path("manifests/tenant.yaml").write_text(TENANT.replace("a shop", "the shop"))
    result = plait("apply", "-f", "manifests")
    assert "FeatureView/item-stats unchanged (generation 1)" in result.stdout
    assert "Tenant/shop updated (generation 2)\n  description: a shop → the shop\n" in result.stdout


def test_json_everywhere(plait: Plait) -> None:
    applied = json.loads(plait("apply", "manifests/tenant.yaml", "--json", "--reason", "why").stdout)
    assert applied["dry_run"] is False
    (change,) = applied["changes"]
    assert (change["action"], change["kind"], change["name"], change["reason"]) == ("created", "Tenant", "shop", "why")
    listed = next(tenant for tenant in json.loads(plait("get", "tenants", "--json").stdout) if tenant["metadata"]["name"] == "shop")
    got = json.loads(plait("get", "tenant", "shop", "--json").stdout)
    described = json.loads(plait("describe", "tenant", "shop", "--json").stdout)
    assert listed == got == {name: part for name, part in described.items() if name != "history"}
    assert (got["metadata"]["name"], got["status"]["generation"], got["status"]["etag"]) == ("shop", 1, "g1")
    assert [entry["action"] for entry in described["history"]] == ["created"]
    assert json.loads(plait("get", "models", "--json").stdout) == []


def test_every_problem_is_told_with_file_and_line(plait: Plait) -> None:
    Path("bad.yaml").write_text(VIEW.replace("entity: {type: item}", "entitty: {type: item}") + "---" + TENANT.replace("spec:", "spek:"))
    result = plait("apply", "-f", "bad.yaml", "-f", "missing.yaml")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "[MANIFEST_INVALID]" in result.stderr
    for part in ("bad.yaml:", "entitty", "spek", "missing.yaml"):
        assert part in result.stderr
    assert plait("get", "views").stdout == "there is no FeatureView yet\n"


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (
            ("get", "view", "nothing"),
            1,
            "there is no FeatureView nothing: see 'plait get featureview' for what there is  [RESOURCE_NOT_FOUND]",
        ),
        (("describe", "model", "nothing"), 1, "there is no Model nothing: see 'plait get model' for what there is  [RESOURCE_NOT_FOUND]"),
        (("get", "modles"), 2, "did you mean models?"),
        (("apply",), 2, "say what to apply: plait apply -f PATH"),
    ],
)
def test_what_is_not_there(plait: Plait, words: tuple[str, ...], code: int, says: str) -> None:
    result = plait(*words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert says in result.stderr


def test_a_registry_without_tables_says_so(plait: Plait, postgres_server: Any) -> None:
    dsn = postgres_server.create_database("test_empty_registry")
    try:
        result = plait("get", "models", "--dsn", dsn)
    finally:
        postgres_server.drop_database("test_empty_registry")
    assert result.exit_code == 1
    assert "[REGISTRY_NOT_MIGRATED]" in result.stderr


def test_rollback_applies_an_earlier_generation_as_a_new_one(plait: Plait) -> None:
    for text in ("one", "two", "three"):
        Path("manifests/tenant.yaml").write_text(TENANT.replace("a shop", text))
        plait("apply", "-f", "manifests/tenant.yaml")
    assert "Tenant/shop updated (generation 4)" in plait("rollback", "tenant", "shop").stdout
    assert json.loads(plait("get", "tenant", "shop", "--json").stdout)["spec"]["description"] == "two"
    change = json.loads(plait("rollback", "tenant", "shop", "--to", "1", "--reason", "why", "--json").stdout)
    assert (change["generation"], change["reason"]) == (5, "why")
    assert json.loads(plait("get", "tenant", "shop", "--json").stdout)["spec"]["description"] == "one"
    refused = plait("rollback", "tenant", "shop", "--to", "9")
    assert (refused.exit_code, "no generation 9" in refused.stderr) == (1, True)
