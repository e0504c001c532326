"""The three layouts of an export, each written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from lcia.adapters import AdapterPool, stack_members
from lcia.adapters.merging import merge_active, write_model
from lcia.adapters.pool import WEIGHTS_FILE
from lcia.adapters.projector import PROJECTOR_FILE
from lcia.errors import UserError, did_you_mean
from lcia.export.cards import adapter_card, merged_card, serve_script, serving_guide
from lcia.export.source import CONFIG_FILE, Source, open_source
from lcia.files import write_json, write_text
from lcia.grouping import save_routes
from lcia.session import Session, open_run

LAYOUTS = ("peft", "merged", "vllm")
DTYPES = ("float32", "bfloat16")
# The values that vLLM's --max-lora-rank takes (newer versions: 1 as well).
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Exported:
    """What was written, and what it needs."""

    out: str
    layout: str
    groups: list[str]
    base: str  # where the base model was found: a hub id or a folder
    finished: bool
    rounding: float | None  # merged: see `merge_active`

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Text:
        lines = [f"{self.layout}: {', '.join(self.groups)} → {self.out}"]
        if self.layout == "peft":
            lines.append(f"base model to load beneath: {self.base}")
        if self.rounding:
            lines.append(f"rounding errors have {self.rounding:.1%} of the adapter's norm; --dtype float32 makes none")
        if not self.finished:
            lines.append("the run is not finished: this is what it has learned so far")
        return Text("\n".join(lines))


def export_run(
    run: Path, out: Path, layout: str = "peft", group: str | None = None, dtype: str | None = None
) -> Exported:
    """Write a run's adapters into the folder `out`.

    Args:
        out: must not exist, or be empty.
        layout: peft: OUT/GROUP/ with adapter, settings and model card. merged: OUT is one model, base and group in
            one. vllm: OUT/adapters/GROUP/, routes.json, serve.sh, and the base model if it is not on the hub.
        group: only this one; None takes all, of which a merged model can hold one.
        dtype: of the merged weights, one of DTYPES; None is that of the base model in the run.

    Raises:
        UserError: an option does not fit, the run has no LoRA adapters, `out` is in use, or a file of the run was
            altered.
    """
    if layout not in LAYOUTS:
        raise UserError(f"--as: {layout!r} does not exist. {did_you_mean(layout, LAYOUTS)}")
    if dtype is not None and layout != "merged":
        raise UserError("--dtype goes with --as merged; adapters stay float32")
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype: {dtype!r} does not exist. {did_you_mean(dtype, DTYPES)}")
    if group is not None and layout == "vllm":
        raise UserError("--group goes with --as peft or merged; a server needs every group that requests are routed to")
    source = open_source(run)
    if group is not None and group not in source.groups:
        raise UserError(f"--group: {run} has no group {group!r}. {did_you_mean(group, source.groups)}")
    groups = list(source.groups) if group is None else [group]
    if layout == "merged" and len(groups) > 1:
        raise UserError(f"--as merged: a merged model holds one group; choose it with --group: {', '.join(groups)}")
    if layout != "merged" and source.is_stack:
        raise UserError(f"{run}: method {source.method} sums its adapters, which is no PEFT adapter; use --as merged")
    if layout == "vllm":
        _check_servable(source)

    rounding = None
    with _filled(out) as folder:
        if layout == "peft":
            for name in groups:
                _write_adapter(source, name, folder / name, source.base)
        elif layout == "merged":
            rounding = _write_merged(source, groups[0], folder, dtype)
        else:
            _write_vllm(source, folder)
    return Exported(str(out), layout, groups, source.base, source.results is not None, rounding)


@contextlib.contextmanager
def _filled(out: Path) -> Iterator[Path]:
    """A folder inside `out` to write into. Its content moves up when all of it is there; an error leaves nothing.

    Raises:
        UserError: `out` is a file, or holds something.
    """
    partial = out / ".export.part"
    is_new = not out.exists()
    if not is_new and not out.is_dir():
        raise UserError(f"{out}: a file of this name exists; name a new folder")
    if not is_new and any(entry != partial for entry in out.iterdir()):  # what a killed export left is made again
        raise UserError(f"{out}: not empty; name a new folder")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(out if is_new else partial)
        raise
    for entry in list(partial.iterdir()):
        os.replace(entry, out / entry.name)
    partial.rmdir()


def _write_adapter(source: Source, group: str, folder: Path, base: str) -> None:
    """The adapter's weights as they are in the run; its settings name a base model that can be loaded."""
    folder.mkdir(parents=True)
    shutil.copyfile(source.snapshot / group / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    if source.has_projectors:
        shutil.copyfile(source.snapshot / group / PROJECTOR_FILE, folder / PROJECTOR_FILE)
    # The run's settings may say a built-in name or a GGUF file, which mean nothing to other programs.
    write_json(folder / CONFIG_FILE, {**source.lora, "base_model_name_or_path": base})
    write_text(folder / "README.md", adapter_card(source, group, base))


def _write_merged(source: Source, group: str, folder: Path, dtype: str | None) -> float:
    session = open_run(source.run)
    with session.pool.active(group) as model:
        rounding = merge_active(model, None if dtype is None else getattr(torch, dtype))
    _write_model(session, source, folder, stack_members(group)[-1])
    write_text(folder / "README.md", merged_card(source, group, dtype or source.dtype, rounding))
    return rounding


def _write_model(session: Session, source: Source, folder: Path, projector: str | None = None) -> None:
    """A model folder: the base as it is in memory, an adapter's projector in it, and its tokenizer or processor."""
    assert isinstance(session.pool, AdapterPool)
    write_model(session.pool, session.backbone.reader, source.base, folder, projector)


def _check_servable(source: Source) -> None:
    if source.lora["task_type"] != "CAUSAL_LM":
        raise UserError("--as vllm: vLLM serves adapters of decoder-only models; use --as peft")
    if source.has_projectors:
        raise UserError("--as vllm: vLLM's adapters have no projector of their own; use --as merged")
    if source.lora["r"] > VLLM_RANKS[-1]:
        raise UserError(f"--as vllm: lora_r is {source.lora['r']}, vLLM serves up to {VLLM_RANKS[-1]}; use --as merged")
    if source.router is None and len(source.groups) > 1:
        raise UserError(f"--as vllm: method {source.method} does not route by instructions; use --as peft")


def _write_vllm(source: Source, folder: Path) -> None:
    base = served = source.base
    if source.base_is_local:
        _write_model(open_run(source.run), source, folder / "base")
        base = "base"
        served = f"base/{Path(source.config.model).stem}"  # no group can be called so: a group's name names a folder
    adapters = {group: f"adapters/{group}" for group in source.groups}
    for group, path in adapters.items():
        _write_adapter(source, group, folder / path, base)
    if source.router is not None:
        save_routes(folder / "routes.json", source.router, served, adapters)
    max_rank = min(rank for rank in VLLM_RANKS if rank >= source.lora["r"])
    write_text(folder / "serve.sh", serve_script(source, base, served, adapters, max_rank))
    (folder / "serve.sh").chmod(0o755)
    write_text(folder / "README.md", serving_guide(source, served))
