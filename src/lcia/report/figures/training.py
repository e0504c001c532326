"""The course of training: loss, β and fallback over the steps of all tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lcia.report.figures.layout import WIDTH_IN, styled
from lcia.report.figures.theme import FAINT, RULE, fitted, hue, new_figure
from lcia.report.load import Run, Step

_CHARACTERS = 118  # of task names that fit above the axis
_MARKED = 60  # steps of a task; more, and the marks would hide the line


@dataclass(frozen=True)
class _Stage:
    """The logged steps of one task, on a common axis of steps."""

    task: str
    steps: tuple[Step, ...]
    start: int  # steps before it
    end: int

    @property
    def x(self) -> list[int]:
        return [self.start + step.step for step in self.steps]

    @property
    def averages(self) -> bool:
        return any(step.beta_p50 is not None for step in self.steps)

    def column(self, key: str) -> list[float]:
        """One column of the log; a step without a finite value leaves a gap."""
        values = [getattr(step, key) for step in self.steps]
        return [math.nan if value is None else value for value in values]


@styled
def training_course(run: Run) -> Figure:
    """Loss over all steps; where weights are averaged, β (median, p10 to p90) and the fallback fraction."""
    rows = 3 if run.averages else 1
    figure = new_figure(WIDTH_IN, 0.9 + 1.35 * rows)
    axes = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    stages = _stages(run)
    for stage in stages:
        _line(axes[0], stage, "loss", hue(0))
        if stage.averages:
            axes[1].fill_between(
                stage.x, stage.column("beta_p10"), stage.column("beta_p90"), color=hue(2), alpha=0.2, lw=0
            )
            _line(axes[1], stage, "beta_p50", hue(2))
            _line(axes[2], stage, "fallback_fraction", hue(1))
    losses = [loss for stage in stages for loss in stage.column("loss") if math.isfinite(loss)]
    axes[0].set(ylabel="loss", ylim=(0, 1.08 * max(losses, default=0.0) or 1.0))
    if run.averages:
        axes[1].set(ylabel="β")
        axes[2].set(ylabel="fallback fraction", ylim=(-0.05, 1.05))
    axes[-1].set(xlabel="optimizer step, all tasks", xlim=(0, stages[-1].end))
    _name_stages(axes[0], stages, run)
    _part_stages(axes, stages)
    figure.align_ylabels(axes)
    return figure


def _stages(run: Run) -> list[_Stage]:
    stages: list[_Stage] = []
    start = 0
    for task in dict.fromkeys(step.task for step in run.steps):
        steps = tuple(step for step in run.steps if step.task == task)
        end = start + max(steps[-1].step, 1)  # not what was planned: early stopping ends a task before
        stages.append(_Stage(task, steps, start, end))
        start = end
    return stages


def _line(axis: Axes, stage: _Stage, key: str, colour: str) -> None:
    heights = stage.column(key)
    if any(map(math.isfinite, heights)):
        axis.plot(stage.x, heights, color=colour, marker=".", markersize=3 if len(heights) < _MARKED else 0, lw=1.3)


def _name_stages(axis: Axes, stages: Sequence[_Stage], run: Run) -> None:
    """The tasks' names above the axis, or their numbers where names have no room."""
    number_of = {task: i for i, task in enumerate(run.tasks, start=1)}
    total = stages[-1].end
    for stage in stages:
        room = int((stage.end - stage.start) / total * _CHARACTERS)
        number = str(number_of.get(stage.task, "·"))
        text = fitted(f"{number} {stage.task}", room - 1, lines=2) if room >= 10 else number
        axis.annotate(
            text,
            ((stage.start + stage.end) / 2, 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=8,
        )


def _part_stages(axes: Sequence[Axes], stages: Sequence[_Stage]) -> None:
    """A rule between tasks; hatched where nothing is averaged."""
    for number, axis in enumerate(axes):
        for stage in stages:
            if stage.start:
                axis.axvline(stage.start, color=FAINT, lw=0.8)
            if number and not stage.averages:
                axis.axvspan(stage.start, stage.end, facecolor="none", hatch="////", edgecolor=RULE, lw=0)
