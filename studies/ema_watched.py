"""Averages of one and the same training: what the rule alone changes.

    make study-ema-watched

A rule does not change the training it averages. So each setting trains three tasks that share an instruction one after
the other, all averages watch, and each is measured on the dev rows of the tasks so far; test rows are not looked at.
The second task is what rules, readings of F_new and the importance of the product BA are compared by. The next task
goes on from the constant's average; behind the third one, only what is handed on from two tasks is compared. Rows are
passed backward one by one, so that `per_example` is what it says; the gradient of a step is the same.

results/ema_watched/SETTING-seedN.json each, results/ema_watched.md; about half an hour on 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from study import ROOT, paired_p

from lcia.backbone import load_backbone
from lcia.config import parse_config
from lcia.ema import DynamicEMA
from lcia.evaluation import AnswerCache, Decoding, evaluate_task
from lcia.files import write_text
from lcia.grouping import Match
from lcia.methods import Placement
from lcia.methods.base import SHARED, Method, Training
from lcia.results import library_versions
from lcia.seeds import stable_seed
from lcia.session import load_run_stream, make_pool
from lcia.stream import Task
from lcia.training import learn_task

STUDY = "ema_watched"
TASKS = ("travel_intent", "banking_intent", "kitchen_intent")
SEEDS = (0, 1)
SETTINGS = {
    "5e-4": {"learning_rate": 5e-4, "tasks": TASKS},
    "2e-3": {"learning_rate": 2e-3, "tasks": TASKS},
    "2e-3-reverse": {"learning_rate": 2e-3, "tasks": TASKS[::-1]},
}
ROWS = 8  # a step
CHAIN = "constant, 0.3"  # the next task goes on from this average
PLAIN = "none"

STRENGTHS = (0.1, 0.3, 1.0)
# `forgetting` 0: what is handed on is of one task alone, and mixed here
FISHER: dict[str, Any] = {"rule": "fisher", "strength": 0.3, "forgetting": 0.0}
READINGS = {"running": "", "adamw": ", read from AdamW", "per_example": ", read per example"}
# name: options of DynamicEMA; "handed" is γ of the importance that `fisher` is given, F_old = γ F_1 + F_2
SECOND: dict[str, dict[str, Any]] = {
    "constant, 0.1": {"rule": "fixed", "retained": 0.1},
    CHAIN: {"rule": "fixed", "retained": 0.3},
    "constant, 0.5": {"rule": "fixed", "retained": 0.5},
    "constant, 0.3, rest 0.9": {"rule": "fixed", "retained": 0.3, "rest": 0.9},
    **{
        f"fisher, λ = {strength:g}{words}": {**FISHER, "strength": strength, "fisher_source": reading}
        for reading, words in READINGS.items()
        for strength in STRENGTHS
    },
    "fisher, λ = 0.3, one w per tensor": {**FISHER, "per": "tensor"},
    "fisher, λ = 0.3, rest 0.9": {**FISHER, "rest": 0.9},
}
PRODUCT = "fisher of BA's components, λ = {}"
PRODUCT_STRENGTHS = (0.3, 1.0, 3.0)
THIRD: dict[str, dict[str, Any]] = {
    CHAIN: SECOND[CHAIN],
    **{f"fisher, λ = 0.3, γ = {factor:g}": {**FISHER, "handed": factor} for factor in (0.0, 0.3, 1.0)},
}


class ComponentAverage:
    """`fisher` with one β for each component b_k a_kᵀ of a product BA = Σ_k b_k a_kᵀ.

    The loss knows b_k and a_k by their product alone, so its Fisher information is that of a factor s on the component,
    at s = 1: ∂L/∂s = Σ_j (∂L/∂A_kj) A_kj. Scaling A by c and B by 1/c leaves it, and so β, unchanged. It sees only how
    much of a component is needed, not in which direction, and behind an adapter's first task, whose B grew from zero,
    it is small: hence larger λ.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        importance: Mapping[str, torch.Tensor] | None,
        strength: float,
        total_steps: int,
        examples: int,
    ) -> None:
        self._pairs = {name: (p, parameters[name.replace("lora_A", "lora_B")]) for name, p in by_a(parameters)}
        self._importance, self._strength = importance, strength
        self._steps, self._examples, self._seen = total_steps, examples, 0
        self._squares = {name: torch.zeros(len(a)) for name, (a, _) in self._pairs.items()}
        self._average = {p: p.detach().clone() for pair in self._pairs.values() for p in pair}
        self._left = {name: torch.ones(len(a)) for name, (a, _) in self._pairs.items()}  # Π β

    @torch.no_grad()
    def observe(self) -> None:
        self._seen += 1
        for name, (a, _) in self._pairs.items():
            assert a.grad is not None
            self._squares[name] += (a.grad * a).sum(1).square()

    @property
    def importance(self) -> dict[str, torch.Tensor]:
        return {name: self._examples * total / self._seen for name, total in self._squares.items()}

    @torch.no_grad()
    def step(self) -> None:
        new = self.importance
        for name, (a, b) in self._pairs.items():
            old = self._strength * (self._importance or {}).get(name, torch.zeros(len(a)))
            share = old / (old + new[name]).clamp_min(torch.finfo(torch.float32).tiny)
            beta = share ** (1 / self._steps)  # (r,)
            self._left[name] *= beta
            move = 1 - beta
            self._average[a].lerp_(a, move[:, None].expand_as(a))
            self._average[b].lerp_(b, move[None].expand_as(b))

    @property
    def retained_mass(self) -> dict[str, float]:
        return {name: float(left.mean()) for name, left in self._left.items()}

    def copy_to_model(self) -> None:
        with torch.no_grad():
            for parameter, average in self._average.items():
                parameter.copy_(average)


