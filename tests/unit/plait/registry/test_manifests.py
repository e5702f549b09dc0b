from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from tests.fakes.object_store import ObjectStore

from plait.errors import FailedPrecondition, InvalidArgument
from plait.registry import artifact, plan, rules
from plait.registry.manifests import MAX_MANIFEST_BYTES, Manifest, load, parse, pin_artifacts
from plait.registry.records import Batching, Model, ModelVersion, Snapshot, Tenant, TensorSpec, VersionPolicy
from plait.registry.resources import Past
from plait.registry.sources import StoreOptions
from plait.registry.specs import to_manifest, to_spec
from plait.registry.yaml_tree import dump

HEAD = "apiVersion: plait.dev/v1\n"
TENANT = HEAD + "kind: Tenant\nmetadata: {name: shop}\n"

DTYPES = "bool, int8, int16, int32, int64, float16, float32, float64, timestamp or string"

EVERYTHING_WRONG = """\
apiVersion: plait.dev/v1
kind: FeatureView
metadata: {name: item-stats}
spec:
  entity: {type: item, key: strin}
  version: "1"
  featurs: 3
  features:
    - {name: rating_mean, dtype: flot32, default: [1]}
    - {dtype: int8, default: 300}
---
apiVersion: plait.dev/v2
kind: Modle
metadata: {name: 3}
---
apiVersion: plait.dev/v1
kind: Model
metadata: {name: m, labels: {}}
spec:
  versions: [{version: 1, artifact: ./x}]
  aliases:
    champion: 1
---
apiVersion: plait.dev/v1
kind: Route
metadata: {name: Demo}
spec:
  name: x
  timeout_s: .inf
  variants:
    - {name: a, model: b, use: c, weight: 0}
---
- 1
"""


def violations(text: str) -> list[str]:
    with pytest.raises(InvalidArgument) as caught:
        parse(text, source="m.yaml")
    assert caught.value.reason == "MANIFEST_INVALID"
    return [f"{v.field}: {v.description}" for v in caught.value.violations]


def test_every_problem_is_said_at_once_with_file_and_line() -> None:
    assert violations(EVERYTHING_WRONG) == [
        "m.yaml:5 spec.entity.key: expected one of string, int64 or composite, found 'strin'; did you mean 'string'?",
        "m.yaml:6 spec.version: expected a whole number, found '1'; take the quotes away",
        "m.yaml:7 spec.featurs: is not a field of this; did you mean 'features'?",
        f"m.yaml:9 spec.features[0].dtype: expected one of {DTYPES}, found 'flot32'; did you mean 'float32'?",
        "m.yaml:9 spec.features[0].default: expected a number or a whole number or true or false or text, found a list",
        "m.yaml:10 spec.features[1].name: is required",
        "m.yaml:12 apiVersion: expected plait.dev/v1, found 'plait.dev/v2'",
        "m.yaml:13 kind: expected one of Model, FeatureView, FeatureSet, Route, Tenant, Experiment, Pool, found 'Modle'; did you mean 'Model'?",
        "m.yaml:14 metadata.name: expected text, found the number 3; put it in quotes",
        "m.yaml:18 metadata.labels: is not a field of this; the fields here are name, etag",
        'm.yaml:20 spec.versions[0].version: expected text, found the number 1; put it in quotes: "1"',
        'm.yaml:22 spec.aliases.champion: expected text, found the number 1; put it in quotes: "1"',
        f"m.yaml:26 metadata.name: 'Demo' is not a name: use {rules.NAME_HELP}",
        "m.yaml:28 spec.name: belongs under metadata",
        "m.yaml:30 spec.variants: need one with a weight above 0: requests that no rule and no experiment takes have to go somewhere",
        "m.yaml:29 spec.timeout_s: expected a number of more than 0 and at most 60, found inf",
        "m.yaml:33: expected a mapping with apiVersion, kind, metadata, spec; found a list",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            HEAD + "metadata: {name: a}",
            "m.yaml:1 kind: is required; write one of Model, FeatureView, FeatureSet, Route, Tenant, Experiment, Pool",
        ),
        ("kind: Tenant\nmetadata: {name: a}", "m.yaml:1 apiVersion: is required; write apiVersion: plait.dev/v1"),
        (HEAD + "kind: Tenant", "m.yaml:1 metadata: is required; write metadata: {name: …}"),
        (HEAD + "kind: Tenant\nmetadata: {}", "m.yaml:3 metadata.name: is required"),
        (HEAD + "kind: Tenant\nmetadata: shop", "m.yaml:3 metadata: is required; write metadata: {name: …}"),
        (TENANT + "spec: 3", "m.yaml:4 spec: expected a mapping of fields, found the number 3"),
        (TENANT + "status: {}", "m.yaml:4 status: is not a field of this; the fields here are apiVersion, kind, metadata, spec"),
        (TENANT + "spec: {a: 1, a: 2}", "m.yaml:4: 'a' is given twice; the first is on line 4"),
        (TENANT + "---\n" + TENANT, "m.yaml:5 metadata.name: Tenant shop is described twice, first at m.yaml:1"),
        (
            HEAD + "kind: [Tenant]\nmetadata: {name: a}",
            "m.yaml:2 kind: expected one of Model, FeatureView, FeatureSet, Route, Tenant, Experiment, Pool, found a list",
        ),
        (
            HEAD + "kind: FeatureView\nmetadata: {name: v}\nspec: {entity: {type: u}, features: [{name: a}], schemas: []}",
            "m.yaml:4 spec.schemas: is filled in by the registry; leave it out",
        ),
        (
            HEAD + "kind: FeatureView\nmetadata: {name: v}\nspec: {entity: {type: u}, features: [{name: a}], versions: []}",
            "m.yaml:4 spec.versions: is filled in by the registry; leave it out",
        ),
    ],
)
def test_each_fault_has_its_sentence(text: str, problem: str) -> None:
    assert problem in violations(text)


