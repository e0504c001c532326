"""A Trainer with DynamicEMACallback, as a launcher starts it: `python callback_in_processes.py FOLDER ROWS`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import Trainer

from fsdp_on_cpu import take_the_cpu_for_a_gpu
from lcia.ema import DynamicEMACallback
from test_ema_callback import Net, Rows, arguments, raw


class Rooted(Net):
    """With a parameter of its own, which FSDP2 treats in another way than those of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.body(x) * self.scale
        return {"loss": 20 * torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def main() -> None:
    folder, rows = Path(sys.argv[1]), int(sys.argv[2])
    sharding = "ACCELERATE_USE_FSDP" in os.environ
    if sharding:
        take_the_cpu_for_a_gpu()
    net = Rooted()
    net.body[2].p = 0.0  # the processes would draw other numbers than one
    importance = {name: torch.full_like(value, 0.1) for name, value in raw(net).items()}
    callback = DynamicEMACallback(rule="fisher", importance=importance)
    settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    saving = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    backend = {"use_cpu": False} if sharding else {"ddp_backend": "gloo" if rows == 2 else None}
    # AdamW would make a step of its own size out of a gradient that is nothing but rounding
    training = Trainer(
        model=net,
        args=arguments(folder, **settings, **saving, optim="sgd", **backend),
        train_dataset=Rows(),
        eval_dataset=Rows(8),
        callbacks=[callback],
    )
    training.train()
    assert callback.ema is not None
    found = {f"average/{name}": whole(value) for name, value in callback.ema.averages.items()}  # of all processes
    found |= {f"importance/{name}": whole(value) for name, value in callback.ema.importance.items()}
    found |= {f"model/{name}": whole(value.detach()) for name, value in net.named_parameters()}
    losses = [log["eval_loss"] for log in training.state.log_history if "eval_loss" in log]
    found["evaluations"] = torch.tensor(losses)
    if training.is_world_process_zero():
        save_file(found, folder / "found.safetensors")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