def by_a(parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in parameters.items() if "lora_A" in name)


class Watched(Method):
    """Trains like `lora`; all averages watch."""

    name = "watched"

    def __init__(self) -> None:
        self.importances: list[dict[str, dict[str, torch.Tensor]]] = []  # per task: reading → F_new
        self.components: dict[str, torch.Tensor] | None = None

    def begin(self, training: Training) -> None:
        self.trained = training.parameters
        number = len(self.importances)
        wanted = ({reading: {**FISHER, "fisher_source": reading} for reading in READINGS}, SECOND, THIRD)[number]
        self.averages = {name: self._average(training, options) for name, options in wanted.items()}
        common = (training.total_steps, training.examples_per_gradient)
        self.products = {
            PRODUCT.format(f"{strength:g}"): ComponentAverage(training.parameters, self.components, strength, *common)
            for strength in (PRODUCT_STRENGTHS if number < 2 else ())
        }

    def _average(self, training: Training, options: Mapping[str, Any]) -> DynamicEMA:
        options = dict(options)
        factor = options.pop("handed", None)
        reading = options.get("fisher_source", "running")
        importance = self.importances[-1].get(reading) if self.importances else None
        if factor is not None:
            first, second = (found["running"] for found in self.importances)
            importance = {name: factor * first[name] + second[name] for name in second}
        return DynamicEMA(
            training.parameters,
            total_steps=training.total_steps,
            examples_per_gradient=training.examples_per_gradient,
            importance=importance if options["rule"] == "fisher" else None,
            optimizer=training.optimizer if reading == "adamw" else None,
            **options,
        )

    def see_grads(self) -> None:
        for average in [*self.averages.values(), *self.products.values()]:
            average.observe()

    def after_step(self) -> None:
        for average in [*self.averages.values(), *self.products.values()]:
            average.step()

    def close_task(self, task: Task) -> None:
        if len(self.importances) == 0:
            self.importances.append({name: average.importance for name, average in self.averages.items()})
        elif len(self.importances) == 1:  # of this task alone: what is handed on is mixed by `_average`
            self.importances.append({"running": self.averages["fisher, λ = 0.3"].importance})
        for product in self.products.values():
            self.components = product.importance


def configuration(setting: str, seed: int) -> dict[str, Any]:
    options = SETTINGS[setting]
    return {
        "stream": "assistant",
        "tasks": list(options["tasks"]),
        "model": "smollm2-135m",
        "method": "lora",
        "output_dir": "unused",
        "seed": seed,
        "max_steps": 30,
        "save_steps": 10_000,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": ROWS,
        "learning_rate": options["learning_rate"],
        "lora_r": 16,
        "max_eval_examples": 40,
        "max_new_tokens": 16,
    }


