"""Several processes of one run, as `accelerate launch` or `torchrun` start them: all compute, one writes.

Every process goes through the same code and reads the same files (a file system they share). What changes a file goes
through `on_main`. One process alone notices nothing of this.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_main_works = False  # this process is in a function of `on_main`: the others wait for it


def count() -> int:
    """How many there are. The first question joins them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 1
    import torch  # here, because a command that is alone may not need it
    from torch import distributed

    if not distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available())  # each one's own GPU is the current one from here on
    return distributed.get_world_size()


def rank() -> int:
    """Which of them this is, from 0."""
    if count() == 1:
        return 0
    from torch import distributed

    return distributed.get_rank()


def is_main() -> bool:
    """Whether this is the one that writes files and speaks."""
    return rank() == 0


def is_sharding() -> bool:
    """Whether training spreads the model's weights over them, as the launcher was told."""
    return count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def name_layers(model: Any) -> None:
    """Tell accelerate which layers FSDP2 shards one by one, where the launcher was not told.

    transformers names them for all models of a family: for LLaVA those of any tower, at the first of which that the
    model does not have accelerate would stop. Of a model that sees, only the language model's are named: a process
    whose rows have no images does not go through the tower, and the others would wait for it there.
    """
    sees = getattr(model.config, "vision_config", None) is not None
    there = {type(module).__name__ for module in (model.get_decoder() if sees else model).modules()}
    named = [name for name in getattr(model, "_no_split_modules", None) or () if name in there]
    if named:
        os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(sorted(named)))


def leave(code: int) -> NoReturn:
    """End this process with `code`, 0 once all have come here."""
    if count() > 1:
        from torch import distributed

        if code == 0:
            distributed.barrier()
            distributed.destroy_process_group()
        # A thread of gloo's that still wants Python while the interpreter closes aborts the process (SIGABRT), whatever
        # the code: several processes end without closing it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def on_main(function: Callable[P, T]) -> Callable[P, T]:
    """`function` as the main process calls it, alone, while the others wait.

    They have arrived when it begins, so that nobody still reads what it changes; they get what it returned, or the
    exception that it raised.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        global _main_works
        if _main_works or count() == 1:
            return function(*args, **kwargs)
        from torch import distributed

        distributed.barrier()
        told: list[object] = [None, None]  # the result, the exception
        if is_main():
            _main_works = True
            try:
                told[0] = function(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - raised below, in every process
                told[1] = error
            finally:
                _main_works = False
        distributed.broadcast_object_list(told, src=0)
        if isinstance(told[1], Exception):
            raise told[1]
        return told[0]  # type: ignore[return-value]

    return call


def gathered(mine: T) -> list[T]:
    """What each process has, in the order of their ranks, in every process."""
    if count() == 1:
        return [mine]
    from torch import distributed

    found: list[T] = [mine] * count()
    distributed.all_gather_object(found, mine)
    return found
