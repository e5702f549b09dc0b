"""Describe protobuf files as plain data: run with the names of generated modules, it prints JSON.

A process of its own imports them, because a client's generated modules and ours define the same names, and one process can hold them once.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any


def describe(file: Any) -> dict[str, Any]:
    """Return messages (fields by name), enums (numbers by name) and methods of a file descriptor."""
    messages: dict[str, Any] = {}
    enums = {e.full_name: _enum(e) for e in file.enum_types_by_name.values()}
    for message in file.message_types_by_name.values():
        _message(message, messages, enums)
    methods = {
        method.name: [method.input_type.full_name, method.output_type.full_name, method.client_streaming, method.server_streaming]
        for service in file.services_by_name.values()
        for method in service.methods
    }
    return {"messages": messages, "enums": enums, "methods": methods}


def merged(files: list[dict[str, Any]]) -> dict[str, Any]:
    """Return several descriptions as one."""
    return {part: {name: value for file in files for name, value in file[part].items()} for part in ("messages", "enums", "methods")}


def _message(message: Any, messages: dict[str, Any], enums: dict[str, Any]) -> None:
    messages[message.full_name] = {field.name: _field(field) for field in message.fields}
    enums.update({e.full_name: _enum(e) for e in message.enum_types})
    for nested in message.nested_types:
        _message(nested, messages, enums)


def _field(field: Any) -> list[Any]:
    kind = field.message_type or field.enum_type
    oneof = field.containing_oneof
    return [field.number, field.type, field.is_repeated, kind.full_name if kind else "", oneof.name if oneof else ""]


def _enum(enum: Any) -> dict[str, int]:
    return {value.name: value.number for value in enum.values}


if __name__ == "__main__":
    print(json.dumps(merged([describe(importlib.import_module(name).DESCRIPTOR) for name in sys.argv[1:]])))  # noqa: T201
