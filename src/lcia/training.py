"""Learn one task: transformers.Trainer under the moments of a method it does not know by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lcia.backbone import Encoded, answer_logits
from lcia.checkpoint import Checkpoint, checkpoint_at, load_trained, mark_complete, save_trained
from lcia.early_stopping import EarlyStopping
from lcia.ema.sharding import local
from lcia.errors import UserError
from lcia.methods import Method, Placement, Training
from lcia.processes import is_sharding, name_layers, on_main
from lcia.stream import Row, Task

LogFunction = Callable[[dict[str, Any]], None]  # one dict per optimizer step


@dataclass(frozen=True)
class Learned:
    """One task was learned."""

    seconds: float  # of training, what an interrupted attempt took included
    log: list[dict[str, Any]]  # one record per optimizer step
    step: int  # whose weights are kept: the last one, unless early stopping found an earlier one better
    sharded: bool  # the model's weights are spread over processes by now


class _Moments(TrainerCallback):
    """Passes the Trainer's events on to the method, and keeps the log and the checkpoints of one task."""

    def __init__(
        self,
        method: Method,
        task: Task,
        placement: Placement,
        rows: Sequence[Row],
        checkpoint: Checkpoint | None,
        early_stopping: EarlyStopping | None,
        on_record: LogFunction,
    ) -> None:
        self._method = method
        self._task = task
        self._placement = placement
        self._rows = rows
        self._checkpoint = checkpoint
        self._early_stopping = early_stopping
        self._on_record = on_record
        # what several events tell of one step becomes one record
        self.log = {record["step"]: record for record in (checkpoint.log if checkpoint else [])}
        self.seconds_before = checkpoint.seconds if checkpoint else 0.0
        self._steps_before = checkpoint.step if checkpoint else 0
        self._scoring = 0.0  # seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self._trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        per_gradient = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        per_gradient = min(per_gradient, len(self._rows))
        self._method.begin(
            Training(
                self._task,
                self._placement,
                self._rows,
                self._trained,
                model,
                optimizer,
                state.max_steps,
                per_gradient,
                state.global_step,
            )
        )
        if self._checkpoint is not None:
            # Only now: a method's `begin` sees the weights before the task, whenever the task was interrupted.
            self.load(self._checkpoint.folder)
        self._started, self._rows_per_step = time.monotonic(), per_gradient

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._method.shape_grads()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A gradient scaler skips steps whose gradients overflowed: the weights did not move.
        if getattr(kwargs["optimizer"], "step_was_skipped", False):
            self._method.skipped_step()
        else:
            self._method.after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = max(state.global_step - self._steps_before, 1)
        seconds = time.monotonic() - self._started - self._scoring
        self._record(
            state,
            total_steps=state.max_steps,
            examples_per_s=done * self._rows_per_step / max(seconds, 1e-9),
        )
        if state.global_step >= state.max_steps:
            control.should_save = False  # the finished task is kept elsewhere
        elif self._early_stopping is not None and state.epoch == int(state.epoch):
            control.should_save = False  # `on_epoch_end` saves, with the epoch's score
        if control.should_save:
            control.should_log = True  # the mean of losses that is running is in no checkpoint

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._early_stopping is None:
            return
        began = time.monotonic()
        self._record(state, dev_score=self._early_stopping.score())
        self._scoring += time.monotonic() - began
        control.should_training_stop |= self._early_stopping.is_over(self._dev_scores())
        # the end of the task as the best epoch needs no checkpoint, and one that is not gives way to that epoch's
        control.should_save = not control.should_training_stop and state.global_step < state.max_steps
        control.should_log |= control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            values = {key: float(logs[key]) for key in ("loss", "learning_rate", "grad_norm") if key in logs}
            self._record(state, **values, **self._method.log())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._write_progress(folder, state.global_step)

    @on_main
    def _write_progress(self, folder: Path, step: int) -> None:
        self._method.save_progress(folder)
        mark_complete(folder, self._task.name, step, self.seconds, list(self.log.values()), self.best_step())

    def load(self, folder: Path) -> None:
        """The weights and what the method had gathered, as a checkpoint keeps them."""
        load_trained(folder, self._trained)
        self._method.load_progress(folder)

    def best_step(self) -> int | None:
        """The last step of the best epoch so far; None without early stopping, or before an epoch ended."""
        return EarlyStopping.best(scores) if (scores := self._dev_scores()) else None

    def _dev_scores(self) -> dict[int, float]:
        return {step: record["dev_score"] for step, record in self.log.items() if "dev_score" in record}

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self._started

    def _record(self, state: Any, **values: Any) -> None:
        record = {"task": self._task.name, "step": state.global_step, **values}
        self.log.setdefault(state.global_step, {}).update(record)
        self._on_record(record)


