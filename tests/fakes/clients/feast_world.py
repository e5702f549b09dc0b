"""A real Feast repository in Feast's own environment: made, applied, filled through Feast's own API and read back by it.

argv: folder, host:port and password of the Redis. Prints JSON: what Feast reads for ENTITIES, and the keys and fields it uses in Redis.
The shape is that of `feast init`: a driver's hourly statistics, an on-demand view, and feature services.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path

DEFINITIONS = """
from datetime import timedelta

import pandas as pd
from feast import Entity, FeatureService, FeatureView, Field, FileSource, RequestSource, ValueType
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Array, Bool, Float32, Float64, Int32, Int64, Json, String, UnixTimestamp

print("a repository may print")
driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
customer = Entity(name="Customer", join_keys=["customer_id"], value_type=ValueType.STRING)
short = Entity(name="short", join_keys=["short_id"], value_type=ValueType.INT32)


def source(name):
    return FileSource(name=name, path=f"{name}.parquet", timestamp_field="event_timestamp")


driver_stats = FeatureView(
    name="driver_hourly_stats",
    entities=[driver],
    ttl=timedelta(days=1),
    schema=[
        Field(name="driver_id", dtype=Int64),
        Field(name="conv_rate", dtype=Float32),
        Field(name="acc_rate", dtype=Float64),
        Field(name="avg_daily_trips", dtype=Int64, description="Average daily trips"),
        Field(name="active", dtype=Bool),
        Field(name="level", dtype=Int32),
        Field(name="since", dtype=UnixTimestamp),
        Field(name="city", dtype=String, tags={"vocabulary": "paris, kyoto"}),
        Field(name="car", dtype=String),
        Field(name="taste", dtype=Array(Float32), tags={"width": "3"}),
        Field(name="recent", dtype=Array(Int64)),
        Field(name="words", dtype=Array(String)),
        Field(name="config", dtype=Json),
    ],
    source=source("driver_stats"),
)
pair_stats = FeatureView(
    name="PairStats",
    entities=[driver, customer],
    ttl=None,
    schema=[Field(name="driver_id", dtype=Int64), Field(name="customer_id", dtype=String), Field(name="Rides", dtype=Float32)],
    source=source("pair_stats"),
)
everything = FeatureView(name="everything", entities=[], schema=[Field(name="rain", dtype=Float32)], source=source("everything"))
small = FeatureView(
    name="small", entities=[short], schema=[Field(name="short_id", dtype=Int32), Field(name="x", dtype=Float32)], source=source("small")
)
asked = RequestSource(name="asked", schema=[Field(name="to_add", dtype=Int64)])


@on_demand_feature_view(sources=[driver_stats[["conv_rate"]], asked], schema=[Field(name="conv_plus", dtype=Float64)])
def plus(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"conv_plus": inputs["conv_rate"] + inputs["to_add"]})


