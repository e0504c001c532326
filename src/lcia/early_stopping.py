"""When a task has been learned enough: CITB's rule (Zhang et al., Findings of EMNLP 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class EarlyStopping:
    """A task ends when `patience` epochs in a row brought no higher score; it keeps the weights of its best epoch."""

    score: Callable[[], float]  # of the weights in training, on the dev rows, in percent
    patience: int

    @staticmethod
    def best(scores: Mapping[int, float]) -> int:
        """The step after which the score was highest, the first of equals.

        Args:
            scores: {optimizer step at the end of an epoch: score}.
        """
        return max(sorted(scores), key=scores.__getitem__)

    def is_over(self, scores: Mapping[int, float]) -> bool:
        """Whether `patience` epochs followed the best one."""
        return sum(step > self.best(scores) for step in scores) >= self.patience
