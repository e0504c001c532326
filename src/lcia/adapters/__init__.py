"""What is trained: named adapters on PEFT."""

from lcia.adapters.pool import AdapterPool

__all__ = ["AdapterPool"]