def test_a_manifest_has_a_largest_size() -> None:
    (found,) = violations(TENANT + f"spec: {{description: {'x' * MAX_MANIFEST_BYTES}}}")
    assert found.startswith("m.yaml:1: this manifest is ")
    assert found.endswith(f" bytes long; at most {MAX_MANIFEST_BYTES} are allowed")


def test_a_tenant_needs_no_spec() -> None:
    (manifest,) = parse(TENANT + "---\n# nothing more\n", source="m.yaml")
    assert manifest.record == Tenant(name="shop")
    assert (manifest.kind, manifest.name, manifest.where) == ("Tenant", "shop", "m.yaml:1")


MODEL = HEAD + "kind: Model\nmetadata: {name: m}\nspec:\n  versions: [{version: '1', artifact: /m/1}, {version: '2', artifact: /m/2}]\n"


@pytest.mark.parametrize(
    ("written", "policy"),
    [
        ("", VersionPolicy()),
        ("  version_policy: {}\n", VersionPolicy(latest=1)),
        ("  version_policy: {latest: 2}\n", VersionPolicy(latest=2)),
        ("  version_policy: {latest: 0}\n", VersionPolicy(latest=0)),
        ("  version_policy: {specific: ['1']}\n", VersionPolicy(specific=("1",))),
        ("  version_policy: {all: true}\n", VersionPolicy(all=True)),
    ],
)
def test_a_version_policy_goes_in_and_out(written: str, policy: VersionPolicy) -> None:
    (manifest,) = parse(MODEL + written)
    assert isinstance(manifest.record, Model)
    assert manifest.record.version_policy == policy
    spec = to_spec(manifest.record)
    assert ("version_policy" in spec) == (policy != VersionPolicy())
    (again,) = parse(dump(to_manifest(manifest.record)))
    assert again.record == manifest.record


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("{latest: '2'}", "m.yaml:6 spec.version_policy.latest: "),
        ("{specific: [1]}", "m.yaml:6 spec.version_policy.specific[0]: "),
        ("{newest: 2}", "m.yaml:6 spec.version_policy.newest: "),
        ("{specific: ['9']}", "m.yaml:6 spec.version_policy.specific[0]: "),
        ("{all: true, latest: 2}", "m.yaml:6 spec.version_policy.all: "),
    ],
)
def test_a_wrong_version_policy_is_named_where_it_stands(written: str, problem: str) -> None:
    (violation,) = violations(f"{MODEL}  version_policy: {written}\n")
    assert violation.startswith(problem)


def test_an_etag_is_taken_along() -> None:
    assert parse(HEAD + "kind: Tenant\nmetadata: {name: shop, etag: g3}")[0].etag == "g3"


def test_what_is_made_in_code_is_named_by_kind_and_name() -> None:
    assert Manifest(record=Tenant(name="shop")).where == "Tenant shop"


