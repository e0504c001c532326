"""Which group each task joined, and how similar it was to all of them."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lcia.report.figures.layout import WIDTH_IN, heat_map, slant_labels, styled
from lcia.report.figures.theme import FAINT, INK, fitted, new_figure
from lcia.report.load import Run

_FEW_GROUPS = 5  # names of more need a slant


def group_order(run: Run) -> list[str]:
    """The groups in the order in which they came into being."""
    joined = [group for task in run.tasks if (group := run.groups.get(task)) is not None]
    scored = [group for task in run.tasks for group in run.group_scores.get(task, {})]
    return list(dict.fromkeys([*joined, *scored]))


def similarity(run: Run, task: str, group: str) -> float:
    """NaN where the group did not exist yet."""
    score = run.group_scores.get(task, {}).get(group)
    return math.nan if score is None else score


@styled
def group_similarities(run: Run) -> Figure:
    """Similarity of each task's instructions to every group that existed; framed: the group it is in."""
    groups, tasks = group_order(run), run.tasks
    figure = new_figure(min(WIDTH_IN, 3.2 + 1.1 * len(groups)), 1.4 + 0.28 * len(tasks))
    axis = figure.add_subplot()
    scores = np.array([[similarity(run, task, group) for group in groups] for task in tasks])
    heat_map(axis, scores, top=1.0)
    slanted = len(groups) > _FEW_GROUPS
    axis.set_xticks(range(len(groups)), [fitted(group, 16, lines=1 if slanted else 2) for group in groups])
    axis.set_yticks(range(len(tasks)), [fitted(f"{i} {task}", 28) for i, task in enumerate(tasks, start=1)])
    if slanted:
        slant_labels(axis)
    for row, column in np.ndindex(scores.shape):
        joined = run.groups.get(tasks[row]) == groups[column]
        score = scores[row, column]
        text = ("new" if joined else "·") if math.isnan(score) else f"{score:.2f}"
        axis.text(column, row, text, ha="center", va="center", color=INK if joined else FAINT, fontsize=7.5)
        if joined:
            axis.add_patch(Rectangle((column - 0.47, row - 0.44), 0.94, 0.88, fill=False, edgecolor=INK, lw=1.2))
    threshold = "not recorded" if run.threshold is None else f"{run.threshold:g}"
    axis.set_title(f"similarity to each group; joined from {threshold}")
    return figure
