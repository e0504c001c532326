"""The passes of lcia.ema.passes in C, for float32 weights in a processor's memory.

In torch a pass copies many small tensors together and reads them several times; in C each number is read once where it
lies. Threads share the pieces of all tensors; sums are those of pieces, so that they do not depend on the threads.

Shapes: n tensors, P pieces, K reads.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lcia.ema.followed import Followed
from lcia.ema.layout import WIDTH, Layout
from lcia.ema.passes import Buffers, Passes, Seen, Shown
from lcia.ema.rules import READS, Rule, fisher

PIECE = 1 << 14  # elements, as in compiled.c: small beside the share of a thread, large beside what a call costs
LEAST = 1 << 17  # elements for which another thread is worth its while
# |a − b + c| of every read of rules with one β a tensor: a and b are fields of Shown or Buffers
_DIFFERENCES: dict[str, tuple[str, str | None, float]] = {
    "offset": ("weights", "average", 0),
    "step": ("weights", "previous_weights", 0),
    "gradient": ("gradients", None, 0),
    "gradient_plus_one": ("gradients", None, 1),
    "gradient_change": ("gradients", "previous_gradient", 0),
}

Pointers = NDArray[np.int64]  # (P,) addresses


def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there are none that can be used (`why_not`)."""
    return _found()[0]


def why_not() -> str | None:
    """Why there is no library; None where there is one."""
    return _found()[1]


@cache
def _found() -> tuple[ctypes.CDLL | None, str | None]:
    here = Path(__file__).parent
    places = [here / f"_compiled{suffix}" for suffix in EXTENSION_SUFFIXES]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        return None, "lcia was installed without gcc"
    try:
        functions = ctypes.CDLL(str(file))
        functions.source.restype = ctypes.c_char_p
        source = functions.source().decode()
    except (OSError, AttributeError) as error:
        return None, f"{file} cannot be loaded: {error}"
    if source != hashlib.sha256((here / "compiled.c").read_bytes()).hexdigest():
        return None, f"{file} was compiled of another compiled.c: install lcia again"
    return functions, None


def passes_for(
    layout: Layout, rule: Rule, buffers: Buffers, followed: Followed | None, weights: Sequence[Tensor]
) -> Passes:
    """The compiled passes, where they are there and made for these weights and this rule; else those of torch."""
    kinds = {tensor.dtype for tensor in [*weights, *buffers.kept().values()]}
    norms = {name for name in rule.reads if name in READS}
    made_for_rule = rule.move is fisher if followed is not None else norms <= set(_DIFFERENCES)
    if made_for_rule and kinds == {torch.float32} and library() is not None:
        if layout.device.type == "cpu":
            return CompiledPasses(layout, rule, buffers, followed)
        if layout.device.type == "meta" and not weights[0].is_cuda:  # lcia.planning says where it would be
            return RehearsedPasses(layout)
    return Passes(layout, rule, buffers, followed)