def test_files_folders_and_stdin_are_read_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "manifests"
    (folder / "deeper.yaml").mkdir(parents=True)
    for name in ("b.yml", "a.yaml", "c.txt"):
        (folder / name).write_text(TENANT.replace("shop", name[0]))
    (tmp_path / "one.txt").write_text("\ufeff" + TENANT.replace("shop", "one"), encoding="utf-8")
    found = load([tmp_path / "one.txt", folder, "-"], stdin=io.StringIO(TENANT))
    assert [m.name for m in found] == ["one", "a", "b", "shop"]
    assert [m.source for m in found] == [f"{tmp_path}/one.txt:1", f"{folder}/a.yaml:1", f"{folder}/b.yml:1", "stdin:1"]
    assert [m.folder for m in found[:3]] == [tmp_path, folder, folder]


def test_problems_of_all_files_come_together(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [")
    (tmp_path / "b.yaml").write_text(TENANT)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidArgument) as caught:
        load([tmp_path, tmp_path / "missing.yaml", tmp_path / "empty", tmp_path / "b.yaml"])
    found = [str(v.field).removeprefix(str(tmp_path)) + ": " + v.description for v in caught.value.violations]
    assert found[0].startswith("/a.yaml:")
    assert found[1:] == [
        "/c.yaml: is not UTF-8 text",
        "/missing.yaml: cannot be read: No such file or directory",
        "/empty: there is no *.yaml or *.yml file in this folder",
        f"/b.yaml:1 metadata.name: Tenant shop is described twice, first at {tmp_path}/b.yaml:1",
    ]


def test_nothing_to_apply_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# only a comment\n")
    with pytest.raises(InvalidArgument, match="there is no manifest in it"):
        load([tmp_path])


def published(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.pt").write_bytes(b"weights")
    manifest = artifact.ArtifactManifest(
        name="m",
        format="torchscript",
        entry="model.pt",
        inputs=(TensorSpec(name="x", dtype="float32", shape=(-1, 2)),),
        outputs=(TensorSpec(name="score", dtype="float32", shape=(-1,)),),
        batching=Batching(max_rows=8),
    )
    artifact.write(folder, manifest)
    return folder


def model(location: str, folder: Path, digest: str = "") -> Manifest:
    version = ModelVersion(version="1", artifact=location, digest=digest)
    return Manifest(record=Model(name="m", versions=(version,)), source="m.yaml:1", folder=folder)


@pytest.mark.parametrize("location", ["./art", "art", "file://{base}/art", "{base}/art"])
def test_pinning_fills_in_path_digest_and_signature(location: str, tmp_path: Path) -> None:
    folder = published(tmp_path / "art")
    (pinned,) = pin_artifacts([model(location.format(base=tmp_path), tmp_path)])
    assert isinstance(pinned.record, Model)
    (version,) = pinned.record.versions
    assert version.artifact == str(folder.resolve())
    assert version.digest == artifact.digest(folder)
    assert version.signature == artifact.read(folder).signature
    assert pin_artifacts([pinned]) == [pinned]


def test_a_version_on_a_foreign_server_has_nothing_to_pin(tmp_path: Path) -> None:
    text = (
        HEAD
        + """kind: Model
metadata: {name: ranker}
spec:
  pool: triton
  versions:
  - version: "1"
    signature: {inputs: [{name: x, dtype: float32, shape: [-1, 2]}], outputs: [{name: score, dtype: float32, shape: [-1]}], feature_set: home}
"""
    )
    [manifest] = parse(text, source="m.yaml")
    assert pin_artifacts([manifest], tmp_path) == [manifest]
    assert tuple(rules.check(manifest.record)) == ()


def test_pinning_may_start_elsewhere_and_leaves_other_kinds_alone(tmp_path: Path) -> None:
    published(tmp_path / "art")
    tenant = Manifest(record=Tenant(name="shop"))
    pinned = pin_artifacts([tenant, model("art", Path("/nowhere"))], tmp_path)
    assert pinned[0] is tenant
    assert isinstance(pinned[1].record, Model)
    assert pinned[1].record.versions[0].digest


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_an_artifact_in_an_object_store_is_pinned_by_its_model_yaml_alone(tmp_path: Path, object_store: ObjectStore, scheme: str) -> None:
    content = (published(tmp_path / "art") / "model.yaml").read_bytes()
    object_store.objects["models/art/1/model.yaml"] = content
    (pinned,) = pin_artifacts([model(f"{scheme}://models/art/1/", tmp_path)], options=StoreOptions(allow_http=True, retries=0))
    assert isinstance(pinned.record, Model)
    (version,) = pinned.record.versions
    assert version.artifact == f"{scheme}://models/art/1"
    assert version.digest == artifact.digest(tmp_path / "art")
    assert version.signature == artifact.read(tmp_path / "art").signature
    assert object_store.order == [("GET", "models/art/1/model.yaml")]


def test_pinning_names_every_artifact_that_cannot_be_used(tmp_path: Path) -> None:
    folder = published(tmp_path / "art")
    wrong = model("art", tmp_path, digest="sha256:" + "0" * 64)
    missing = dataclasses.replace(model("nothing", tmp_path), source="n.yaml:1")
    later = dataclasses.replace(model("s3://bucket", tmp_path), source="o.yaml:1")
    with pytest.raises(FailedPrecondition) as caught:
        pin_artifacts([wrong, missing, later])
    fields = [v.field for v in caught.value.violations]
    texts = [v.description for v in caught.value.violations]
    assert fields == [f"{name}.yaml:1 spec.versions[0].artifact" for name in "mno"]
    assert texts[0].startswith("version 1 is pinned to sha256:0000")
    assert "there is no artifact at" in texts[1]
    assert "whole bucket" in texts[2]
    (folder / "model.pt").write_bytes(b"tampered")
    with pytest.raises(FailedPrecondition, match=r"model\.pt: expected sha256"):
        pin_artifacts([model("art", tmp_path)])


EVERY_TYPE = """\
apiVersion: plait.dev/v1
kind: FeatureView
metadata: {name: listing-facts}
spec:
  entity: {type: listing, key: composite, parts: [{name: shop, type: string}, {name: sku, type: int64}]}
  features:
  - {name: price, dtype: float32, default: 0}
  - {name: listed_at, dtype: timestamp}
  - {name: colour, dtype: string, vocabulary: [red, green, blue], default: red}
  - {name: brand, dtype: string, hash_buckets: 10000}
  - {name: sizes, dtype: int16, max_length: 8, pad: -1}
  version: 1
  max_age_s: 3600
  retention_s: 86400
  readers: [shop-a]
  writers: [shop-a, key-0123456789ab]
  durable: behind
---
apiVersion: plait.dev/v1
kind: FeatureView
metadata: {name: listing-text}
spec:
  entity: {type: listing, key: composite, parts: [{name: shop, type: string}, {name: sku, type: int64}]}
  features:
  - {name: text, dtype: int8, width: 384, scale: 0.0078125}
---
apiVersion: plait.dev/v1
kind: FeatureView
metadata: {name: user-taste}
spec:
  entity: {type: user}
  features:
  - {name: vector, width: 384}
---
apiVersion: plait.dev/v1
kind: FeatureView
metadata: {name: live}
spec:
  entity: {type: listing}
  retention_s: 2678400
  aggregation: {entity_from: object, lateness_s: 86400}
  features:
  - {name: views_1h,   dtype: float32, aggregate: {function: count, events: [view], window_s: 3600, tile_s: 300}}
  - {name: spend_7d,   dtype: float32, aggregate: {function: sum, events: [complete_purchase], value: value, window_s: 604800, tile_s: 43200}}
  - {name: rating,     dtype: float32, aggregate: {function: mean, events: [rate], value: value}}
  - {name: low_30d,    dtype: float32, aggregate: {function: min, events: [make_offer], value: value, window_s: 2592000, tile_s: 86400}}
  - {name: last_price, dtype: float32, aggregate: {function: last, events: [make_offer], value: value}}
  - {name: viewers_1d, dtype: float32, aggregate: {function: distinct, events: [view], value: subject, window_s: 86400, tile_s: 14400, precision: 8}}
  - {name: heat,       dtype: float32, aggregate: {function: sum, events: [view, like], half_life_s: 1209600}}
---
apiVersion: plait.dev/v1
kind: FeatureSet
metadata: {name: home}
spec:
  request:
  - {name: hour, dtype: int32, minimum: 0, maximum: 23, default: 12}
  - {name: distance_km, entity: listing, minimum: 0}
  transforms:
  - {name: affinity, entity: listing, expression: "cosine({user-taste:vector}, {listing-text:text})", default: 0}
  - {name: freshness, entity: listing, expression: "log1p(time_since({listing-facts:listed_at}))", default: 0}
  inputs:
  - {name: item, entity: listing, features: ["listing-facts@1:price", "listing-text:text", "$request:distance_km", "$transform:affinity"]}
"""


def test_everything_that_may_be_declared_applies_and_is_written_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(EVERY_TYPE)
    found = load([tmp_path / "all.yaml"])
    steps = plan.apply(found, {}, Snapshot(), Past())
    assert [step.action for step in steps] == ["created"] * 5
    again = "---\n".join(dump(to_manifest(step.after)) for step in steps if step.after is not None)
    (tmp_path / "again.yaml").write_text(again)
    assert [m.record for m in load([tmp_path / "again.yaml"])] == [m.record for m in found]
