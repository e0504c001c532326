"""`python fsdp_on_cpu.py ARGUMENTS`: `lcia ARGUMENTS` under FSDP2 without GPUs.

accelerate shards on accelerators only; here it takes the CPU for one. Everything behind that is its own and torch's.
"""

from __future__ import annotations

from typing import Any

import torch.distributed
from accelerate import PartialState
from accelerate.utils import DistributedType


def _as_if_on_gpus(self: Any, *arguments: Any, **options: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def take_the_cpu_for_a_gpu() -> None:
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = _as_if_on_gpus  # type: ignore[method-assign]


if __name__ == "__main__":
    take_the_cpu_for_a_gpu()
    from lcia.cli import main

    main()
