"""What the numbers say, in sentences computed from them: also that a method does not help."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lcia.report.compare import Arena, Estimate, Series, paired_difference
from lcia.report.significance import ALPHA, Scope

BASELINE = "lora"  # sequential fine-tuning: what every other method has to beat
_VISIBLE = 0.05  # points; less is 0.0 in print


def summary(arena: Arena) -> list[str]:
    """Sentences about an arena, the most important first."""
    measured = [series for series in arena.series if series.metric("avg_acc")]
    if not measured:
        return ["No run here has been measured on all its tasks yet."]
    learners = [series for series in measured if not series.is_reference]
    references = [series for series in measured if series.is_reference]
    sentences = [_headline(learners or references, len(arena.tasks))]
    sentences += _against_baseline(learners)
    sentences += _outside_the_contest(arena, references if learners else [])
    sentences += _about_chance(measured)
    return sentences


def _points(value: float) -> str:
    return f"{value:.1f} point{'' if f'{value:.1f}' == '1.0' else 's'}"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−") if abs(value) >= _VISIBLE else "0.0"


def _percent(found: Estimate) -> str:
    return f"{found.mean:.1f} %"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _mean(series: Series, key: str) -> float:
    found = series.metric(key)
    return math.nan if found is None else found.mean


def _forgets(series: Series) -> str:
    """ "forgets 2.1 points a task", or that it does not; empty where nothing was measured."""
    lost = _mean(series, "forgetting")
    if math.isnan(lost):
        return ""
    if lost >= _VISIBLE:
        return f"forgets {_points(lost)} a task"
    if lost <= -_VISIBLE:
        return f"forgets nothing and even gains {_points(-lost)} a task on what it had learned"
    return "forgets nothing"


def _headline(series: Sequence[Series], n_tasks: int) -> str:
    """Which has the highest Avg.ACC, and who forgets most."""
    after = f"after {n_tasks} task{'' if n_tasks == 1 else 's'}"
    highest = max(_mean(one, "avg_acc") for one in series)
    best = [one for one in series if highest - _mean(one, "avg_acc") < _VISIBLE]
    names = _listed([one.label for one in best])
    forgets = _forgets(best[0]) if len(best) == 1 else ""
    tail = f", and {forgets}" if forgets else ""
    if len(series) == 1:
        return f"{names} has an average accuracy (Avg.ACC) of {highest:.1f} % {after}{tail}."
    verb = "has" if len(best) == 1 else "share"
    subject = f"Of {len(series)} methods, {names} {verb}"
    sentence = f"{subject} the highest average accuracy {after}, {highest:.1f} %{tail}"
    forgetful = [one for one in series if _mean(one, "forgetting") >= _VISIBLE]
    if not forgetful:
        return f"{sentence}."
    worst = max(forgetful, key=lambda one: _mean(one, "forgetting"))
    if worst in best:
        return f"{sentence}; no other method forgets more." if len(best) == 1 else f"{sentence}."
    lost = _points(_mean(worst, "forgetting"))
    return f"{sentence}; {worst.label} forgets most, {lost} a task, and has {_mean(worst, 'avg_acc'):.1f} %."


def _against_baseline(learners: Sequence[Series]) -> list[str]:
    """Each method's Avg.ACC less the baseline's, sorted into better, unclear and not better."""
    baselines = [series for series in learners if series.method == BASELINE]
    if len(baselines) != 1 or len(learners) < 2:
        return []
    (baseline,) = baselines
    better, unclear, not_better = [], [], []
    for series in learners:
        if series is baseline:
            continue
        gain = paired_difference(series, baseline, "avg_acc")
        if gain is None:
            continue
        entry = f"{series.label} ({_difference(gain)})"
        if gain.mean < _VISIBLE:
            not_better.append(entry)
        elif gain.half_width is not None and gain.half_width >= gain.mean:
            unclear.append(entry)
        else:
            better.append(entry)
    sentences = []
    if better:
        sentences.append(f"Higher Avg.ACC than {baseline.label}, in points: {_listed(better)}.")
    if unclear:
        sentences.append(f"Higher than {baseline.label}, but the difference's interval includes 0: {_listed(unclear)}.")
    if not_better:
        sentences.append(f"No help here, Avg.ACC not above {baseline.label}: {_listed(not_better)}.")
    best = max(learners, key=lambda one: _mean(one, "avg_acc"))
    return sentences + _price(best, baseline)


def _difference(gain: Estimate) -> str:
    return _signed(gain.mean) + ("" if gain.half_width is None else f" ± {gain.half_width:.1f}")


def _price(best: Series, baseline: Series) -> list[str]:
    """Does the best method learn new tasks less well than the baseline? The usual price of remembering."""
    change = paired_difference(best, baseline, "new_acc")
    if best is baseline or change is None or change.mean > -_VISIBLE:
        return []
    return [f"{best.label} learns new tasks worse than {baseline.label}: New.ACC {_difference(change)} points."]


def _outside_the_contest(arena: Arena, references: Sequence[Series]) -> list[str]:
    """The methods measured only after the whole stream, and the model before any training."""
    sentences = []
    if references:
        named = _listed([f"{one.label} {_mean(one, 'avg_acc'):.1f} %" for one in references])
        sentences.append(f"For reference, measured only after the whole stream: {named}.")
    untrained = [series.matrix[0] for series in arena.series if not np.isnan(series.matrix[0]).any()]
    if untrained:
        before = float(np.mean(untrained[0]))
        sentences.append(f"The model before training: {before:.1f} %.")
        worse = [one.label for one in arena.series if _mean(one, "avg_acc") < before - _VISIBLE]
        if worse:
            sentences.append(f"Worse than without any training: {_listed(worse)}.")
    return sentences


def _about_chance(series: Sequence[Series]) -> list[str]:
    if all(len(one.runs) == 1 for one in series):
        return (
            ["One seed each: how much of a difference another seed would change cannot be told."]
            if len(series) > 1
            else []
        )
    single = ", of which a number without ± has only one" if any(len(one.runs) == 1 for one in series) else ""
    return [f"± is the half width of a 95 % t-interval over seeds{single}."]


def verdicts(scope: Scope) -> list[str]:
    """Which differences hold after Holm's correction, and which are left open: one sentence a test."""
    sentences = []
    for over, tests in (
        (
            scope.over,
            [(one.repeats, None if one.difference is None else one.difference.mean) for one in scope.contrasts],
        ),
        ("test rows", [(one.examples, one.examples_difference) for one in scope.contrasts]),
    ):
        found: dict[str, list[str]] = {"higher": [], "lower": [], "undecided": []}
        for one, (test, difference) in zip(scope.contrasts, tests, strict=True):
            if test.corrected is not None and difference is not None:
                sign = "higher" if difference > 0 else "lower"
                found[sign if test.corrected < ALPHA else "undecided"].append(one.label)
        said = "; ".join(f"{word}: {', '.join(labels)}" for word, labels in found.items() if labels)
        if said:
            sentences.append(f"Avg.ACC against {scope.reference}, tested over {over}, after correction: {said}.")
    return sentences
