"""Feast's own keys and fields, in Feast's own environment: JSON in on stdin, JSON out."""

from __future__ import annotations

import json
import sys

from feast.infra.online_stores.helpers import _mmh3, _redis_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value


def main() -> None:
    """Answer a hex key for each [project, join keys, values], a hex field for each text."""
    given = json.load(sys.stdin)
    keys = []
    for project, names, values in given["keys"]:
        made = [Value(int64_val=v) if isinstance(v, int) else Value(string_val=v) for v in values]
        keys.append(_redis_key(project, EntityKey(join_keys=names, entity_values=made)).hex())
    json.dump({"keys": keys, "fields": [_mmh3(text).hex() for text in given["fields"]]}, sys.stdout)


if __name__ == "__main__":
    main()
