"""Which group each task joined, and how similar it was to all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from lcia.report.figures.layout import WIDTH_IN, heat_map, slant_labels, styled
from lcia.report.figures.theme import FAINT, INK, fitted, new_figure
from lcia.report.load import Run

_FEW_GROUPS = 5  # names of more need a slant
BASE_MODEL = "base model"
_STACKED = "+"  # joins the adapters of a stack's name (`lcia.adapters.stack_name`, which would load torch)
Confusion = Mapping[str, Mapping[str, int]]  # task → {group, "" for the base model: requests}


def group_order(run: Run) -> list[str]:
    """The groups in the order in which they came into being."""
    joined = [group for task in run.tasks if (group := run.groups.get(task)) is not None]
    scored = [group for task in run.tasks for group in run.group_scores.get(task, {})]
    return list(dict.fromkeys([*joined, *scored]))


def similarity(run: Run, task: str, group: str) -> float:
    """NaN where the group did not exist yet."""
    score = run.group_scores.get(task, {}).get(group)
    return math.nan if score is None else score


def answers_for(group: str, own: str | None) -> bool:
    """Whether a group holds what learned a task: a stack of adapters answers for the tasks of all its members."""
    return own in group.split(_STACKED)


def routed_groups(run: Run, confusion: Confusion) -> list[str]:
    """The groups in order, those that no request was sent to included; "" for the base model comes last."""
    sent = dict.fromkeys(group for counts in confusion.values() for group in counts)
    stacked = {member for group in sent if _STACKED in group for member in group.split(_STACKED)}
    known = [group for group in group_order(run) if group in sent or group not in stacked]
    groups = [group for group in dict.fromkeys([*known, *sent]) if group]
    return [*groups, ""] if "" in sent else groups


@styled
def group_similarities(run: Run) -> Figure:
    """Similarity of each task's instructions to every group that existed; framed: the group it is in."""
    groups, tasks = group_order(run), run.tasks
    scores = np.array([[similarity(run, task, group) for group in groups] for task in tasks])
    figure, axis = _task_by_group(run, groups, scores)
    for row, column in np.ndindex(scores.shape):
        joined = run.groups.get(tasks[row]) == groups[column]
        score = scores[row, column]
        text = ("new" if joined else "·") if math.isnan(score) else f"{score:.2f}"
        axis.text(column, row, text, ha="center", va="center", color=INK if joined else FAINT, fontsize=7.5)
        if joined:
            _frame(axis, row, column)
    threshold = "not recorded" if run.threshold is None else f"{run.threshold:g}"
    axis.set_title(f"similarity to each group; joined from {threshold}")
    return figure


@styled
def routing_confusion(run: Run, confusion: Confusion) -> Figure:
    """How many test inputs of each task were sent to which group; framed: the task's own group."""
    groups, tasks = routed_groups(run, confusion), run.tasks
    counts = np.array([[confusion.get(task, {}).get(group, 0) for group in groups] for task in tasks], dtype=float)
    totals = counts.sum(axis=1, keepdims=True)  # (T, 1)
    shares = np.divide(counts, totals, out=np.full_like(counts, np.nan), where=totals > 0)
    figure, axis = _task_by_group(run, groups, shares)
    for row, column in np.ndindex(counts.shape):
        own = answers_for(groups[column], run.groups.get(tasks[row]))
        text = f"{counts[row, column]:.0f}" if totals[row, 0] else "·"
        axis.text(column, row, text, ha="center", va="center", color=INK if own else FAINT, fontsize=7.5)
        if own:
            _frame(axis, row, column)
    axis.set_title("test inputs of each task, by the group they were sent to")
    return figure


def _task_by_group(run: Run, groups: list[str], shares: NDArray[np.float64]) -> tuple[Figure, Axes]:
    """A heat map with a row a task and a column a group, from 0 to 1."""
    figure = new_figure(min(WIDTH_IN, 3.2 + 1.1 * len(groups)), 1.4 + 0.28 * len(run.tasks))
    axis = figure.add_subplot()
    heat_map(axis, shares, top=1.0)
    slanted = len(groups) > _FEW_GROUPS
    axis.set_xticks(range(len(groups)), [fitted(name or BASE_MODEL, 16, lines=1 if slanted else 2) for name in groups])
    axis.set_yticks(range(len(run.tasks)), [fitted(f"{i} {task}", 28) for i, task in enumerate(run.tasks, start=1)])
    if slanted:
        slant_labels(axis)
    return figure, axis


def _frame(axis: Axes, row: int, column: int) -> None:
    axis.add_patch(Rectangle((column - 0.47, row - 0.44), 0.94, 0.88, fill=False, edgecolor=INK, lw=1.2))
