"""Instruction groups: a task shares the weights of the group its instructions match, or founds one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lcia.grouping import Codebook, Match, Router
from lcia.methods.base import Method, Placement
from lcia.stream import Row, Task


class InstructionGroups(Method):
    """Retrain or expand by TF-IDF cosine of the instructions (LCIA §4.4, Alg. 1).

    Args:
        threshold: a group is matched from this mean similarity on (the paper's ε: 0.9 for one instruction a task,
            0.3 for diverse ones).
        reduce: mean | max over all pairs of instructions.
        similarity: a key of lcia.grouping's similarities.
        route_threshold: below it the base model answers a request; 0 = the nearest group always answers.
        start: a new group starts from the `last` learned weights (Alg. 1) or at `random` (Fig. 3).
    """

    def __init__(
        self,
        *,
        threshold: float = 0.9,
        reduce: str = "mean",
        similarity: str = "tfidf_pair",
        route_threshold: float = 0.0,
        start: str = "last",
    ) -> None:
        if start not in ("last", "random"):
            raise ValueError(f"start must be last or random, got {start!r}")
        if isinstance(route_threshold, bool) or not isinstance(route_threshold, int | float):
            raise ValueError(f"route_threshold must be a number, got {route_threshold!r}")
        self.codebook: Codebook = Codebook(threshold=threshold, reduce=reduce, similarity=similarity)
        self.router = Router(self.codebook, route_threshold)
        self._start = start
        self._last: str | None = None
        self._opened: str | None = None

    @classmethod
    def works_sharded(cls) -> bool:
        return True

    def open_task(self, task: Task) -> Placement:
        match = self.codebook.match(task.instructions)
        self._opened = match.group or task.name
        if match.group is not None:
            return Placement(match.group, is_new=False, scores=match.scores)
        return Placement(
            task.name, is_new=True, start=self._last if self._start == "last" else None, scores=match.scores
        )

    def close_task(self, task: Task) -> None:
        assert self._opened is not None
        self.codebook.add(self._opened, task.instructions)
        self._last = self._opened

    def route(self, requests: Sequence[Row]) -> list[Match]:
        return self.router.route_many([request.instruction for request in requests])

    def state_dict(self) -> dict[str, Any]:
        return {
            "last": self._last,
            "groups": {group: list(texts) for group, texts in self.codebook.groups.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = state["last"]
        for group, texts in state["groups"].items():
            self.codebook.add(group, texts)

    def adapters_changed(self, origin: Mapping[str, str]) -> None:
        if self._last not in origin:  # renamed; or dropped, then the newest that is left
            renamed = [name for name, source in origin.items() if source == self._last]
            self._last = (renamed or list(origin))[-1]
