"""Dynamic exponential moving average of the trained weights, weighted by what earlier tasks need."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lcia.ema.average import DynamicEMA
from lcia.ema.rules import RULES, Rule

if TYPE_CHECKING:
    from lcia.ema.callback import DynamicEMACallback

__all__ = ["RULES", "DynamicEMA", "DynamicEMACallback", "Rule"]


def __getattr__(name: str) -> Any:
    # Only the callback needs transformers, which takes seconds to import.
    if name != "DynamicEMACallback":
        raise AttributeError(f"module 'lcia.ema' has no attribute {name!r}")
    return import_module("lcia.ema.callback").DynamicEMACallback
