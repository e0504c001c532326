"""Real steps on this machine: the only measured time in a plan."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lcia.backbone import load_backbone
from lcia.config import RunConfig
from lcia.methods import build_method
from lcia.results import machine, peak_memory_mib
from lcia.seeds import stable_seed
from lcia.session import make_pool
from lcia.stream import Row, Task
from lcia.training import learn_task


@dataclass(frozen=True)
class Measured:
    """Optimizer steps of one task, made and thrown away."""

    task: str
    steps: int
    seconds_per_step: float  # the first one's start-up included
    peak_memory_mib: float  # of this process, its libraries included; on a GPU what was allocated there
    device: str
    threads: int


def measure_steps(config: RunConfig, task: Task, rows: list[Row], steps: int) -> Measured:
    """Learn `task` for so many steps, on a draw of its `rows`, in a folder that is removed.

    Raises:
        UserError: the model cannot be loaded.
    """
    backbone = load_backbone(config.model, config.dtype, config.attn_implementation)
    pool, method = make_pool(config, backbone), build_method(config.method_parts())
    method.attach(pool, backbone)
    wanted = steps * config.per_device_train_batch_size * config.gradient_accumulation_steps
    drawn = random.Random(stable_seed(config.seed, task.name, "plan")).sample(rows, min(wanted, len(rows)))
    placement = method.open_task(task)
    pool.add(placement.adapter, start=placement.start)
    pool.train_only(placement.adapter, placement.beneath)
    with tempfile.TemporaryDirectory() as folder:
        learned = learn_task(
            pool.model,
            method,
            task,
            placement,
            [(row, backbone.reader.encode(row)) for row in drawn],
            collate=backbone.reader.collate,
            arguments={**config.training_arguments(), "max_steps": steps, "save_steps": steps},
            state_folder=Path(folder),
            checkpoint=None,
            seed=stable_seed(config.seed, task.name, "order"),
            on_record=lambda record: None,
            projector=pool.projector_parameters(placement.adapter),
            projector_learning_rate=config.projector_learning_rate,
        )
    here = machine()
    return Measured(
        task.name, steps, learned.seconds / steps, peak_memory_mib(), str(here["device"]), int(here["threads"])
    )