class TaskTrainer(Trainer):
    """transformers.Trainer with the answer loss, the method's penalty, and a look at unclipped gradients."""

    def __init__(
        self,
        *args: Any,
        method: Method,
        projector: Collection[str],
        projector_learning_rate: float | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._method = method
        self._projector = frozenset(projector)
        self._projector_learning_rate = projector_learning_rate
        self.model_accepts_loss_kwargs = True  # the loss below divides by num_items_in_batch itself

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The projector's parameters, when they have a learning rate of their own, in groups of their own."""
        optimizer = super().create_optimizer(model)
        if self._projector_learning_rate is not None:
            own = set(self._projector_weights())
            for group in list(optimizer.param_groups):
                members = [parameter for parameter in group["params"] if parameter in own]
                group["params"] = [parameter for parameter in group["params"] if parameter not in own]
                optimizer.add_param_group({**group, "params": members, "lr": self._projector_learning_rate})
        return optimizer

    def _projector_weights(self) -> list[torch.nn.Parameter]:
        return [value for name, value in self.model.named_parameters() if name in self._projector]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, tokens = super().get_batch_samples(*args, **kwargs)
        self._step_rows = sum(len(batch["labels"]) for batch in batches)
        return batches, tokens

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        logits, targets = answer_logits(model, inputs)
        tokens = num_items_in_batch  # of the whole optimizer step
        if self.args.average_tokens_across_devices:
            tokens = tokens / self.accelerator.num_processes  # gradients are averaged over processes
        loss = cross_entropy(logits, targets, reduction="sum") / tokens
        micro_batches = self.current_gradient_accumulation_steps
        sizes = {"answer_tokens": tokens / micro_batches, "rows": self._step_rows / micro_batches}
        penalty = self._method.penalty({**inputs, "answer_logits": logits, **sizes})
        if penalty is not None:
            # once per optimizer step, however many micro-batches share it
            loss = loss + penalty / micro_batches
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            super()._save_checkpoint(model, trial)
        except (RuntimeError, OSError, SafetensorError) as error:  # torch says "iostream error" of a full disk
            where = f"{self.args.output_dir}/checkpoint-{self.state.global_step}"
            raise OSError(f"{where} could not be written ({error}): is the disk full?") from error

    def go_back(self, moments: _Moments, checkpoint: Checkpoint) -> None:
        """To the end of an earlier epoch: weights, method, and the optimizer, which a method may read at its close."""
        self._load_optimizer_and_scheduler(str(checkpoint.folder))
        moments.load(checkpoint.folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The trained weights alone: the base model and other adapters do not change, and lie elsewhere."""
        assert output_dir is not None
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        save_trained(Path(output_dir), trained)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: `_Moments` loads the weights when the method has seen those before the task."""

    def _clip_grad_norm(self, model: Any) -> Any:
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
    rows: Sequence[tuple[Row, Encoded]],
    collate: Callable[[Sequence[Encoded]], dict[str, torch.Tensor]],
    arguments: Mapping[str, Any],
    state_folder: Path,
    checkpoint: Checkpoint | None,
    seed: int,
    on_record: LogFunction,
    projector: Collection[str] = (),
    projector_learning_rate: float | None = None,
    early_stopping: EarlyStopping | None = None,
) -> Learned:
    """Train the weights that require gradients on `rows`; the method sees every step.

    Args:
        arguments: of transformers.TrainingArguments.
        state_folder: where checkpoints go while the task is learned.
        checkpoint: go on behind this one instead of beginning.
        on_record: is told of every step and of every logged loss.
        projector: names of the trained parameters that only rows with images use.
        projector_learning_rate: theirs; None: that of `arguments`.
        early_stopping: ends the task before `arguments` say so.

    Raises:
        RuntimeError: a trained weight is not finite at the end.
        UserError: the launcher asks for a sharding that there is not on this device, or the checkpoint of the best
            epoch was altered.
    """
    settings = TrainingArguments(
        **{
            **arguments,
            "output_dir": str(state_folder),
            "seed": seed,
            "save_strategy": "no" if is_sharding() else "steps",
            "report_to": arguments.get("report_to", "none"),
            "disable_tqdm": True,
            "logging_nan_inf_filter": False,  # it would hide a diverged loss
            "remove_unused_columns": False,
            "use_cpu": not torch.cuda.is_available(),  # where the backbone is
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
    )
    # A Trainer without a launcher would deal the rows of each batch out to all GPUs (DataParallel): more rows a step
    # than asked for, and the answers' positions cut in pieces.
    settings.device  # noqa: B018 - looks how many there are
    settings._n_gpu = min(settings.n_gpu, 1)
    if is_sharding():
        name_layers(model)
    moments = _Moments(method, task, placement, [row for row, _ in rows], checkpoint, early_stopping, on_record)
    trainer = TaskTrainer(
        model=model,
        args=settings,
        train_dataset=[encoded for _, encoded in rows],
        data_collator=collate,
        callbacks=[moments],
        method=method,
        projector=projector,
        projector_learning_rate=projector_learning_rate,
    )
    trainer.remove_callback(PrinterCallback)  # results go to stdout, and this is not one
    if trainer.is_fsdp_enabled != is_sharding():
        raise UserError("the launcher asks for FSDP, and accelerate does not shard on this kind of device; use DDP")
    trainer.train(resume_from_checkpoint=str(checkpoint.folder) if checkpoint is not None else None)
    seconds, step = moments.seconds, trainer.state.global_step
    if early_stopping is None and step < trainer.state.max_steps:
        raise RuntimeError(f"task {task.name!r}: training ended after {step} of {trainer.state.max_steps} steps")
    best = moments.best_step()
    if best is not None and best != step:
        trainer.go_back(moments, checkpoint_at(state_folder, best))
        step = best
    model.eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(local(parameter)).all():
            raise RuntimeError(f"task {task.name!r}: {name} is not finite after training; lower learning_rate")
    return Learned(seconds, list(moments.log.values()), step, sharded=trainer.is_fsdp_enabled)
