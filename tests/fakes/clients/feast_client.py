"""Feast's own stubs, in Feast's own environment, calling a ServingService: argv has its address, stdin a list of requests as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import grpc
from feast.protos.feast.serving import ServingService_pb2 as pb
from feast.protos.feast.serving import ServingService_pb2_grpc as pb_grpc
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import feast_value_type_to_python_type


def main() -> None:
    """Print what each request gave: names, values as Feast's SDK makes Python of them, statuses and times; or the error."""
    seen: list[Any] = []
    metadata = (("x-plait-service-token", "t0ken"),)
    with grpc.insecure_channel(sys.argv[1]) as channel:
        stub = pb_grpc.ServingServiceStub(channel)
        info = stub.GetFeastServingInfo(pb.GetFeastServingInfoRequest(), metadata=metadata, timeout=20)
        for given in json.load(sys.stdin):
            request = pb.GetOnlineFeaturesRequest(full_feature_names=given.get("full", False), include_feature_view_version_metadata=True)
            if "service" in given:
                request.feature_service = given["service"]
            else:
                request.features.val.extend(given["features"])
            for name, values in given["entities"].items():
                made = [Value(string_val=v) if isinstance(v, str) else Value(int64_val=v) for v in values]
                request.entities[name].val.extend(made)
            try:
                answer = stub.GetOnlineFeatures(request, metadata=metadata, timeout=20)
            except grpc.RpcError as error:
                seen.append({"error": error.details(), "code": error.code().name})
                continue
            names = list(answer.metadata.feature_names.val)
            seen.append(
                {
                    "names": names,
                    "values": {n: [_plain(v) for v in r.values] for n, r in zip(names, answer.results, strict=True)},
                    "statuses": {n: list(r.statuses) for n, r in zip(names, answer.results, strict=True)},
                    "times_us": {n: [t.ToMicroseconds() for t in r.event_timestamps] for n, r in zip(names, answer.results, strict=True)},
                    "views": {v.name: v.version for v in answer.metadata.feature_view_metadata},
                }
            )
    sys.stdout.write(json.dumps({"version": info.version, "answers": seen}) + "\n")


def _plain(value: Value) -> Any:
    found = feast_value_type_to_python_type(value)
    return found.timestamp() if hasattr(found, "timestamp") else found


if __name__ == "__main__":
    main()
