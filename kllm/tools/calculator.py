"""The calculator: arithmetic by walking the syntax tree, so there is nothing to escape from."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from kllm.tools.tool import ToolError

Number = int | float

_MOST_DIGITS = 1000  # of any number on the way
_MOST_EXPONENT = 10_000
_MOST_CHARS = 1000
_MOST_DEPTH = 100

_BINARY: dict[type, Callable[[Any, Any], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type, Callable[[Any], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    **{name: getattr(math, name) for name in ("sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan")},
    **{name: getattr(math, name) for name in ("asin", "acos", "atan", "atan2", "floor", "ceil", "gcd")},
    **{"abs": abs, "round": round, "min": min, "max": max},
}
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
    except (ValueError, TypeError) as error:
        raise ToolError(str(error)) from None


def _value(node: ast.expr, depth: int) -> Number:
    if depth > _MOST_DEPTH:
        raise ToolError("the expression is nested too deeply")
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand, depth + 1))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            a, b = _value(left, depth + 1), _value(right, depth + 1)
            if isinstance(op, ast.Pow):
                _check_power(a, b)
            return _bounded(_BINARY[type(op)](a, b))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            values = [_value(one, depth + 1) for one in args]
            if name == "round" and abs(values[-1]) > _MOST_DIGITS and len(values) > 1:
                raise ToolError("too many digits to round to")
            return _bounded(_FUNCTIONS[name](*values))
    raise ToolError(f"not allowed in an expression: {ast.unparse(node)[:40]}")


def _check_power(a: Number, b: Number) -> None:
    """Refuses before it is computed: 9**9**9 has 370 million digits."""
    if abs(b) > _MOST_EXPONENT or (
        isinstance(a, int) and isinstance(b, int) and abs(a) > 1 and b * math.log10(abs(a)) > _MOST_DIGITS
    ):
        raise ToolError("the power is too large")


def _bounded(value: Any) -> Number:
    if isinstance(value, complex):
        raise ToolError("the result is no real number")
    if isinstance(value, int) and value.bit_length() > _MOST_DIGITS * 3.33:
        raise ToolError("the result is too large")
    if isinstance(value, float) and not math.isfinite(value):
        raise ToolError("the result is not finite")
    return value  # type: ignore[no-any-return]


def _shown(value: Number) -> str:
    """Integers whole; others to 12 significant digits, so that 0.1+0.2 is 0.3."""
    if isinstance(value, float):
        if value.is_integer() and abs(value) < 1e15:
            return str(int(value))
        return f"{value:.12g}"
    return str(value)
