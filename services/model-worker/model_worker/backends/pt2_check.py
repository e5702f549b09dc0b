"""Says whether a torch.export archive (.pt2) can be loaded without running code that came with it.

`torch.export.load` falls back to pickle for weights, constants and sample inputs, loads shared libraries of AOTInductor, and evaluates
strings of the graph (symbolic sizes, guards). All of that is refused here, by looking at the zip and its JSON, before torch opens the
file. What is left is data: flat tensors and a graph of torch.ops.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from plait.errors import FailedPrecondition

_ALLOWED: Final = re.compile(
    r"archive_format|archive_version|byteorder|\.data/(version|serialization_id)|\.format_version|\.storage_alignment"
    r"|models/model\.json|extra/[\w.-]+|data/sample_inputs/model\.pt"
    r"|data/(weights|constants)/(model_(weights|constants)_config\.json|(weight|tensor)_\d+)"
)
_PAYLOAD: Final = re.compile(r"(weight|tensor)_\d+")
_OPERATOR: Final = re.compile(
    r"torch\.ops\.(aten|prims|prim|higher_order|quantized|quantized_decomposed)\.\w+(\.\w+)?|_operator\.[a-z]\w*|math\.[a-z]\w*|torch\.sym_\w+"
)
_NAME: Final = re.compile(r"[\w.]*")
_TREE_TYPES: Final = frozenset({"builtins.tuple", "builtins.list", "builtins.dict"})
_CODE_NODES: Final = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Constant, ast.Name, ast.Call, ast.keyword, ast.Subscript,
    ast.Attribute, ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip
_CLASS: Final = re.compile(r"[A-Z][A-Za-z]+")  # sympy's classes: Symbol, Integer, Add; not S, which evaluates its argument
_FUNCTIONS: Final = frozenset({"min", "max"})
_WORD: Final = re.compile(r"\w*")
_MAX_JSON_BYTES: Final = 64 * 1024 * 1024


def check(file: Path) -> bytes:
    """Return the archive's sample inputs (a torch.save file, which is still to be read with weights_only).

    Raises FailedPrecondition (MODEL_UNSAFE) that says what is wrong.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = _members(archive)
            _check_payloads(_json(archive, members, "data/weights/model_weights_config.json"))
            _check_payloads(_json(archive, members, "data/constants/model_constants_config.json"))
            _check_graph(_json(archive, members, "models/model.json"))
            return archive.read(members["data/sample_inputs/model.pt"])
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, RecursionError) as error:
        raise _refused(f"it is not an archive of torch.export.save of this torch ({type(error).__name__})") from error


def _members(archive: zipfile.ZipFile) -> dict[str, str]:
    """Return path inside the archive's root folder → full name, of which each is known and there once."""
    members: dict[str, str] = {}
    for name in archive.namelist():
        path = name.partition("/")[2]
        if not _ALLOWED.fullmatch(path):
            raise _refused(f"it holds {path[:80]!r}, which is neither a graph nor tensors; save it with torch.export.save, without extras")
        if path in members:
            raise _refused(f"it holds {path!r} twice")
        members[path] = name
    return members


def _json(archive: zipfile.ZipFile, members: dict[str, str], path: str) -> Any:
    if archive.getinfo(members[path]).file_size > _MAX_JSON_BYTES:
        raise _refused(f"{path} is longer than {_MAX_JSON_BYTES} bytes")
    return json.loads(archive.read(members[path]))


def _check_payloads(config: Any) -> None:
    for name, payload in config["config"].items():
        if payload["use_pickle"] is not False or not _PAYLOAD.fullmatch(payload["path_name"]):
            raise _refused(f"{name[:80]!r} needs pickle: make it a plain dense tensor")


def _check_graph(program: Any) -> None:
    for tree in _walk(program):
        for operator in (tree.get("target") if "inputs" in tree else None, tree.get("as_operator")):
            if operator is not None and not _OPERATOR.fullmatch(operator):
                raise _refused(f"its graph calls {operator[:80]!r}, which is not one of torch.ops")
        for name in (tree.get("name"), tree.get("fqn"), *(tree.get("forward_arg_names") or ())):  # these become source text
            if name is not None and not _NAME.fullmatch(name):
                raise _refused(f"its graph uses the name {name[:80]!r}")
        for spec in (tree.get("in_spec"), tree.get("out_spec")):
            if spec:
                _check_tree(spec)
        if tree.get("expr_str"):
            _check_code(tree["expr_str"])
    if program["graph_module"].get("treespec_namedtuple_fields"):
        raise _refused("it takes or gives named tuples: use plain tensors")
    for code in (*program.get("guards_code", ()), *program.get("range_constraints", ())):
        _check_code(code)


def _walk(tree: Any) -> Iterator[dict[str, Any]]:
    """Yield every mapping of a JSON tree; metadata is only text about where the graph came from."""
    if isinstance(tree, dict):
        yield tree
    for value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        if value[0] != "metadata":
            yield from _walk(value[1])


def _check_tree(spec: str) -> None:
    for tree in _walk(json.loads(spec)):
        if tree["type"] is not None and tree["type"] not in _TREE_TYPES:
            raise _refused(f"it takes or gives {str(tree['type'])[:80]!r}: use plain tensors")
        if tree["context"] is not None and _holds_mapping(json.loads(tree["context"])):
            raise _refused("it takes or gives containers with a context of their own: use plain tensors")


def _holds_mapping(context: Any) -> bool:
    """A mapping in a context may name a module to import."""
    return next(_walk(context), None) is not None


def _check_code(code: str) -> None:
    """Let arithmetic on sizes through, and nothing that could reach anything else."""
    try:
        tree = ast.parse(code.strip(), mode="eval")
    except SyntaxError as error:
        raise _refused(f"its graph holds {code[:80]!r}, which is no expression") from error
    for node in ast.walk(tree):
        if not (isinstance(node, _CODE_NODES) and _harmless(node)):
            raise _refused(f"its graph holds {code[:80]!r}, which is more than arithmetic on sizes")


def _harmless(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute):
        return node.attr == "size"
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, str) or bool(_WORD.fullmatch(node.value))
    if isinstance(node, ast.Call):
        called = node.func
        return isinstance(called, ast.Attribute) or (
            isinstance(called, ast.Name) and (called.id in _FUNCTIONS or bool(_CLASS.fullmatch(called.id)))
        )
    return not (isinstance(node, ast.Name) and node.id.startswith("_"))


def _refused(why: str) -> FailedPrecondition:
    return FailedPrecondition(f"the .pt2 file is refused: {why}", reason="MODEL_UNSAFE")
