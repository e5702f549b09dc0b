"""Archives that would run code of their own: each is refused, and none leaves a trace."""

from __future__ import annotations

import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.fakes.artifacts import load
from torch import Tensor, nn

from model_worker.backends import export_guard
from plait.errors import FailedPrecondition
from plait.registry.records import Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(TensorSpec(name="x", dtype="float32", shape=(-1, 3)),), outputs=(TensorSpec(name="y", dtype="float32", shape=(-1,)),)
)
Members = dict[str, bytes]
PROGRAM = "archive/models/model.json"
EXAMPLES = "archive/data/sample_inputs/model.pt"
WEIGHTS = "archive/data/weights/model_weights_config.json"
CONSTANTS = "archive/data/constants/model_constants_config.json"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.constant = torch.tensor([2.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze(1) * self.constant


@pytest.fixture(scope="module")
def honest() -> Members:
    """The members of an archive as torch writes it."""
    rows = torch.export.Dim("rows", min=1, max=1000)
    program = torch.export.export(Small(), (torch.ones(4, 3),), dynamic_shapes=({0: rows},))
    target = io.BytesIO()
    torch.export.save(program, target, extra_files={"notes.txt": "from the team"})
    with zipfile.ZipFile(target) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(members: Members) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return target.getvalue()


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def pickled(file: Path) -> bytes:
    target = io.BytesIO()
    torch.save((Touch(file),), target)
    return target.getvalue()


def program(members: Members, change: Callable[[Any], None]) -> Members:
    tree = json.loads(members[PROGRAM])
    change(tree)
    return {**members, PROGRAM: json.dumps(tree).encode()}


def config(members: Members, name: str, **change: Any) -> Members:
    tree = json.loads(members[name])
    next(iter(tree["config"].values())).update(change)
    return {**members, name: json.dumps(tree).encode()}


def examples(members: Members, mark: Path) -> Members:
    return {**members, EXAMPLES: pickled(mark)}


def second_model(members: Members, mark: Path) -> Members:
    evil = {name.replace("model_", "evil_"): members[name] for name in (WEIGHTS, CONSTANTS)}
    return {"archive/models/evil.json": members[PROGRAM], "archive/data/sample_inputs/evil.pt": pickled(mark), **evil, **members}


def older_format(members: Members, mark: Path) -> Members:
    """Makes the reader of the present format fail, upon which torch tries the old one."""
    broken = program(members, lambda p: p["graph_module"]["graph"]["nodes"][0].update(target="torch.ops.aten.no_such_operator.default"))
    old = {
        "version": f"{json.loads(members[PROGRAM])['schema_version']['major']}.0".encode(),
        "serialized_exported_program.json": members[PROGRAM],
        "serialized_state_dict.pt": pickled(mark),
        "serialized_constants.pt": pickled(mark),
        "serialized_example_inputs.pt": pickled(mark),
    }
    return {**broken, **old}


def pickled_weight(members: Members, mark: Path) -> Members:
    return {**config(members, WEIGHTS, use_pickle=True), "archive/data/weights/weight_0": pickled(mark)}


def legacy_weights(members: Members, mark: Path) -> Members:
    return {**members, "archive/data/weights/model.pt": pickled(mark)}


def legacy_constants(members: Members, mark: Path) -> Members:
    return {**members, "archive/data/constants/model.pt": pickled(mark)}


def opaque_constant(members: Members, mark: Path) -> Members:
    changed = config(members, CONSTANTS, path_name="opaque_obj_0")
    return {**changed, "archive/data/constants/opaque_obj_0": pickle.dumps(Touch(mark))}


def opaque_constant_under_a_plain_name(members: Members, mark: Path) -> Members:
    changed = config(members, CONSTANTS, path_name="opaque_obj/../tensor_0")
    return {**changed, "archive/data/constants/tensor_0": pickle.dumps(Touch(mark))}


def compiled_library(members: Members, mark: Path) -> Members:
    return {**members, "archive/data/aotinductor/model/evil.so": b"\x7fELF"}


def operator_that_runs_a_command(members: Members, mark: Path) -> Members:
    def change(tree: Any) -> None:
        node = tree["graph_module"]["graph"]["nodes"][0]
        node["target"] = "torch.serialization.os.system"
        node["inputs"] = [{"name": "", "arg": {"as_string": f"touch {mark}"}, "kind": 1}]

    return program(members, change)


def expression_that_runs_a_command(members: Members, mark: Path) -> Members:
    text = members[PROGRAM].decode()
    command = f"__import__('pathlib').Path('{mark}').touch()"
    found = json.dumps("Symbol('s77', positive=True, integer=True)")
    assert found in text
    return {**members, PROGRAM: text.replace(found, json.dumps(command)).encode()}


def range_that_runs_a_command(members: Members, mark: Path) -> Members:
    key = f"__import__('pathlib').Path('{mark}').touch()"
    return program(members, lambda tree: tree["range_constraints"].update({key: {"min_val": 1, "max_val": 2}}))


def guard_that_runs_a_command(members: Members, mark: Path) -> Members:
    return program(members, lambda tree: tree["guards_code"].append(f"__import__('pathlib').Path('{mark}').touch() is None"))


def attribute_beyond_sizes(members: Members, mark: Path) -> Members:
    return program(members, lambda tree: tree["guards_code"].append("L['x'].__class__.__mro__[0].size() == 3"))


def default_factory_that_is_imported(members: Members, mark: Path) -> Members:
    (mark.parent / "plait_test_imported.py").write_text(f"open({str(mark)!r}, 'w').close()\nfactory = int\n")

    def change(tree: Any) -> None:
        call = next(c for c in tree["graph_module"]["module_call_graph"] if c["signature"])
        context = {"default_factory_module": "plait_test_imported", "default_factory_name": "factory", "dict_context": []}
        call["signature"]["in_spec"] = json.dumps([1, {"type": "collections.defaultdict", "context": context, "children_spec": []}])

    return program(members, change)


ATTACKS = [
    examples,
    second_model,
    older_format,
    pickled_weight,
    legacy_weights,
    legacy_constants,
    opaque_constant,
    opaque_constant_under_a_plain_name,
    compiled_library,
    operator_that_runs_a_command,
    expression_that_runs_a_command,
    range_that_runs_a_command,
    guard_that_runs_a_command,
    attribute_beyond_sizes,
    default_factory_that_is_imported,
]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.__name__)
def test_nothing_of_the_archives_own_runs(honest: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: Any) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    mark = tmp_path / "it-ran"
    content = zipped(attack(honest, mark))
    with pytest.raises(FailedPrecondition) as refused:
        load(content, "torch_export", SIGNATURE)([np.ones((2, 3), np.float32)])
    assert refused.value.reason in {"ARTIFACT_UNSAFE", "ARTIFACT_INVALID"}
    assert not mark.exists()
    assert "plait_test_imported" not in sys.modules


def test_an_honest_archive_is_loaded_and_notes_are_left_out(honest: Members) -> None:
    model = load(zipped(honest), "torch_export", SIGNATURE)
    for rows in (1, 2, 5):
        [y] = model([np.ones((rows, 3), np.float32)])
        assert y.shape == (rows,)
    with zipfile.ZipFile(io.BytesIO(export_guard.check(zipped(honest)).archive)) as clean:
        assert not [name for name in clean.namelist() if "extra" in name]
        assert clean.read(PROGRAM) == honest[PROGRAM]


def test_two_members_of_one_name_are_refused(honest: Members) -> None:
    """Which of them is read depends on who reads."""
    content = zipped({**honest, "other/models/model.json": honest[PROGRAM]})
    with pytest.raises(FailedPrecondition, match="twice"):
        export_guard.check(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no zip",
        zipped({"archive/models/model.json": b"{"}),
        zipped({"archive/models/model.json": b"{}"}).replace(b"PK\x01\x02", b"PK\x01\x03"),
        zipped({"archive/models/model.json": b"[]"}),
        zipped({"archive/models/model.json": b"{}"}),
        zipped({"archive/models/model.json": b"[" * 100_000}),
        zipped({"archive/archive_format": b"pt2"}),
    ],
)
def test_what_is_no_archive_is_called_so(content: bytes) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        export_guard.check(content)
    assert refused.value.reason == "ARTIFACT_INVALID"


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(Mul(Integer(2), Symbol('s0', positive=True, integer=True)), Integer(-1))",
        "Float('2.5', precision=53)",
        "L['x'].size()[0] >= 2",
        "Max(1, s0)",
    ],
)
def test_arithmetic_is_let_through(text: str) -> None:
    export_guard._check_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "().__class__",
        "Symbol('__import__(\"os\")')",
        "(lambda: 1)()",
        "[x for x in (1,)]",
        "getattr(L, 'x')",
        "open('/etc/passwd')",
        "f'{1}'",
        "Symbol.mro()",
        "s0 if 1 else 2",
        "b'x'",
        "1 +",
        "1" * 5000,
        None,
        7,
    ],
)
def test_what_is_more_than_arithmetic_is_refused(text: Any) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        export_guard._check_expression(text)
    assert refused.value.reason == "ARTIFACT_UNSAFE"


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("torch.ops.aten.add.Tensor", True),
        ("torch.ops.aten.linear.default", True),
        ("_operator.mul", True),
        ("torch.sym_max", True),
        ("torch.ops.aten.from_file.default", False),
        ("torch.ops.aten.save.default", False),
        ("torch.ops.mylib.run.default", False),
        ("torch.serialization.os.system", False),
        ("torch.load", False),
        ("_operator.methodcaller", False),
        ("_operator.attrgetter", False),
        ("math.__loader__.load_module", False),
        ("torch.ops.aten.add.Tensor.__globals__", False),
        ("#custom", False),
    ],
)
def test_only_plain_operators_are_called(target: str, allowed: bool) -> None:
    if allowed:
        export_guard._check_target(target)
    else:
        with pytest.raises(FailedPrecondition, match="not a plain tensor operator"):
            export_guard._check_target(target)
