"""Checks of a method's options: a wrong value is refused before anything is loaded or trained."""

from __future__ import annotations

import math
from typing import Any


def number(name: str, value: Any, high: float = math.inf, positive: bool = False) -> float:
    """`value` as a float from 0 to `high`.

    Raises:
        ValueError: it is not a number, not finite, outside this range, or 0 where it must be positive.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value <= high or (positive and value == 0):
        low = "above 0" if positive else "from 0"
        raise ValueError(f"{name} must be a number {low}{'' if high == math.inf else f' to {high:g}'}, got {value!r}")
    return float(value)


def count(name: str, value: Any) -> int | None:
    """`value` as a whole number from 1, or None (null in a configuration), which stands for all.

    Raises:
        ValueError: it is anything else.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be a whole number from 1, or null for all; got {value!r}")
    return value


def whole(name: str, value: Any) -> int:
    """`value` as a whole number from 1.

    Raises:
        ValueError: it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1, got {value!r}")
    return value
