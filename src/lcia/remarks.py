"""What a user should know of a run before it trains, though nothing is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping

from lcia.config import RunConfig
from lcia.grouping import group_tasks
from lcia.methods import build_method
from lcia.methods.averaging import Averaging
from lcia.stream import Stream


def remarks(config: RunConfig, stream: Stream) -> list[str]:
    """Sentences about a run that has not begun."""
    codebook = build_method(config.method_parts()).codebook
    groups = {} if codebook is None else group_tasks({task.name: task.instructions for task in stream}, codebook)
    return [*about_learning_rate(config), *about_groups(groups), *about_early_stopping(config)]


def about_learning_rate(config: RunConfig) -> list[str]:
    """Methods whose source names another rate than the default, where the default was not chosen but left."""
    if "learning_rate" in config.model_fields_set:
        return []
    default = config.learning_rate
    return [
        f"{part.name}: its source trains with learning_rate={rate:g}; none is given, so this is the default {default:g}"
        for part in build_method(config.method_parts()).leaves()
        if (rate := part.published_learning_rate) not in (None, default)
    ]


def about_early_stopping(config: RunConfig) -> list[str]:
    """What counts on the length of a task that may end before, and dev rows that serve two ends."""
    if config.early_stopping_patience is None:
        return []
    found = [
        f"the average ({', '.join(counting)}) is paced for the full length: a task that stops early keeps more of the "
        "weights before it"
        for part in build_method(config.method_parts()).leaves()
        if isinstance(part, Averaging) and (counting := part.counts_on_length())
    ]
    if config.eval_split == "dev":
        found.append("early stopping chooses each task's epoch by the rows that the scores are of (eval_split: dev)")
    return found


def about_groups(groups: Mapping[str, str]) -> list[str]:
    """Says where grouping joins nothing: {task: group}."""
    n = len(groups)
    if n < 2 or len(set(groups.values())) < n:
        return []
    return [f"{n} groups for {n} tasks: nothing is shared, no average is ever taken"]
