"""The six-task assistant stream on SmolLM2-135M: does lcia forget less than sequential LoRA?

    make study-demo

Size: 30 optimizer steps of 8 rows a task, 40 evaluation rows a task, three seeds; about 75 minutes on 2 CPU cores.
Chosen first, on dev rows, with a seed of its own: the learning rate of each method that learns one task after another,
on this stream; then the retained mass, on the three tasks that share an instruction.
"""

from __future__ import annotations

from typing import Any

from study import ROOT, mean_and_spread, run_all

from lcia.files import write_text

STUDY = "demo"
SEEDS = (0, 1, 2)
COMMON: dict[str, Any] = {
    "stream": "assistant",
    "model": "smollm2-135m",
    "max_steps": 30,
    "per_device_train_batch_size": 8,
    "lora_r": 16,
    "max_eval_examples": 40,
    "max_new_tokens": 16,
}
ONE_GROUP = ["travel_intent", "banking_intent", "kitchen_intent"]
RETAINED = (0.1, 0.3, 0.5)  # tried on dev rows; lcia's default is 0.3
RATES = (5e-4, 1e-3, 2e-3)  # tried on dev rows
TUNED = ("lora", "llaca", "lcia")
MULTI_TASK_RATE = 1e-3  # the best of four on dev rows (results/methods.md)
TUNING = {"eval_split": "dev", "seed": 100}
METHODS = ("zero_shot", "lora", "multi_task", "llaca", "lcia")

Runs = dict[str, dict[str, Any]]


def rate_runs() -> Runs:
    few = {"max_eval_examples": 20}
    return {
        f"tune-{method}-{rate:g}": {**COMMON, **TUNING, **few, "learning_rate": rate, "method": method}
        for method in TUNED
        for rate in RATES
    }


def best_rates(found: Runs) -> dict[str, float]:
    """The rate with the highest Avg.ACC on dev rows, of equal ones the lowest."""
    return {
        method: max(RATES, key=lambda rate: (found[f"tune-{method}-{rate:g}"]["metrics"]["avg_acc"], -rate))
        for method in TUNED
    }


def retained_runs(rate: float) -> Runs:
    return {
        f"tune-retained-{retained}": {
            **COMMON,
            **TUNING,
            "tasks": ONE_GROUP,
            "learning_rate": rate,
            "method": {"name": "lcia", "rule": "fixed", "retained": retained},
        }
        for retained in RETAINED
    }


def method_runs(rates: dict[str, float]) -> Runs:
    """Seed by seed, so that a part of the study compares all methods."""
    runs = {"zero_shot-seed0": {**COMMON, "seed": 0, "method": "zero_shot"}}  # nothing is drawn without training
    for seed in SEEDS:
        for method, rate in {**rates, "multi_task": MULTI_TASK_RATE}.items():
            runs[f"{method}-seed{seed}"] = {**COMMON, "seed": seed, "learning_rate": rate, "method": method}
    return runs


def write_table(by_rate: Runs, by_retained: Runs, runs: Runs) -> None:
    def row(label: str, found: list[dict[str, Any]]) -> str:
        cells = [
            mean_and_spread([run["metrics"][key] for run in found]) for key in ("avg_acc", "forgetting", "new_acc")
        ]
        return f"| {label} | {' | '.join(cells)} |"

    rates = {**best_rates(by_rate), "multi_task": MULTI_TASK_RATE}
    versions = next(iter(runs.values()))["versions"]
    dates = sorted(run["date"] for run in runs.values())
    header = ["| Avg.ACC | Forgetting | New.ACC |", "|---|---|---|---|"]
    lines = [
        "# Six-task assistant stream, SmolLM2-135M, LoRA r = 16",
        "",
        f"Command: `make study-demo`. {COMMON['max_steps']} steps of {COMMON['per_device_train_batch_size']} rows",
        f"a task, {COMMON['max_eval_examples']} test rows a task, constant learning rates, chosen on dev rows (below).",
        f"Seeds {', '.join(map(str, SEEDS))}; mean ± sample standard deviation over seeds; percent. Two runs at a",
        "time, one thread each, on 2 CPU cores: another number of threads rounds bfloat16 sums otherwise, and so gives",
        "other runs.",
        f"Dates {dates[0][:10]} to {dates[-1][:10]}; versions: "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ".",
        "",
        "| method, learning rate " + header[0],
        header[1],
        *(
            row(
                f"{name}, {rates[name]:g}" if name in rates else name,
                [run for key, run in runs.items() if key.startswith(f"{name}-seed")],
            )
            for name in METHODS
        ),
        "",
        "zero_shot has no seeds (nothing is drawn). Forgetting and New.ACC need an order of tasks.",
        "",
        "## The learning rates, chosen on dev rows",
        "",
        "All six tasks, seed 100, 20 of the 50 dev rows each; no test row was looked at for this choice. multi_task",
        "has the rate that was the best of four on dev rows in results/methods.md.",
        "",
        "| method, learning rate " + header[0],
        header[1],
        *(row(name.removeprefix("tune-").replace("-", ", ", 1), [run]) for name, run in by_rate.items()),
        "",
        "## The retained mass, on dev rows",
        "",
        "Three tasks that share one instruction and so one adapter (travel, banking, kitchen), method `lcia` with its",
        "rate, seed 100, 40 of the 50 dev rows. The runs above have the default, 0.3.",
        "",
        "| retained mass of the start point over a task " + header[0],
        header[1],
        *(row(name.removeprefix("tune-retained-"), [run]) for name, run in by_retained.items()),
        "",
    ]
    write_text(ROOT / "results" / STUDY / "README.md", "\n".join(lines))


if __name__ == "__main__":
    by_rate = run_all(STUDY, rate_runs())
    rates = best_rates(by_rate)
    results = run_all(STUDY, {**retained_runs(rates["lcia"]), **method_runs(rates)})
    write_table(
        by_rate,
        {name: results[name] for name in retained_runs(rates["lcia"])},
        {name: results[name] for name in method_runs(rates)},
    )
