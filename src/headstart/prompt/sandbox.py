"""Jinja for untrusted chat templates. They can access only their variables; products and powers, whose
computation could take unbounded time, have a limit."""

from __future__ import annotations

import json
from collections.abc import Sized
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.filters import do_round
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Limits: bits of a number, and items or characters of a repetition.
MOST_BITS = 1 << 14
MOST_ITEMS = 1 << 22
MOST_DIGITS = 100


class OwnWords(TemplateError):
    """The template refuses its input, with its own message."""


class Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        self.filters["round"] = _round

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Limits products and powers, which could become arbitrarily large. Raises OverflowError."""
        if operator == "**":
            _check_power(left, right)
        else:
            _check_product(left, right)
            _check_product(right, left)
        return super().call_binop(context, operator, left, right)


def _raise(message: object) -> None:
    raise OwnWords(str(message))


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MOST_BITS:
        raise OverflowError(f"a power of more than {MOST_BITS} bits")


def _check_product(one: Any, other: Any) -> None:
    if not isinstance(other, int):
        return
    if isinstance(one, int) and one.bit_length() + other.bit_length() > MOST_BITS:
        raise OverflowError(f"a product of more than {MOST_BITS} bits")
    if isinstance(one, Sized) and len(one) * other > MOST_ITEMS:
        raise OverflowError(f"a repetition of more than {MOST_ITEMS} items")


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
    if abs(precision) > MOST_DIGITS:
        raise OverflowError(f"rounding to more than {MOST_DIGITS} digits")
    return do_round(value, precision, method)
