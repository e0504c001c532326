"""What is trained: named adapters, on PEFT or of modules of our own."""

from lcia.adapters.base import Pool
from lcia.adapters.lora import answering
from lcia.adapters.modules import ModulePool
from lcia.adapters.pool import AdapterPool, stack_members, stack_name
from lcia.adapters.projector import find_projector
from lcia.adapters.targets import language_targets

__all__ = [
    "AdapterPool",
    "ModulePool",
    "Pool",
    "answering",
    "find_projector",
    "language_targets",
    "stack_members",
    "stack_name",
]
