"""The language of on-demand transforms: what `expression` of a feature set may say, read into a small tree and bounded before it ever runs.

Closed on purpose: operands in braces, numbers, operators and the functions listed here. There is no name that could reach anything else, no
loop and no text, so what an expression costs is known when it is applied. `feature_retrieval.transforms` turns the tree into numpy.

    cosine({user-taste:vector}, {listing-text:text}) * where({$request:hour} >= 18, 1.5, 1)

Every operand is [rows, its columns]; widths must be equal or 1. What is missing (null without a default) is NaN, and NaN in is NaN out,
except for `missing`, `coalesce` and the branch that `where` does not take. 1 is true, 0 is false.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from plait.registry.references import parse as parse_reference

MAX_TEXT: Final = 2048
MAX_NODES: Final = 128
MAX_DEPTH: Final = 16  # of brackets, calls and signs inside one another
MAX_WIDTH: Final = 1024  # columns of an operand or a result
MAX_CELLS: Final = 4096  # computed per row, over all transforms of a set
MAX_BUCKETS: Final = 2**31 - 1

_ELEMENTWISE: Final = {
    **dict.fromkeys(("log", "log1p", "exp", "sqrt", "abs", "sign", "floor", "ceil", "missing", "negate", "not"), (1, 1)),
    **dict.fromkeys(("time_since", "hour_of_day", "day_of_week"), (1, 1)),
    **dict.fromkeys(("+", "-", "*", "/", "<", "<=", ">", ">=", "==", "!=", "and", "or"), (2, 2)),
    **dict.fromkeys(("min", "max", "coalesce"), (2, 16)),
    **dict.fromkeys(("clip", "where"), (3, 3)),
}
_ARGUMENTS: Final = {**_ELEMENTWISE, "bucket": (2, 65), "one_hot": (2, 2), "cosine": (2, 2), "dot": (2, 2), "norm": (1, 1), "cross": (3, 3)}
_INTERNAL: Final = {"negate", "not", "and", "or"}  # written as operators
FUNCTIONS: Final = tuple(sorted(name for name in _ARGUMENTS if name.isidentifier() and name not in _INTERNAL))

_TOKEN: Final = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)|(?P<word>[A-Za-z_][A-Za-z0-9_]*)|\{(?P<operand>[^{}]*)\}"
    r"|(?P<sign><=|>=|==|!=|[-+*/<>(),]))"
)
_COMPARISONS: Final = ("<", "<=", ">", ">=", "==", "!=")


class ExpressionError(ValueError):
    """What is wrong, and in which column of the text (the first is 1)."""

    def __init__(self, column: int, message: str) -> None:
        super().__init__(f"column {column}: {message}")
        self.column = column
        self.message = message


@dataclass(frozen=True, slots=True)
class Number:
    """A constant."""

    value: float
    column: int


@dataclass(frozen=True, slots=True)
class Operand:
    """A feature, `view:feature`, `view@version:feature` or `$request:name`."""

    reference: str
    column: int


@dataclass(frozen=True, slots=True)
class Call:
    """A function or an operator; a sign is `negate`."""

    function: str
    arguments: tuple[Expression, ...]
    column: int


Expression = Number | Operand | Call


@dataclass(frozen=True, slots=True)
class Checked:
    """What an expression yields and costs: `width` columns, and `cells` computed per row."""

    width: int
    cells: int


@functools.lru_cache(maxsize=4096)  # of every expression there is, as a rule: it is looked at by several checks of several routes
def parse(text: str) -> Expression:
    """Return the tree of an expression. Raises ExpressionError; a text that is too long, too deep or has too many parts is one, too."""
    if len(text) > MAX_TEXT:
        raise ExpressionError(MAX_TEXT + 1, f"the expression is {len(text)} characters long; at most {MAX_TEXT} are allowed")
    return _Parser(text).whole()


@functools.lru_cache(maxsize=4096)
def references(expression: Expression) -> tuple[str, ...]:
    """Return what an expression reads, each once, in order of appearance."""
    return tuple(dict.fromkeys(node.reference for node in walk(expression) if isinstance(node, Operand)))


def walk(expression: Expression) -> Iterator[Expression]:
    """Yield every node, parents before children."""
    yield expression
    if isinstance(expression, Call):
        for argument in expression.arguments:
            yield from walk(argument)


def constant(expression: Expression) -> float | None:
    """Return the value of a number with or without a sign, None for anything else."""
    if isinstance(expression, Call) and expression.function == "negate" and isinstance(expression.arguments[0], Number):
        return -expression.arguments[0].value
    return expression.value if isinstance(expression, Number) else None


def check(expression: Expression, widths: Mapping[str, int]) -> Checked:
    """Return how wide an expression is, given how wide its operands are. Raises ExpressionError where widths or constants do not fit."""
    if isinstance(expression, Number):
        return Checked(1, 1)
    if isinstance(expression, Operand):
        width = widths[expression.reference]
        if width > MAX_WIDTH:
            raise ExpressionError(expression.column, f"{expression.reference} has {width} columns; a transform takes at most {MAX_WIDTH}")
        return Checked(width, width)
    arguments = [check(argument, widths) for argument in expression.arguments]
    width = _width(expression, [argument.width for argument in arguments])
    return Checked(width, width + sum(argument.cells for argument in arguments))


def _width(call: Call, widths: list[int]) -> int:
    match call.function:
        case "one_hot":
            size = _whole(call, 1, 1, MAX_WIDTH, "how many columns")
            _single(call, widths[:1])
            return size
        case "cross":
            _whole(call, 2, 1, MAX_BUCKETS, "how many buckets")
            _single(call, widths[:2])
            return 1
        case "bucket":
            _bounds(call)
            return widths[0]
        case "cosine" | "dot":
            if widths[0] != widths[1]:
                raise ExpressionError(
                    call.column, f"{call.function} needs two vectors of one width, found {widths[0]} and {widths[1]} columns"
                )
            return 1
        case "norm":
            return 1
    wide = max(widths)
    if any(width not in (1, wide) for width in widths):
        found = ", ".join(map(str, widths))
        raise ExpressionError(call.column, f"{_shown(call)} needs operands of one width, or of 1 column, found {found} columns")
    return wide


def _single(call: Call, widths: list[int]) -> None:
    if any(width != 1 for width in widths):
        raise ExpressionError(call.column, f"{call.function} takes features of one column, found {max(widths)} columns")


def _whole(call: Call, at: int, low: int, high: int, what: str) -> int:
    value = constant(call.arguments[at])
    if value is None or value != math.floor(value) or not low <= value <= high:
        raise ExpressionError(call.arguments[at].column, f"{call.function} needs {what} as a whole number from {low} to {high}")
    return int(value)


def _bounds(call: Call) -> None:
    values = [constant(argument) for argument in call.arguments[1:]]
    for argument, value, before in zip(call.arguments[1:], values, [None, *values], strict=False):
        if value is None or (before is not None and value <= before):
            raise ExpressionError(argument.column, "bucket needs its bounds as numbers, each larger than the one before")


def _shown(call: Call) -> str:
    return {"negate": "-"}.get(call.function, call.function)


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str  # number, word, operand, sign, end
    text: str
    column: int


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while text[at:].strip():
        found = _TOKEN.match(text, at)
        if found is None or found.lastgroup is None:
            at += len(text[at:]) - len(text[at:].lstrip())
            hint = ": '{' is not closed" if text[at] == "{" else ""
            raise ExpressionError(at + 1, f"cannot read {text[at]!r} here{hint}")
        kind = found.lastgroup
        yield _Token(kind, found[kind], found.start(kind) + (kind != "operand"))
        at = found.end()
    yield _Token("end", "", len(text) + 1)


class _Parser:
    """Recursive descent, one method per level of precedence: or, and, not, comparison, sum, product, sign."""

    def __init__(self, text: str) -> None:
        self._tokens = list(_tokens(text))
        self._at = 0
        self._nodes = 0
        self._depth = 0

    def whole(self) -> Expression:
        found = self._any_of()
        if self._now.kind != "end":
            raise ExpressionError(self._now.column, f"expected an operator or the end, found {self._now.text!r}")
        return found

    @property
    def _now(self) -> _Token:
        return self._tokens[self._at]

    def _take(self, *texts: str) -> _Token | None:
        token = self._now
        if token.kind not in ("sign", "word") or token.text not in texts:
            return None
        self._at += 1
        return token

    def _call(self, function: str, arguments: tuple[Expression, ...], column: int) -> Call:
        self._count(column)
        return Call(function, arguments, column)

    def _count(self, column: int) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise ExpressionError(column, f"the expression has more than {MAX_NODES} numbers, operands and operations")

    def _deeper(self, column: int) -> None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ExpressionError(column, f"more than {MAX_DEPTH} brackets, calls or signs are inside one another")

    def _any_of(self) -> Expression:
        left = self._all_of()
        while token := self._take("or"):
            left = self._call("or", (left, self._all_of()), token.column)
        return left

    def _all_of(self) -> Expression:
        left = self._negation()
        while token := self._take("and"):
            left = self._call("and", (left, self._negation()), token.column)
        return left

    def _negation(self) -> Expression:
        token = self._take("not")
        if token is None:
            return self._comparison()
        self._deeper(token.column)
        found = self._call("not", (self._negation(),), token.column)
        self._depth -= 1
        return found

    def _comparison(self) -> Expression:
        left = self._sum()
        token = self._take(*_COMPARISONS)
        if token is None:
            return left
        found = self._call(token.text, (left, self._sum()), token.column)
        if self._now.text in _COMPARISONS and self._now.kind == "sign":
            raise ExpressionError(self._now.column, "comparisons cannot be chained: write a < b and b < c")
        return found

    def _sum(self) -> Expression:
        left = self._product()
        while token := self._take("+", "-"):
            left = self._call(token.text, (left, self._product()), token.column)
        return left

    def _product(self) -> Expression:
        left = self._sign()
        while token := self._take("*", "/"):
            left = self._call(token.text, (left, self._sign()), token.column)
        return left

    def _sign(self) -> Expression:
        token = self._take("-")
        if token is None:
            return self._atom()
        self._deeper(token.column)
        found = self._call("negate", (self._sign(),), token.column)
        self._depth -= 1
        return found

    def _atom(self) -> Expression:
        token = self._now
        self._at += 1
        if token.kind == "number":
            self._count(token.column)
            value = float(token.text)
            if math.isinf(value):
                raise ExpressionError(token.column, f"{token.text} is too large for a float64")
            return Number(value, token.column)
        if token.kind == "operand":
            self._count(token.column)
            return Operand(_reference(token), token.column)
        if token.kind == "word":
            return self._function(token)
        if token.text == "(":
            self._deeper(token.column)
            found = self._any_of()
            self._close(token)
            return found
        found_text = repr(token.text) if token.text else "the end"
        raise ExpressionError(token.column, f"expected a number, {{view:feature}}, a function or '(', found {found_text}")

    def _function(self, token: _Token) -> Expression:
        if token.text not in FUNCTIONS:
            raise ExpressionError(token.column, f"there is no function {token.text!r}; there are {', '.join(FUNCTIONS)}")
        opened = self._take("(")
        if opened is None:
            raise ExpressionError(self._now.column, f"expected '(' after {token.text}")
        self._deeper(token.column)
        arguments = [self._any_of()]
        while self._take(","):
            arguments.append(self._any_of())
        self._close(opened)
        least, most = _ARGUMENTS[token.text]
        if not least <= len(arguments) <= most:
            wanted = str(least) if least == most else f"{least} to {most}"
            raise ExpressionError(token.column, f"{token.text} takes {wanted} arguments, found {len(arguments)}")
        return self._call(token.text, tuple(arguments), token.column)

    def _close(self, opened: _Token) -> None:
        if self._take(")") is None:
            raise ExpressionError(self._now.column, f"expected ')' for the '(' in column {opened.column}")
        self._depth -= 1


def _reference(token: _Token) -> str:
    found = parse_reference(token.text.strip())
    if found is None:
        raise ExpressionError(token.column, f"expected {{view:feature}} or {{$request:name}}, found {{{token.text[:80]}}}")
    if found.kind == "transform":
        raise ExpressionError(token.column, "a transform cannot read another one: write its expression out")
    return str(found)
