"""YAML as a tree that remembers its lines, so that every complaint can name the place.

Built from the parser's events and not with PyYAML's composer, which recurses in C and dies on deeply nested input. Scalars follow
the YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema): `no` and `on` are text, `1e-4` is a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import yaml

MAX_DEPTH: Final = 64
MAX_NODES: Final = 500_000  # aliases included as often as they are used, so that they cannot multiply without end

_LOADER: Final[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL: Final = re.compile(r"(?:null|Null|NULL|~|)\Z")
_BOOL: Final = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT: Final = re.compile(r"[-+]?[0-9]+\Z")
_BASED: Final = re.compile(r"0(?:o[0-7]+|x[0-9a-fA-F]+)\Z")
_FLOAT: Final = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_SPECIAL: Final = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")
_MAX_INT_DIGITS: Final = 64

Scalar = str | int | float | bool | None


class YamlProblem(Exception):
    """The text is not the YAML we take; caught by who called `documents` and reported with the other problems. `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


@dataclass(frozen=True, slots=True)
class Node:
    """A value and the line it stands on (for an entry of a mapping: the line of its key). `size` counts the nodes below and itself."""

    value: Scalar | tuple[Node, ...] | dict[str, Node]
    line: int
    size: int = 1

    def child(self, step: str | int) -> Node | None:
        """Return the entry of that name or index, or None."""
        if isinstance(self.value, dict):
            return self.value.get(str(step))
        if isinstance(self.value, tuple) and isinstance(step, int) and step < len(self.value):
            return self.value[step]
        return None

    def plain(self) -> Any:
        """Return the same as dicts, lists and scalars, ready for JSON."""
        if isinstance(self.value, dict):
            return {name: node.plain() for name, node in self.value.items()}
        if isinstance(self.value, tuple):
            return [node.plain() for node in self.value]
        return self.value


@dataclass(frozen=True, slots=True)
class Document:
    """One document of a stream, its first line and how much text it takes (UTF-8 bytes)."""

    root: Node
    line: int
    size_bytes: int


def documents(text: str) -> Iterator[Document]:
    """Yield the non-empty documents of a stream. Raises YamlProblem; what came before it stands."""
    events: Iterator[Any] = _events(text)
    for event in events:
        if not isinstance(event, yaml.DocumentStartEvent):
            continue
        builder = _Builder(events)
        root = builder.node(next(events), depth=0)
        end = next(events)
        if root.value is not None:
            size_bytes = len(text[_index(event.start_mark) : _index(end.end_mark)].encode())
            yield Document(root, root.line, size_bytes)


def dump(data: Any) -> str:
    """Return plain data as YAML that `documents` reads back as the same, whatever its strings look like."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """PyYAML quotes what YAML 1.1 would misread; this one also what the core schema would ("1e5")."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    looks_otherwise = any(pattern.match(text) for pattern in (_NULL, _BOOL, _INT, _BASED, _FLOAT, _SPECIAL))
    breaks = any(c in text for c in "\x85\u2028\u2029\ufeff")  # which PyYAML takes for line ends, or for nothing
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if looks_otherwise or breaks else None)


_Dumper.add_representer(str, _represent_text)


def _index(mark: Any) -> int:
    index: int = mark.index
    return index


def _events(text: str) -> Iterator[Any]:
    try:
        yield from yaml.parse(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise YamlProblem(mark.line + 1 if mark else 1, f"this is not YAML: {what}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlProblem(line, "this is not YAML: it holds a character that YAML does not allow") from error


class _Builder:
    """Makes the nodes of one document; keeps its anchors and its budget."""

    def __init__(self, events: Iterator[Any]) -> None:
        self._events = events
        self._anchors: dict[str, Node] = {}
        self._left = MAX_NODES

    def node(self, event: Any, *, depth: int) -> Node:
        line = event.start_mark.line + 1
        if depth > MAX_DEPTH:
            raise YamlProblem(line, f"nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, line)
        node = self._build(event, line, depth)
        self._spend(1, line)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _build(self, event: Any, line: int, depth: int) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            return Node(_scalar(event, line), line)
        if isinstance(event, yaml.SequenceStartEvent):
            items = tuple(self._items(depth))
            return Node(items, line, 1 + sum(i.size for i in items))
        entries = self._entries(depth)
        return Node(entries, line, 1 + sum(e.size for e in entries.values()))

    def _items(self, depth: int) -> Iterator[Node]:
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            yield self.node(event, depth=depth + 1)

    def _entries(self, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            name, line = self._key(event), event.start_mark.line + 1
            if name in entries:
                raise YamlProblem(line, f"{name!r} is given twice; the first is on line {entries[name].line}")
            entries[name] = replace(self.node(next(self._events), depth=depth + 1), line=line)
        return entries

    def _key(self, event: Any) -> str:
        line = event.start_mark.line + 1
        if not isinstance(event, yaml.ScalarEvent):
            raise YamlProblem(line, "a field's name must be plain text")
        if event.value == "<<" and event.implicit[0]:
            raise YamlProblem(line, "merge keys (<<) are not supported; write the fields out")
        name: str = event.value
        return name

    def _alias(self, event: Any, line: int) -> Node:
        node = self._anchors.get(event.anchor)
        if node is None:
            raise YamlProblem(line, f"*{event.anchor} refers to an anchor that was not defined before")
        self._spend(node.size, line)
        return replace(node, line=line)

    def _spend(self, nodes: int, line: int) -> None:
        self._left -= nodes
        if self._left < 0:
            raise YamlProblem(line, f"more than {MAX_NODES} values in one document")


def _scalar(event: Any, line: int) -> Scalar:
    text: str = event.value
    if event.tag is not None and event.tag not in ("!", "tag:yaml.org,2002:str"):
        raise YamlProblem(line, f"the tag {event.tag} is not supported; write plain values")
    if event.tag is not None or not event.implicit[0]:
        return text
    return _resolve(text, line)


def _resolve(text: str, line: int) -> Scalar:
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text) or _BASED.match(text):
        if len(text) > _MAX_INT_DIGITS:
            raise YamlProblem(line, f"a whole number of more than {_MAX_INT_DIGITS} digits; quote it if it is text")
        return int(text, 0) if _BASED.match(text) else int(text)
    if _FLOAT.match(text):
        return float(text)
    if _SPECIAL.match(text):
        return float(text.replace(".", ""))
    return text
