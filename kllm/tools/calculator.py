"""The calculator: arithmetic by walking the syntax tree, so there is nothing to escape from.

Decimals and quotients are exact fractions on the way: floats would show 100.1-100 as 0.0999999999999943,
or hide that with so few digits that large sums come out wrong. Roots, logarithms and the like are floats.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from contextlib import suppress
from decimal import Context, Decimal, Inexact
from fractions import Fraction
from typing import Any

from kllm.tools.tool import ToolError

Number = int | float | Fraction

_MOST_DIGITS = 1000  # of any number on the way
_MOST_EXPONENT = 10_000
_MOST_CHARS = 1000
_MOST_DEPTH = 100
_WHOLE = 10**15  # whole numbers of decimals beyond have an exponent
_EXACT_DIGITS = 21  # of a decimal that is shown in full where 15 would hide its end


def _quotient(a: Number, b: Number) -> Number:
    return Fraction(a, b) if isinstance(a, int) and isinstance(b, int) else a / b


def _power(a: Number, b: Number) -> Number:
    """Refused before it is computed where it is too long: 9**9**9 has 370 million digits."""
    if not -_MOST_EXPONENT <= b <= _MOST_EXPONENT:
        raise ToolError("the power is too large")
    if isinstance(a, float) or isinstance(b, float) or b.denominator > 1:
        return float(a) ** float(b)  # type: ignore[no-any-return]
    if math.log10(max(abs(a.numerator), a.denominator)) * abs(int(b)) > _MOST_DIGITS:
        if isinstance(a, int) and b > 0:
            raise ToolError("the power is too large")
        return float(a) ** float(b)  # type: ignore[no-any-return]
    if a == 0 and b < 0:
        raise ZeroDivisionError  # Fraction makes 1/0 of it, before Python 3.12
    return a ** int(b) if b >= 0 else Fraction(a) ** int(b)


_BINARY: dict[type, Callable[[Any, Any], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _quotient,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_UNARY: dict[type, Callable[[Any], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    **{name: getattr(math, name) for name in ("sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan")},
    **{name: getattr(math, name) for name in ("asin", "acos", "atan", "atan2", "floor", "ceil", "gcd")},
    **{"abs": abs, "round": round, "min": min, "max": max},
}
_KEEP_FRACTIONS = ("abs", "min", "max", "floor", "ceil")
_CONSTANTS = {"pi": math.pi, "e": math.e}
# As people and small models write them.
_SPELLINGS = str.maketrans(
    {"×": "*", "÷": "/", "−": "-", "–": "-", "（": "(", "）": ")", "，": ",", "＋": "+"}
)


def calculator(expression: str) -> str:
    """Computes an arithmetic expression.

    Args:
        expression: e.g. 12*(3+4) or sqrt(2)
    """
    text = expression.translate(_SPELLINGS).replace("^", "**").strip().rstrip("=").strip()
    if len(text) > _MOST_CHARS:
        raise ToolError(f"the expression is longer than {_MOST_CHARS} characters")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError(f"not an arithmetic expression: {expression[:60]!r}") from None
    try:
        return _shown(_value(tree.body, 0))
    except ZeroDivisionError:
        raise ToolError("division by zero") from None
    except OverflowError:
        raise ToolError("the result is too large") from None
    except RecursionError:  # of ast.unparse, below
        raise ToolError("the expression is nested too deeply") from None
    except (ValueError, TypeError) as error:
        raise ToolError(str(error)) from None


def _value(node: ast.expr, depth: int) -> Number:
    if depth > _MOST_DEPTH:
        raise ToolError("the expression is nested too deeply")
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return Fraction(repr(_bounded(value))) if isinstance(value, float) else _bounded(value)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand, depth + 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _bounded(_BINARY[type(op)](_value(left, depth + 1), _value(right, depth + 1)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _bounded(_called(name, [_value(one, depth + 1) for one in args]))
    raise ToolError(f"not allowed in an expression: {ast.unparse(node)[:40]}")


def _called(name: str, values: list[Number]) -> Number:
    if name == "round" and len(values) > 1 and not -_MOST_DIGITS <= values[-1] <= _MOST_DIGITS:
        raise ToolError("too many digits to round to")
    if name not in _KEEP_FRACTIONS:
        values = [float(value) if isinstance(value, Fraction) else value for value in values]
    try:
        result = _FUNCTIONS[name](*values)
    except TypeError:
        raise ToolError(f"{name}: wrong number or kind of arguments") from None
    return Fraction(repr(result)) if name == "round" and isinstance(result, float) else result


def _bounded(value: Any) -> Number:
    if isinstance(value, complex):
        raise ToolError("the result is no real number")
    if isinstance(value, int) and value.bit_length() > _MOST_DIGITS * 3.33:
        raise ToolError("the result is too large")
    if isinstance(value, float) and not math.isfinite(value):
        raise ToolError("the result is not finite")
    if isinstance(value, Fraction):
        longest = max(value.numerator.bit_length(), value.denominator.bit_length())
        return float(value) if longest > _MOST_DIGITS * 3.33 else value
    return value  # type: ignore[no-any-return]


def _shown(value: Number) -> str:
    """Whole numbers whole; others to 15 significant digits, or with all where those would hide decimals."""
    if isinstance(value, int):
        return str(value)
    if -_WHOLE < value < _WHOLE and value == int(value):
        return str(int(value))
    text = f"{float(value):.15g}"
    if isinstance(value, Fraction) and "e" not in text and Fraction(text) != value:
        with suppress(Inexact):  # it never ends, or is too long
            exact = Context(prec=_EXACT_DIGITS, traps=[Inexact])
            return f"{exact.divide(Decimal(value.numerator), Decimal(value.denominator)):f}"
    return text
