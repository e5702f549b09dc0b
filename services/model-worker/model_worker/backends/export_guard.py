"""Refuses torch.export archives that could run code of their own, before torch opens them.

`torch.export.load` unpickles tensor subclasses, custom objects and example inputs without `weights_only`, evaluates symbolic
expressions and guards as Python (sympy.sympify, exec), and resolves operator names by walking attributes from the `torch` module, from
where `os.system` is two dots away. It also loads every further model, every compiled library (AOTInductor) and, where the archive is
broken in the right way, an older format that an archive may hold besides. A plain exported model needs none of that. So the archive is
read here first, as the zip and JSON it is, whatever is not known to be harmless is refused, and torch gets a new archive of exactly
what was checked.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from model_worker.backends.archive import Content, invalid, members, unsafe, zipped

_MAX_JSON_BYTES: Final = 256 * 1024 * 1024
_MAX_EXPRESSION_CHARS: Final = 4096
_WRITTEN_BY: Final = "torch.export.save of torch 2.8 or newer"
_PROGRAM: Final = "models/model.json"
_EXAMPLES: Final = "data/sample_inputs/model.pt"
_MEMBER: Final = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|models/model\.json|data/sample_inputs/model\.pt"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
)
_LEFT_OUT: Final = re.compile(r"extra/.*|\.format_version|\.storage_alignment")  # notes of whoever exported; torch's about the zip
_TARGET: Final = re.compile(
    r"torch\.ops\.(aten|prims)\.\w+(\.\w+)?"
    r"|torch\.ops\.higher_order\.(cond|while_loop|wrap_with_set_grad_enabled|wrap_with_autocast)"
    r"|torch\.sym_(max|min|not|ite|int|float|sum)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|not_|pos|abs|getitem)"
    r"|math\.(ceil|floor|trunc)"
)
_FORBIDDEN_OPS: Final = re.compile(r"torch\.ops\.aten\.(from_file|save|_print|warn|python_dispatch)(\.|\Z)")
_FUNCTIONS: Final = frozenset(
    {
        "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Abs", "Mod", "Eq", "Ne", "Lt", "Le", "Gt", "Ge",
        "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan", "And", "Or", "Not", "Piecewise",
        "ExprCondPair", "FloorDiv", "CleanDiv", "CeilDiv", "PythonMod", "ModularIndexing", "IntTrueDiv", "FloatTrueDiv", "PowByNatural",
        "FloatPow", "ToFloat", "TruncToInt", "TruncToFloat", "CeilToInt", "FloorToInt", "RoundToInt", "Identity", "Where", "NegativeOne",
        "Half", "One", "Zero", "max", "min", "abs", "len",
    }
)  # fmt: skip
_METHODS: Final = frozenset({"size", "stride", "storage_offset", "dim", "shape"})
_SYMBOL: Final = re.compile(r"[A-Za-z]\w{0,63}|-?\d{1,20}(\.\d{0,20})?(e[-+]?\d{1,3})?")  # a symbol's name, or the number in a Float
_TREE_TYPES: Final = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})
_NODES: Final = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.Attribute, ast.Subscript, ast.BinOp, ast.UnaryOp,
    ast.Compare, ast.BoolOp, ast.Tuple, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """An archive that torch may open, once its pickled `examples` (possibly empty) were found loadable with `weights_only`."""

    archive: bytes
    examples: bytes


def check(archive: bytes) -> Checked:
    """Return the archive, written anew with nothing in it that was not checked.

    Raises FailedPrecondition (ARTIFACT_UNSAFE, ARTIFACT_INVALID).
    """
    found = members(archive, _MEMBER, _LEFT_OUT, written_by=_WRITTEN_BY)
    try:
        for name, content in found.items():
            if name == _PROGRAM:
                _check_program(_json(content))
            elif name.endswith("_config.json"):
                _check_payloads(_json(content))
        return Checked(archive=zipped({_PROGRAM: found[_PROGRAM], **found}), examples=bytes(found[_EXAMPLES]))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise invalid(error, _WRITTEN_BY) from error


def _json(content: Content) -> Any:
    if len(content) > _MAX_JSON_BYTES:
        raise ValueError("too large")
    return json.loads(bytes(content))


def _check_payloads(config: Mapping[str, Any]) -> None:
    for name, payload in config["config"].items():
        if payload.get("use_pickle", True) is not False or not re.match(r"(weight|tensor)_\d+\Z", payload["path_name"]):
            raise unsafe(f"the weight or constant {name[:60]!r} is pickled: only plain tensors are loaded")


def _check_program(program: Mapping[str, Any]) -> None:
    for key, value in _walk(program):
        if key in ("target", "as_operator") and isinstance(value, str):
            _check_target(value)
        elif key == "expr_str":
            _check_expression(value)
        elif key in ("in_spec", "out_spec") and isinstance(value, str) and value:
            _check_tree(value)
    for expression in program["range_constraints"]:
        _check_expression(expression)
    for guard in program.get("guards_code") or ():
        _check_expression(guard)


def _walk(tree: Any) -> Iterator[tuple[str, Any]]:
    pending = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            yield from node.items()
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)


def _check_target(target: str) -> None:
    if not _TARGET.fullmatch(target) or _FORBIDDEN_OPS.match(target):
        raise unsafe(f"it calls {target[:80]!r}, which is not a plain tensor operator")


def _check_tree(spec: str) -> None:
    """Let through nested tuples, lists and dicts: torch imports what other types of node name (a default's factory, an enum's class)."""
    for key, value in _walk(json.loads(spec)):
        if (key == "type" and value not in _TREE_TYPES) or (key == "context" and not _is_plain_context(value)):
            raise unsafe(f"it takes or gives {str(value)[:80]!r}, which is no tuple, list or dict")


def _is_plain_context(context: Any) -> bool:
    if context is None:
        return True
    keys = json.loads(context) if isinstance(context, str) else context
    return keys is None or (isinstance(keys, list) and all(isinstance(key, str | int) for key in keys))


def _check_expression(text: Any) -> None:
    """Let through arithmetic on symbols and sizes, nothing that could reach an attribute or a function beyond it."""
    if not isinstance(text, str) or len(text) > _MAX_EXPRESSION_CHARS:
        raise unsafe("it holds an expression that is too long")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, MemoryError) as error:
        raise unsafe("it holds an expression that is not arithmetic") from error
    if not all(_harmless(node) for node in ast.walk(tree)):
        raise unsafe("it holds an expression that is more than arithmetic on sizes")


def _harmless(node: ast.AST) -> bool:  # noqa: PLR0911 - one answer per kind of node
    match node:
        case ast.Call(func=ast.Name(id=name)):
            return name in _FUNCTIONS
        case ast.Call(func=ast.Attribute(attr=name)):
            return name in _METHODS
        case ast.Call():
            return False
        case ast.Name(id=name):
            return name in _FUNCTIONS or re.fullmatch(r"L|True|False|None|[a-z]{1,3}\d+", name) is not None
        case ast.Attribute(attr=name):
            return name in _METHODS
        case ast.Constant(value=str() as text):
            return _SYMBOL.fullmatch(text) is not None
        case ast.Constant(value=value):
            return isinstance(value, int | float)
    return isinstance(node, _NODES)
