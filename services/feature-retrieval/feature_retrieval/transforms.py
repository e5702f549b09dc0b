"""On-demand transforms as numpy: a checked expression becomes nested functions over whole columns, so that a request computes, never parses.

Every array is [rows, columns] or [1, columns] (a constant, a feature sent once per request, or another entity's one row), and they broadcast.
NaN is what is missing; how it travels is told in `plait.registry.expressions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from plait.registry.expressions import Call, Expression, Number, Operand, constant, references, walk
from plait.registry.records import Feature, RequestFeature
from plait.registry.shapes import stand_in, stored_type

Array = npt.NDArray[Any]
_Compiled = Callable[[Sequence[Array], int], Array]  # arrays of the operands, now in µs since the epoch

_WIDE: Final = ("int32", "int64", "float64")  # not exact in a float32
_TIMES: Final = ("time_since", "hour_of_day", "day_of_week", "cross")
_HOUR_US: Final = 3_600_000_000
_DAY_US: Final = 24 * _HOUR_US
_MONDAY: Final = 3  # days since Monday on 1970-01-01, a Thursday


def operand_dtype(feature: Feature | RequestFeature) -> np.dtype[Any]:
    """Return the dtype in which a transform takes a feature: float64 where a float32 would round it, else float32."""
    name = stored_type(feature).name if isinstance(feature, Feature) else feature.dtype
    return np.dtype(np.float64 if name in _WIDE else np.float32)


def operand_default(feature: Feature | RequestFeature) -> float:
    """Return what stands in for one unknown value: the declared default (coded where it is text), else NaN, which is missing."""
    if feature.default is None:
        return float("nan")
    return float(stand_in(feature) if isinstance(feature, Feature) else feature.default)


@dataclass(frozen=True, slots=True)
class CompiledTransform:
    """One transform. `operands`: the references it reads, in the order of the arrays it is called with; `dtype`: what it computes in."""

    operands: tuple[str, ...]
    dtype: np.dtype[Any]
    _run: _Compiled

    def __call__(self, arrays: Sequence[Array], now_us: int) -> Array:
        """Return [rows, columns] (or [1, columns]) in `dtype`, not finite where nothing can be said.

        `arrays`: one [rows, columns] or [1, columns] per operand, float32 or float64, NaN where missing; `now_us`: µs since the epoch.
        """
        with np.errstate(all="ignore"):
            return self._run([array.astype(self.dtype, copy=False) for array in arrays], now_us)


def compile_transform(expression: Expression, dtypes: Mapping[str, np.dtype[Any]]) -> CompiledTransform:
    """Compile an expression that `plait.registry.expressions.check` has passed; `dtypes`: by reference, as `operand_dtype` gives them."""
    read = references(expression)
    exact = any(isinstance(node, Call) and node.function in _TIMES for node in walk(expression))
    dtype = np.dtype(np.float64 if exact or not read or any(dtypes[name] == np.float64 for name in read) else np.float32)
    return CompiledTransform(read, dtype, _compile(expression, {name: at for at, name in enumerate(read)}, dtype))


def settle(values: Array, default: float | None, out: Array) -> int:
    """Write [rows or 1, columns] results into the tensor's columns `out` [rows, columns], of any tensor dtype; return how many of its cells
    hold the default (NaN or 0 without one) because the result is not a finite number or does not fit.

    Whole numbers are rounded half to even, a bool is whether the number is not 0.
    """
    with np.errstate(all="ignore"):
        if out.dtype.kind == "f":
            values = values.astype(out.dtype, copy=False)
            good = np.isfinite(values)
        elif out.dtype.kind == "b":
            good = np.isfinite(values)
        else:
            values = np.rint(values)
            bounds = np.iinfo(out.dtype)
            good = (values >= float(bounds.min)) & (values < float(bounds.max) + 1)
    bad = good.size - int(np.count_nonzero(good))
    if not bad:
        out[...] = values
        return 0
    stand = default if default is not None else np.nan if out.dtype.kind == "f" else 0
    out[...] = np.where(good, values, np.asarray(stand).astype(values.dtype))
    return bad * (out.size // good.size)


def _compile(node: Expression, places: Mapping[str, int], dtype: np.dtype[Any]) -> _Compiled:
    if isinstance(node, Number):
        value = np.full((1, 1), node.value).astype(dtype)
        return lambda _arrays, _now: value
    if isinstance(node, Operand):
        at = places[node.reference]
        return lambda arrays, _now: arrays[at]
    special = _SPECIAL.get(node.function)
    if special is not None:
        return special(node, [_compile(argument, places, dtype) for argument in node.arguments], dtype)
    parts = [_compile(argument, places, dtype) for argument in node.arguments]
    return _plain(_FUNCTIONS[node.function], parts)


def _plain(function: Callable[..., Array], parts: list[_Compiled]) -> _Compiled:
    """Return a function of one, two or more computed arguments; the frequent numbers without a list per call."""
    if len(parts) == 1:
        [only] = parts
        return lambda arrays, now: function(only(arrays, now))
    if len(parts) == 2:
        left, right = parts
        return lambda arrays, now: function(left(arrays, now), right(arrays, now))
    return lambda arrays, now: function(*(part(arrays, now) for part in parts))


def _known(found: Array, *arguments: Array) -> Array:
    """Return truths as 1 and 0, NaN where an argument is NaN."""
    dtype = arguments[0].dtype
    unknown = np.isnan(arguments[0])
    for argument in arguments[1:]:
        unknown = unknown | np.isnan(argument)
    return np.where(unknown, dtype.type(np.nan), found.astype(dtype))


def _comparison(compare: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: _known(compare(a, b), a, b)


def _where(condition: Array, then: Array, otherwise: Array) -> Array:
    return np.where(np.isnan(condition), condition, np.where(condition != 0, then, otherwise))


def _coalesce(first: Array, *others: Array) -> Array:
    for other in others:
        first = np.where(np.isnan(first), other, first)
    return first


def _fold(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    def folded(first: Array, *others: Array) -> Array:
        for other in others:
            first = function(first, other)
        return first

    return folded


def _dot(a: Array, b: Array) -> Array:
    found: Array = np.einsum("ij,ij->i", a, b)[:, None]
    return found


def _norm(a: Array) -> Array:
    found: Array = np.sqrt(_dot(a, a))
    return found


def _cosine(a: Array, b: Array) -> Array:
    """Return the cosine of the angle, NaN where a vector is all zeros."""
    found: Array = np.clip(_dot(a, b) / (_norm(a) * _norm(b)), -1, 1)
    return found


_FUNCTIONS: Final[dict[str, Callable[..., Array]]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    "<": _comparison(np.less),
    "<=": _comparison(np.less_equal),
    ">": _comparison(np.greater),
    ">=": _comparison(np.greater_equal),
    "==": _comparison(np.equal),
    "!=": _comparison(np.not_equal),
    "and": lambda a, b: _known((a != 0) & (b != 0), a, b),
    "or": lambda a, b: _known((a != 0) | (b != 0), a, b),
    "not": lambda a: _known(a == 0, a),
    "negate": np.negative,
    "log": np.log,
    "log1p": np.log1p,
    "exp": np.exp,
    "sqrt": np.sqrt,
    "abs": np.abs,
    "sign": np.sign,
    "floor": np.floor,
    "ceil": np.ceil,
    "min": _fold(np.minimum),
    "max": _fold(np.maximum),
    "clip": lambda value, low, high: np.minimum(np.maximum(value, low), high),
    "missing": lambda a: np.isnan(a).astype(a.dtype),
    "coalesce": _coalesce,
    "where": _where,
    "dot": _dot,
    "norm": _norm,
    "cosine": _cosine,
    "hour_of_day": lambda at: np.floor(at / _HOUR_US) % 24,
    "day_of_week": lambda at: (np.floor(at / _DAY_US) + _MONDAY) % 7,
}


# --- functions whose later arguments are constants, or that need the time ------------------------------------------------------------------


def _numbers(call: Call) -> list[float]:
    return [value for argument in call.arguments[1:] if (value := constant(argument)) is not None]


def _time_since(_call: Call, parts: list[_Compiled], _dtype: np.dtype[Any]) -> _Compiled:
    [at] = parts
    return lambda arrays, now: (now - at(arrays, now)) / 1e6


def _bucket(call: Call, parts: list[_Compiled], dtype: np.dtype[Any]) -> _Compiled:
    """How many of the ascending bounds a value has reached."""
    value, bounds = parts[0], np.array(_numbers(call), dtype)

    def run(arrays: Sequence[Array], now: int) -> Array:
        found = value(arrays, now)
        return _known(np.searchsorted(bounds, found, side="right"), found)

    return run


def _one_hot(call: Call, parts: list[_Compiled], dtype: np.dtype[Any]) -> _Compiled:
    """1 in the column of the value, 0 in the others; all 0 where it is none of the columns."""
    value, columns = parts[0], np.arange(int(_numbers(call)[0])).astype(dtype)

    def run(arrays: Sequence[Array], now: int) -> Array:
        found = value(arrays, now)
        return _known(found == columns, found)

    return run


def _cross(call: Call, parts: list[_Compiled], dtype: np.dtype[Any]) -> _Compiled:
    """A bucket for each pair of whole numbers: splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA
    2014) of the first, the second added, mixed again, modulo the buckets. NaN for what is no whole number below 2**53."""
    left, right, buckets = parts[0], parts[1], np.uint64(constant(call.arguments[2]) or 1)

    def run(arrays: Sequence[Array], now: int) -> Array:
        a, b = np.broadcast_arrays(left(arrays, now), right(arrays, now))
        whole = (np.abs(a) < 2**53) & (np.abs(b) < 2**53) & (np.floor(a) == a) & (np.floor(b) == b)
        mixed = _mix(_mix(np.where(whole, a, 0).astype(np.int64).view(np.uint64)) + np.where(whole, b, 0).astype(np.int64).view(np.uint64))
        return np.where(whole, (mixed % buckets).astype(dtype), dtype.type(np.nan))

    return run


def _mix(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


_SPECIAL: Final[dict[str, Callable[[Call, list[_Compiled], np.dtype[Any]], _Compiled]]] = {
    "time_since": _time_since,
    "bucket": _bucket,
    "one_hot": _one_hot,
    "cross": _cross,
}
