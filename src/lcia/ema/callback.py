"""The dynamic EMA in any transformers or TRL Trainer."""

from __future__ import annotations

import json
import statistics
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lcia.ema.average import DynamicEMA
from lcia.ema.clipping import ClipWatch
from lcia.ema.rules import find_rule
from lcia.ema.sharding import forget_gathered

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import Trainer

FILE_NAME = "ema.safetensors"
TRAINER_STATE_NAME = "trainer_state.json"


class DynamicEMACallback(TrainerCallback):
    """One line: `trainer.add_callback(DynamicEMACallback(rule="fisher", importance=before, trainer=trainer))`.

    - One update per optimizer step, whatever the accumulation; a step that a gradient scaler skips is no step.
    - Every checkpoint holds the raw θ where Trainer puts it, so that resuming is exact, and θ* with all that the rule
      needs in `ema.safetensors` beside it. `resume_from_checkpoint` restores both.
    - Evaluations that the Trainer makes during training see θ*, others are warned of; after training the model holds
      θ*, so that the last evaluation and the last `save_model` are of θ*. With `load_best_model_at_end` it is the best
      checkpoint's θ*, and its importance, unless that is AdamW's, which is of the last step.
    - `fisher` gets gradients as they were before clipping (lcia.ema.clipping).
    - β, the fallback fraction and the retained mass are logged with every training log, as `ema_...`: into
      `state.log_history`, and, if `trainer` is given, through its loggers. (Trainer's own loggers stand before other
      callbacks in the line, so that without it they never see what a callback adds, and what they upload, as W&B does
      with WANDB_LOG_MODEL, is the raw θ.)

    Args:
        rule, fallback: as of DynamicEMA, like every other keyword argument. `total_steps` and `examples_per_gradient`
            are taken from the Trainer, and `optimizer` too, unless they are given.
        evaluate_average: False: evaluations during training see the raw θ.
        keep_raw: True: the model holds the raw θ after training; θ* is in `.ema.averages`.
        resume_from: the checkpoint folder, where it is neither in `output_dir` nor in `args.resume_from_checkpoint`.
        trainer: whose loggers are used, and whose evaluation sets are counted; better always given.

    Attributes:
        ema: the DynamicEMA of the current or last training; None before the first.

    Raises:
        FileNotFoundError: training resumes from a checkpoint without `ema.safetensors`.
        ValueError: an option that DynamicEMA does not take, or one that does not go with the Trainer's.
        RuntimeError: the Trainer runs on DeepSpeed or FSDP1, or evaluates several sets and `trainer` is not given, or
            the `ema.safetensors` that is found is not of the training that resumes.
    """

    def __init__(
        self,
        rule: str = "eq45",
        fallback: float = 0.99,
        *,
        evaluate_average: bool = True,
        keep_raw: bool = False,
        resume_from: str | Path | None = None,
        trainer: Trainer | None = None,
        **options: Any,
    ):
        if options.get("importance") and "importance" not in find_rule(rule).reads:
            raise ValueError(f"rule {rule!r} does not read importance: take rule='fisher', or leave it out")
        self.options = {"rule": rule, "fallback": fallback, **options}
        self.evaluate_average = evaluate_average
        self.keep_raw = keep_raw
        self.resume_from = resume_from
        self.trainer = trainer
        self.ema: DynamicEMA | None = None
        if trainer is not None:
            trainer.callback_handler.callbacks.insert(0, _First(self))
        self._clip_watch: ClipWatch | None = None
        self._unclip = 1.0
        self._loss_scale = 1.0
        self._rows = 0  # of a process's micro-batch
        self._raw: list[tuple[Tensor, Tensor]] = []  # (parameter, its θ) while an evaluation sees θ*
        self._evaluations_left = 0
        self._evaluated = False  # in this step, with θ*
        self._training = False
        self._saved: int | None = None  # the step of the last checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: nn.Module = kwargs["model"]
        self._refuse_what_cannot_work(args, state, kwargs["optimizer"])
        rows = args.train_batch_size
        if args.auto_find_batch_size:
            # the loader's own: of a training that resumes, `state` has what the checkpoint was trained with
            together = getattr(kwargs.get("train_dataloader"), "total_batch_size", None) if state.global_step else None
            rows = state.train_batch_size if together is None else together // args.world_size
            if rows < self._rows and self._training and state.global_step:
                self._rows, self._training = 0, False
                raise RuntimeError(
                    "memory was short when training resumed, and it began again from weights that were trained on "
                    f"already: resume once more, with per_device_train_batch_size={rows}"
                )
            if rows < self._rows and self._training:
                warnings.warn(
                    "training begins again with smaller batches, from weights that have been trained already: the "
                    "average starts there. For one that starts where training did, begin with "
                    f"per_device_train_batch_size={rows}",
                    stacklevel=2,
                )
        self._rows = rows
        defaults = {
            "total_steps": state.max_steps,
            "examples_per_gradient": rows * args.gradient_accumulation_steps * args.world_size,
            "optimizer": kwargs["optimizer"],
        }
        self.ema = DynamicEMA(model.named_parameters(), **{**defaults, **self.options})
        if state.global_step:
            file = self._file_to_resume(args, state)
            self.ema.load(file)
            found = self.ema.steps + self.ema.skipped_steps
            if found != state.global_step:
                raise RuntimeError(
                    f"{file} is the average after {found} steps, and training resumes behind step {state.global_step}. "
                    "Give resume_from= the folder that resume_from_checkpoint names"
                )
        self._evaluations_left, self._raw, self._saved = 0, [], None  # of a training that broke off
        self._unclip = 1.0
        self._training = True
        self._stop_watching()
        if self.ema.wants_unclipped and args.max_grad_norm:
            self._clip_watch = ClipWatch(model.parameters())

    def _refuse_what_cannot_work(self, args: TrainingArguments, state: TrainerState, optimizer: Any) -> None:
        # set by the configuration's key, or by `accelerate launch`
        if args.deepspeed is not None or getattr(args, "deepspeed_plugin", None) is not None:
            raise RuntimeError(
                "DeepSpeed makes the optimizer step, and clears the gradients, inside backward(), before a callback "
                "can read them: DynamicEMACallback works with one process, DDP and FSDP2"
            )
        if getattr(args, "enable_jit_checkpoint", False):
            raise ValueError(
                "enable_jit_checkpoint writes checkpoints that no callback is told of: they would lack the average. "
                "Leave it out, and save often (save_steps)"
            )
        own = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has all methods there are
        if callable(getattr(own, "eval", None)):
            raise ValueError(
                f"{type(own).__name__} changes the weights for every evaluation, as the average does, and each would "
                "undo the other's: take another optimizer"
            )
        scaled = getattr(optimizer, "scaler", None) is not None  # by a key, or by `accelerate launch`
        if scaled and self.options.get("fisher_source") == "per_example":
            raise ValueError(
                "fisher_source='per_example' would see gradients of the scaled loss that fp16 trains with: use bf16"
            )
        if self.evaluate_average and getattr(args, "use_vllm", False) and args.eval_strategy != "no":
            raise ValueError(
                "with use_vllm an evaluation hands the averaged weights to vLLM, and the training step behind it would "
                "generate with them: give DynamicEMACallback(evaluate_average=False), or eval_strategy='no'"
            )
        if state.is_hyper_param_search and args.save_strategy != "no":
            raise ValueError(
                "a hyperparameter search writes checkpoints into folders that no callback is told: save_strategy='no'"
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._loss_scale = _loss_scale(kwargs["optimizer"])
        if self._clip_watch is not None:
            self._unclip = self._clip_watch.undo(self._loss_scale)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        ema = self._running()
        # A fused optimizer skips a step inside its kernel, which accelerate does not see; the scale falls all the same.
        if kwargs["optimizer"].step_was_skipped or _loss_scale(kwargs["optimizer"]) < self._loss_scale:
            ema.discard()
            return
        if not ema.observed:  # else by a Trainer of the user's own
            ema.observe(self._unclip)
        ema.step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._show_average(control, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._show_average(control, kwargs["model"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._evaluated = False
        self._evaluations_left = 0
        self._show_raw(kwargs["model"])  # of an evaluation that another callback has called off

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._training and self.evaluate_average and not self._evaluated and state.global_step:
            warnings.warn(
                "this evaluation saw the raw weights: it was asked for by a callback behind DynamicEMACallback, or "
                "called by hand; put DynamicEMACallback last, or evaluate inside `ema.applied()`",
                stacklevel=2,
            )
        if self._evaluated and not self._evaluations_left:
            advice = "Give DynamicEMACallback(trainer=...), so that it knows of all sets"
            if self.trainer is not None:
                advice = "Another callback has evaluated in this step: put it before DynamicEMACallback"
            raise RuntimeError(
                "the first set of this evaluation was seen by the averaged weights, this one by the raw weights. "
                f"{advice}, or evaluate_average=False"
            )
        self._evaluations_left = max(0, self._evaluations_left - 1)
        if not self._evaluations_left:
            self._show_raw(kwargs["model"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer is None:
            self.add_values(state, kwargs["logs"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.save(args, state)

    def save(self, args: TrainingArguments, state: TrainerState) -> None:
        """θ* and what the rule needs, into the checkpoint that the Trainer has just written; once."""
        if self._saved == state.global_step:
            return
        self._saved = state.global_step
        if self._evaluations_left:
            raise RuntimeError("a checkpoint was saved in the middle of an evaluation: it holds θ* instead of θ")
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._running().save(folder / FILE_NAME, write=args.should_save)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.end(args, state, kwargs["model"])

    def end(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Give the model the weights that it shall have after training; once."""
        if not self._training:
            return
        ema = self._running()
        self._evaluated = self._training = False
        self._stop_watching()
        ema.close()
        self._show_raw(model)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            ema.load(_existing(Path(state.best_model_checkpoint) / FILE_NAME))
        if ema.rest_steps and not ema.has_moved:
            warnings.warn(
                "what is averaged of this training is its start alone: it ended (or its best checkpoint is) at step "
                f"{ema.steps + ema.skipped_steps}, and by rest={self.options['rest']} the average moves from step "
                f"{ema.rest_steps + 1} on; the model holds the raw weights with keep_raw=True",
                stacklevel=2,
            )
        if not self.keep_raw:
            ema.copy_to_model(model)

    def add_values(self, state: TrainerState, logs: dict[str, float]) -> None:
        """`log_values` into a log of training, which `state` keeps a copy of."""
        if self.ema is not None and "loss" in logs:
            values = self.log_values()
            logs.update(values)
            state.log_history[-1].update(values)

    def log_values(self) -> dict[str, float]:
        """What is logged: quantiles of β over tensors, the fallback fraction, the mean retained mass."""
        ema = self._running()
        betas = sorted(ema.betas.values())
        values = {
            "ema_beta_min": betas[0],
            "ema_beta_median": statistics.median(betas),
            "ema_beta_max": betas[-1],
            "ema_fallback_fraction": ema.fallback_fraction,
            "ema_retained_mass": statistics.fmean(ema.retained_mass.values()),
        }
        if self._clip_watch is not None and self._clip_watch.unknown:
            values["ema_clipping_unknown"] = float(self._clip_watch.unknown)
        return values

    @torch.no_grad()
    def _show_average(self, control: TrainerControl, model: nn.Module) -> None:
        """Trainer has no moment before an evaluation; but what it will do after a step is decided by now."""
        if control.should_evaluate and self.evaluate_average and not self._evaluations_left:
            sets = None if self.trainer is None else self.trainer.eval_dataset
            self._evaluations_left = len(sets) if isinstance(sets, dict) else 1
            self._evaluated = True
            self._raw = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]
            self._running().copy_to_model(model)

    @torch.no_grad()
    def _show_raw(self, model: nn.Module) -> None:
        if self._raw:
            forget_gathered(model)  # `parameter` is the sharded one then
        for parameter, weights in self._raw:
            parameter.copy_(weights)
        self._raw = []

    def _stop_watching(self) -> None:
        if self._clip_watch is not None:
            self._clip_watch.close()
            self._clip_watch = None

    def _running(self) -> DynamicEMA:
        if self.ema is None:
            raise RuntimeError("training has not begun")
        return self.ema

    def _file_to_resume(self, args: TrainingArguments, state: TrainerState) -> Path:
        folders = [self.resume_from, args.resume_from_checkpoint]
        folder = next((Path(given) for given in folders if isinstance(given, str | Path)), None)
        folder = folder or Path(args.output_dir) / f"checkpoint-{state.global_step}"
        file = _existing(folder / FILE_NAME)
        trainers = folder / TRAINER_STATE_NAME
        if trainers.is_file():
            there = TrainerState.load_from_json(str(trainers)).log_history
            # as text, in which NaN is equal to itself; an evaluation as training begins may have been added
            if json.dumps(there) != json.dumps(state.log_history[: len(there)]):
                raise RuntimeError(
                    f"{file} is not of the training that resumes: {trainers} has another history. Give resume_from= "
                    "the folder that resume_from_checkpoint names"
                )
        return file


class _First(TrainerCallback):
    """Stands before the Trainer's loggers: they see what `owner` adds to a log, upload whole checkpoints, and θ*."""

    def __init__(self, owner: DynamicEMACallback):
        self._owner = owner

    @property
    def _is_called(self) -> bool:
        """Whether the owner is still one of the Trainer's callbacks."""
        trainer = self._owner.trainer
        return trainer is not None and self._owner in trainer.callback_handler.callbacks

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._is_called:
            self._owner.add_values(state, kwargs["logs"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._is_called:
            self._owner.save(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._is_called:
            self._owner.end(args, state, kwargs["model"])


def _loss_scale(optimizer: Any) -> float:
    """What fp16 multiplies the loss by."""
    return 1.0 if optimizer.scaler is None else float(optimizer.scaler.get_scale())


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing: the checkpoint was written without DynamicEMACallback, or lies elsewhere "
            "(then give resume_from=). Going on would average from the wrong start"
        )
    return file
