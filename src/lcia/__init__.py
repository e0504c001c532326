"""Large Continual Instruction Assistant: continual instruction tuning of language and vision-language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lcia.ema import DynamicEMA, DynamicEMACallback
    from lcia.grouping import Codebook, Match
    from lcia.methods import METHODS
    from lcia.metrics import accuracy_metrics
    from lcia.stream import Row, Stream, Task, load_stream

# Imported on first use: `lcia --help` must not wait for torch and transformers.
_HOME = {
    "DynamicEMA": "lcia.ema",
    "DynamicEMACallback": "lcia.ema",
    "Codebook": "lcia.grouping",
    "Match": "lcia.grouping",
    "METHODS": "lcia.methods",
    "accuracy_metrics": "lcia.metrics",
    "Row": "lcia.stream",
    "Stream": "lcia.stream",
    "Task": "lcia.stream",
    "load_stream": "lcia.stream",
}

__all__ = [
    "METHODS",
    "Codebook",
    "DynamicEMA",
    "DynamicEMACallback",
    "Match",
    "Row",
    "Stream",
    "Task",
    "accuracy_metrics",
    "load_stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lcia' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
