"""Every method on the assistant stream, each with the learning rate and the strength that suit it.

    make study-methods

First the settings, on dev rows and with a seed of their own, on two tasks that share an instruction: four learning
rates, two other strengths at the best of them, and twice the highest rate for as long as the highest is the best. Then
three tasks, two seeds, test rows; the four best methods, lora and lcia learn them in the other order too. 30 optimizer
steps of 8 rows a task, 40 rows a task and split; about three hours on 2 CPU cores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from study import ROOT, mean_and_spread, paired_p, run_all

from lcia.files import write_text
from lcia.report.statistics import holm, sign_flip_test

STUDY = "methods"
SEEDS = (0, 1)
TUNING_SEED = 100
LEARNING_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
HIGHER_RATES = (4e-3, 8e-3)  # each tried only where the one before it was the best
COMMON: dict[str, Any] = {
    "stream": "assistant",
    "model": "smollm2-135m",
    "max_steps": 30,
    "per_device_train_batch_size": 8,
    "lora_r": 16,
    "max_eval_examples": 40,
    "max_new_tokens": 16,
}
TASKS = ["travel_intent", "playlist_name", "banking_intent"]
TUNING_TASKS = ["travel_intent", "banking_intent"]  # one instruction: lcia has one adapter for both
# method → the option that says how strongly it keeps the old, and its values: the default first
STRENGTHS: dict[str, tuple[str, tuple[float, ...]]] = {
    "l2": ("strength", (0.01, 0.001, 0.1)),
    "ewc": ("strength", (5000.0, 500.0, 50000.0)),
    "lwf": ("weight", (1.0, 0.1, 10.0)),
    "o_lora": ("orthogonality", (0.5, 0.05, 5.0)),
    "model_tailor": ("keep", (0.1, 0.03, 0.3)),
    "pgp": ("energy", (0.9, 0.7, 0.97)),
    "stable_ema": ("beta", (0.99, 0.97, 0.9)),
    "lcia": ("retained", (0.3, 0.1, 0.5)),
}
TUNED = ["lora", "multi_task", "replay", "agem", "moelora", "adapter_cl", *STRENGTHS]
# What is not tuned by itself takes the settings of another: inside one group llaca is lcia.
SETTINGS_OF = {"llaca": "lcia", "replay-50": "replay", "lcia+replay": "lcia", "ewc-last": "ewc", "zero_shot": "lora"}
ORDER = [
    "lora", "lcia", "multi_task", "llaca", "stable_ema", "l2", "ewc", "lwf", "o_lora", "pgp", "model_tailor",
    "replay", "replay-50", "agem", "moelora", "adapter_cl", "lcia+replay", "ewc-last", "zero_shot",
]  # fmt: skip
WITHOUT_ORDER = {"multi_task", "zero_shot"}
Settings = tuple[float, float | None]  # learning rate, strength (None: the method has none)


def spec(method: str, strength: float | None) -> Any:
    """The configuration's `method`."""
    if method == "replay-50":
        return {"name": "replay", "memory": 50}
    if method == "lcia+replay":
        return [spec("lcia", strength), "replay"]
    if strength is None or method == "zero_shot":
        return method
    if method == "ewc-last":
        return {"name": "ewc", "strength": strength, "accumulate": False}
    return {"name": method, STRENGTHS[SETTINGS_OF.get(method, method)][0]: strength}


def tuning_run(method: str, settings: Settings) -> tuple[str, dict[str, Any]]:
    rate, strength = settings
    name = f"tune-{method}-lr{rate:g}" + ("" if strength is None else f"-{strength:g}")
    return name, {
        **COMMON,
        "tasks": TUNING_TASKS,
        "eval_split": "dev",
        "seed": TUNING_SEED,
        "learning_rate": rate,
        "method": spec(method, strength),
    }


def tune() -> dict[str, list[tuple[Settings, float]]]:
    """{method: [(settings, Avg.ACC on dev rows)]}, best first; the first of equals was tried first."""
    rates = {m: [(rate, STRENGTHS[m][1][0] if m in STRENGTHS else None) for rate in LEARNING_RATES] for m in TUNED}
    tried = _measure(rates)

    def best(method: str) -> Settings:
        return max(tried[method], key=lambda one: one[1])[0]

    def measure(wanted: Mapping[str, Sequence[Settings]]) -> None:
        for method, found in _measure(wanted).items():
            tried[method] = tried[method] + found

    measure({m: [(best(m)[0], value) for value in values[1:]] for m, (_, values) in STRENGTHS.items()})
    highest = LEARNING_RATES[-1]
    for rate in HIGHER_RATES:
        measure({m: [(rate, best(m)[1])] for m in TUNED if best(m)[0] == highest})
        highest = rate
    return {m: sorted(tried[m], key=lambda one: -one[1]) for m in TUNED}