class CompiledPasses(Passes):
    """The same passes, by the C functions."""

    def __init__(self, layout: Layout, rule: Rule, buffers: Buffers, followed: Followed | None) -> None:
        self._layout, self._rule, self._buffers, self._followed = layout, rule, buffers, followed
        self._used: list[Tensor] = []  # whose addresses the next call is given
        counts = [-(-size // PIECE) for size in layout.sizes]
        self._tensor = np.repeat(np.arange(len(counts)), counts)  # (P,)
        self._start = np.concatenate([np.arange(count, dtype=np.int64) * PIECE for count in counts])
        sizes = np.array(layout.sizes, dtype=np.int64)
        self._size = np.minimum(PIECE, sizes[self._tensor] - self._start)
        self._counts = torch.tensor(counts)
        # where each piece begins in a flat buffer
        self._zeros = np.zeros_like(self._size)
        self._flat = np.array(layout.first_row, dtype=np.int64)[self._tensor] * WIDTH + self._start
        if followed is not None:
            index = followed.index.numpy()
            self._follow = np.append(np.searchsorted(index, self._flat), len(index)).astype(np.int64)
            of_piece = np.repeat(np.arange(len(self._flat)), np.diff(self._follow))
            self._element = (index - self._flat[of_piece]).astype(np.int32)

    def sums(
        self,
        shown: Shown,
        norms: Sequence[str],
        checks: Mapping[str, Sequence[Tensor]],
        correction: Tensor | None = None,
    ) -> dict[str, Tensor]:
        names = [*norms, *checks]
        minuends, subtrahends, constants = [], [], []
        held: dict[str, Pointers] = {}  # weights and gradients are looked up once
        for name in norms:
            minuend, subtrahend, constant = _DIFFERENCES[name]
            if minuend not in held:
                held[minuend] = self._of(getattr(shown, minuend))
            minuends.append(held[minuend])
            subtrahends.append(self._zeros if subtrahend is None else self._in(getattr(self._buffers, subtrahend)))
            constants.append(constant)
        for tensors in checks.values():
            minuends.append(self._of(tensors))
            subtrahends.append(self._zeros)
            constants.append(0)
        sums = np.empty((len(names), len(self._size)))
        kept = self._buffers.previous_gradient if norms else None
        self._run(
            "absolute_sums",
            ctypes.c_int64(len(self._size)),
            ctypes.c_int64(len(names)),
            self._size,
            np.array(minuends),
            np.array(subtrahends),
            np.array(constants, dtype=np.float32),
            sums,
            None if kept is None else held["gradients"],
            None if kept is None else self._in(kept),
        )
        return dict(zip(names, self._by_tensor(sums), strict=True))

    def observe(self, seen: Seen) -> None:
        assert self._buffers.squares is not None
        self._run("observe", self._size, self._in(self._buffers.squares), *self._seen(seen))

    def move_tensors(self, shown: Shown, move: Tensor) -> None:
        kept = self._buffers.previous_weights
        self._run(
            "move_tensors",
            self._size,
            self._in(self._buffers.average),
            self._of(shown.weights),
            self._each(move),
            None if kept is None else self._in(kept),
        )

    def move_elements(
        self,
        shown: Shown,
        seen: Seen | None,
        moves: Tensor,
        known: Tensor,
        correction: Tensor | None,
        numbers: Mapping[str, float],
    ) -> tuple[Tensor, Tensor]:
        assert self._followed is not None
        assert correction is not None
        importance, squares = self._buffers.importance, self._buffers.squares
        sums = np.empty((1, len(self._size)))
        self._run(
            "move_by_fisher",
            self._size,
            self._in(self._buffers.average),
            self._of(shown.weights),
            None if importance is None else self._in(importance),
            self._of(shown.squares) if squares is None else self._in(squares),
            *((None, None, ctypes.c_float(1), ctypes.c_int(0)) if seen is None else self._seen(seen)),
            self._each(correction),
            ctypes.c_float(numbers["exponent"]),
            self._each(moves),
            self._follow,
            self._element,
            self._followed.left.numpy(),
            sums,
        )
        (moved,) = self._by_tensor(sums)
        return moved, torch.zeros_like(moved)

    def _seen(self, seen: Seen) -> tuple[Any, ...]:
        scale = ctypes.c_float(float(seen.scale))
        return self._of(seen.tensors), self._each(seen.weight), scale, ctypes.c_int(seen.squared)

    def _of(self, tensors: Sequence[Tensor]) -> Pointers:
        """Where each piece of these n tensors lies; of one that is not contiguous, of a copy kept until `_run`."""
        lying = [tensor if _as_it_should(tensor) else tensor.float().contiguous() for tensor in tensors]
        self._used += lying
        addresses = np.fromiter((tensor.data_ptr() for tensor in lying), np.int64, len(lying))
        found: Pointers = addresses[self._tensor] + 4 * self._start
        return found

    def _in(self, flat: Tensor) -> Pointers:
        """Where each piece lies in a flat buffer."""
        found: Pointers = flat.data_ptr() + 4 * self._flat
        return found

    def _each(self, per_tensor: Tensor) -> NDArray[np.float32]:  # (n,) -> (P,)
        found: NDArray[np.float32] = per_tensor.numpy().astype(np.float32)[self._tensor]
        return found

    def _by_tensor(self, sums: NDArray[np.float64]) -> list[Tensor]:  # (k, P) -> k of (n,)
        """What the pieces of each tensor add up to."""
        return [torch.segment_reduce(row, "sum", lengths=self._counts, unsafe=True) for row in torch.from_numpy(sums)]

    def _run(self, name: str, *arguments: Any) -> None:
        """Call a function of the library: each thread does some of the pieces.

        The arguments are those of the C function behind `last`: arrays with a number or an address for each piece.
        What they point to lives at least until here: in the buffers, the model, or `_used`.
        """
        function: Callable[..., None] = getattr(library(), name)
        given: list[Any] = [
            argument.ctypes.data_as(ctypes.c_void_p) if isinstance(argument, np.ndarray) else argument
            for argument in arguments
        ]
        shares = [(ctypes.c_int64(first), ctypes.c_int64(last)) for first, last in self._shares()]
        others = [_workers(os.getpid()).submit(function, *share, *given) for share in shares[1:]]
        function(*shares[0], *given)
        for other in others:
            other.result()
        self._used.clear()

    def _shares(self) -> list[tuple[int, int]]:
        """[first, last) of the pieces of each thread, of about as many elements."""
        total = int(self._size.sum())
        threads = max(1, min(torch.get_num_threads(), total // LEAST))
        ends = np.searchsorted(np.cumsum(self._size), [total * (i + 1) // threads for i in range(threads - 1)])
        bounds = [0, *ends.tolist(), len(self._size)]
        return list(pairwise(bounds))


class RehearsedPasses(Passes):
    """What stands for `CompiledPasses` where there are no numbers: it holds as little, and finds zeros."""

    def __init__(self, layout: Layout) -> None:
        self._nothing = torch.zeros(len(layout.sizes), dtype=torch.float64, device=layout.device)  # (n,)

    def sums(
        self,
        shown: Shown,
        norms: Sequence[str],
        checks: Mapping[str, Sequence[Tensor]],
        correction: Tensor | None = None,
    ) -> dict[str, Tensor]:
        return dict.fromkeys([*norms, *checks], self._nothing)

    def observe(self, seen: Seen) -> None:
        pass

    def move_tensors(self, shown: Shown, move: Tensor) -> None:
        pass

    def move_elements(
        self,
        shown: Shown,
        seen: Seen | None,
        moves: Tensor,
        known: Tensor,
        correction: Tensor | None,
        numbers: Mapping[str, float],
    ) -> tuple[Tensor, Tensor]:
        return self._nothing, self._nothing


def _as_it_should(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()


@cache
def _workers(process: int) -> ThreadPoolExecutor:
    """Threads beside the one that calls; those of a process do not live on in one that is forked from it."""
    return ThreadPoolExecutor(thread_name_prefix="average")
