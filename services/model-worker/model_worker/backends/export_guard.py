"""Refuses torch.export archives that could run code of their own, before torch opens them.

`torch.export.load` unpickles tensor subclasses, custom objects and example inputs without `weights_only`, evaluates symbolic
expressions and guards as Python (sympy.sympify, exec), and resolves operator names by walking attributes from the `torch` module, from
where `os.system` is two dots away. A plain exported model needs none of that. So the archive is read here first, as the zip and JSON it
is, and whatever is not known to be harmless is refused.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, Final

from plait.errors import FailedPrecondition

_MAX_JSON_BYTES: Final = 256 * 1024 * 1024
_MAX_EXPRESSION_CHARS: Final = 4096
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
_SYMBOL: Final = re.compile(r"[A-Za-z_]\w{0,63}")
_NODES: Final = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.Attribute, ast.Subscript, ast.BinOp, ast.UnaryOp,
    ast.Compare, ast.BoolOp, ast.Tuple, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
)  # fmt: skip


def check(archive: bytes) -> bytes:
    """Return the archive's pickled example inputs (possibly empty), for the caller to try with `weights_only`.

    Raises FailedPrecondition (ARTIFACT_UNSAFE, ARTIFACT_INVALID).
    """
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            return _check(opened)
    except (zipfile.BadZipFile, KeyError, ValueError, RecursionError, NotImplementedError) as error:
        raise FailedPrecondition(
            f"this is no archive that torch.export.save of torch 2.8 or newer wrote ({type(error).__name__}): export the model again",
            reason="ARTIFACT_INVALID",
        ) from error


def _check(archive: zipfile.ZipFile) -> bytes:
    members = {name.partition("/")[2]: name for name in archive.namelist()}
    if "models/model.json" not in members:
        raise ValueError("no models/model.json")
    for inner in members:
        if inner.endswith((".pkl", ".pickle")) or (inner.startswith(("data/weights/", "data/constants/")) and inner.endswith(".pt")):
            raise _unsafe(f"{inner} is a pickle")
    for inner, name in members.items():
        if inner.startswith("models/"):
            _check_program(_json(archive, name))
        elif inner.endswith("_config.json"):
            _check_payloads(_json(archive, name))
    return archive.read(members["data/sample_inputs/model.pt"])


def _json(archive: zipfile.ZipFile, name: str) -> Any:
    if archive.getinfo(name).file_size > _MAX_JSON_BYTES:
        raise ValueError("too large")
    return json.loads(archive.read(name))


def _check_payloads(config: Mapping[str, Any]) -> None:
    for name, payload in config["config"].items():
        if payload.get("use_pickle", True) is not False or not re.match(r"(weight|tensor)_\d+\Z", payload["path_name"]):
            raise _unsafe(f"the weight or constant {name[:60]!r} is pickled: only plain tensors are loaded")


def _check_program(program: Mapping[str, Any]) -> None:
    for key, value in _walk(program):
        if key in ("target", "as_operator") and isinstance(value, str):
            _check_target(value)
        elif key == "expr_str":
            _check_expression(value)
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
        raise _unsafe(f"it calls {target[:80]!r}, which is not a plain tensor operator")


def _check_expression(text: Any) -> None:
    """Let through arithmetic on symbols and sizes, nothing that could reach an attribute or a function beyond it."""
    if not isinstance(text, str) or len(text) > _MAX_EXPRESSION_CHARS:
        raise _unsafe("it holds an expression that is too long")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, MemoryError) as error:
        raise _unsafe("it holds an expression that is not arithmetic") from error
    if not all(_harmless(node) for node in ast.walk(tree)):
        raise _unsafe("it holds an expression that is more than arithmetic on sizes")


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
            return _SYMBOL.fullmatch(text) is not None and not text.startswith("__")
        case ast.Constant(value=value):
            return isinstance(value, int | float)
    return isinstance(node, _NODES)


def _unsafe(why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the torch.export archive is refused: {why}; export plain tensors and aten operators, or use TorchScript", reason="ARTIFACT_UNSAFE"
    )
