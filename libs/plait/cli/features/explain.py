"""`plait features explain`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer

from plait.cli.features.calling import AddressOption, ApiKeyOption, CaOption, InsecureOption, Target, TlsOption, run, stub, target
from plait.cli.options import DEFAULT_STATE, JsonOption, StateOption
from plait.cli.output import when, write_json, write_line, write_table

_FORMATS: Final = {
    "bool": "?", "int8": "b", "int16": "h", "int32": "i", "int64": "q", "float16": "e", "float32": "f", "float64": "d",
}  # fmt: skip
_INT: Final = "int:"
_TEXT: Final = "text:"
_SHOWN_BYTES: Final = 32  # of a stored row, in a table


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(explain)


def explain(
    feature_set: Annotated[str, typer.Argument(metavar="SET", help="Name of the feature set.", show_default=False)],
    ids: Annotated[
        list[str],
        typer.Option(
            "--id",
            help="TYPE=ID, one per entity type; int:7 is a number. Given again for a type: the next part of its key.",
            show_default=False,
        ),
    ],
    request: Annotated[
        list[str] | None, typer.Option("--request", help="NAME=VALUE of a request feature; may be repeated.", show_default=False)
    ] = None,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.001, help="Longest wait for the answer, seconds.")] = 5.0,
    address: AddressOption = None,
    api_key: ApiKeyOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    insecure: InsecureOption = False,
    state: StateOption = DEFAULT_STATE,
    as_json: JsonOption = False,
) -> None:
    """Show for one entity of each type what is stored, where it was found, how old it is and what each column of the tensor came from.

    Example:  plait features explain home --id user=42 --id item=int:7 --request hour=9

    Example:  plait features explain offers --id offer=shop-a --id offer=int:12
    """
    entities, sent = _pairs(ids, "--id"), _pairs(request or (), "--request")
    answer = run(_explain(target(address, api_key, tls, ca, insecure, state), feature_set, entities, sent, timeout_s))
    if as_json:
        from google.protobuf.json_format import MessageToDict  # noqa: PLC0415

        write_json(MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
    else:
        _show(answer)


def _pairs(given: Sequence[str], option: str) -> list[tuple[str, str]]:
    pairs = [(name, value) for name, equals, value in (text.partition("=") for text in given) if name and equals]
    if len(pairs) < len(given):
        raise typer.BadParameter("expected NAME=VALUE", param_hint=option)
    return pairs


async def _explain(
    where: Target, feature_set: str, entities: Sequence[tuple[str, str]], sent: Sequence[tuple[str, str]], timeout_s: float
) -> Any:
    from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb  # noqa: PLC0415

    request = pb.ExplainFeaturesRequest(feature_set=feature_set)
    for entity_type in dict.fromkeys(name for name, _ in entities):
        parts = [value for name, value in entities if name == entity_type]
        _fill(request.entities.add(entity_type=entity_type).ids, parts)
    async with stub(where) as features:
        if sent:
            asked = pb.DescribeFeatureSetRequest(feature_set=feature_set)
            described = await features.DescribeFeatureSet(asked, metadata=where.metadata, timeout=timeout_s)
            declared = {feature.name: feature for feature in described.request_features}
            request.request_features.extend(_tensor(name, value, declared.get(name)) for name, value in sent)
        return await features.ExplainFeatures(request, metadata=where.metadata, timeout=timeout_s)


def _fill(ids: Any, parts: Sequence[str]) -> None:
    """Put one id into an EntityIds message: several parts are one composite key."""
    if len(parts) > 1:
        key = ids.composite_ids.add()
        for part in parts:
            if part.startswith(_INT):
                key.parts.add(int64_part=_int(part))
            else:
                key.parts.add(string_part=part.removeprefix(_TEXT))
    elif parts[0].startswith(_INT):
        ids.int64_ids.append(_int(parts[0]))
    else:
        ids.string_ids.append(parts[0].removeprefix(_TEXT))


def _int(text: str) -> int:
    try:
        number = int(text.removeprefix(_INT))
    except ValueError:
        number = 1 << 63
    if not -(1 << 63) <= number < 1 << 63:
        raise typer.BadParameter("expected a whole number of 64 bits after int:", param_hint="--id")
    return number


def _tensor(name: str, value: str, declared: Any) -> Any:
    """Return a request feature as its declaration wants it; one that is not declared goes as text, and the service says what there is."""
    from plait.api.types.v1 import types_pb2  # noqa: PLC0415
    from plait.dtypes import BY_NUMBER  # noqa: PLC0415

    if declared is None:
        return types_pb2.Tensor(name=name, dtype=types_pb2.DATA_TYPE_BYTES, data=value.encode())
    dtype = BY_NUMBER[declared.dtype].name
    try:
        number: Any = {"true": True, "false": False}[value] if dtype == "bool" else int(value) if dtype.startswith("int") else float(value)
        data = struct.pack("<" + _FORMATS[dtype], number)
    except (KeyError, ValueError, OverflowError, struct.error):
        raise typer.BadParameter(f"{name} takes one {dtype}", param_hint="--request") from None
    return types_pb2.Tensor(name=name, dtype=declared.dtype, shape=[1] if declared.entity_type else [], data=data)


def _beginning(stored: bytes) -> str:
    """Return what fits in a line; `--json` has all of it."""
    return stored[:_SHOWN_BYTES].hex() + (f"… {len(stored)} bytes" if len(stored) > _SHOWN_BYTES else "")


def _show(answer: Any) -> None:
    from plait.api.feature_retrieval.v1 import feature_retrieval_service_pb2 as pb  # noqa: PLC0415
    from plait.api.types.v1 import types_pb2  # noqa: PLC0415

    write_table(
        ("view", "version", "epoch", "status", "from", "event time", "age", "expires", "ttl", "schema", "sequence", "flags", "stored"),
        [
            (
                view.feature_view,
                view.view_version,
                view.epoch,
                types_pb2.RowStatus.Name(view.status).removeprefix("ROW_STATUS_").lower(),
                pb.RowSource.Name(view.source).removeprefix("ROW_SOURCE_").lower(),
                _time(view.event_time_us),
                f"{view.age_us / 1e6:.1f} s" if view.age_us >= 0 else "",
                _time(view.expires_at_us),
                f"{view.time_to_live_s:.0f} s" if view.time_to_live_s >= 0 else "",
                view.schema_id or "",
                view.sequence or "",
                " ".join(word for word, on in (("deleted", view.deleted), ("backfilled", view.backfilled)) if on),
                _beginning(view.stored),
            )
            for view in answer.views
        ],
    )
    write_line("")
    write_table(
        ("input", "column", "from", "stored", "in the tensor", ""),
        [(c.input, c.column, c.reference, c.stored_value, f"{c.value:g}", "default" if c.defaulted else "") for c in answer.columns],
    )


def _time(at_us: int) -> str:
    return when(datetime.fromtimestamp(at_us / 1e6, UTC)) if at_us else ""
