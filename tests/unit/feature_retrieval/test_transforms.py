"""Transforms against a plain-Python interpreter that takes one cell at a time, and what becomes of results that are no numbers."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_retrieval.transforms import compile_transform, operand_default, operand_dtype, settle
from plait.registry.expressions import Call, Expression, Number, Operand, check, constant, parse, references
from plait.registry.records import Feature, RequestFeature

NOW_US = 1_700_000_000_000_000
F64 = np.dtype(np.float64)
F32 = np.dtype(np.float32)
WIDTHS = {"v:a": 1, "v:b": 1, "v:wide": 3, "w:wide": 3, "$request:r": 1}
VALUES = st.integers(-32, 32).map(lambda n: n / 4) | st.just(math.nan)


# --- the interpreter -----------------------------------------------------------------------------------------------------------------------


class BeyondNumbers(Exception):
    """Python refuses what IEEE 754 calls infinite or not a number; from there on the two ways part."""


def evaluate(node: Expression, row: dict[str, list[float]]) -> list[float]:
    """The columns of one row, in plain Python."""
    if isinstance(node, Number):
        return [node.value]
    if isinstance(node, Operand):
        return row[node.reference]
    arguments = [evaluate(argument, row) for argument in node.arguments]
    if node.function in VECTORS:
        return [VECTORS[node.function](*arguments)]
    if node.function == "one_hot":
        [value] = arguments[0]
        return [math.nan if math.isnan(value) else float(value == n) for n in range(int(constant(node.arguments[1]) or 0))]
    wide = max(map(len, arguments))
    return [scalar(node.function, [a[at if len(a) > 1 else 0] for a in arguments]) for at in range(wide)]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: list[float], b: list[float]) -> float:
    size = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / size if size else math.nan


VECTORS: dict[str, Any] = {"dot": dot, "norm": lambda a: math.sqrt(dot(a, a)), "cosine": cosine}


def scalar(function: str, a: list[float]) -> float:
    if function == "missing":
        return float(math.isnan(a[0]))
    if function == "coalesce":
        return next((value for value in a if not math.isnan(value)), math.nan)
    if function == "where":
        return math.nan if math.isnan(a[0]) else a[1] if a[0] else a[2]
    if any(map(math.isnan, a)):
        return math.nan
    try:
        found = float(KNOWN[function](*a))
    except (ValueError, ZeroDivisionError, OverflowError):
        found = math.inf
    if math.isinf(found):
        raise BeyondNumbers
    return found


KNOWN: dict[str, Any] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "and": lambda a, b: a != 0 and b != 0,
    "or": lambda a, b: a != 0 or b != 0,
    "not": lambda a: a == 0,
    "negate": lambda a: -a,
    "log": math.log,
    "log1p": math.log1p,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "abs": abs,
    "sign": lambda a: (a > 0) - (a < 0),
    "floor": math.floor,
    "ceil": math.ceil,
    "min": min,
    "max": max,
    "clip": lambda value, low, high: min(max(value, low), high),
    "bucket": lambda value, *bounds: sum(value >= bound for bound in bounds),
}


def show(node: Expression) -> str:
    if isinstance(node, Number):
        return repr(node.value)
    if isinstance(node, Operand):
        return f"{{{node.reference}}}"
    shown = [show(argument) for argument in node.arguments]
    if node.function == "negate":
        return f"-({shown[0]})"
    if node.function == "not":
        return f"(not {shown[0]})"
    if node.function.isidentifier() and node.function not in ("and", "or"):
        return f"{node.function}({', '.join(shown)})"
    return f"({shown[0]} {node.function} {shown[1]})"


# --- generated expressions -------------------------------------------------------------------------------------------------------------------


def call(function: str, *arguments: Any) -> st.SearchStrategy[Expression]:
    return st.tuples(*arguments).map(lambda given_arguments: Call(function, given_arguments, 0))


def exact(inner: Any) -> st.SearchStrategy[Any]:
    """What gives quarters of whole numbers for such: here a comparison, or a step, is the same however it is computed."""
    bounds = st.lists(st.integers(-8, 8), min_size=1, max_size=4, unique=True).map(sorted)
    bucket = st.tuples(inner, bounds).map(lambda m: Call("bucket", (m[0], *(number(b) for b in m[1])), 0))
    one = [call(f, inner) for f in ("abs", "sign", "floor", "ceil", "missing", "negate", "not")]
    two = [call(f, inner, inner) for f in ("+", "-", "<", "<=", ">", ">=", "==", "!=", "and", "or", "min", "max", "coalesce")]
    three = [call(f, inner, inner, inner) for f in ("where", "clip", "max", "coalesce")]
    return st.one_of(*one, *two, *three, bucket)


def smooth(inner: Any) -> st.SearchStrategy[Any]:
    one = [call(f, inner) for f in ("log", "log1p", "exp", "sqrt", "norm", "negate", "missing")]
    two = [call(f, inner, inner) for f in ("*", "/", "+", "dot", "cosine", "coalesce")]
    return st.one_of(*one, *two)


def number(value: float) -> Expression:
    return Call("negate", (Number(-float(value), 0),), 0) if value < 0 else Number(float(value), 0)


LEAVES = st.one_of(st.sampled_from(sorted(WIDTHS)).map(lambda name: Operand(name, 0)), st.integers(-4, 8).map(number))
EXACT = st.recursive(LEAVES, exact, max_leaves=8)
ONE_HOT = st.sampled_from(["v:a", "$request:r"]).map(lambda name: Call("one_hot", (Operand(name, 0), Number(3.0, 0)), 0))
EXPRESSIONS = st.recursive(EXACT | ONE_HOT, smooth, max_leaves=4)


def fits(node: Expression) -> bool:
    try:
        check(node, WIDTHS)
    except ValueError:
        return False
    return True


def bare(node: Expression) -> Expression:
    """Without columns, which depend on how it was written."""
    if isinstance(node, Number):
        return Number(node.value, 0)
    if isinstance(node, Operand):
        return Operand(node.reference, 0)
    return Call(node.function, tuple(map(bare, node.arguments)), 0)


@settings(max_examples=250, deadline=None)
@given(EXPRESSIONS.filter(fits), st.data(), st.booleans())
def test_any_expression_is_what_plain_python_computes(tree: Expression, data: st.DataObject, single: bool) -> None:
    text = show(tree)
    parsed = parse(text)
    assert bare(parsed) == tree
    compiled = compile_transform(parsed, dict.fromkeys(WIDTHS, F64))
    assert compiled.operands == references(tree)
    assert compiled.dtype == F64
    counts = {name: 1 if name == "$request:r" or single else 3 for name in WIDTHS}
    columns = {
        name: np.array(data.draw(st.lists(VALUES, min_size=counts[name] * width, max_size=counts[name] * width))).reshape(-1, width)
        for name, width in WIDTHS.items()
    }
    found = compiled([columns[name] for name in compiled.operands], NOW_US)
    assert found.shape[1] == check(tree, WIDTHS).width
    assert len(found) in (1, 3)
    for at in range(len(found)):
        row = {name: values[at if len(values) > 1 else 0].tolist() for name, values in columns.items()}
        try:
            expected = evaluate(tree, row)
        except BeyondNumbers:
            continue
        assert found[at].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)


def run(text: str, now_us: int = NOW_US, **operands: Any) -> list[list[float]]:
    """A transform of int64 or float64 features of view v."""
    tree = parse(text)
    arrays = [np.array(operands[name.partition(":")[2]], float).reshape(-1, 1) for name in references(tree)]
    found: list[list[float]] = compile_transform(tree, dict.fromkeys(references(tree), F64))(arrays, now_us).tolist()
    return found


def test_time_is_told_in_seconds_hours_and_days_of_the_week_in_utc() -> None:
    times = [0, 1, NOW_US - 1, NOW_US, 1_234_567_890_123_456, 4_000_000_000_000_000]
    assert run("time_since({v:t})", t=times) == [[(NOW_US - t) / 1e6] for t in times]
    when = [datetime.datetime.fromtimestamp(t // 1_000_000, datetime.UTC) for t in times]
    assert run("hour_of_day({v:t})", t=times) == [[float(w.hour)] for w in when]
    assert run("day_of_week({v:t})", t=times) == [[float(w.weekday())] for w in when]
    assert compile_transform(parse("time_since({v:t})"), {"v:t": F32}).dtype == F64  # a float32 would round microseconds to minutes


def test_a_cross_tells_pairs_apart_and_spreads_them() -> None:
    pairs = [(a, b) for a in range(-50, 50) for b in range(50)]
    a, b = ([pair[at] for pair in pairs] for at in (0, 1))
    found = [value for [value] in run("cross({v:a}, {v:b}, 2147483647)", a=a, b=b)]
    assert len(set(found)) >= len(pairs) - 2
    counts = np.bincount(np.array(run("cross({v:a}, {v:b}, 10)", a=a, b=b), int).ravel(), minlength=10)
    assert counts.size == 10
    assert counts.min() > 400
    assert run("cross({v:a}, {v:b}, 10)", a=[1], b=[2]) != run("cross({v:b}, {v:a}, 10)", a=[1], b=[2])
    assert all(math.isnan(value) for [value] in run("cross({v:a}, {v:b}, 10)", a=[0.5, math.nan, 1, 2.0**60], b=[1, 1, math.inf, 1]))


def test_a_cross_is_what_is_documented() -> None:
    """A scalar splitmix64 (https://prng.di.unimi.it/splitmix64.c)."""

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    for a, b in ((0, 0), (1, 2), (-3, 4), (2**40, -1)):
        wanted = mix((mix(a % 2**64) + b) % 2**64) % 1000
        assert run("cross({v:a}, {v:b}, 1000)", a=[a], b=[b]) == [[float(wanted)]]


@pytest.mark.parametrize(
    ("feature", "dtype", "default"),
    [
        (Feature(name="f"), F32, math.nan),
        (Feature(name="f", dtype="float16", default=2), F32, 2.0),
        (Feature(name="f", dtype="int64", default=3), F64, 3.0),
        (Feature(name="f", dtype="int32"), F64, math.nan),
        (Feature(name="f", dtype="int16"), F32, math.nan),
        (Feature(name="f", dtype="bool", default=True), F32, 1.0),
        (Feature(name="f", dtype="timestamp"), F64, math.nan),
        (Feature(name="f", dtype="float64"), F64, math.nan),
        (Feature(name="f", dtype="string", vocabulary=("a", "b"), default="b"), F64, 2.0),
        (Feature(name="f", dtype="int8", max_length=3, pad=-1), F32, math.nan),
        (RequestFeature(name="f", dtype="int64"), F64, math.nan),
        (RequestFeature(name="f", default=0.5), F32, 0.5),
    ],
)
def test_operands_are_exact_and_missing_without_a_default(feature: Any, dtype: np.dtype[Any], default: float) -> None:
    assert operand_dtype(feature) == dtype
    np.testing.assert_equal(operand_default(feature), default)


def test_it_computes_in_float32_where_every_operand_is_one() -> None:
    tree = parse("{v:a} / 3")
    assert compile_transform(tree, {"v:a": F32}).dtype == F32
    found = compile_transform(tree, {"v:a": F32})([np.ones((2, 1), np.float32)], NOW_US)
    assert found.dtype == F32
    assert compile_transform(parse("{v:a} + {v:b}"), {"v:a": F32, "v:b": F64}).dtype == F64


@pytest.mark.parametrize(
    ("dtype", "values", "default", "out", "defaulted"),
    [
        ("float32", [1.5, math.nan, math.inf, 1e300], 9.0, [1.5, 9.0, 9.0, 9.0], 3),
        ("float32", [1.5, math.nan], None, [1.5, math.nan], 1),
        ("float16", [70000.0, 1.0], 0.0, [0.0, 1.0], 1),
        ("float64", [1e300], 0.0, [1e300], 0),
        ("int8", [127.4, 127.6, -128.5, -129.0, 2.5, 3.5], 7.0, [127, 7, -128, 7, 2, 4], 2),
        ("int8", [math.nan, -1.0], None, [0, -1], 1),
        ("int64", [2.0**63, -(2.0**63), 5.0], 1.0, [1, -(2**63), 5], 1),
        ("bool", [0.0, -2.0, math.nan], 1.0, [False, True, True], 1),
        ("bool", [math.inf], None, [False], 1),
    ],
)
def test_what_is_no_number_becomes_the_default_and_is_counted(
    dtype: str, values: list[float], default: float | None, out: list[Any], defaulted: int
) -> None:
    tensor = np.zeros((len(values), 2), dtype)
    assert settle(np.array(values)[:, None], default, tensor[:, 1:]) == defaulted
    np.testing.assert_array_equal(tensor[:, 1], np.array(out, dtype))
    assert not tensor[:, 0].any()


@pytest.mark.parametrize("rows", [0, 1, 4])
def test_one_result_for_every_row_is_counted_for_every_row(rows: int) -> None:
    tensor = np.zeros((rows, 2), np.float32)
    assert settle(np.array([[math.nan, 1.0]]), 5.0, tensor) == rows
    assert tensor.tolist() == [[5.0, 1.0]] * rows


@pytest.mark.parametrize("text", ["{v:a} / {v:b}", "log({v:b})", "1 / 0", "sqrt(0 - 1) + {v:a}", "exp(1000 * ({v:a} + 1))"])
def test_division_by_zero_and_its_like_warn_nobody(text: str) -> None:
    tree = parse(text)
    arrays: Sequence[Any] = [np.zeros((3, 1))] * len(references(tree))
    tensor = np.ones((3, 1), np.float32)
    assert settle(compile_transform(tree, dict.fromkeys(references(tree), F64))(arrays, NOW_US), -1.0, tensor) == 3
    assert tensor.tolist() == [[-1.0]] * 3


def test_operands_are_not_written_to() -> None:
    array = np.arange(6.0).reshape(3, 2)
    array.flags.writeable = False
    tree = parse("-abs({v:wide}) + {v:wide} * 2")
    compile_transform(tree, {"v:wide": F64})([array], NOW_US)
    assert array.tolist() == [[0, 1], [2, 3], [4, 5]]