def one(setting: str, seed: int) -> dict[str, Any]:
    """{stage: {average: {"dev": {task: score}, "retained": Π β}}} of one training."""
    values = configuration(setting, seed)
    config = parse_config(values, where=STUDY)
    backbone = load_backbone(config.model, config.dtype, config.attn_implementation)
    pool, method = make_pool(config, backbone), Watched()
    method.attach(pool, backbone)
    pool.add(SHARED)
    stream = list(load_run_stream(config))
    decoding = Decoding(config.max_new_tokens, config.per_device_eval_batch_size, config.max_length)

    def scores(tasks: list[Task]) -> dict[str, float]:
        nowhere = AnswerCache(None, "")
        found = {
            task.name: evaluate_task(
                pool, backbone.reader, task, task.dev, [Match(SHARED, 1.0, {})] * len(task.dev), nowhere, decoding
            ).score
            for task in tasks
        }
        pool.train_only(SHARED, ())
        return found

    measured: dict[str, dict[str, Any]] = {}
    for number, task in enumerate(stream):
        pool.train_only(SHARED, ())
        with tempfile.TemporaryDirectory() as state:
            learn_task(
                pool.model,
                method,
                task,
                Placement(SHARED, is_new=number == 0),
                [(row, backbone.reader.encode(row)) for row in task.train],
                collate=backbone.reader.collate,
                arguments={**config.training_arguments(), "max_steps": config.max_steps},
                state_folder=Path(state),
                checkpoint=None,
                seed=stable_seed(seed, task.name, "order"),
                on_record=lambda record: print(record["task"], record["step"], file=sys.stderr, flush=True),
            )
        method.close_task(task)
        seen = stream[: number + 1]
        row: dict[str, Any] = {PLAIN: {"dev": scores(seen)}}
        if number:
            for name, average in {**method.averages, **method.products}.items():
                average.copy_to_model()
                masses = average.retained_mass.values()
                row[name] = {"dev": scores(seen), "retained": sum(masses) / len(masses)}
            method.averages[CHAIN].copy_to_model()
        for average in method.averages.values():
            average.close()
        measured[task.name] = row
    return {
        "setting": setting,
        "seed": seed,
        "config": values,
        "measured": measured,
        "threads": torch.get_num_threads(),
        "versions": library_versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def in_own_process(setting: str, seed: int) -> dict[str, Any]:
    kept = ROOT / "results" / STUDY / f"{setting}-seed{seed}.json"
    expected = [PLAIN, *SECOND, *(PRODUCT.format(f"{one:g}") for one in PRODUCT_STRENGTHS)]
    if not kept.is_file():
        print(f"{setting}, seed {seed}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--one", setting, str(seed)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        write_text(kept, json.dumps(json.loads(done.stdout.splitlines()[-1]), indent=1) + "\n")
    found = dict(json.loads(kept.read_text(encoding="utf-8")))
    if found["config"] != configuration(setting, seed) or list(list(found["measured"].values())[1]) != expected:
        raise SystemExit(f"{kept} holds a result of other settings than the study's; remove it")
    return found


def table(runs: list[dict[str, Any]], stage: int, names: list[str]) -> list[str]:
    """A column per setting: mean over its seeds of the mean dev score, and the tasks' own."""
    columns = {setting: [run for run in runs if run["setting"] == setting] for setting in SETTINGS}
    lines = [
        f"| average | retained | all runs | against {CHAIN} | {' | '.join(f'`{setting}`' for setting in columns)} |",
        "|---|---|---|---|" + "---|" * len(columns),
    ]

    def of(run: dict[str, Any], name: str) -> list[float]:
        return list(list(run["measured"].values())[stage][name]["dev"].values())

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    for name in names:
        cells = []
        for found in columns.values():
            tasks = [mean([of(run, name)[i] for run in found]) for i in range(stage + 1)]
            cells.append(f"{mean(tasks):.1f} ({', '.join(f'{one:.0f}' for one in tasks)})")
        overall = [mean(of(run, name)) for run in runs]
        against = paired_p(overall, [mean(of(run, CHAIN)) for run in runs])
        left = [list(run["measured"].values())[stage][name].get("retained") for run in runs]
        retained = "–" if None in left else f"{mean(left):.2f}"
        lines.append(f"| {name} | {retained} | {mean(overall):.1f} | {against} | {' | '.join(cells)} |")
    return lines


def page(runs: list[dict[str, Any]]) -> str:
    dates = sorted(run["date"][:10] for run in runs)
    versions = ", ".join(f"{name} {number}" for name, number in runs[0]["versions"].items())
    return "\n".join(
        [
            "# Averages of the same training",
            "",
            "Command: `make study-ema-watched`. SmolLM2-135M, LoRA r = 16, travel_intent, banking_intent,",
            f"kitchen_intent (`reverse`: the other way round), 30 steps of {ROWS} rows a task, learning rate as the",
            f"column says, 40 dev rows a task, seeds {', '.join(map(str, SEEDS))}. In a setting all averages watch the",
            "same training; test rows are not looked at. Mean dev score over tasks and seeds, in brackets each task's,",
            "in the order learned. `retained`: Π β, the mean over tensors. Differences are means over runs with the p",
            "of the paired t test (two-sided, not corrected for as many rows; too small besides: runs of one seed",
            "share their start and the order of their rows, so they are not as many as they look). AdamW's second",
            "moment is of clipped gradients, the other readings are not.",
            f"{dates[0]} to {dates[-1]}; {versions}; one thread each.",
            "",
            "## Behind the second task",
            "",
            *table(runs, 1, [PLAIN, *SECOND, *(PRODUCT.format(f"{one:g}") for one in PRODUCT_STRENGTHS)]),
            "",
            "## Behind the third task: what of the first one's importance is handed on",
            "",
            f"The third task is trained from the second one's average `{CHAIN}`; F_old = γ F_1 + F_2.",
            "",
            *table(runs, 2, [PLAIN, *THIRD]),
            "",
            "What follows from it: LOG.md.",
            "",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(one(chosen.one[0], int(chosen.one[1]))))
        sys.exit()
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        wanted = [(setting, seed) for seed in SEEDS for setting in SETTINGS]
        finished = list(pool.map(lambda pair: in_own_process(*pair), wanted))
    write_text(ROOT / "results" / f"{STUDY}.md", page(finished))
