"""Learn one task: transformers.Trainer under the moments of a method it does not know by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lcia.backbone import Encoded, collate
from lcia.backbone.chat import IGNORED
from lcia.methods import Method, Placement, Training
from lcia.stream import Task

LogFunction = Callable[[dict[str, Any]], None]  # one dict per optimizer step


def answer_loss(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], num_items: torch.Tensor | int
) -> torch.Tensor:
    """Cross entropy of the answer tokens, summed and divided by the answer tokens of the whole optimizer step.

    Logits are computed for the right edge only: prompt positions have no loss, and the vocabulary
    projection is a large part of a small model's step.
    """
    labels = batch["labels"]  # (B, A)
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        logits_to_keep=labels.shape[1],
        use_cache=False,
    ).logits  # (B, A, V)
    targets = labels[:, 1:]
    kept = targets != IGNORED
    return cross_entropy(logits[:, :-1][kept].float(), targets[kept], reduction="sum") / num_items


class _Moments(TrainerCallback):
    """Passes the Trainer's events on to the method."""

    def __init__(self, method: Method, task: Task, placement: Placement, log: LogFunction) -> None:
        self._method = method
        self._task = task
        self._placement = placement
        self._log = log
        self._last: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        per_gradient = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._method.begin(
            Training(self._task, self._placement, trained, model, optimizer, state.max_steps, per_gradient)
        )
        self._started, self._rows_per_step = time.monotonic(), per_gradient

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._method.shape_grads()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A gradient scaler skips steps whose gradients overflowed: the weights did not move.
        if not getattr(kwargs["optimizer"], "step_was_skipped", False):
            self._method.after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = max(state.global_step, 1)
        seconds = time.monotonic() - self._started
        self._log(
            {
                "task": self._task.name,
                "step": state.global_step,
                "total_steps": state.max_steps,
                "examples_per_s": done * self._rows_per_step / max(seconds, 1e-9),
                **self._last,
            }
        )
        self._last = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            values: dict[str, Any] = {
                key: float(logs[key]) for key in ("loss", "learning_rate", "grad_norm") if key in logs
            }
            record: dict[str, Any] = {"task": self._task.name, "step": state.global_step}
            self._log({**record, **values, **self._method.log()})


class TaskTrainer(Trainer):
    """transformers.Trainer with the answer loss, the method's penalty, and a look at unclipped gradients."""

    def __init__(self, *args: Any, method: Method, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._method = method
        self.model_accepts_loss_kwargs = True  # the loss below divides by num_items_in_batch itself

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        loss = answer_loss(model, inputs, num_items_in_batch)
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        penalty = self._method.penalty(inputs)
        if penalty is not None:
            # once per optimizer step, however many micro-batches share it
            loss = loss + penalty / self.current_gradient_accumulation_steps
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        self.accelerator.unscale_gradients()
        self._method.see_grads()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self.args.max_grad_norm <= 0:  # then nothing was clipped and `_clip_grad_norm` not called
            self._method.see_grads()
        return super()._get_grad_norm(model, grad_norm=grad_norm)


def learn_task(
    model: torch.nn.Module,
    method: Method,
    task: Task,
    placement: Placement,
    rows: Sequence[Encoded],
    pad_id: int,
    arguments: Mapping[str, Any],
    output_dir: Path,
    seed: int,
    log: LogFunction,
) -> float:
    """Train the weights that require gradients on `rows`; the method sees every step.

    Returns:
        The seconds the training took.

    Raises:
        RuntimeError: a trained weight is not finite at the end.
    """
    settings = TrainingArguments(
        **{
            **arguments,
            "output_dir": str(output_dir),
            "seed": seed,
            "save_strategy": "no",
            "report_to": arguments.get("report_to", "none"),
            "disable_tqdm": True,
            "logging_nan_inf_filter": False,  # it would hide a diverged loss
            "remove_unused_columns": False,
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
    )
    trainer = TaskTrainer(
        model=model,
        args=settings,
        train_dataset=list(rows),
        data_collator=lambda batch: collate(batch, pad_id),
        callbacks=[_Moments(method, task, placement, log)],
        method=method,
    )
    trainer.remove_callback(PrinterCallback)  # results go to stdout, and this is not one
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    model.eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise RuntimeError(f"task {task.name!r}: {name} is not finite after training; lower learning_rate")
    return seconds
