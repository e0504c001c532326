"""From one request to the group of weights that answers it."""

from __future__ import annotations

from collections.abc import Sequence

from lcia.errors import UserError, did_you_mean
from lcia.grouping.codebook import Codebook, Match, best_match
from lcia.grouping.reduction import REDUCTIONS


class Router:
    """Sends a request to the nearest group of a codebook, the earliest among equals.

    No group (the base model answers) only when the codebook is empty or the best score < `route_threshold`.
    The codebook is read, not copied: groups added later are found. `reduce` None is the codebook's own.
    """

    def __init__(self, codebook: Codebook, route_threshold: float = 0.0, reduce: str | None = None) -> None:
        if reduce is not None and reduce not in REDUCTIONS:
            raise UserError(f"reduce: {reduce!r} does not exist. " + did_you_mean(reduce, REDUCTIONS))
        self.codebook = codebook
        self.route_threshold = route_threshold
        self.reduce = reduce

    def route(self, instruction: str) -> Match:
        """The group for one request."""
        return best_match(self.codebook.scores([instruction], self.reduce), self.route_threshold)

    def route_many(self, instructions: Sequence[str]) -> list[Match]:
        """One match for each request, in order; equal instructions are looked up once."""
        matches = {text: self.route(text) for text in dict.fromkeys(instructions)}
        return [matches[text] for text in instructions]
