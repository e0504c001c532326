"""The configuration: one flat YAML file, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lcia.errors import UserError, did_you_mean
from lcia.stream import BUILT_IN as STREAMS

# TrainingArguments that the run sets itself: a user's value would be ignored, so it is refused.
_OWNED_ARGUMENTS = frozenset(
    {
        "auto_find_batch_size",
        "bf16",
        "data_seed",
        "deepspeed",
        "fsdp",
        "fsdp_config",
        "dataloader_pin_memory",
        "disable_tqdm",
        "do_eval",
        "do_predict",
        "do_train",
        "enable_jit_checkpoint",
        "eval_on_start",
        "eval_strategy",
        "fp16",
        "group_by_length",
        "label_smoothing_factor",
        "load_best_model_at_end",
        "logging_dir",
        "logging_nan_inf_filter",
        "push_to_hub",
        "remove_unused_columns",
        "resume_from_checkpoint",
        "save_on_each_node",
        "save_only_model",
        "save_strategy",
        "save_total_limit",
        "train_sampling_strategy",
        "use_cpu",
    }
)


class RunConfig(BaseModel):
    """What a run does. Unknown keys are looked up in transformers.TrainingArguments, then refused."""

    model_config = ConfigDict(extra="allow", validate_default=True)

    stream: str | dict[str, Any] | list[dict[str, Any]]
    model: str = "smollm2-135m"
    method: str | dict[str, Any] | list[str | dict[str, Any]] = "lcia"
    output_dir: str
    seed: int = 0

    tasks: list[str] | None = None  # a choice and order of the stream's tasks; null = as it comes
    max_train_examples: int | None = Field(None, ge=1)  # per task; null = all
    max_eval_examples: int | None = Field(None, ge=1)  # per task; null = all
    eval_split: Literal["test", "dev"] = "test"  # tune on dev, report test
    skip_bad_rows: bool = False

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    attn_implementation: str = "auto"
    lora_r: int = Field(16, ge=1)
    lora_alpha: float | None = None  # null = 2 r
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    lora_target_modules: str | list[str] = "all-linear"

    projector: str = "auto"  # of a vision-language model, trained with each adapter: auto, none, or a module's path
    projector_learning_rate: float | None = Field(None, gt=0)  # null = learning_rate

    system: str | None = None  # the system message of every prompt that has none of its own; null = none
    image_padding: Literal["square"] | None = None  # what an image gets before the processor sees it; null = nothing

    max_length: int = Field(1024, ge=8)  # tokens of prompt + answer; longer rows are counted and left out
    max_new_tokens: int = Field(64, ge=1)
    per_device_eval_batch_size: int = Field(40, ge=1)

    learning_rate: float = Field(5e-4, gt=0)
    lr_scheduler_type: str = "constant"
    num_train_epochs: float = Field(1.0, gt=0)
    max_steps: int = -1  # optimizer steps per task; -1 = num_train_epochs decides
    per_device_train_batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    logging_steps: int = Field(5, ge=1)
    # epochs without a higher dev score after which a task ends, with the weights of its best epoch; null = never
    early_stopping_patience: int | None = Field(None, ge=1)
    save_steps: int = Field(100, ge=1)  # a checkpoint inside a task, so that a killed task goes on behind it

    # tasks learned all at once before the stream begins, and merged into the base: as `stream`, or {name, path, tasks}
    init_stream: str | dict[str, Any] | list[dict[str, Any]] | None = None
    init_max_train_examples: int | None = Field(None, ge=1)  # here and below: null = the run's own
    init_num_train_epochs: float | None = Field(None, gt=0)
    init_max_steps: int | None = Field(None, ge=1)  # per task, as max_steps
    init_learning_rate: float | None = Field(None, gt=0)

    def method_parts(self) -> list[tuple[str, dict[str, Any]]]:
        """The method as (name, options) pairs; a list in the configuration composes several."""
        specs = self.method if isinstance(self.method, list) else [self.method]
        parts: list[tuple[str, dict[str, Any]]] = []
        for spec in specs:
            options = {"name": spec} if isinstance(spec, str) else dict(spec)
            name = options.pop("name", None)
            if not isinstance(name, str):
                raise UserError(f"configuration key 'method': {spec!r} has no name; write {{name: lcia, ...}}")
            parts.append((name, options))
        return parts

    def init_source(self) -> tuple[Any, list[str] | None]:
        """`init_stream` as a value for `stream`, and the tasks of it to take; None takes all."""
        if not isinstance(self.init_stream, dict):
            return self.init_stream, None
        source = dict(self.init_stream)
        tasks = source.pop("tasks", None)
        if set(source) == {"path"}:  # a folder, of which only some tasks are taken
            source = source["path"]
        return source, tasks

    def training_arguments(self) -> dict[str, Any]:
        """The keys that go to transformers.TrainingArguments as they are."""
        known = _training_argument_names()
        return {key: value for key, value in self.model_dump().items() if key in known and key != "output_dir"}

    def with_absolute_paths(self) -> RunConfig:
        """Local files and folders as absolute paths: a run can then be resumed from any working directory."""
        from lcia.backbone import BUILT_IN as MODELS  # late: the configuration must not wait for torch when it is wrong

        changes = {"stream": absolute_stream(self.stream), "init_stream": absolute_stream(self.init_stream)}
        return self.model_copy(update={**changes, "model": _absolute(self.model, MODELS)})

    def as_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def absolute_stream(stream: Any) -> Any:
    """A value for `stream` or `init_stream` with its files and folders as absolute paths."""
    if isinstance(stream, list):
        return [absolute_stream(task) for task in stream]
    if not isinstance(stream, dict):
        return _absolute(stream, STREAMS)
    # beside a name it is a folder; without one, in init_stream, it is read as a text alone would be
    built_in: Collection[str] = () if "name" in stream else STREAMS
    paths = {key: _absolute(stream[key], built_in) for key in ("path", "image_folder") if key in stream}
    return {**stream, **paths}


def _absolute(name: Any, built_in: Collection[str]) -> Any:
    is_path = isinstance(name, str) and name not in built_in and Path(name).exists()
    return str(Path(name).absolute()) if is_path else name


@cache
def _training_argument_names() -> frozenset[str]:
    from transformers import TrainingArguments

    return frozenset(field.name for field in dataclasses.fields(TrainingArguments))


def parse_config(values: dict[str, Any], where: str) -> RunConfig:
    """Check the values and return the configuration.

    Args:
        values: key → value, as read from YAML.
        where: the file's name, for messages.

    Raises:
        UserError: a key is unknown (the nearest valid one is named) or a value has the wrong type.
    """
    valid = [*RunConfig.model_fields, *_training_argument_names() - _OWNED_ARGUMENTS]
    extra = set(values) - set(RunConfig.model_fields)
    for key in sorted(extra, key=str):
        if key in _OWNED_ARGUMENTS:
            raise UserError(f"{where}: key {key!r} is set by lcia itself; remove it")
        if key not in _training_argument_names():
            raise UserError(f"{where}: unknown key {key!r}. {did_you_mean(str(key), valid)}")
    try:
        config = RunConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else "?"
        raise UserError(f"{where}: key {key!r}: {first['msg']}") from None
    for key in ("init_max_train_examples", "init_num_train_epochs", "init_max_steps", "init_learning_rate"):
        if getattr(config, key) is not None and config.init_stream is None:
            raise UserError(f"{where}: key {key!r} goes with init_stream, which is not set")
    _, init_tasks = config.init_source()
    if not (init_tasks is None or (isinstance(init_tasks, list) and all(isinstance(task, str) for task in init_tasks))):
        raise UserError(f"{where}: key 'init_stream': 'tasks' must be a list of names, not {init_tasks!r}")
    from lcia.methods import build_method  # late: the configuration must not wait for torch when it is wrong

    build_method(config.method_parts(), where=where)
    _check_training_arguments(config, where)
    return config


def _check_training_arguments(config: RunConfig, where: str) -> None:
    """transformers refuses some values only when its arguments are built: that must not be after hours of work."""
    import torch
    from transformers import TrainingArguments

    values = {"report_to": "none", "use_cpu": not torch.cuda.is_available(), **config.training_arguments()}
    for field in dataclasses.fields(TrainingArguments):
        value = values.get(field.name)
        is_number = isinstance(field.default, int | float) and not isinstance(field.default, bool)
        if is_number and isinstance(value, str):  # YAML reads 1e-6 (no dot) as text
            try:
                values[field.name] = float(value)
            except ValueError:
                raise UserError(f"{where}: key {field.name!r}: {value!r} is not a number") from None
            setattr(config, field.name, values[field.name])
    if str(values.get("optim", "")).startswith("schedule_free"):
        raise UserError(
            f"{where}: key 'optim': {values['optim']} trains other weights than those that should answer, and lcia "
            "would measure the wrong ones; take adamw_torch_fused with a lr_scheduler_type"
        )
    try:
        TrainingArguments(output_dir=config.output_dir, **values)
    except (ValueError, TypeError) as error:
        # transformers names the value it refuses, not its key
        named = [key for key, value in values.items() if isinstance(value, str) and value and value in str(error)[:80]]
        key = f"key {named[0]!r}: " if named else ""
        raise UserError(f"{where}: {key}{error}") from None


def load_config(path: Path | str, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML configuration and apply `key=value` overrides from the command line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    return parse_config(apply_overrides(values, overrides or []), str(path))


def apply_overrides(values: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """The values with `key=value` texts from the command line over them, each value read as YAML."""
    changed = dict(values)
    for override in overrides:
        key, separator, raw = override.partition("=")
        if not separator:
            raise UserError(f"command line: {override!r} is not key=value")
        try:
            changed[key.replace("-", "_")] = yaml.safe_load(raw)
        except yaml.YAMLError:
            raise UserError(f"command line: the value of {key!r} is not valid YAML: {raw!r}") from None
    return changed
