"""The vision stream on lite-llava: the methods of the paper's Table 1, in small.

    lcia backbone build lite-llava --captions-only
    make study-methods         # strengths are those it found on dev rows
    make study-vision          # LCIA_DATA is the folder in which vision_stream/ lies

First the learning rates, of the adapter and of the projector, on dev rows, with lora and two tasks alone. Then four
tasks, 30 steps of 8 rows each, 40 test rows: lora, lcia, replay and multi_task with three seeds, seven others with
one, which is 19 runs of 4 x 30 steps. Before them each task alone (4 runs of 30 steps) on all of its test rows, against
the answer that its training rows have most often and against the model before. In all 2,600 steps: a little more than
two hours of CPU.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from methods import HIGHER_RATES, LEARNING_RATES, STRENGTHS, TUNING_SEED, Settings, spec, tuning_run
from methods import STUDY as TUNING_STUDY
from study import ROOT, mean_and_spread, paired_p, run_all

from lcia.backbone.lite_llava import COMMAND, folder
from lcia.config import parse_config
from lcia.errors import UserError
from lcia.files import write_json, write_text
from lcia.methods import build_method
from lcia.methods.averaging import Averaging
from lcia.report.statistics import holm, sign_flip_test
from lcia.session import load_run_stream
from lcia.stream import SCORERS

STUDY = "vision"
SEEDS = (0, 1, 2)
TASKS = ["eurosat_mcq", "clothing_cls", "coco_vqa", "bccd_ground"]
COMMON: dict[str, Any] = {
    "stream": "vision",
    "model": "lite-llava",
    "max_steps": 30,
    "per_device_train_batch_size": 8,
    "lora_r": 16,
    "max_eval_examples": 40,
    "max_new_tokens": 24,
}
ALL_TEST_ROWS: dict[str, Any] = {**COMMON, "max_eval_examples": None, "seed": 0}
THREE_SEEDS = ("lora", "lcia", "replay", "multi_task")
AS_PUBLISHED = "continual_llava-2e-5"
ONE_SEED = ("stable_ema", "llaca", "ewc", "moelora", "eproj", "continual_llava", AS_PUBLISHED)
STRENGTH_OF = {"llaca": "lcia"}  # what the study of the methods did not tune takes the strength of another
# of the adapter, of the projector
RATES = ((5e-4, 5e-4), (1e-3, 1e-4), (5e-4, 5e-5), (2e-3, 2e-4))
TUNING_TASKS = ("clothing_cls", "coco_vqa")
CLEAR = 0.05


# --- what the study stands on


def alignment() -> dict[str, Any]:
    """How `model: lite-llava` was made: its complete.json.

    Raises:
        SystemExit: its projector was aligned on the tasks' own questions, or results lie here of another build.
    """
    wanted = f"{COMMAND} --captions-only"
    try:
        made: dict[str, Any] = json.loads((folder() / "complete.json").read_text(encoding="utf-8"))
    except UserError:
        raise SystemExit(f"lite-llava is not built yet: {wanted}") from None
    if not made["settings"]["captions_only"]:
        raise SystemExit(
            f"lite-llava was aligned on the tasks' own questions and answers, so what a task teaches cannot be told; "
            f"{wanted}"
        )
    kept = ROOT / "results" / STUDY / "lite-llava.json"
    if not kept.is_file():
        write_json(kept, made)
    if json.loads(kept.read_text(encoding="utf-8")) != made:
        raise SystemExit(f"{kept.parent} holds results of another build of lite-llava; remove it")
    return made


def rate_runs() -> dict[str, dict[str, Any]]:
    """Each pair of rates on each of two tasks alone, on dev rows, with a seed of their own."""
    own = {"method": "lora", "eval_split": "dev", "seed": TUNING_SEED}
    return {
        f"tune-{task}-{rate:g}-{projector:g}": {
            **COMMON, **own, "tasks": [task], "learning_rate": rate, "projector_learning_rate": projector
        }
        for rate, projector in RATES
        for task in TUNING_TASKS
    }  # fmt: skip


def best_rates(found: Mapping[str, Any]) -> tuple[float, float]:
    """Of the highest mean over the tuning tasks; the first of equals."""
    return max(RATES, key=lambda pair: sum(tuning_scores(found)[pair]))


def tuning_scores(found: Mapping[str, Any]) -> dict[tuple[float, float], list[float]]:
    return {
        (rate, projector): [found[f"tune-{task}-{rate:g}-{projector:g}"]["metrics"]["avg_acc"] for task in TUNING_TASKS]
        for rate, projector in RATES
    }


def tuned(method: str) -> Settings:
    """Its best settings on the dev rows of the assistant stream; the first of equals was tried first.

    Raises:
        SystemExit: the study of the methods has not tried all of them yet.
    """
    strengths = STRENGTHS[method][1] if method in STRENGTHS else (None,)
    tried: dict[Settings, float] = {}
    for rates in (LEARNING_RATES, HIGHER_RATES):
        for settings in ((rate, strength) for strength in strengths for rate in rates):
            kept = ROOT / "results" / TUNING_STUDY / f"{tuning_run(method, settings)[0]}.json"
            if kept.is_file():
                tried[settings] = json.loads(kept.read_text(encoding="utf-8"))["metrics"]["avg_acc"]
    best = max(tried, key=tried.__getitem__, default=None)  # max keeps the first of equals
    all_strengths = {strength for _, strength in tried} == set(strengths)
    all_rates = {(rate, strengths[0]) for rate in LEARNING_RATES} <= tried.keys()
    highest = max((rate for rate, _ in tried), default=0.0)
    if best is None or not all_strengths or not all_rates or (best[0] == highest < HIGHER_RATES[-1]):
        raise SystemExit(f"results/{TUNING_STUDY}: {method} is not tuned to the end; `make study-methods` comes first")
    return best


# --- the runs


def own_values(name: str, rates: tuple[float, float]) -> dict[str, Any]:
    """What the runs of a method, called `name` here, do not share with the others."""
    if name == AS_PUBLISHED:
        return {"learning_rate": 2e-5, "lr_scheduler_type": "cosine", "method": "continual_llava"}
    settings_of = STRENGTH_OF.get(name, name)
    strength = tuned(settings_of)[1] if settings_of in STRENGTHS else None
    return {"learning_rate": rates[0], "projector_learning_rate": rates[1], "method": spec(name, strength)}


def stream_runs(names: Sequence[str], seeds: Sequence[int], rates: tuple[float, float]) -> dict[str, dict[str, Any]]:
    return {
        f"{name}-seed{seed}": {**COMMON, "tasks": TASKS, "seed": seed, **own_values(name, rates)}
        for seed in seeds
        for name in names
    }


def single_runs(rates: tuple[float, float]) -> dict[str, dict[str, Any]]:
    """Each task alone, and the model before, on all test rows."""
    own = own_values("lora", rates)
    alone = {f"alone-{task}": {**ALL_TEST_ROWS, "tasks": [task], **own} for task in TASKS}
    return {"before": {**ALL_TEST_ROWS, "tasks": TASKS, "method": "zero_shot"}, **alone}


def most_frequent() -> dict[str, tuple[str, dict[str, float]]]:
    """{task: (the answer that its training rows have most often, {test row's id: the score it gets})}."""
    config = parse_config({**ALL_TEST_ROWS, "tasks": TASKS, "output_dir": "none"}, where="study")
    found = {}
    for task in load_run_stream(config):
        answer = Counter(row.outputs[0] for row in task.train).most_common(1)[0][0]
        found[task.name] = (answer, {row.id: float(SCORERS[task.scorer](answer, row.outputs)) for row in task.test})
    return found


# --- can each task be learned at all?


def percent(scores: Mapping[str, float]) -> float:
    return 100 * sum(scores.values()) / len(scores)


def learnable(
    alone: Mapping[str, Mapping[str, float]], baselines: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> tuple[dict[str, dict[str, str]], dict[str, list[str]]]:
    """Each task learned alone against what asks for no learning.

    Args:
        alone: {task: {test row's id: score}}; baselines: {name: the same}.

    Returns:
        {task: {baseline: difference and p}}, and {task: the baselines it is not clearly above}: where its score is not
        higher, or p ≥ 0.05 in the paired sign-flip test over rows, corrected by Holm over all of these tests.
    """
    pairs = [(task, name) for task in alone for name in baselines]
    differences = {}
    for task, name in pairs:
        mine, theirs = alone[task], baselines[name][task]
        if mine.keys() != theirs.keys():
            raise ValueError(f"{task}: learned alone and {name!r} were not measured on the same rows")
        differences[task, name] = [mine[row] - theirs[row] for row in mine]
    corrected = dict(zip(pairs, holm([sign_flip_test(differences[pair], *pair) for pair in pairs]), strict=True))
    texts: dict[str, dict[str, str]] = {task: {} for task in alone}
    failed: dict[str, list[str]] = {task: [] for task in alone}
    for (task, name), p in corrected.items():
        values = differences[task, name]
        mean = 100 * sum(values) / len(values)
        texts[task][name] = f"{mean:+.1f}, p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
        if mean <= 0 or p >= CLEAR:
            failed[task].append(name)
    return texts, failed


# --- the page


def matrix(run: Mapping[str, Any]) -> list[str]:
    rows = ["before", *(f"after {task}" for task in run["tasks"])]
    lines = [f"| | {' | '.join(run['tasks'])} |", "|---" * (len(run["tasks"]) + 1) + "|"]
    for name, cells in zip(rows, run["matrix"], strict=True):
        lines.append(f"| {name} | {' | '.join('' if cell is None else f'{cell:.1f}' for cell in cells)} |")
    return lines


def settings_row(name: str, run: Mapping[str, Any]) -> str:
    """Learning rate, options, averaging rule, measured retained mass, and the tasks that share an adapter."""
    config = parse_config({**run["config"], "output_dir": "none"}, where="study")
    parts = config.method_parts()
    options = ", ".join(f"{key} {value}" for _, chosen in parts for key, value in chosen.items())
    rules = [leaf.options for leaf in build_method(parts).leaves() if isinstance(leaf, Averaging)]
    rule = ", ".join(
        f"{one['rule']}, retained {one['retained']:g}" if "retained" in one else f"{one['rule']}, β {one['fallback']:g}"
        for one in rules
    )
    masses = ", ".join(f"{task} {mass:.2f}" for task, mass in run["ema"]["retained_mass"].items())
    members: dict[str, list[str]] = {}
    for task, group in run["groups"].items():
        members.setdefault(group, []).append(task)
    shared = [" + ".join(tasks) for tasks in members.values() if len(tasks) > 1]
    groups = "all" if len(members) == 1 else ", ".join(shared) or "none"
    schedule = "" if config.lr_scheduler_type == "constant" else f", {config.lr_scheduler_type}"
    projector = "" if config.projector_learning_rate is None else f", projector {config.projector_learning_rate:g}"
    cells = [
        f"{config.learning_rate:g}{projector}{schedule}",
        options,
        rule,
        masses or ("no task" if rule else ""),
        groups,
    ]
    return f"| `{name}` | {' | '.join(cell or '–' for cell in cells)} |"


def write_tables(
    found: Mapping[str, Any], answers: Mapping[str, tuple[str, Mapping[str, float]]], made: Mapping[str, Any]
) -> None:
    def of(method: str) -> list[Any]:
        return [found[f"{method}-seed{seed}"] for seed in (SEEDS if method in THREE_SEEDS else SEEDS[:1])]

    def row(method: str) -> str:
        runs = of(method)
        cells = [mean_and_spread([run["metrics"][key] for run in runs]) for key in ("avg_acc", "forgetting", "new_acc")]
        against = "one seed"
        if method == "lora":
            against = "–"
        elif method in THREE_SEEDS:
            against = paired_p(*([run["metrics"]["avg_acc"] for run in of(name)] for name in (method, "lora")))
        return f"| `{method}` | {' | '.join(cells)} | {against} |"

    any_run = found["lora-seed0"]
    before = found["before"]["row_scores"]
    alone = {task: found[f"alone-{task}"]["row_scores"][task] for task in TASKS}
    constant = {task: scores for task, (_, scores) in answers.items()}
    baselines = {"its most frequent answer": constant, "the model before": before}
    texts, failed = learnable(alone, baselines)
    warnings = [
        f"`{task}` learned alone is not clearly above {' nor above '.join(names)} "
        f"({'; '.join(texts[task][name] for name in names)}): what a method keeps or forgets of it says little here."
        for task, names in failed.items()
        if names
    ]
    print("\n".join(warnings) or "Each task learned alone is clearly above both.")
    names = sorted(
        [*THREE_SEEDS, *ONE_SEED], key=lambda m: -sum(run["metrics"]["avg_acc"] for run in of(m)) / len(of(m))
    )
    dates = sorted(run["date"] for run in found.values())
    aligned = made["settings"]
    lines = [
        "# The vision stream on lite-llava",
        "",
        f"Command: `make study-vision`. Four tasks in order, {COMMON['max_steps']} steps of"
        f" {COMMON['per_device_train_batch_size']} rows a task, r = {COMMON['lora_r']}, {COMMON['max_eval_examples']}"
        " test rows a task. Two",
        "runs at a time, one thread each.",
        f"Dates {dates[0][:10]} to {dates[-1][:10]}; versions: "
        + ", ".join(f"{name} {number}" for name, number in any_run["versions"].items())
        + ".",
        "",
        f"The model is `{COMMAND} --captions-only`: its projector saw captions made of the labels of the stream's",
        f"training rows, and none of their questions and answers: {made['rows']} captions of {made['images']} images,"
        f" {aligned['steps']} steps of {aligned['batch_size']}",
        f"rows, learning rate {aligned['learning_rate']:g} (cosine, warm-up {aligned['warmup']:g}), seed"
        f" {aligned['seed']}. Loss of {made['held_out_rows']} held-out rows, in nats per answer",
        f"token: {made['loss_before']:.3f} before, {made['loss_after']:.3f} after, {made['loss_other_image']:.3f} after"
        " with another image in place of each.",
        "",
        "## Can each task be learned at all?",
        "",
        "| task | test rows | most frequent answer | its score | before | learned alone | against its most frequent"
        " answer | against the model before | clearly above both |",
        "|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {task} | {len(alone[task])} | {answers[task][0]} | {percent(constant[task]):.1f}"
            f" | {percent(before[task]):.1f} | {percent(alone[task]):.1f} | {' | '.join(texts[task].values())}"
            f" | {'**no**' if failed[task] else 'yes'} |"
            for task in TASKS
        ),
        "",
        "All test rows, with lora's learning rate and seed 0. `before`: no task learned. Scores of grounding: share of",
        "boxes with IoU > 0.5. p: paired sign-flip test over test rows, corrected by Holm over all of these tests;",
        f"clearly above: higher, and p < {CLEAR:g}.",
        *(line for warning in warnings for line in ("", warning)),
        "",
        "## One after another",
        "",
        f"Mean ± sample standard deviation over seeds {', '.join(map(str, SEEDS))}, or one seed; percent. `against",
        "lora`: difference of Avg.ACC, p of the paired t test over seeds.",
        "",
        "| method | Avg.ACC | Forgetting | New.ACC | against lora |",
        "|---|---|---|---|---|",
        *map(row, names),
        "",
        "## Settings",
        "",
        "Learning rates (adapter, projector) are for all methods those with which lora learns two tasks alone best, on",
        f"dev rows and with seed {TUNING_SEED}:",
        "",
        f"| rates | {' | '.join(TUNING_TASKS)} |",
        "|---" * (len(TUNING_TASKS) + 1) + "|",
        *(
            f"| {rate:g}, {projector:g} | {' | '.join(f'{score:.1f}' for score in scores)} |"
            for (rate, projector), scores in tuning_scores(found).items()
        ),
        "",
        "Strengths are the best on the dev rows of the assistant stream, a stream of text (`make study-methods`);",
        f"llaca has lcia's. `{AS_PUBLISHED}` has the rate and schedule of the copy of its released code, meant for",
        "longer training. `stable_ema` has a constant β whatever the number of steps, llaca the constant that keeps a",
        "chosen mass of the weights before a task. Retained mass: as measured, of the tasks that are averaged. Groups:",
        "which tasks share an adapter.",
        "",
        "| method | learning rate | options | averaging rule | retained mass | groups |",
        "|---|---|---|---|---|---|",
        *(settings_row(name, found[f"{name}-seed0"]) for name in names),
        "",
        "## Matrices of seed 0",
    ]
    for method in names:
        lines += ["", f"`{method}`", "", *matrix(found[f"{method}-seed0"])]
    write_text(ROOT / "results" / f"{STUDY}.md", "\n".join([*lines, ""]))


if __name__ == "__main__":
    os.environ.setdefault("LCIA_DATA", str(Path("..") / "shared" / "data"))
    os.chdir(ROOT)
    made = alignment()
    found = run_all(STUDY, rate_runs())
    rates = best_rates(found)
    found |= run_all(STUDY, {**single_runs(rates), **stream_runs((*THREE_SEEDS, *ONE_SEED), SEEDS[:1], rates)})
    found |= run_all(STUDY, stream_runs(THREE_SEEDS, SEEDS[1:], rates))
    if alignment() != made:
        raise SystemExit("lite-llava was built anew while the study ran; remove results/vision and start again")
    write_tables(found, most_frequent(), made)
