"""Why a task trains a group's weights or opens a new group, and what another threshold would do."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from lcia.grouping.codebook import Codebook, Match
from lcia.grouping.reduction import REDUCTIONS
from lcia.grouping.similarity import words_of

SHOWN_WORDS = 8


@dataclass(frozen=True)
class Explanation:
    """One decision: the scores, the words behind the best, and the thresholds at which it changes."""

    match: Match
    threshold: float
    reduce: str
    similarity: str
    words: dict[str, float]  # term -> what it adds to the best score, largest first
    only_task: tuple[str, ...]  # words of the task that the nearest group does not have
    only_group: tuple[str, ...]  # and the other way round

    @property
    def nearest(self) -> str | None:
        return self.match.nearest

    @property
    def decision(self) -> str:
        return "expand" if self.match.group is None else "retrain"

    @property
    def thresholds(self) -> list[dict[str, Any]]:
        """What each threshold in `above` < threshold ≤ `up_to` decides; None is no bound."""
        if self.nearest is None:
            return [{"above": None, "up_to": None, "decision": "expand", "group": None}]
        score = self.match.score
        return [
            {"above": None, "up_to": score, "decision": "retrain", "group": self.nearest},
            {"above": score, "up_to": None, "decision": "expand", "group": None},
        ]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "decision": self.decision,
            "group": self.match.group,
            "nearest": self.nearest,
            "score": self.match.score,
            "scores": self.match.scores,
            "threshold": self.threshold,
            "reduce": self.reduce,
            "similarity": self.similarity,
            "thresholds": self.thresholds,
            "words": self.words,
            "only_task": list(self.only_task),
            "only_group": list(self.only_group),
        }

    def lines(self) -> list[str]:
        """The explanation in sentences, without the table of scores."""
        if self.nearest is None:
            return ["Opens a new group: there is none yet."]
        score, sign = self.match.score, "≥" if self.match.group else "<"
        act = f"Trains group {self.nearest}" if self.match.group else f"Opens a new group; nearest is {self.nearest}"
        words = ", ".join(f"{word} {value:+.3f}" for word, value in list(self.words.items())[:SHOWN_WORDS])
        other = "opens a new group" if self.match.group else f"trains {self.nearest}"
        side = f"above {score:.3f}" if self.match.group else f"of {score:.3f} or lower"
        lines = [
            f"{act}: {score:.3f} {sign} threshold {self.threshold:g} ({self.reduce} of {self.similarity}).",
            f"A threshold {side} {other}; it is {abs(score - self.threshold):.3f} away.",
            f"Words behind the score: {words or 'none'}.",
        ]
        for whose, listed in (("the task", self.only_task), (self.nearest, self.only_group)):
            if listed:
                more = f" and {len(listed) - SHOWN_WORDS} more" if len(listed) > SHOWN_WORDS else ""
                lines.append(f"Only {whose} has: {', '.join(listed[:SHOWN_WORDS])}{more}.")
        return lines

    def __str__(self) -> str:
        scores = sorted(self.match.scores.items(), key=lambda item: -item[1])
        return "\n".join([*self.lines(), *(f"  {score:.3f}  {group}" for group, score in scores)])

    def __rich__(self) -> Group:
        table = Table("group", "score")
        for group, score in sorted(self.match.scores.items(), key=lambda item: -item[1]):
            table.add_row(Text(group, "bold" if group == self.match.group else ""), f"{score:.3f}")
        return Group(Text("\n".join(self.lines())), *([table] if self.match.scores else []))


def explain(codebook: Codebook, instructions: Sequence[str]) -> Explanation:
    """The decision that `codebook.match(instructions)` takes, with its reasons."""
    match = codebook.match(instructions)
    words: dict[str, float] = {}
    only_task: set[str] = set()
    only_group: set[str] = set()
    if match.nearest is not None:
        distinct, saved = list(dict.fromkeys(instructions)), codebook.groups[match.nearest]
        words = _words(codebook, distinct, match.nearest)
        analyse = words_of()
        task_words = {word for text in distinct for word in analyse(text)}
        group_words = {word for text in saved for word in analyse(text)}
        only_task, only_group = task_words - group_words, group_words - task_words
    return Explanation(
        match=match,
        threshold=codebook.threshold,
        reduce=codebook.reduce,
        similarity=codebook.similarity,
        words=words,
        only_task=tuple(sorted(only_task)),
        only_group=tuple(sorted(only_group)),
    )


def _words(codebook: Codebook, instructions: list[str], group: str) -> dict[str, float]:
    """What each term adds to the score of `group`, in the pairs that the reduction picks."""
    saved, members = codebook.groups[group], codebook.members(group)
    block = np.stack([row[members] for row in codebook.index.rows(instructions)])  # (n, m)
    weights = REDUCTIONS[codebook.reduce].weights(block)  # (n, m)
    total = defaultdict[str, float](float)
    for text, row in zip(instructions, weights, strict=True):
        picked = np.flatnonzero(row)
        if len(picked):
            added = codebook.index.words(text, [saved[i] for i in picked], row[picked].tolist())
            for term, value in added.items():
                total[term] += value
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


@dataclass(frozen=True)
class ThresholdRange:
    """Every threshold in `above` < threshold ≤ `up_to` forms the same groups {task: group}."""

    above: float
    up_to: float
    groups: dict[str, str]


def threshold_ranges(
    tasks: Mapping[str, Sequence[str]], reduce: str = "mean", similarity: str = "tfidf_pair"
) -> list[ThresholdRange]:
    """The groups that a stream of tasks {name: instructions} forms, for every threshold from -inf to inf.

    The groups stay the same up to the lowest score at which some task joined, so each run of the stream
    finds the next threshold to try: exact, without a grid.
    """
    ranges, above = [], -math.inf
    while above < math.inf:
        groups, up_to = _join_above(above, tasks, Codebook(reduce=reduce, similarity=similarity))
        ranges.append(ThresholdRange(above, up_to, groups))
        above = up_to
    return ranges


def _join_above(bound: float, tasks: Mapping[str, Sequence[str]], codebook: Codebook) -> tuple[dict[str, str], float]:
    """The groups when every task with a score above `bound` joins, and the lowest such score."""
    groups, lowest = {}, math.inf
    for task, instructions in tasks.items():
        match = codebook.match(instructions)
        if match.nearest is not None and match.score > bound:
            groups[task] = match.nearest
            lowest = min(lowest, match.score)
        else:
            groups[task] = task
        codebook.add(groups[task], instructions)
    return groups, lowest
