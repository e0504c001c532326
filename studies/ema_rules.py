"""Which averaging rule keeps the most and learns the most, inside one adapter?

    make study-ema-rules

Three tasks of the assistant stream that share an instruction, and so one adapter; five seeds; every rule takes over
the same first task. 30 optimizer steps of 8 rows a task, 40 rows a task and split; about two hours on 2 CPU cores.
"""

from __future__ import annotations

from typing import Any

from study import run_all

STUDY = "ema_rules"
SEEDS = (0, 1, 2, 3, 4)
COMMON: dict[str, Any] = {
    "stream": "assistant",
    "tasks": ["travel_intent", "banking_intent", "kitchen_intent"],
    "model": "smollm2-135m",
    "max_steps": 30,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-4,
    "lora_r": 16,
    "max_eval_examples": 40,
    "max_new_tokens": 16,
}
# The published rules with the constant that the paper gives them as their fallback.
RULES: dict[str, dict[str, Any]] = {
    "fisher-1": {"rule": "fisher", "strength": 1.0},
    "fixed-retained-0.3": {"rule": "fixed", "retained": 0.3},
    "fisher-0.3": {"rule": "fisher", "strength": 0.3},
    "fixed-0.99": {"rule": "fixed", "retained": None, "fallback": 0.99},
    "fisher-0.1": {"rule": "fisher", "strength": 0.1},
    "released": {"rule": "released", "retained": None, "fallback": 0.99},
    "eq45": {"rule": "eq45", "retained": None, "fallback": 0.99},
}
FIRST = "fisher-1"  # its first task is gone on with by all others: fisher also keeps the importance the others ignore


def rule_runs(rules: list[str]) -> dict[str, dict[str, Any]]:
    return {
        f"{rule}-seed{seed}": {**COMMON, "seed": seed, "method": {"name": "lcia", **RULES[rule]}}
        for rule in rules
        for seed in SEEDS
    }


if __name__ == "__main__":
    first = run_all(STUDY, rule_runs([FIRST]))
    others = rule_runs([rule for rule in RULES if rule != FIRST])
    runs = {**first, **run_all(STUDY, others, first_task_of={name: f"{FIRST}-seed{name[-1]}" for name in others})}
