"""Made-up run folders for the tests of the report: plausible numbers, the same ones every time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lcia import accuracy_metrics

ASSISTANT = (
    "travel_intent",
    "playlist_name",
    "banking_intent",
    "domain_choice",
    "artist_name",
    "kitchen_intent",
)
INTENT = "Answer with the intent of the request using a short phrase"
# share of a learned score that is left after each later task, of a task's possible score that is learned
KEEPS = {"lora": (0.72, 0.92), "lcia": (0.97, 0.88), "llaca": (0.9, 0.8), "ewc": (0.8, 0.7)}
REFERENCES = ("zero_shot", "multi_task")


def make_matrix(method: str, n_tasks: int, seed: int) -> list[list[float | None]]:
    """(T + 1, T) in percent; measured where a run of this method measures."""
    random = np.random.default_rng([seed, n_tasks, *map(ord, method)])
    ease = np.random.default_rng(n_tasks).uniform(55, 95, n_tasks)
    before = ease * 0.2
    keep, learn = KEEPS.get(method, tuple(random.uniform((0.6, 0.6), (0.98, 0.95))))
    matrix: list[list[float | None]] = [[None] * n_tasks for _ in range(n_tasks + 1)]
    matrix[0] = [round(float(score), 4) for score in before]
    rows = [n_tasks] if method in REFERENCES else range(1, n_tasks + 1)
    for row in rows:
        for task in range(n_tasks if method in REFERENCES else min(row + 1, n_tasks)):
            if method == "zero_shot":
                score = before[task]
            elif method == "multi_task":
                score = 0.95 * ease[task]
            elif task >= row:
                score = before[task] * 1.1
            else:
                score = before[task] + (learn * ease[task] - before[task]) * keep ** (row - 1 - task)
            noise = 0.0 if method == "zero_shot" else random.normal(0, 1.5)
            matrix[row][task] = round(float(np.clip(score + noise, 0, 100)), 4)
    return matrix


def make_run(
    folder: Path,
    method: str = "lcia",
    tasks: Sequence[str] = ASSISTANT,
    seed: int = 0,
    n_steps: int = 30,
    n_rows: int = 6,
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a run folder as a finished run leaves it.

    Args:
        config: added to config.yaml.
        changes: keys of results.json to set; None leaves the key out.
    """
    folder.mkdir(parents=True)
    matrix = make_matrix(method, len(tasks), seed)
    metrics: dict[str, float | None] = accuracy_metrics(matrix)
    if method in REFERENCES:
        metrics = {key: value if key == "avg_acc" else None for key, value in metrics.items()}
    grouped = method == "lcia"
    averages = {task: i for i, task in enumerate(tasks) if i and method in ("lcia", "llaca")}
    groups, scores = make_groups(tasks) if grouped else (dict.fromkeys(tasks, "shared"), {})
    if grouped:
        averages = {task: i for task, i in averages.items() if groups[task] in list(groups.values())[:i]}
    trained = () if method == "zero_shot" else tasks
    results: dict[str, Any] = {
        "method": method,
        "model": "smollm2-135m",
        "stream": "assistant",
        "seed": seed,
        "eval_split": "test",
        "tasks": list(tasks),
        "scorers": {task: "option_letter" if "choice" in task else "exact" for task in tasks},
        "groups": groups,
        "group_scores": scores,
        "threshold": 0.9 if grouped else None,
        "matrix": matrix,
        "metrics": metrics,
        "routing": {"accuracy": 98.5 if grouped else 100.0, "oracle_avg_acc": 70.25, "base_model_answers": 0},
        "ema": {
            "fallback_fraction": 0.125 if averages else None,
            "retained_mass": {task: 0.3 + 0.01 * i for task, i in averages.items()},
        },
        "cost": {
            "train_s": 20.5 * len(trained) + seed,
            "eval_s": 61.0 * len(tasks),
            "evaluations_run": 240,
            "evaluations_reused": 12 if grouped else 0,
            "peak_memory_mib": 2310.4,
            "trained_parameters": 4_884_480 if trained else 0,
            "stored_parameters": 4_884_480 * len(set(groups.values())) if trained else 0,
        },
        "versions": {"lcia": "0.1.0", "torch": "2.9.0", "transformers": "5.10.0"},
        "date": f"2025-01-0{seed % 9 + 1}T12:00:00Z",
    }
    results |= changes
    (folder / "results.json").write_text(json.dumps({k: v for k, v in results.items() if v is not None}))
    settings = {
        "stream": "assistant",
        "model": "smollm2-135m",
        "method": method,
        "seed": seed,
        "learning_rate": 5e-4,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings | {"output_dir": str(folder)} | (config or {})))
    log = [step for i, task in enumerate(trained) for step in _steps(task, i, n_steps, task in averages)]
    (folder / "training_log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in log))
    for i, task in enumerate(tasks):
        _write_predictions(folder, method, task, len(tasks), matrix[-1][i], n_rows, groups[task])
    return folder


def make_answers(
    method: str, tasks: Sequence[str], seed: int = 0, n_rows: int = 20
) -> dict[tuple[int, str], list[float]]:
    """(row, task) → the score of each test row, in [0, 1]: what is easy for one method is easy for all."""
    matrix = make_matrix(method, len(tasks), seed)
    answers = {}
    for column, task in enumerate(tasks):
        difficulty = np.random.default_rng([*map(ord, task)]).uniform(0, 100, n_rows)
        luck = np.random.default_rng([seed, *map(ord, method + task)]).normal(0, 8, n_rows)
        for row in range(len(matrix)):
            score = matrix[row][column]
            if score is not None:
                answers[row, task] = [float(hit) for hit in difficulty + luck < score]
    return answers


def make_answered_run(
    folder: Path,
    method: str,
    tasks: Sequence[str],
    seed: int = 0,
    answers: dict[tuple[int, str], list[float]] | None = None,
    **options: Any,
) -> Path:
    """A run folder whose matrix and metrics follow from its predictions.

    Args:
        answers: (row, task) → the score of each test row, in [0, 1]; made up where None.
        options: of `make_run`.
    """
    answers = make_answers(method, tasks, seed) if answers is None else answers
    matrix: list[list[float | None]] = [[None] * len(tasks) for _ in range(len(tasks) + 1)]
    for (row, task), scores in answers.items():
        matrix[row][tasks.index(task)] = 100 * sum(scores) / len(scores)
    metrics = accuracy_metrics(matrix)
    if method in REFERENCES:
        metrics = {key: value if key == "avg_acc" else None for key, value in metrics.items()}
    make_run(folder, method, tasks, seed, **({"matrix": matrix, "metrics": metrics} | options))
    for (row, task), scores in answers.items():
        path = folder / "predictions" / str(row) / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {"prompt": "q", "prediction": "p", "reference": ["r"], "group": "shared"}
        lines = [json.dumps({"id": f"{task}-{i}", "score": score} | line) for i, score in enumerate(scores)]
        path.write_text("\n".join(lines) + "\n")
    return folder


def make_groups(tasks: Sequence[str]) -> tuple[dict[str, str], dict[str, dict[str, float]]]:
    """Every task whose name ends in `intent` is in one group, every third other task in a second."""
    groups: dict[str, str] = {}
    scores: dict[str, dict[str, float]] = {}
    for i, task in enumerate(tasks):
        home = "intent" if task.endswith("intent") else "name" if task.endswith("name") else f"{task}"
        home = f"g{list(dict.fromkeys([*groups.values()])).index(home) + 1}" if home in groups else home
        scores[task] = {
            group: 1.0 if group == home else round(0.1 + 0.07 * ((i + j) % 4), 3)
            for j, group in enumerate(dict.fromkeys(groups.values()))
        }
        groups[task] = home
    return groups, scores


def _steps(task: str, number: int, n_steps: int, averages: bool) -> list[dict[str, Any]]:
    random = np.random.default_rng([number, n_steps])
    steps = []
    for step in range(1, n_steps + 1, max(1, n_steps // 15)):
        loss = 0.4 + 2.2 * np.exp(-6 * step / n_steps) + random.normal(0, 0.06)
        record = {
            "task": task,
            "step": step,
            "total_steps": n_steps,
            "loss": float(abs(loss)),
            "learning_rate": 5e-4,
        }
        if averages:
            middle = 0.96 + 0.02 * step / n_steps + random.normal(0, 0.002)
            record |= {"beta_p10": middle - 0.02, "beta_p50": middle, "beta_p90": min(1.0, middle + 0.012)}
            record |= {"fallback_fraction": float(0.3 / step), "retained_mass": float(0.97**step)}
        steps.append(record)
    return steps


def _write_predictions(
    folder: Path, method: str, task: str, n_tasks: int, percent: float | None, n_rows: int, group: str
) -> None:
    path = folder / "predictions" / str(n_tasks) / f"{task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    right = round(n_rows * (percent or 0) / 100)
    lines = []
    for i in range(n_rows):
        reference = ["book a flight", "flight"]
        hit = (i * 5 + len(method)) % n_rows < right
        lines.append(
            {
                "id": f"{task}-{i}",
                "prompt": f"<|im_start|>user\ni want to fly to city {i}\n{INTENT}<|im_end|>\n",
                "prediction": reference[0] if hit else "cancel the reservation",
                "reference": reference,
                "score": float(hit),
                "group": group,
            }
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
