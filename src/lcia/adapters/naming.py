"""How an adapter's own modules are called inside the model."""

from __future__ import annotations

CHILD = "adapters"  # below the module that they change
# torch's ModuleDicts have methods, and names such as `update`, `train` or `keys` are taken.
PREFIX = "group_"


def key_of(name: str) -> str:
    """A module's name holds no dot; an adapter's, which is a folder's, no slash."""
    return PREFIX + name.replace(".", "/")


def in_adapter(parameter: str, source: str, name: str) -> str:
    """What a parameter of the adapter `source` is called in the adapter `name`."""
    return ".".join(key_of(name) if part == key_of(source) else part for part in parameter.split("."))
