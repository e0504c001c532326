"""A plan as rich prints it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lcia.planning.parts import GRADIENTS, PARTS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lcia.planning.plan import Moment, Plan

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: int) -> str:
    """Bytes with three digits."""
    value, unit = float(count), 0
    while abs(value) >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def render(plan: Plan) -> RenderableType:
    place = "a GPU" if plan.device == "cuda" else "a CPU"
    title = Text(f"{plan.method} · {plan.model} · stream {plan.stream}, on {place}", style="bold")
    return Group(title, _tasks(plan), _memory(plan), *(Text(line) for line in _lines(plan)))


def _tasks(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("task", overflow="fold", ratio=1)
    for name in ("rows", "left\nout", "tokens", "longest", "steps", "eval\nrows"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("adapter", overflow="fold", ratio=1)
    alone = {stage.tasks[0]: stage for stage in plan.stages if len(stage.tasks) == 1}
    for task in plan.tasks:
        stage = alone.get(task.name)
        near = "" if task.similarity is None else f" {task.similarity:.3f}"
        new = " (new)" if stage is not None and stage.is_new else ""
        counts = (task.train_rows, task.left_out, task.tokens, task.longest, stage.steps if stage else None)
        cells = ["-" if count is None else f"{count:,}" for count in (*counts, task.eval_rows)]
        table.add_row(Text(task.name), *cells, Text(f"{task.adapter or '-'}{new}{near}"))
    return table


def _memory(plan: Plan) -> Table:
    """A column for each moment that is looked at."""
    moments: dict[str, Moment] = {}
    if plan.training is not None:
        moments["training"] = plan.training
    if plan.init is not None:
        moments["Init"] = plan.init.training
        if plan.init.exchanging.peak > plan.init.training.peak:
            moments["loading the\nbase after Init"] = plan.init.exchanging
    if plan.closing is not None and plan.training is not None and plan.closing.peak > plan.training.peak:
        moments["closing\na task"] = plan.closing
    moments["evaluating"] = plan.evaluating
    of_init = None if plan.init is None else plan.init.devices
    for name, devices in (("training", plan.devices), ("Init", of_init)):
        if devices is not None and devices.gpus > 1:
            moments[f"{name}, each of\n{devices.gpus} GPUs, DDP"] = devices.ddp
            if devices.fsdp2 is not None:
                moments[f"{name}, each of\n{devices.gpus}, FSDP2"] = devices.fsdp2
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("memory at its peak")
    for name in moments:
        table.add_column(name, justify="right", no_wrap=True)
    for part in PARTS:
        if part == GRADIENTS or any(moment.parts.get(part) for moment in moments.values()):
            table.add_row(part, *(size(moment.parts.get(part, 0)) for moment in moments.values()))
    table.add_row("all", *(size(moment.peak) for moment in moments.values()), style="bold")
    return table


def _lines(plan: Plan) -> Iterator[str]:
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in plan.base_parameters.items())
    yield f"base: {dtypes} parameters, {size(plan.base_bytes)}"
    if plan.adapters:
        parts = f"{plan.lora:,}" + (f" and a projector of {plan.projector:,}" if plan.projector else "")
        many = f"{len(plan.adapters)} adapter" + ("s" if len(plan.adapters) > 1 else "")
        yield f"trained: {parts} parameters (float32) at a time; {many} at the end of the stream"
    if plan.init is not None:
        rows = sum(task.train_rows for task in plan.init.tasks)
        yield f"Init: {len(plan.init.tasks)} tasks at once, {rows:,} rows, {plan.init.stage.steps:,} of the steps"
    for batch, what in ((plan.train_batch, "micro-batch"), (plan.eval_batch, "batch of prompts")):
        if batch is not None:
            yield f"longest {what}: {batch.rows} rows of {batch.task}, up to {batch.longest} tokens"
    if plan.training is not None:
        yield f"gradients: {size(plan.gradients)} when all are there; they come as activations go"
    if plan.libraries is not None:
        yield (
            f"the process: {size(plan.needed)}, of which {size(plan.libraries)} are libraries, code and data "
            "(those of this one)"
        )
    if plan.memory_gib is not None:
        yield _fit(plan, plan.memory_gib)
    yield _disk(plan)
    cells, reused = plan.evaluations.cells, plan.evaluations.reusable
    yield f"steps: {plan.steps:,}; cells of the matrix: {cells}, of which at most {reused} repeat an earlier one"
    yield from _time(plan)
    beside = "libraries, kernels'" if plan.libraries is None else "kernels'"
    yield f"memory {plan.how}. Beside it: {beside} own buffers, the allocator's gaps"
    yield from (f"note: {note}" for note in plan.notes)


def _fit(plan: Plan, memory_gib: float) -> str:
    there = round(memory_gib * 2**30)

    def verdict(needed: int) -> str:
        left = there - needed
        return f"{size(needed)}, " + (f"fits, {size(left)} left" if left >= 0 else f"does not fit, {size(-left)} over")

    what = "tensors" if plan.libraries is None else "the process"
    line = f"{what} in {memory_gib:g} GiB: {verdict(plan.needed)}"
    if plan.devices is None or plan.devices.gpus == 1:
        return line
    if plan.devices.fsdp2 is None:
        return f"{line} (DDP); this run cannot be trained under FSDP2"
    return f"{line} (DDP); {verdict(max(plan.devices.fsdp2.peak, plan.evaluating.peak))} (FSDP2)"


def _disk(plan: Plan) -> str:
    disk = plan.disk
    parts = [f"history {size(disk.history)}", f"pool {size(disk.pool)}"]
    if disk.checkpoints:
        parts.append(f"checkpoints up to {size(disk.checkpoints)} while a task is learned")
    if disk.init:
        parts.append(f"Init's adapter and the base after it {size(disk.init)}")
    return f"disk: {', '.join(parts)}"


def _time(plan: Plan) -> Iterator[str]:
    if plan.flops is not None:
        yield f"training: {plan.flops:.2g} floating-point operations in products of matrices"
    if plan.tflops is not None and plan.training_s is not None:
        many = f"each of {plan.devices.gpus} GPUs" if plan.devices and plan.devices.gpus > 1 else "the device"
        yield (
            f"time: {_clock(plan.training_s)} of training, if {many} makes {plan.tflops:g} · 10¹² of them a second, "
            "whatever else a step does included; computed, not measured; evaluation is not in it"
        )
        return
    if plan.measured is None or plan.training_s is None:
        yield "time: not measured (--measure N makes N steps, --tflops X computes it)"
        return
    m = plan.measured
    yield (
        f"time: {m.seconds_per_step:.3g} s a step ({m.steps} steps of {m.task}, {m.device}, {m.threads} threads; the "
        f"process held up to {m.peak_memory_mib:,.0f} MiB); at this rate {_clock(plan.training_s)} of training, other "
        "rows being as long; evaluation was not measured"
    )


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