def _measure(wanted: Mapping[str, Sequence[Settings]]) -> dict[str, list[tuple[Settings, float]]]:
    found = run_all(STUDY, dict(tuning_run(m, one) for m, settings in wanted.items() for one in settings))
    return {
        m: [(one, found[tuning_run(m, one)[0]]["metrics"]["avg_acc"]) for one in settings]
        for m, settings in wanted.items()
    }


def method_runs(
    chosen: Mapping[str, Settings], methods: Sequence[str], reverse: bool = False
) -> dict[str, dict[str, Any]]:
    """Seed by seed, so that a part of the study compares all methods."""
    runs = {}
    for seed in SEEDS:
        for method in methods:
            rate, strength = chosen[SETTINGS_OF.get(method, method)]
            runs[f"{method}{'-reverse' if reverse else ''}-seed{seed}"] = {
                **COMMON,
                "tasks": TASKS[::-1] if reverse else TASKS,
                "seed": seed,
                "learning_rate": rate,
                "method": spec(method, strength),
            }
    return runs


def avg_acc(runs: Mapping[str, Any], method: str) -> list[float]:
    return [runs[f"{method}-seed{seed}"]["metrics"]["avg_acc"] for seed in SEEDS]


def row_test(runs: Mapping[str, Any], method: str, reference: str) -> float:
    """p of the paired sign-flip test over test rows, a row's difference being the mean over seeds."""
    shares: dict[tuple[str, str], float] = {}
    for seed in SEEDS:
        mine, theirs = (runs[f"{name}-seed{seed}"]["row_scores"] for name in (method, reference))
        for task in mine:
            for row in mine[task]:
                share = (mine[task][row] - theirs[task][row]) / (len(SEEDS) * len(mine) * len(mine[task]))
                shares[task, row] = shares.get((task, row), 0.0) + share
    return sign_flip_test(list(shares.values()))


def against(runs: Mapping[str, Any], methods: Sequence[str], reference: str) -> dict[str, str]:
    """{method: difference, its t test over seeds, its test over rows with Holm's correction}."""
    others = [method for method in methods if method != reference]
    corrected = holm([row_test(runs, method, reference) for method in others])
    found = {reference: "–"}
    for method, p in zip(others, corrected, strict=True):
        over_seeds = paired_p(avg_acc(runs, method), avg_acc(runs, reference))
        found[method] = f"{over_seeds}; rows p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
    return found


