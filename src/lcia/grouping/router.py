"""From one request to the group of weights that answers it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from lcia.errors import UserError, did_you_mean
from lcia.files import write_json
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


def save_routes(path: str | os.PathLike[str], router: Router, base: str, adapters: Mapping[str, str]) -> None:
    """Write what a server needs to route, as one JSON file that explains itself.

    Args:
        base: the model name that answers where no group is near enough.
        adapters: group → folder of its weights, relative to the file.
    """
    codebook = router.codebook
    groups = {name: {"instructions": texts, "adapter": adapters[name]} for name, texts in codebook.groups.items()}
    content = {
        "threshold": codebook.threshold,
        "route_threshold": router.route_threshold,
        "reduce": router.reduce or codebook.reduce,
        "similarity": codebook.similarity,
        "base": base,
        "groups": groups,
    }
    write_json(Path(path), content)


def load_routes(path: str | os.PathLike[str]) -> Router:
    """The router of a `routes.json`; numpy and scikit-learn are enough for it.

    Raises:
        UserError: the file is missing or not what `save_routes` wrote.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        codebook = Codebook(content["threshold"], content["reduce"], content["similarity"])
        for name, group in content["groups"].items():
            codebook.add(name, group["instructions"])
        return Router(codebook, float(content["route_threshold"]))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the routes.json of an export ({type(error).__name__}: {error})") from error