activity = FeatureService(name="driver_activity", features=[driver_stats[["conv_rate", "city", "level"]], plus])
all_of_it = FeatureService(name="AllOfIt", features=[pair_stats, driver_stats, everything])
renamed = FeatureService(name="renamed", features=[driver_stats[["conv_rate"]].with_join_key_map({"driver_id": "origin_id"})])
"""
ROWS = {
    1001: {
        "conv_rate": 0.25, "acc_rate": 0.1, "avg_daily_trips": 2**40 + 1, "active": True, "level": -7, "since": 1_700_000_000, "city": "kyoto",
        "car": "blue", "taste": [0.5, -1.0, 2.0], "recent": [5, 6], "words": ["a"], "config": "{}",
    },
    1002: {
        "conv_rate": None, "acc_rate": -3.5, "avg_daily_trips": -1, "active": False, "level": None, "since": None, "city": "oslo", "car": None,
        "taste": None, "recent": [], "words": None, "config": None,
    },
}  # fmt: skip
TYPES = {
    "conv_rate": "float_val", "acc_rate": "double_val", "avg_daily_trips": "int64_val", "active": "bool_val", "level": "int32_val",
    "since": "unix_timestamp_val", "city": "string_val", "car": "string_val", "taste": "float_list_val", "recent": "int64_list_val",
    "words": "string_list_val", "config": "json_val",
}  # fmt: skip
ENTITIES = [1001, 1002, 1003, 1004]  # 1003 is too old, 1004 was never written


def main() -> None:
    """Make the repository and say what is in it."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder, address, password = sys.argv[1:4]
    repo = Path(folder)
    repo.mkdir(parents=True, exist_ok=True)
    (repo / "feature_store.yaml").write_text(
        f"project: drivers\nprovider: local\nregistry: registry.db\nentity_key_serialization_version: 3\n"
        f'online_store:\n  type: redis\n  connection_string: "{address},password={password}"\n'
    )
    (repo / "definitions.py").write_text(DEFINITIONS)
    os.chdir(repo)
    sys.path.insert(0, str(repo))
    import definitions
    from feast import FeatureStore
    from feast.infra.online_stores.helpers import _mmh3, _redis_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    for name in ("driver_stats", "pair_stats", "everything", "small"):
        _source(name, definitions)
    store = FeatureStore(repo_path=".")
    d = definitions
    store.apply(
        [d.driver, d.customer, d.short, d.driver_stats, d.pair_stats, d.everything, d.small, d.plus, d.activity, d.all_of_it, d.renamed]
    )
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=123456)

    def value(name: str, given: object) -> Value:
        made = Value()
        if given is None:
            return made
        kind = TYPES[name]
        if kind.endswith("list_val"):
            getattr(made, kind).val.extend(given)  # type: ignore[arg-type]
            getattr(made, kind).SetInParent()
        else:
            setattr(made, kind, given)
        return made

    def key(driver: int) -> EntityKey:
        return EntityKey(join_keys=["driver_id"], entity_values=[Value(int64_val=driver)])

    provider, view = store._get_provider(), store.get_feature_view("driver_hourly_stats")
    rows = [(key(driver), {name: value(name, given) for name, given in row.items()}, now, None) for driver, row in ROWS.items()]
    old = now - datetime.timedelta(days=3)
    rows.append((key(1003), {name: value(name, given) for name, given in ROWS[1001].items()}, old, None))
    provider.online_write_batch(store.config, view, rows, None)
    pair = EntityKey(join_keys=["driver_id", "customer_id"], entity_values=[Value(int64_val=1001), Value(string_val="zoë")])
    pairs = store.get_feature_view("PairStats")
    provider.online_write_batch(store.config, pairs, [(pair, {"Rides": Value(float_val=12.5)}, now, None)], None)

    features = [f"driver_hourly_stats:{name}" for name in TYPES if name not in ("words", "config")]
    answer = store.get_online_features(features=features, entity_rows=[{"driver_id": driver} for driver in ENTITIES])
    names = list(answer.proto.metadata.feature_names.val)
    print(
        json.dumps(
            {
                "event_time_us": int(now.timestamp() * 1e6 + 0.5),
                "values": {name: [_plain(v) for v in answer.to_dict()[name]] for name in names},
                "statuses": {name: [int(s) for s in r.statuses] for name, r in zip(names, answer.proto.results, strict=True)},
                "keys": {"driver": _redis_key("drivers", key(1001)).hex(), "pair": _redis_key("drivers", pair).hex()},
                "fields": {text: _mmh3(text).hex() for text in ("driver_hourly_stats:conv_rate", "PairStats:Rides", "", "é", "abc")},
            }
        ),
        file=out,
        flush=True,
    )


def _plain(value: object) -> object:
    return value.timestamp() if isinstance(value, datetime.datetime) else value


def _source(name: str, definitions: object) -> None:
    """Write an empty file with the columns of a view: Feast takes types from it."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq
    from feast.types import from_feast_to_pyarrow_type

    views = {view.batch_source.name: view for view in vars(definitions).values() if hasattr(view, "batch_source")}
    fields = {field.name: from_feast_to_pyarrow_type(field.dtype) for field in views[name].schema}
    fields["event_timestamp"] = pa.timestamp("us", tz="UTC")
    frame = pd.DataFrame({column: pd.Series(dtype="object") for column in fields})
    pq.write_table(pa.Table.from_pandas(frame, schema=pa.schema(list(fields.items())), preserve_index=False), f"{name}.parquet")


if __name__ == "__main__":
    main()
