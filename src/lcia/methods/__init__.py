"""All methods by name. A new one is a file with its equation and an entry here."""

from __future__ import annotations

import inspect
from typing import Any

from lcia.errors import UserError, did_you_mean
from lcia.methods.averaging import Averaging, LLaCA, StableEMA
from lcia.methods.base import Combined, Method, Placement, Training
from lcia.methods.lcia import LCIA
from lcia.methods.references import MultiTask, ZeroShot

METHODS: dict[str, type[Method]] = {cls.name: cls for cls in (ZeroShot, Method, MultiTask, StableEMA, LLaCA, LCIA)}


def build_method(parts: list[tuple[str, dict[str, Any]]], where: str = "configuration") -> Combined:
    """The method for a configuration's (name, options) pairs.

    Raises:
        UserError: unknown method or option (the nearest valid one is named), or a value it refuses.
    """
    built = []
    for name, options in parts:
        if name not in METHODS:
            raise UserError(f"{where}: key 'method': unknown method {name!r}. {did_you_mean(name, METHODS)}")
        known = [key for key in inspect.signature(METHODS[name]).parameters if key not in ("args", "kwargs")]
        for key in options:
            if key not in known:
                hint = did_you_mean(key, known) if known else "It takes none."
                raise UserError(f"{where}: key 'method': {name} has no option {key!r}. {hint}")
        try:
            built.append(METHODS[name](**options))
        except (UserError, ValueError, TypeError) as error:
            raise UserError(f"{where}: key 'method': {name}: {error}") from error
    combined = Combined(built)
    if sum(isinstance(part, Averaging) for part in combined.leaves()) > 1:
        raise UserError(f"{where}: key 'method': two parts average the weights; the last one would undo the others")
    return combined


__all__ = ["METHODS", "Combined", "Method", "Placement", "Training", "build_method"]
