"""All methods by name. A new one is a file with its equation and an entry here."""

from __future__ import annotations

import inspect
from typing import Any

from lcia.errors import UserError, did_you_mean
from lcia.methods.adapter_cl import AdapterCL
from lcia.methods.agem import AGEM
from lcia.methods.averaging import Averaging, LLaCA, StableEMA
from lcia.methods.base import Combined, Method, Placement, Training
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
    leaves = combined.leaves()
    averaging = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Averaging)]
    if len(averaging) > 1:
        raise UserError(f"{where}: key 'method': two parts average the weights; the last one would undo the others")
    for leaf in leaves[: averaging[0]] if averaging else []:
        if isinstance(leaf, EWC | ModelTailor | PGP):
            raise UserError(
                f"{where}: key 'method': write {leaf.name} behind the part that averages; it needs the weights that "
                "the average leaves in the adapter"
            )
    own = combined.with_own_pool()
    if len(own) > 1:
        names = " and ".join(leaf.name for leaf in own)
        raise UserError(f"{where}: key 'method': {names} each train modules of their own; keep one of them")
    for leaf in leaves if own else []:
        if isinstance(leaf, OLoRA | ModelTailor | PGP):
            raise UserError(
                f"{where}: key 'method': {leaf.name} works on the matrices of LoRA adapters, and {own[0].name} trains "
                "modules of its own; keep one of them"
            )
    if sum(type(leaf).open_task is not Method.open_task for leaf in leaves) > 1:
        raise UserError(f"{where}: key 'method': two parts decide which adapter learns a task; keep one of them")
    return combined


__all__ = ["METHODS", "Combined", "Method", "MultiTask", "Placement", "Training", "build_method"]
