"""What of a run is exported: its last snapshot, read without its data and without its model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcia.adapters import stack_name
from lcia.adapters.pool import WEIGHTS_FILE
from lcia.backbone import Layout, find_model, load_layout, resolve_paths
from lcia.config import RunConfig
from lcia.errors import UserError
from lcia.grouping import Codebook, Router
from lcia.methods import Placement, build_method
from lcia.methods.grouping import InstructionGroups
from lcia.results import method_name
from lcia.run_folder import RunFolder
from lcia.session import base_model, frozen_config
from lcia.stream.sources import stated_options

CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """A run's last snapshot, its files checked against the ledger."""

    run: Path
    config: RunConfig
    snapshot: Path
    lora: dict[str, Any]  # adapter_config.json, the same for all adapters of a run
    groups: dict[str, list[str]]  # what answers requests → its tasks, in the order of learning
    is_stack: bool  # the one group is all adapters, summed
    router: Router | None  # None: requests are not routed by their instructions
    planned: list[str]  # the tasks that the run has when it is finished
    examples: dict[str, int | None]  # task → in its prompts, see `prompt_examples`
    base: str  # where the base model is found: a hub id or a folder
    base_sha256: str
    is_initialised: bool  # the base is what the run's Init stage made of config.model
    layout: Layout
    results: dict[str, Any] | None  # results.json; None: the run is not finished

    @property
    def method(self) -> str:
        return method_name(self.config)

    @property
    def base_is_local(self) -> bool:
        return Path(self.base).is_dir()

    @property
    def dtype(self) -> str:
        """Of the base model in the run."""
        return resolve_paths(self.config.dtype, self.config.attn_implementation, torch.device("cpu"))["dtype"]

    @property
    def auto_class(self) -> str:
        """The class of transformers that loads the base model."""
        return str(self.layout.auto_model.__name__)

    @property
    def reader_class(self) -> str:
        """The class of transformers that reads text, or text and images, for it."""
        return "AutoProcessor" if self.layout.sees else "AutoTokenizer"

    @property
    def has_projectors(self) -> bool:
        """Whether every adapter has a projector of its own."""
        return bool(self.lora["modules_to_save"])


def open_source(run: Path) -> Source:
    """Read a run, finished or not.

    Raises:
        UserError: no run, no LoRA adapters in it, its base model is not found, or a file was altered.
    """
    folder = RunFolder(run).require_run()
    config = frozen_config(folder)
    snapshots = folder.snapshots()
    if not snapshots:
        raise UserError(f"{run}: nothing to export: no adapter was learned (`lcia resume {run}` goes on with a run)")
    last = snapshots[-1]
    adapters = list(last["sha256"])
    if any(f"{name}/{WEIGHTS_FILE}" not in last["files"] for name in adapters):
        raise UserError(
            f"{run}: method {method_name(config)} learns modules of its own, not LoRA adapters: other programs cannot "
            f"load them (`lcia generate {run}` answers with them)"
        )
    snapshot = folder.check_snapshot(last)
    placements = {task: Placement(**found) for record in snapshots for task, found in record["placements"].items()}
    is_stack = any(placement.beneath for placement in placements.values())
    groups = {name: [task for task, found in placements.items() if found.adapter == name] for name in adapters}
    planned = _planned(folder)
    base = find_model(base_model(folder, config))
    return Source(
        run=run,
        config=config,
        snapshot=snapshot,
        lora=json.loads((snapshot / adapters[0] / CONFIG_FILE).read_text(encoding="utf-8")),
        groups={stack_name(adapters): list(placements)} if is_stack else groups,
        is_stack=is_stack,
        router=_router(config, snapshot),
        planned=planned,
        examples=_examples(folder, config),
        base=base,
        layout=load_layout(base, config.model),
        base_sha256=str(folder.base_sha256()),
        is_initialised=folder.init_model() is not None,
        results=_results(folder, planned),
    )


def _router(config: RunConfig, snapshot: Path) -> Router | None:
    for part in build_method(config.method_parts()).leaves():
        if isinstance(part, InstructionGroups):
            return Router(Codebook.load(snapshot / "codebook.json"), part.router.route_threshold)
    return None


def _planned(folder: RunFolder) -> list[str]:
    """The names of all tasks that the run has by now, learned or not: the ledger knows them without the data."""
    names: list[str] = []
    for record in folder.records("run_began", "extended", "rolled_back"):
        if record["event"] == "rolled_back":
            names = names[: names.index(record["to"]) + 1]
        else:
            names += record["data_sha256"]
    return names


def _examples(folder: RunFolder, config: RunConfig) -> dict[str, int | None]:
    return {
        task: prompt_examples(record.get("source", config.stream), task)
        for record in folder.records("run_began", "extended")
        for task in record["data_sha256"]
    }


def prompt_examples(stream: Any, task: str) -> int | None:
    """How many examples stand in a task's prompts, which are then Super-NI's; None: plain prompts.

    Args:
        stream: as in a configuration. What a folder's tasks.json says of examples is not known.
    """
    count: int | None = None
    if isinstance(stream, list):
        count = next((entry.get("examples") for entry in stream if entry["name"] == task), None)
    else:
        options = stated_options(stream)
        if options.get("name") == "instrdialog":
            count = options["examples"]
    return count


def _results(folder: RunFolder, planned: list[str]) -> dict[str, Any] | None:
    """results.json, if it tells of the last row: a run that is being extended still has its old one."""
    path = folder.path / "results.json"
    if not path.is_file():
        return None
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    last = folder.rows().get(len(planned), {"scores": {}})["scores"]
    is_current = results["tasks"] == planned and results["matrix"][-1] == [last.get(name) for name in planned]
    return results if is_current else None
