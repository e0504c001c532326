"""All methods by name. A new one is a file with its equation and an entry here."""

from __future__ import annotations

import inspect
from typing import Any

from lcia.errors import UserError, did_you_mean
from lcia.methods.adapter_cl import AdapterCL
from lcia.methods.agem import AGEM
from lcia.methods.averaging import LLaCA, StableEMA
from lcia.methods.base import Combined, Method, Placement, Training
from lcia.methods.composition import why_not_together
from lcia.methods.continual_llava import ContinualLLaVA
from lcia.methods.eproj import EProj
from lcia.methods.ewc import EWC
from lcia.methods.l2 import L2
from lcia.methods.lcia import LCIA
from lcia.methods.lwf import LwF
from lcia.methods.model_tailor import ModelTailor
from lcia.methods.moelora import MoELoRA
from lcia.methods.o_lora import OLoRA
from lcia.methods.pgp import PGP
from lcia.methods.references import MultiTask, ZeroShot
from lcia.methods.replay import Replay

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        ZeroShot,
        Method,
        MultiTask,
        StableEMA,
        LLaCA,
        LCIA,
        L2,
        EWC,
        LwF,
        OLoRA,
        ModelTailor,
        Replay,
        AGEM,
        PGP,
        MoELoRA,
        AdapterCL,
        EProj,
        ContinualLLaVA,
    )
}


def build_method(parts: list[tuple[str, dict[str, Any]]], where: str = "configuration") -> Combined:
    """The method for a configuration's (name, options) pairs.

    Raises:
        UserError: unknown method or option (the nearest valid one is named), a value it refuses, or parts that do not
            go together.
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
    problem = why_not_together(built)
    if problem is not None:
        raise UserError(f"{where}: key 'method': {problem}")
    return Combined(built)


__all__ = ["METHODS", "Combined", "Method", "MultiTask", "Placement", "Training", "build_method"]
