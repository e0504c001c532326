"""From the similarities of all cross pairs to one score for each group.

Shapes: n new instructions; N saved ones in R runs, each of one of G groups (an addition to a group is one
run, never empty); m instructions in one group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable
from typing import final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Runs:
    """Which saved instruction belongs to which group. In runs, because they sum fast."""

    def __init__(self) -> None:
        self._starts, self._groups, self._sizes = array("q"), array("q"), array("q")

    @property
    def starts(self) -> Ints:
        """(R,) the first instruction of each run."""
        return np.frombuffer(self._starts, np.int64)

    @property
    def groups(self) -> Ints:
        """(R,) the group of each run."""
        return np.frombuffer(self._groups, np.int64)

    @property
    def sizes(self) -> Ints:
        """(G,) how many instructions each group has."""
        return np.frombuffer(self._sizes, np.int64)

    def append(self, group: int, length: int) -> None:
        """The next `length` > 0 instructions are the group's; `group` is G for a new one."""
        self._starts.append(sum(self._sizes))
        self._groups.append(group)
        if group == len(self._sizes):
            self._sizes.append(0)
        self._sizes[group] += length

    def members(self, group: int) -> Ints:
        """The numbers of a group's instructions, (m,)."""
        ends = np.append(self.starts[1:], self.sizes.sum())
        mine = np.flatnonzero(self.groups == group)
        return np.concatenate([np.arange(self.starts[run], ends[run]) for run in mine])


class Reduction(ABC):
    """A score of a set of instructions against each group, linear in the pairs that it picks."""

    @abstractmethod
    def scores(self, rows: Iterable[Floats], runs: Runs) -> Floats:
        """(G,) scores from the rows (N,) of the new instructions, each read once and not kept."""

    @abstractmethod
    def weights(self, block: Floats) -> Floats:
        """(n, m) what each pair of one group's block counts for: its score is Σ weights · block."""


@final
class Mean(Reduction):
    """Mean over all cross pairs: the released code."""

    def scores(self, rows: Iterable[Floats], runs: Runs) -> Floats:
        total, n = np.zeros(len(runs.starts)), 0
        for row in rows:
            total += np.add.reduceat(row, runs.starts)
            n += 1
        return np.bincount(runs.groups, total, len(runs.sizes)) / (runs.sizes * n)

    def weights(self, block: Floats) -> Floats:
        return np.full_like(block, 1.0 / block.size)


@final
class Max(Reduction):
    """The nearest pair: the paper's text."""

    def scores(self, rows: Iterable[Floats], runs: Runs) -> Floats:
        nearest = np.full(len(runs.starts), -np.inf)
        for row in rows:
            np.maximum(nearest, np.maximum.reduceat(row, runs.starts), out=nearest)
        scores = np.full(len(runs.sizes), -np.inf)
        np.maximum.at(scores, runs.groups, nearest)
        return scores

    def weights(self, block: Floats) -> Floats:
        weights = np.zeros_like(block)
        weights.flat[int(block.argmax())] = 1.0
        return weights


REDUCTIONS: dict[str, Reduction] = {"mean": Mean(), "max": Max()}
"""Every reduction by the name it has in a configuration."""
