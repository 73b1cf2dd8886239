"""The built-in environment `calculator`: works out arithmetic that the student asks for in the text of its turn."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Sequence
from decimal import Context, Decimal
from fractions import Fraction

from student_trainer.types import Message

MOST_CHARACTERS = 200
"""Of an expression: bounds the work and the size of what comes out."""
DIGITS = Context(prec=12)
"""Significant digits of what is no whole number."""

_ARITHMETIC = re.compile(r"[\d\s.+\-*/%()]*")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
}


def calculator(
    messages: Sequence[Message], *, opening: str = "<calc>", closing: str = "</calc>", role: str = "tool"
) -> list[Message]:
    """Answers the last call in the student's turn, such as `<calc>61-44</calc>`, with a message that holds the value
    alone; a turn without a call ends the conversation. What can't be worked out is answered with `error: …`, from
    which the student may go on.

    Args:
        opening, closing: what stands around the expression.
        role: of the message.
    """
    said = messages[-1]["content"]
    start, stop = said.rfind(opening), said.rfind(closing)
    if start < 0 or stop < start + len(opening):
        return []
    return [{"role": role, "content": worked_out(said[start + len(opening) : stop])}]


def worked_out(expression: str) -> str:
    """The value of + - * / // % and brackets over decimal numbers, exactly; rounded to 12 digits where it is no whole
    number. `error: …` where there is none."""
    if len(expression) > MOST_CHARACTERS:
        return f"error: more than {MOST_CHARACTERS} characters"
    if not _ARITHMETIC.fullmatch(expression):
        return "error: not arithmetic"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body, expression.strip())
    except ZeroDivisionError:
        return "error: division by zero"
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "error: not arithmetic"
    if value.denominator == 1:
        return str(value.numerator)
    rounded = DIGITS.divide(Decimal(value.numerator), Decimal(value.denominator))
    return format(rounded.normalize(DIGITS), "f")


def _value(node: ast.expr, text: str) -> Fraction:
    match node:
        case ast.Constant(value=int() | float()):
            return Fraction(ast.get_source_segment(text, node) or "")  # as written: 0.1 is a tenth
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, text)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, text)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, text), _value(right, text))
    raise ValueError("not arithmetic")
