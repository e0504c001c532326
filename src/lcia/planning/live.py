"""How many bytes of tensors are alive: counted as tensors come and go, not estimated."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lcia.planning.parts import OTHER
from lcia.planning.zeros import tensors

Bytes = dict[str, int]  # part → bytes


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, from their making to their end, under the part that is being done.

    Views share a storage, which counts once. What a kernel needs inside, and what an allocator rounds up or keeps, is
    not seen.

    Args:
        name: the part of a new tensor; None: the part that is being done.
    """

    def __init__(self, name: Callable[[torch.Tensor], str | None] = lambda tensor: None) -> None:
        super().__init__()
        self.now: Bytes = {}
        self.at_peak: Bytes = {}  # when their sum was largest, since `forget_peak`
        self._name = name
        self._part = OTHER
        self._peak = 0
        self._total = 0
        self._alive: dict[int, tuple[str, int, weakref.ref[Any]]] = {}  # storage → part, bytes

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is made inside belongs to part `name`."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    def add(self, tensors: Iterable[torch.Tensor], part: str) -> None:
        """Tensors that are there already."""
        for tensor in tensors:
            self._count(tensor, part)

    def move(self, tensor: torch.Tensor, part: str) -> None:
        """What was counted as something else is a part of `part`."""
        key = tensor.untyped_storage()._cdata
        before, size, reference = self._alive[key]
        self._alive[key] = part, size, reference
        self.now[before] -= size
        self.now[part] = self.now.get(part, 0) + size

    def forget_peak(self) -> None:
        """The highest so far is what there is now."""
        self._peak, self.at_peak = self._total, dict(self.now)

    @property
    def peak(self) -> int:
        return self._peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tensors(made):
            self._count(tensor, self._name(tensor) or self._part)
        return made

    def _count(self, tensor: torch.Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = part, size, weakref.ref(storage, lambda _: self._gone(key))
        self.now[part] = self.now.get(part, 0) + size
        self._total += size
        if self._total > self._peak:
            self._peak, self.at_peak = self._total, dict(self.now)

    def _gone(self, key: int) -> None:
        part, size, _ = self._alive.pop(key)
        self.now[part] -= size
        self._total -= size
