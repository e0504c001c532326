"""A Trainer with DynamicEMACallback, as a launcher starts it: `python callback_in_processes.py FOLDER ROWS`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Trainer

from lcia.ema import DynamicEMACallback
from test_ema_callback import Net, Rows, arguments, raw


def main() -> None:
    folder, rows = Path(sys.argv[1]), int(sys.argv[2])
    net = Net()
    net.body[2].p = 0.0  # the processes would draw other numbers than one
    importance = {name: torch.full_like(value, 0.1) for name, value in raw(net).items()}
    callback = DynamicEMACallback(rule="fisher", importance=importance)
    settings = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    saving = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}
    # AdamW would make a step of its own size out of a gradient that is nothing but rounding
    training = Trainer(
        model=net,
        args=arguments(folder, **settings, **saving, optim="sgd", ddp_backend="gloo" if rows == 2 else None),
        train_dataset=Rows(),
        eval_dataset=Rows(8),
        callbacks=[callback],
    )
    training.train()
    assert callback.ema is not None
    importance = callback.ema.importance  # of all processes
    if training.is_world_process_zero():
        found = {f"average/{name}": value.clone() for name, value in callback.ema.averages.items()}
        found |= {f"importance/{name}": value for name, value in importance.items()}
        save_file(
            {**found, **{f"model/{name}": value for name, value in raw(net).items()}}, folder / "found.safetensors"
        )
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