def write_tables(
    tuning: Mapping[str, list[tuple[Settings, float]]],
    runs: Mapping[str, Any],
    reverse: Mapping[str, Any],
    best: Sequence[str],
) -> None:
    def settings_text(method: str) -> str:
        if method == "zero_shot":
            return "–"
        (rate, strength), _ = tuning[SETTINGS_OF.get(method, method)][0]
        option = STRENGTHS[SETTINGS_OF.get(method, method)][0] if strength is not None else ""
        return f"{rate:g}" + (f", {option} {strength:g}" if strength is not None else "")

    def cells(found: Mapping[str, Any], name: str) -> list[str]:
        chosen = [found[f"{name}-seed{seed}"]["metrics"] for seed in SEEDS]
        return [mean_and_spread([one[key] for one in chosen]) for key in ("avg_acc", "forgetting", "new_acc", "fwt")]

    def cost(method: str) -> list[str]:
        costs = [runs[f"{method}-seed{seed}"]["cost"] for seed in SEEDS]
        first = costs[0]
        passes = sum(first.get(f"extra_{kind}_rows", 0) for kind in ("forward", "backward"))
        pool = first.get("stored_parameters", first["trained_parameters"])  # older results name the pool's so
        seconds = min(one["train_s"] for one in costs)  # other programs make it longer, never shorter
        return [
            f"{pool / 1e6:.1f} M",
            f"{first.get('numbers_stored', 0) / 1e6:.1f} M",
            f"{first.get('examples_stored', 0):g}",
            f"{passes:g}",
            f"{seconds:.0f}",
        ]

    order = sorted(ORDER, key=lambda method: -sum(avg_acc(runs, method)))
    dates = sorted(run["date"] for run in [*runs.values(), *reverse.values()])
    to_lora, to_lcia = against(runs, order, "lora"), against(runs, order, "lcia")
    reversed_runs = {name.replace("-reverse", ""): run for name, run in reverse.items()}
    back_to_lora, back_to_lcia = against(reversed_runs, best, "lora"), against(reversed_runs, best, "lcia")
    versions = next(iter(runs.values()))["versions"]
    lines = [
        "# Every method on the assistant stream",
        "",
        f"Command: `make study-methods`. SmolLM2-135M, LoRA r = {COMMON['lora_r']}, {COMMON['max_steps']} steps of "
        f"{COMMON['per_device_train_batch_size']} rows a task, constant learning rate,",
        f"{COMMON['max_eval_examples']} test rows a task. Tasks in order: {', '.join(TASKS)}; the first and the last",
        "share an instruction. Two runs at a time, one thread each, on 2 CPU cores.",
        f"Dates {dates[0][:10]} to {dates[-1][:10]}; versions: "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ".",
        "",
        "Learning rate and strength were tuned for each method on dev rows, over the same small grid and with one seed",
        f"({TUNING_SEED}), on travel and banking alone: learning rates {', '.join(f'{r:g}' for r in LEARNING_RATES)},",
        "two other strengths at the best of them, then "
        + " and ".join(f"{r:g}" for r in HIGHER_RATES)
        + ", each where the rate before it was the best (below).",
        "llaca and lcia+replay take lcia's settings, replay-50 those of replay, ewc-last (the last task's Fisher",
        "information alone) those of ewc. No test row was looked at for these choices.",
        "",
        f"Mean ± sample standard deviation over seeds {', '.join(map(str, SEEDS))}, percent. `against`: difference of",
        "Avg.ACC; p of the paired t test over seeds (two seeds: it can hardly find anything), and p of the paired",
        "sign-flip test over test rows (mean over seeds), corrected by Holm over the column.",
        "| method | learning rate, strength | Avg.ACC | Forgetting | New.ACC | FWT | against lora | against lcia |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| `{m}` | {settings_text(m)} | {' | '.join(cells(runs, m))} | {to_lora[m]} | {to_lcia[m]} |"
            for m in order
        ),
        "",
        "multi_task has all rows of all tasks at once, zero_shot is the base model: they have no order, and nothing",
        "is forgotten or new.",
        "",
        "## Cost",
        "",
        "Parameters in the pool, numbers kept beside it, rows kept of old tasks, rows passed forward or back beside",
        "those of training, and seconds of training: the faster seed's, two runs side by side on a machine with other",
        "work, so rough.",
        "",
        "| method | parameters | numbers stored | rows stored | extra passes | seconds |",
        "|---|---|---|---|---|---|",
        *(f"| `{m}` | {' | '.join(cost(m))} |" for m in order),
        "",
        "## The other order",
        "",
        "The four that learn one task after another and are best above, by test rows, so that others might do better",
        f"here; lora and lcia. Their settings are the same: {TASKS[-1]} first, {TASKS[0]} last.",
        "",
        "| method | Avg.ACC | Forgetting | New.ACC | FWT | against lora | against lcia |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| `{m}` | {' | '.join(cells(reverse, f'{m}-reverse'))} | {back_to_lora[m]} | {back_to_lcia[m]} |"
            for m in best
        ),
        "",
        "## The settings, tried on dev rows",
        "",
        "| method | learning rate, strength: Avg.ACC on dev rows |",
        "|---|---|",
        *(
            f"| `{m}` | "
            + "; ".join(
                f"{rate:g}{'' if strength is None else f', {strength:g}'}: {score:.1f}"
                for (rate, strength), score in tuning[m]
            )
            + " |"
            for m in TUNED
        ),
        "",
    ]
    write_text(ROOT / "results" / f"{STUDY}.md", "\n".join(lines))


if __name__ == "__main__":
    tuning = tune()
    chosen = {method: tried[0][0] for method, tried in tuning.items()}
    runs = run_all(STUDY, method_runs(chosen, ORDER))
    sequential = sorted(set(ORDER) - WITHOUT_ORDER, key=lambda method: (-sum(avg_acc(runs, method)), method))
    best = [method for method in sequential if method in {*sequential[:4], "lora", "lcia"}]
    write_tables(tuning, runs, run_all(STUDY, method_runs(chosen, best, reverse=True)), best)
