"""The language of transforms: what is refused, in which column, and that nothing gets past a bound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.registry.expressions import (
    FUNCTIONS,
    MAX_DEPTH,
    MAX_NODES,
    MAX_TEXT,
    MAX_WIDTH,
    Call,
    Checked,
    ExpressionError,
    Number,
    Operand,
    check,
    constant,
    parse,
    references,
)

WIDTHS = {"v:a": 1, "v:b": 1, "v:wide": 3, "v:other": 4, "v:huge": MAX_WIDTH + 1, "$request:r": 1}


def shape(text: str) -> str:
    """The tree, fully bracketed."""

    def show(node: Number | Operand | Call) -> str:
        if isinstance(node, Number):
            return f"{node.value:g}"
        return node.reference if isinstance(node, Operand) else f"({node.function} {' '.join(map(show, node.arguments))})"

    return show(parse(text))


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("1 + 2 * 3", "(+ 1 (* 2 3))"),
        ("1 - 2 - 3", "(- (- 1 2) 3)"),
        ("8 / 2 / 2", "(/ (/ 8 2) 2)"),
        ("(1 + 2) * 3", "(* (+ 1 2) 3)"),
        ("-1 * -2", "(* (negate 1) (negate 2))"),
        ("not 1 < 2 and 3 >= 4 or 5 != 6", "(or (and (not (< 1 2)) (>= 3 4)) (!= 5 6))"),
        ("1 or 2 and 3", "(or 1 (and 2 3))"),
        ("1 + 2 == 3 - 0", "(== (+ 1 2) (- 3 0))"),
        (" min( {v:a} ,\n {v@2:b},1e3, .5 ,2. ) ", "(min v:a v@2:b 1000 0.5 2)"),
        ("cosine({ user-taste:vector }, {listing-text:text})", "(cosine user-taste:vector listing-text:text)"),
        ("{$request:hour}", "$request:hour"),
    ],
)
def test_precedence(text: str, tree: str) -> None:
    assert shape(text) == tree


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("", 1, "expected a number, {view:feature}, a function or '(', found the end"),
        ("   ", 4, "found the end"),
        ("1 +", 4, "found the end"),
        ("1 + )", 5, "found ')'"),
        ("1 2", 3, "expected an operator or the end, found '2'"),
        ("1 $ 2", 3, "cannot read '$' here"),
        ("1 + {v:a", 5, "'{' is not closed"),
        ("1 + {va}", 5, "expected {view:feature} or {$request:name}, found {va}"),
        ("{$transform:x}", 1, "cannot read another one"),
        ("1 + foo(2)", 5, "there is no function 'foo'; there are abs, "),
        ("1 + abs 2", 9, "expected '(' after abs"),
        ("abs(1, 2)", 1, "abs takes 1 arguments, found 2"),
        ("max(1)", 1, "max takes 2 to 16 arguments, found 1"),
        ("negate(1)", 1, "there is no function 'negate'"),
        ("(1 + 2", 7, "expected ')' for the '(' in column 1"),
        ("abs(1", 6, "expected ')' for the '(' in column 4"),
        ("1 < 2 < 3", 7, "cannot be chained"),
        ("1e999", 1, "too large"),
        ("__import__('os')", 12, 'cannot read "\'" here'),
        ("{v:a}.real", 6, "cannot read '.' here"),
        ("and 1", 1, "no function 'and'"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_column(text: str, column: int, words: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    assert caught.value.column == column
    assert words in caught.value.message
    assert str(caught.value).startswith(f"column {caught.value.column}: ")


@given(st.text("{}()1.e+-*/<>=!, \n" + "vab:$_@", max_size=40) | st.text(max_size=20))
def test_any_text_is_read_or_refused_inside_it(text: str) -> None:
    column = 1
    try:
        assert all(":" in name for name in references(parse(text)))
    except ExpressionError as error:
        column = error.column
    assert 1 <= column <= len(text) + 1


@pytest.mark.parametrize(
    ("fits", "refused"),
    [
        (" " * (MAX_TEXT - 1) + "1", " " * MAX_TEXT + "1"),
        ("+".join(["1"] * (MAX_NODES // 2)), "+".join(["1"] * (MAX_NODES // 2 + 1))),
        ("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH, "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1)),
        ("-" * MAX_DEPTH + "1", "-" * (MAX_DEPTH + 1) + "1"),
        ("not " * MAX_DEPTH + "1", "not " * (MAX_DEPTH + 1) + "1"),
        ("abs(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH, "abs(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1)),
        (f"max({','.join(['1'] * 16)})", f"max({','.join(['1'] * 17)})"),
        ("+".join(["(1)"] * 60), "(" * 10_000),
    ],
)
def test_every_bound_refuses(fits: str, refused: str) -> None:
    parse(fits)
    with pytest.raises(ExpressionError):
        parse(refused)


@pytest.mark.parametrize(
    ("text", "width", "cells"),
    [
        ("1", 1, 1),
        ("{v:wide}", 3, 3),
        ("{v:wide} + {v:a}", 3, 7),
        ("{v:wide} * {v:wide} / 2", 3, 13),
        ("dot({v:wide}, {v:wide})", 1, 7),
        ("norm({v:other})", 1, 5),
        ("one_hot({v:a}, 7)", 7, 9),
        ("bucket({v:wide}, -1, 0, 2.5)", 3, 10),
        ("cross({v:a}, {$request:r}, 100)", 1, 4),
        ("where({v:a} > 0, {v:wide}, 0)", 3, 10),
    ],
)
def test_widths_and_costs(text: str, width: int, cells: int) -> None:
    assert check(parse(text), WIDTHS) == Checked(width, cells)


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("{v:wide} + {v:other}", 10, "+ needs operands of one width, or of 1 column, found 3, 4 columns"),
        ("1 + clip({v:wide}, 0, {v:other})", 5, "clip needs operands of one width"),
        ("cosine({v:wide}, {v:other})", 1, "cosine needs two vectors of one width, found 3 and 4"),
        ("dot({v:wide}, 1)", 1, "dot needs two vectors of one width"),
        ("one_hot({v:wide}, 3)", 1, "one_hot takes features of one column, found 3"),
        ("one_hot({v:a}, {v:b})", 16, "whole number from 1 to 1024"),
        ("one_hot({v:a}, 1.5)", 16, "whole number from 1 to 1024"),
        ("one_hot({v:a}, 0)", 16, "whole number from 1 to 1024"),
        ("one_hot({v:a}, 1025)", 16, "whole number from 1 to 1024"),
        ("cross({v:a}, {v:b}, 2147483648)", 21, "whole number from 1 to 2147483647"),
        ("cross({v:wide}, {v:b}, 2)", 1, "cross takes features of one column"),
        ("bucket({v:a}, 1, {v:b})", 18, "as numbers, each larger than the one before"),
        ("bucket({v:a}, 2, 1)", 18, "each larger than the one before"),
        ("bucket({v:a}, 1, 1)", 18, "each larger than the one before"),
        ("norm({v:huge})", 6, "v:huge has 1025 columns; a transform takes at most 1024"),
    ],
)
def test_what_does_not_fit_is_told_with_its_column(text: str, column: int, words: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        check(parse(text), WIDTHS)
    assert caught.value.column == column
    assert words in caught.value.message


def test_references_are_each_told_once_in_order() -> None:
    assert references(parse("{v:b} + {v:a} * {v:b} - {$request:r}")) == ("v:b", "v:a", "$request:r")
    assert references(parse("1 + 2")) == ()


def test_constants_may_have_a_sign() -> None:
    assert constant(parse("2")) == 2
    assert constant(parse("-2")) == -2
    assert constant(parse("{v:a}")) is None
    assert constant(parse("1 + 1")) is None


def test_only_what_is_written_with_brackets_is_a_function() -> None:
    assert {"negate", "not", "and", "or"}.isdisjoint(FUNCTIONS)
    assert {"cosine", "time_since", "cross", "where"} <= set(FUNCTIONS)
