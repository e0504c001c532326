"""The codebook: which instructions each group has learnt, and where a new task belongs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lcia.errors import UserError, did_you_mean
from lcia.files import write_text
from lcia.grouping.reduction import REDUCTIONS, Ints, Runs
from lcia.grouping.similarity import SIMILARITIES

# Scores are rounded to this many decimals: neither the order of a sum nor its last bit decides a match.
SCORE_DECIMALS = 12


@dataclass(frozen=True)
class Match:
    """Where a set of instructions belongs.

    `group` is None when no group reaches the threshold; `score` is the best group's even then, 0 without any.
    """

    group: str | None
    score: float
    scores: dict[str, float]

    @property
    def nearest(self) -> str | None:
        """The best group, the earliest among equals, whether or not it reaches the threshold."""
        return max(self.scores, key=self.scores.__getitem__, default=None)  # max keeps the first of equals


class Codebook:
    """Groups of instructions (arXiv 2410.10868, §4.4): a task joins the group it resembles or opens one.

    The score of a group is `reduce` over the similarities of all pairs (new instruction, saved instruction).
    The best group is taken when its score ≥ `threshold`, the earliest one among equals.

    Args:
        threshold: ε of the paper; a finite number. Above 1 every task opens a group.
        reduce: a key of REDUCTIONS.
        similarity: a key of SIMILARITIES.

    Raises UserError for a name that does not exist or a threshold that is no number.
    """

    def __init__(self, threshold: float = 0.9, reduce: str = "mean", similarity: str = "tfidf_pair") -> None:
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not math.isfinite(threshold):
            raise UserError(f"threshold: {threshold!r} is not a finite number")
        _known("reduce", reduce, REDUCTIONS)
        _known("similarity", similarity, SIMILARITIES)
        self.threshold = float(threshold)
        self.reduce = reduce
        self.similarity = similarity
        self.index = SIMILARITIES[similarity]()
        self._groups: dict[str, dict[str, None]] = {}  # name -> its instructions, an ordered set
        self._runs = Runs()  # which instructions of the index are whose

    @property
    def groups(self) -> dict[str, list[str]]:
        """A copy: {name: instructions}, both in the order of adding."""
        return {name: list(instructions) for name, instructions in self._groups.items()}

    def match(self, instructions: Sequence[str]) -> Match:
        """The group whose weights a task with these instructions should train.

        The unit is the set of distinct instructions: repeats count once. Raises UserError without any.
        """
        return best_match(self.scores(instructions), self.threshold)

    def scores(self, instructions: Sequence[str], reduce: str | None = None) -> dict[str, float]:
        """The score of every group, in the order of their creation; `reduce` overrides the codebook's own."""
        distinct = _distinct(instructions, "match")
        if not self._groups:
            return {}
        scores = REDUCTIONS[reduce or self.reduce].scores(self.index.rows(distinct), self._runs)
        return dict(zip(self._groups, np.round(scores, SCORE_DECIMALS).tolist(), strict=True))

    def add(self, group: str, instructions: Sequence[str]) -> None:
        """Append the instructions that `group` does not have yet; a new name creates the group.

        Only these instructions are analysed: the other groups are not touched.
        """
        distinct = _distinct(instructions, f"group {group!r}")
        _check_name(group)
        members = self._groups.get(group, {})
        new = [text for text in distinct if text not in members]
        if new:
            self.index.add(new)  # first, because it may fail: without its model a similarity says so here
            self._groups[group] = members | dict.fromkeys(new)
            self._runs.append(list(self._groups).index(group), len(new))

    def members(self, group: str) -> Ints:
        """The numbers of a group's instructions in the index, in the order of `groups[group]`."""
        self._need(group)
        return self._runs.members(list(self._groups).index(group))

    def rename(self, group: str, name: str) -> None:
        """Give a group another name; its place among the groups stays."""
        self._need(group)
        _check_name(name)
        if name != group and name in self._groups:
            raise UserError(f"group {name!r} exists already; merge the two instead")
        self._groups = {name if key == group else key: value for key, value in self._groups.items()}

    def merge(self, group: str, into: str) -> None:
        """Move the instructions of `group` to the end of `into`, and remove `group`."""
        self._need(group)
        self._need(into)
        if group == into:
            raise UserError(f"group {group!r} cannot be merged into itself")
        self._groups[into] |= self._groups.pop(group)
        self._index_again()

    def split(self, group: str, name: str, instructions: Sequence[str]) -> None:
        """Move some, not all, instructions of `group` to a new group `name`."""
        self._need(group)
        moved = _distinct(instructions, f"split of group {group!r}")
        _check_name(name)
        if name in self._groups:
            raise UserError(f"group {name!r} exists already")
        for text in moved:
            if text not in self._groups[group]:
                raise UserError(f"group {group!r} has no instruction {text!r}")
        if len(moved) == len(self._groups[group]):
            raise UserError(f"group {group!r} would be left without instructions; rename it instead")
        self._groups[name] = dict.fromkeys(moved)
        self._groups[group] = {text: None for text in self._groups[group] if text not in self._groups[name]}
        self._index_again()

    def remove(self, group: str) -> None:
        """Forget a group and its instructions."""
        self._need(group)
        del self._groups[group]
        self._index_again()

    def _need(self, group: str) -> None:
        if group not in self._groups:
            raise UserError(f"no group {group!r}. " + did_you_mean(group, self._groups))

    def _index_again(self) -> None:
        """Merging, splitting and removing are done by hand and rarely: the index is simply made anew."""
        groups, self._groups = self._groups, {}
        self.index, self._runs = SIMILARITIES[self.similarity](), Runs()
        for name, instructions in groups.items():
            self.add(name, list(instructions))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write {threshold, reduce, similarity, groups} as JSON, all of it or nothing.

        Equal codebooks give equal bytes. The order of the groups is kept: the earliest of equal groups wins.
        """
        content = {
            "threshold": self.threshold,
            "reduce": self.reduce,
            "similarity": self.similarity,
            "groups": self.groups,
        }
        write_text(Path(path), json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Codebook:
        """Read what `save` wrote. Raises UserError naming the file and the key for anything else."""
        path = Path(path)
        content = _read(path)
        try:
            codebook = cls(content["threshold"], content["reduce"], content["similarity"])
            for name, instructions in content["groups"].items():
                codebook.add(name, _string_list(name, instructions))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return codebook


def best_match(scores: dict[str, float], threshold: float) -> Match:
    """The earliest of the best groups when its score ≥ threshold, else no group."""
    if not scores:
        return Match(None, 0.0, {})
    match = Match(None, max(scores.values()), scores)
    return replace(match, group=match.nearest) if match.score >= threshold else match


def group_tasks(tasks: Mapping[str, Sequence[str]], codebook: Codebook) -> dict[str, str]:
    """Let tasks {name: instructions} arrive: {task: group}; a new group is named after its first task."""
    groups = {}
    for task, instructions in tasks.items():
        groups[task] = codebook.match(instructions).group or task
        codebook.add(groups[task], instructions)
    return groups


def _known(key: str, name: Any, registry: Mapping[str, object]) -> None:
    if not isinstance(name, str) or name not in registry:
        raise UserError(f"{key}: {name!r} does not exist. " + did_you_mean(str(name), registry))


def _check_name(group: str) -> None:
    # A group names a folder of the pool.
    if not isinstance(group, str) or group in ("", ".", "..") or any(char in group for char in "/\\\0"):
        raise UserError(f"groups: {group!r} cannot name a group: it also names a folder")


def _distinct(instructions: Sequence[str], what: str) -> list[str]:
    if isinstance(instructions, str):
        raise TypeError(f"{what}: a list of instructions is needed, not one string")
    distinct = list(dict.fromkeys(instructions))
    if not distinct:
        raise UserError(f"{what}: at least one instruction is needed")
    for text in distinct:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"{what}: instruction {text!r} is not valid Unicode ({error.reason})") from error
    return distinct


def _string_list(name: str, instructions: Any) -> list[str]:
    if not isinstance(instructions, list) or not all(isinstance(text, str) for text in instructions):
        raise UserError(f"groups: {name!r} is not a list of strings")
    if len(set(instructions)) < len(instructions):
        raise UserError(f"groups: {name!r} holds the same instruction twice")
    return instructions


def _read(path: Path) -> dict[str, Any]:
    def unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                raise UserError(f"{path}: the key {key!r} occurs twice")
            content[key] = value
        return content

    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON document: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a codebook is a JSON object, this is a {type(content).__name__}")
    keys = ("threshold", "reduce", "similarity", "groups")
    for key in content:
        if key not in keys:
            raise UserError(f"{path}: unknown key {key!r}. " + did_you_mean(key, keys))
    content.setdefault("similarity", "tfidf_pair")  # files of {threshold, reduce, groups} alone
    for key in keys:
        if key not in content:
            raise UserError(f"{path}: the key {key!r} is missing")
    if not isinstance(content["groups"], dict):
        raise UserError(f"{path}: groups: an object {{name: [instructions]}} is needed")
    return content
