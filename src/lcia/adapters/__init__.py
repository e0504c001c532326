"""What is trained: named adapters, on PEFT or of modules of our own."""

from lcia.adapters.base import Pool
from lcia.adapters.modules import ModulePool
from lcia.adapters.pool import AdapterPool, stack_members, stack_name

__all__ = ["AdapterPool", "ModulePool", "Pool", "stack_members", "stack_name"]
