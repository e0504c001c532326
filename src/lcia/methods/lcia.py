"""The method of this project: instruction groups + dynamic EMA inside a group."""

from __future__ import annotations

from typing import Any

from lcia.methods.averaging import Averaging
from lcia.methods.base import Combined
from lcia.methods.grouping import InstructionGroups


class LCIA(Combined):
    """Grouping decides where a task is learned; averaging only where a group is matched (LCIA, Alg. 1).

    Args: those of `InstructionGroups` and `Averaging`.
    """

    name = "lcia"

    def __init__(
        self,
        *,
        threshold: float = 0.9,
        reduce: str = "mean",
        similarity: str = "tfidf_pair",
        route_threshold: float = 0.0,
        start: str = "last",
        rule: str = "fixed",
        retained: Any = ...,
        fallback: float | None = None,
        rest: float = 0.0,
        strength: float | None = None,
        forgetting: float | None = None,
        fisher_source: str | None = None,
    ) -> None:
        super().__init__(
            [
                InstructionGroups(
                    threshold=threshold,
                    reduce=reduce,
                    similarity=similarity,
                    route_threshold=route_threshold,
                    start=start,
                ),
                Averaging(
                    rule=rule,
                    retained=retained,
                    fallback=fallback,
                    rest=rest,
                    strength=strength,
                    forgetting=forgetting,
                    fisher_source=fisher_source,
                ),
            ]
        )
