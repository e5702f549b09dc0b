"""What the registry knows, as values: every process holds one immutable `Snapshot` of these and swaps it whole.

The same classes are the schema of the manifests (`spec:` of each kind), so a field is described once. They hold no I/O and
no behaviour beyond look-ups; `manifests` validates into them, `store` writes them, `watcher` hands out snapshots.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from plait.registry.policies import (
    Buckets,
    CachePolicy,
    Condition,
    ExperimentArm,
    Hedge,
    KubernetesService,
    PoolEndpoint,
    Quota,
    Retry,
    Rule,
    Shadow,
    Stages,
    Tier,
    WorkloadIdentity,
)

Name = str  # [a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?  checked by `manifests`

FeatureDType = Literal["bool", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "timestamp", "string"]
KeyKind = Literal["string", "int64", "composite"]
TensorDType = Literal[
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
    "bfloat16", "bytes",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """How one feature is computed from events.

    `events`: the types of event that count. `value`: what of an event is taken, a name of `Event.values` or "value", "subject" or "object";
    empty = each counts one. `window_s`: how far back (0 = for ever), in tiles of `tile_s`; or `half_life_s`: every event weighs half as much
    after that long. `precision`: 2 to its power are the registers of a `distinct`.
    """

    function: Literal["count", "sum", "mean", "min", "max", "last", "distinct"]
    events: tuple[str, ...]
    value: str = ""
    window_s: float = 0.0
    tile_s: float = 0.0
    half_life_s: float = 0.0
    precision: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One column of a feature view.

    `default` is used where no value is known; without one such a cell is NaN (floats) or 0 and its row says NOT_FOUND.
    `timestamp` is an int64 of microseconds since the epoch. A `string` reaches a model as a code: with a `vocabulary` 1 + the word's place
    (0 = not in it), with `hash_buckets` a hash below that number. `width`: an embedding of so many values, an int8 one times `scale`.
    `max_length`: a list of at most so many values, shorter ones padded at the end with `pad`. `aggregate`: computed from events.
    """

    name: Name
    dtype: FeatureDType = "float32"
    default: float | int | bool | str | None = None
    description: str = ""
    width: int = 0
    scale: float = 0.0
    vocabulary: tuple[str, ...] = ()
    hash_buckets: int = 0
    max_length: int = 0
    pad: float = 0.0
    aggregate: Aggregate | None = None

    @property
    def stand_in(self) -> float | int:
        """What takes the place of an unknown number: the declared default, else NaN for floats and 0 for the rest.

        Raises TypeError for a default that is text, whose code depends on how the words are coded.
        """
        if isinstance(self.default, str):
            raise TypeError(f"the default of feature {self.name!r} is text and has to be coded first")
        if self.default is not None:
            return self.default
        return math.nan if self.dtype.startswith("float") else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSchema:
    """One generation of a view's columns. `id` (u16) is stored in every row, so rows of older schemas stay readable."""

    id: int
    features: tuple[Feature, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPart:
    """One part of a composite key."""

    name: Name
    type: Literal["string", "int64"] = "string"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entity:
    """What a view's rows are about. `key` says how an id is typed: string "1" and int64 1 are different entities.

    `parts`: those of a composite key, in order; empty for the others.
    """

    type: Name
    key: KeyKind = "string"
    parts: tuple[KeyPart, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregation:
    """Where an aggregated view's events come from: whose rows they change, and how late one may be.

    `lateness_s`: an event older than the newest one by more than its window and this is refused; duplicates are known for as long.
    """

    entity_from: Literal["object", "subject"] = "object"
    lateness_s: float = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FeastSource:
    """The view of a Feast project whose Redis holds the rows; such a view is only read. `join_keys`: parallel to the parts of the key."""

    project: str
    view: str
    join_keys: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PastVersion:
    """A version of a view that was current before and that feature sets may still pin: all that reading and writing it takes."""

    version: int
    entity: Entity
    schemas: tuple[FeatureSchema, ...]  # oldest first
    max_age_s: float = 0.0
    retention_s: float = 0.0
    aggregation: Aggregation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureView:
    """Features of one entity type that are written together and stored as one packed row.

    `version` is part of the key (a new version starts empty); columns may be appended within a version, which adds a schema.
    `max_age_s`: a row with an older event time is STALE (0 = never). `retention_s`: physical time to live in the store,
    longer than `max_age_s` so that stale and absent can be told apart (0 = for ever).
    `readers`, `writers`: tenants or ids of API keys; empty = whoever has the scope `features`.
    `durable`: whether rows are also kept in Postgres, and whether a write is acknowledged after (`before`) or `behind` Redis alone.
    `aggregation`: every feature is computed from events, none is written by callers. `feast`: rows are read from Feast's Redis.
    """

    name: Name
    entity: Entity
    features: tuple[Feature, ...]
    version: int = 1
    max_age_s: float = 0.0
    retention_s: float = 0.0
    description: str = ""
    readers: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    durable: Literal["off", "behind", "before"] = "off"
    aggregation: Aggregation | None = None
    feast: FeastSource | None = None
    schemas: tuple[FeatureSchema, ...] = ()  # oldest first, the last is current; filled in by the store, never in a manifest
    versions: tuple[PastVersion, ...] = ()  # oldest first, without the current one; filled in by the store, never in a manifest

    def at(self, version: int | None) -> FeatureView | None:
        """Return the view as it is (None, 0 or the current version) or as it was in an earlier version, None where that is not kept."""
        if not version or version == self.version:
            return self
        past = next((p for p in self.versions if p.version == version), None)
        if past is None:
            return None
        return dataclasses.replace(
            self,
            version=past.version,
            entity=past.entity,
            features=past.schemas[-1].features,
            schemas=past.schemas,
            max_age_s=past.max_age_s,
            retention_s=past.retention_s,
            aggregation=past.aggregation,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInput:
    """One tensor a feature set yields: `features` in column order, all of one entity type, cast to `dtype`.

    Each is "view:feature", "view@version:feature", "$request:name" or "$transform:name" (see `references`). Its shape is [number of ids of
    `entity` in the request, columns]; most features take one column, an embedding or a list takes several.
    """

    name: str
    entity: Name
    features: tuple[str, ...]
    dtype: Literal["bool", "int8", "int16", "int32", "int64", "float16", "float32", "float64"] = "float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFeature:
    """A number that callers send along: one per row of `entity`, or one per request where that is empty. Without a default it must be sent.

    `minimum`, `maximum`: bounds, both allowed themselves; None = no bound.
    """

    name: Name
    dtype: Literal["bool", "int8", "int16", "int32", "int64", "float16", "float32", "float64"] = "float32"
    entity: Name = ""
    minimum: float | None = None
    maximum: float | None = None
    default: float | int | bool | None = None
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transform:
    """A column computed at each request, one value per row of `entity`. `default` stands in where the result is not a finite number."""

    name: Name
    entity: Name
    expression: str
    default: float | None = None
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSet:
    """The ordered features a model's inputs need: one `ModelInput` per input tensor, and what is sent along or computed for them."""

    name: Name
    inputs: tuple[ModelInput, ...]
    request: tuple[RequestFeature, ...] = ()
    transforms: tuple[Transform, ...] = ()
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a model's signature. -1 marks a variable dimension.

    `per`: "row" tensors grow with the candidates and are concatenated in a batch; "request" tensors have a first dimension of 1 per
    request (the user side), are stacked to [requests, ...] in a batch and never copied per row.
    """

    name: str
    dtype: TensorDType
    shape: tuple[int, ...]
    per: Literal["row", "request"] = "row"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """How requests to one model may share a forward pass. Rows are counted, not requests.

    `row_splits`: name of the extra int64 [requests + 1] input through which a model with per-request inputs learns which rows
    belong to which request (as in RaggedTensor); empty for a model whose inputs are all per row.
    `max_bytes`: most bytes of input tensors in one batch. `preferred_rows`: sizes that are as good as larger ones; a batch that reaches the
    smallest waits no longer, and one above any of them is cut to the largest it fills. `max_queue_delay_ms`: longest time a free instance
    waits for callers that were just answered and tend to come back at once (0 = never); a lone caller never waits.
    `buckets`: ascending sizes up to which a batch is padded, for models that are fast at fixed shapes (CUDA graphs).
    """

    max_rows: int = 4096
    max_queue_rows: int = 32768
    max_queue_delay_ms: float = 10.0
    row_splits: str = ""
    max_bytes: int = 64 * 1024 * 1024
    preferred_rows: tuple[int, ...] = ()
    buckets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How one version is run; what a worker's settings say comes first.

    `instances` compute side by side, in threads (one copy of the weights) or in processes (one copy each; a crash or a hang stays theirs).
    `devices`: numbers of the GPUs that each get so many instances, as the worker numbers them; empty: whatever the worker computes on.
    `autocast`: compute in this type where the device is faster at it. `timeout_ms`: budget of one forward pass, after which the instance is
    taken for hung (0 = the worker's setting). `finite`: refuse to answer NaN or infinity.
    """

    instances: int = 1
    kind: Literal["thread", "process"] = "thread"
    devices: tuple[int, ...] = ()
    autocast: Literal["", "float16", "bfloat16"] = ""
    timeout_ms: float = 0.0
    finite: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionPolicy:
    """Which versions of a model a worker holds besides those that routes and aliases refer to: the `latest` n, the `specific` ones, or `all`.

    As Triton's version_policy (https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/model_configuration.html#version-policy).
    """

    latest: int = 1
    specific: tuple[str, ...] = ()
    all: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """What a model takes and gives; read from the artifact's `model.yaml`, never typed in a manifest."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    feature_set: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelVersion:
    """One immutable, published artifact; of a model on a foreign server (its pool speaks "oip") only its name and its signature.

    `digest` is "sha256:<hex>" of its `model.yaml`, which in turn holds the digest of every other file.
    `artifact` is a directory path (file:// or plain), or s3://bucket/folder or gs://bucket/folder; `digest` and `signature` may be left out of a manifest: `plait apply` reads
    them from the artifact and pins them.
    """

    version: str
    artifact: str = ""
    digest: str = ""
    signature: Signature | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A named model, its published versions and the aliases routes refer to (for example champion → "3").

    `pool`: where it runs; empty = on the workers the router's settings name.
    """

    name: Name
    versions: tuple[ModelVersion, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    version_policy: VersionPolicy = field(default_factory=VersionPolicy)
    description: str = ""
    pool: Name = ""

    def resolve(self, reference: str) -> ModelVersion | None:
        """Return the version an alias or a version string names, or None."""
        wanted = self.aliases.get(reference, reference)
        return next((v for v in self.versions if v.version == wanted), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One arm of a route: `use` names a version or an alias of `model`; `weight` is relative to the other arms.

    With a weight of 0 only rules, experiments, the ladder and shadows lead to it.
    """

    name: Name
    model: Name
    use: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What a backend calls by name. `subject` and `candidate` are entity types; `score` names the model output that orders.

    `on_missing`: "fail" refuses a request whose features are missing or stale, "default" serves declared defaults and says so,
    "stale_ok" is "default" that does not count stale rows. `max_defaulted_share` (0..1) bounds how much of an answer may be defaults.
    `tenants`: who may call it; empty = every tenant. `sticky`: what stays on one variant: "subject", "tenant", "request" (nothing does),
    "header:NAME" or "label:NAME". `priority`: which class of requests this is when there is more to do than can be done.
    `repeat_window_s`: how long a request_id is answered alike (0 = it is not looked at). `required_views`: feature views whose rows must all
    be there, whatever `on_missing` says. The rest is told where it is defined.
    """

    name: Name
    variants: tuple[Variant, ...]
    subject: Name = "user"
    candidate: Name = "item"
    score: str = "score"
    timeout_s: float = 1.0
    max_candidates: int = 10_000
    on_missing: Literal["fail", "default", "stale_ok"] = "default"
    max_defaulted_share: float = 1.0
    tenants: tuple[Name, ...] = ()
    description: str = ""
    sticky: str = "subject"
    priority: Literal["critical", "normal", "sheddable"] = "normal"
    rules: tuple[Rule, ...] = ()
    ladder: tuple[Tier, ...] = ()
    shadow: tuple[Shadow, ...] = ()
    cache: CachePolicy | None = None
    repeat_window_s: float = 0.0
    retry: Retry = field(default_factory=Retry)
    hedge: Hedge | None = None
    required_views: tuple[Name, ...] = ()
    stages: Stages | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """An A/B/n test on a route. Of one `layer`, a unit is in at most one experiment: `buckets` are ranges of the layer's 10 000.

    `unit`: who is assigned, as a route's `sticky`. `salt`: deals anew when changed ("" = the name). `when`: which requests take part.
    `arms`: variants of the route. A stopped one, or a draft, assigns nobody.
    """

    name: Name
    route: Name
    arms: tuple[ExperimentArm, ...]
    layer: Name = "default"
    buckets: Buckets = field(default_factory=Buckets)
    unit: str = "subject"
    salt: str = ""
    when: Condition = field(default_factory=Condition)
    status: Literal["draft", "running", "stopped"] = "running"
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Workers that hold the same models. `protocol`: "plait" for model-workers, "oip" for any server of the Open Inference Protocol.

    Exactly one of `endpoints` and `kubernetes`. `tls`: the endpoints are called over TLS, trusted as the router's settings say.
    `stateful`: calls depend on those before (sequences), so none is retried or hedged.
    """

    name: Name
    protocol: Literal["plait", "oip"] = "plait"
    endpoints: tuple[PoolEndpoint, ...] = ()
    kubernetes: KubernetesService | None = None
    tls: bool = False
    stateful: bool = False
    description: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """Who shares the mesh. Rows, keys and quotas are kept apart by tenant.

    `weight`: its share, against the others', of what can be done when there is more to do. `identities`: who may call for it besides those
    with an API key.
    """

    name: Name
    description: str = ""
    weight: float = 1.0
    quota: Quota = field(default_factory=Quota)
    identities: tuple[WorkloadIdentity, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A caller's key. Only the SHA-256 (hex) of the 256-bit secret is ever stored; `id` may be logged.

    Scopes are those of `plait.rpc.identity.roles`. Times are seconds since the epoch; `expires_at` 0 = never. `replaces`: the id of the key
    it takes over from. `note`: what it is for.
    """

    id: str
    tenant: Name
    sha256: str
    scopes: tuple[str, ...] = ("rank", "features", "infer")
    expires_at: float = 0.0
    created_at: float = 0.0
    replaces: str = ""
    note: str = ""


Record = Model | FeatureView | FeatureSet | Route | Tenant | Experiment | Pool
Kind = Literal["Model", "FeatureView", "FeatureSet", "Route", "Tenant", "Experiment", "Pool"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Epochs:
    """Which generations of a view's rows there are for one tenant: the one that is read, the one a backfill builds beside it, and the one
    kept for a rollback. All of them are written. `newest` is the highest there ever was: a number is never given twice. `built`: the one
    that is being built holds all it shall."""

    serving: int = 0
    building: int | None = None
    previous: int | None = None
    newest: int = 0
    built: bool = False

    @property
    def in_use(self) -> tuple[int, ...]:
        """Every epoch that is written, the served one first."""
        return (self.serving, *(epoch for epoch in (self.building, self.previous) if epoch is not None))


_FIRST_EPOCHS = Epochs()


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The whole registry at one revision. A request reads the holder's attribute once and so sees one world.

    `epochs` is by (tenant, view, version) and holds only what was ever backfilled; ask `epochs_of`.
    """

    revision: int = 0
    models: Mapping[str, Model] = field(default_factory=dict)
    feature_views: Mapping[str, FeatureView] = field(default_factory=dict)
    feature_sets: Mapping[str, FeatureSet] = field(default_factory=dict)
    routes: Mapping[str, Route] = field(default_factory=dict)
    tenants: Mapping[str, Tenant] = field(default_factory=dict)
    experiments: Mapping[str, Experiment] = field(default_factory=dict)
    pools: Mapping[str, Pool] = field(default_factory=dict)
    keys: Mapping[str, ApiKey] = field(default_factory=dict)  # by sha256
    epochs: Mapping[tuple[str, str, int], Epochs] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"<Snapshot revision={self.revision} models={len(self.models)} views={len(self.feature_views)} sets={len(self.feature_sets)} "
            f"routes={len(self.routes)} tenants={len(self.tenants)} keys={len(self.keys)} epochs={len(self.epochs)}>"
        )

    def epochs_of(self, tenant: str, view: str, version: int) -> Epochs:
        """Return the epochs of a view's version for a tenant: only the first, epoch 0, where none was ever built."""
        return self.epochs.get((tenant, view, version), _FIRST_EPOCHS)


EMPTY = Snapshot()
