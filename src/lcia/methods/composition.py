"""Which methods go together: in a composition no part may do nothing, or be undone by another."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, permutations

from lcia.methods.averaging import Averaging
from lcia.methods.base import Combined, Method
from lcia.methods.model_tailor import ModelTailor
from lcia.methods.o_lora import OLoRA
from lcia.methods.pgp import PGP
from lcia.methods.references import MultiTask, ZeroShot


def why_not_together(parts: Sequence[Method]) -> str | None:
    """What is wrong with these parts in this order, and what to do; None where they go together."""
    for part, later in combinations(parts, 2):
        if part.name == later.name:
            return f"{part.name} is written twice; keep one of them"
    combined = Combined(parts)
    leaves, own = combined.leaves(), combined.with_own_pool()
    if sum(isinstance(leaf, Averaging) for leaf in leaves) > 1:
        return "two parts average the weights; the last one would undo the others"
    if len(own) > 1:
        names = " and ".join(leaf.name for leaf in own)
        return f"{names} each train modules of their own; keep one of them"
    for leaf in leaves if own else []:
        if isinstance(leaf, OLoRA | ModelTailor | PGP):
            return (
                f"{leaf.name} works on the matrices of LoRA adapters, and {own[0].name} trains modules of its own; "
                "keep one of them"
            )
    if sum(_chooses_adapters(leaf) for leaf in leaves) > 1:
        return "two parts decide which adapter learns a task; keep one of them"
    for part, other in permutations(parts, 2):
        problem = _why_not_beside(part, other)
        if problem is not None:
            return f"{problem}; leave one of them out"
    for part, later in combinations(parts, 2):
        if part.measures_at_close and later.changes_at_close:
            return (
                f"write {part.name} behind {later.name}: {part.name} needs the weights that the adapter keeps, and "
                f"{later.name} changes them when a task is over"
            )
    return None


def _why_not_beside(part: Method, other: Method) -> str | None:
    """Why `part` cannot do its work beside `other`, whichever stands first."""
    if isinstance(other, ZeroShot):
        return f"zero_shot trains nothing, so that {part.name} has nothing to do"
    if isinstance(other, MultiTask) and any(
        _chooses_adapters(leaf) and type(leaf).make_pool is Method.make_pool for leaf in Combined([part]).leaves()
    ):
        return f"multi_task learns all tasks at once, so that {part.name} has no adapters to choose among"
    if part.idle_on_first_task and other.one_task_per_adapter:
        return (
            f"{part.name} acts from an adapter's second task on, and with {other.name} no adapter learns a second one"
        )
    if isinstance(part, ModelTailor) and isinstance(other, OLoRA | PGP):
        return (
            f"{other.name} keeps what a task changes out of some directions, and model_tailor undoes changes number by "
            "number, which leads back into them"
        )
    return None


def _chooses_adapters(part: Method) -> bool:
    return type(part).open_task is not Method.open_task
