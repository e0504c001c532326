"""Replay: task t is trained on D_t ∪ M, M = `memory` rows of each earlier task (CITB: 10 or 50).

A row of the memory is seen as often as a row of the task. Experience replay in arXiv 1902.10486 draws a batch of the
memory beside every batch of the task instead, so that old rows are seen more often the fewer of them are kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from lcia.methods.base import Placement
from lcia.methods.memory import EpisodicMemory
from lcia.stream import Row


class Replay(EpisodicMemory):
    """Stored rows of earlier tasks, mixed into the training rows of later ones in the same adapter.

    Args:
        memory: rows kept of each task, a draw that depends on the task's name alone; null = all.
    """

    name = "replay"

    @classmethod
    def works_sharded(cls) -> bool:
        return True

    def feed(self, rows: Sequence[Row], placement: Placement) -> Sequence[Row]:
        return [*rows, *self.remembered(placement.adapter)]
