"""DynamicEMACallback in a plain transformers Trainer."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from lcia.ema import DynamicEMA, DynamicEMACallback

STEPS = 6


class Net(nn.Module):
    """The smallest thing that a Trainer trains: dropout shows whether the random state is resumed too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Dropout(0.1), nn.Linear(9, 3))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.body(x)
        return {"loss": 20 * nn.functional.cross_entropy(logits, labels), "logits": logits}


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int = 48) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(count, 4, generator=generator)
        self.labels = torch.randint(0, 3, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


class Recorder(TrainerCallback):
    """The raw weights after every step, and what the loggers are given."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.logged: list[dict[str, float]] = []
        self.stop_after = stop_after

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append(raw(kwargs["model"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop_after:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logged.append(dict(kwargs["logs"]))


def raw(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def arguments(folder: Any, **changes: Any) -> TrainingArguments:
    values = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(values | changes))


def trainer(folder: Any, *callbacks: TrainerCallback, eval_dataset: Any = None, **changes: Any) -> Trainer:
    return Trainer(
        model=Net(),
        args=arguments(folder, **changes),
        train_dataset=Rows(),
        eval_dataset=eval_dataset,
        callbacks=list(callbacks),
    )


def test_one_update_per_optimizer_step_and_the_model_ends_as_the_average(tmp_path):
    start, recorder = raw(Net()), Recorder()
    callback = DynamicEMACallback(rule="fixed", fallback=0.5)
    run = trainer(tmp_path, callback, recorder, gradient_accumulation_steps=3)
    run.train()
    assert callback.ema.steps == STEPS
    assert callback.ema.examples_per_gradient == 12
    for name, parameter in run.model.named_parameters():
        expected = start[name]
        for weights in recorder.weights:
            expected = 0.5 * expected + 0.5 * weights[name]
        assert torch.allclose(parameter, expected, atol=1e-6)
    run.save_model(tmp_path / "final")
    assert same(load_file(tmp_path / "final" / "model.safetensors"), raw(run.model))


def test_the_raw_weights_can_be_kept(tmp_path):
    recorder = Recorder()
    callback = DynamicEMACallback(rule="fixed", keep_raw=True)
    run = trainer(tmp_path, callback, recorder)
    run.train()
    assert same(raw(run.model), recorder.weights[-1])
    assert not same(raw(run.model), callback.ema.averages)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("eq45", {}),
        ("fisher", {}),
        ("fisher", {"fisher_source": "adamw"}),
        ("fisher", {"fisher_source": "per_example"}),
    ],
)
def test_resuming_is_bit_identical(tmp_path, rule, options, bf16):
    if rule == "fisher":
        options = {**options, "importance": {name: torch.full_like(value, 0.1) for name, value in raw(Net()).items()}}

    def run(folder: str, stop_after: int | None = None, resume: bool = False) -> tuple[Trainer, DynamicEMA]:
        callback = DynamicEMACallback(rule=rule, keep_raw=True, **options)
        training = trainer(
            tmp_path / folder,
            callback,
            Recorder(stop_after),
            bf16=bf16,
            save_strategy="steps",
            save_steps=1,
            gradient_accumulation_steps=2,
        )
        training.train(resume_from_checkpoint=resume)
        return training, callback.ema

    through, expected = run("through")
    run("halted", stop_after=4)
    resumed, found = run("halted", resume=True)
    assert same(raw(through.model), raw(resumed.model))
    assert same(expected.averages, found.averages)
    assert expected.retained_mass == found.retained_mass
    assert expected.fallback_fraction == found.fallback_fraction
    states = [
        torch.load(tmp_path / folder / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)["state"]
        for folder in ("through", "halted")
    ]
    for mine, theirs in zip(states[0].values(), states[1].values(), strict=True):
        assert same(mine, theirs)


def test_a_checkpoint_holds_the_raw_weights_and_the_average_beside_them(tmp_path):
    recorder = Recorder()
    callback = DynamicEMACallback(rule="fixed", fallback=0.9)
    trainer(tmp_path, callback, recorder, save_strategy="steps", save_steps=STEPS).train()
    folder = tmp_path / f"checkpoint-{STEPS}"
    assert same(load_file(folder / "model.safetensors"), recorder.weights[-1])
    stored = load_file(folder / "ema.safetensors")
    averages = {key.removeprefix("average/"): stored[key] for key in stored if key.startswith("average/")}
    assert same(averages, callback.ema.averages)


def test_resuming_without_the_average_is_refused(tmp_path):
    trainer(tmp_path, Recorder(stop_after=2), save_strategy="steps", save_steps=2).train()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-2/ema\.safetensors is missing"):
        trainer(tmp_path, DynamicEMACallback()).train(resume_from_checkpoint=True)


def test_a_checkpoint_elsewhere_is_found_where_it_is_said_to_be(tmp_path):
    run = (DynamicEMACallback(rule="fixed"), Recorder(stop_after=2))
    trainer(tmp_path / "one", *run, save_strategy="steps", save_steps=2).train()
    folder = str(tmp_path / "one" / "checkpoint-2")
    with pytest.raises(FileNotFoundError, match="resume_from"):
        trainer(tmp_path / "two", DynamicEMACallback(rule="fixed")).train(resume_from_checkpoint=folder)
    callback = DynamicEMACallback(rule="fixed", resume_from=folder)
    trainer(tmp_path / "two", callback).train(resume_from_checkpoint=folder)
    assert callback.ema.steps == STEPS


class Witness(TrainerCallback):
    """Which weights an evaluation sees, told by a hook on the model."""

    def __init__(self, ema: DynamicEMACallback) -> None:
        self.ema = ema
        self.seen: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kwargs["model"].register_forward_pre_hook(self.look)

    def look(self, model: nn.Module, inputs: Any) -> None:
        if not model.training and self.ema.ema.steps:
            average = same(raw(model), dict(self.ema.ema.averages))
            self.seen.append("average" if average else "raw")


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_evaluations_during_training_see_the_average_and_checkpoints_do_not(tmp_path, strategy):
    callback = DynamicEMACallback(rule="fixed", fallback=0.9)
    witness, recorder = Witness(callback), Recorder()
    run = trainer(
        tmp_path,
        callback,
        witness,
        recorder,
        eval_dataset=Rows(8),
        eval_strategy=strategy,
        save_strategy=strategy,
        eval_steps=2,
        save_steps=2,
        per_device_train_batch_size=16,
    )
    run.train()
    assert witness.seen
    assert set(witness.seen) == {"average"}
    for folder in tmp_path.glob("checkpoint-*"):
        step = int(folder.name.removeprefix("checkpoint-"))
        assert same(load_file(folder / "model.safetensors"), recorder.weights[step - 1])
    witness.seen.clear()
    run.evaluate()
    assert set(witness.seen) == {"average"}, "after training the model holds the average"


def test_evaluations_may_see_the_raw_weights(tmp_path):
    callback = DynamicEMACallback(rule="fixed", fallback=0.9, evaluate_average=False)
    witness = Witness(callback)
    trainer(tmp_path, callback, witness, eval_dataset=Rows(8), eval_strategy="steps", eval_steps=2).train()
    assert set(witness.seen) == {"raw"}


def test_several_evaluation_sets_need_to_be_known(tmp_path):
    sets = {"one": Rows(8), "two": Rows(8)}
    options = {"eval_dataset": sets, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(RuntimeError, match="so that it knows of all sets"):
        trainer(tmp_path, DynamicEMACallback(rule="fixed"), **options).train()

    run = trainer(tmp_path, **options)
    callback = DynamicEMACallback(rule="fixed", fallback=0.9, trainer=run)
    witness = Witness(callback)
    run.add_callback(callback)
    run.add_callback(witness)
    run.train()
    assert set(witness.seen) == {"average"}


def test_the_best_checkpoint_is_loaded_as_its_average(tmp_path):
    callback = DynamicEMACallback(rule="fixed", fallback=0.5)
    run = trainer(
        tmp_path,
        callback,
        eval_dataset=Rows(8),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        learning_rate=1.0,  # so that the last is not the best
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith(f"-{STEPS}")
    stored = load_file(f"{best}/ema.safetensors")
    assert same(raw(run.model), {name: stored[f"average/{name}"] for name in raw(run.model)})


def test_the_betas_are_logged(tmp_path):
    recorder = Recorder()
    run = trainer(tmp_path, DynamicEMACallback(rule="eq45"))
    run.callback_handler.callbacks.insert(0, recorder)  # where Trainer has its own loggers
    run.train()
    names = {
        "ema_beta_min",
        "ema_beta_median",
        "ema_beta_max",
        "ema_fallback_fraction",
        "ema_retained_mass",
    }
    steps = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(steps) == STEPS
    assert all(names <= entry.keys() for entry in steps)
    assert steps[0]["ema_fallback_fraction"] == 1, "the first step of eq45"
    assert not any(names & logged.keys() for logged in recorder.logged)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_trainers_loggers_get_the_betas_with_the_loss(tmp_path, strategy):
    recorder = Recorder()
    run = trainer(tmp_path, logging_strategy=strategy, logging_steps=2, per_device_train_batch_size=16)
    run.callback_handler.callbacks.insert(0, recorder)  # where Trainer has its own loggers
    run.add_callback(DynamicEMACallback(rule="eq45", trainer=run))
    run.train()
    told = [logged for logged in recorder.logged if "ema_beta_median" in logged]
    assert len(told) == (3 if strategy == "steps" else 2)
    assert all({"loss", "grad_norm", "learning_rate", "ema_retained_mass"} <= logged.keys() for logged in told)
    assert [logged for logged in run.state.log_history if "loss" in logged] == [
        {**logged, "step": step}
        for logged, step in zip(told, (2, 4, 6) if strategy == "steps" else (3, 6), strict=True)
    ]


def test_what_the_trainers_loggers_upload_is_whole_and_the_average(tmp_path):
    """W&B and others upload checkpoints, and the model as it is when training ends."""

    class Uploads(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            whole.append((tmp_path / f"checkpoint-{state.global_step}" / "ema.safetensors").is_file())

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            uploaded.update(raw(kwargs["model"]))

    whole, uploaded = [], {}
    run = trainer(tmp_path, save_strategy="steps", save_steps=2)
    run.callback_handler.callbacks.insert(0, Uploads())  # where Trainer has its own loggers
    callback = DynamicEMACallback(rule="fixed", trainer=run)
    run.add_callback(callback)
    run.train()
    assert whole == [True] * 3
    assert same(uploaded, callback.ema.averages)


def test_a_callback_that_was_replaced_or_met_its_trainer_later(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    run = trainer(tmp_path, **saving)
    for _ in range(2):
        callback = DynamicEMACallback(rule="fixed", trainer=run)
        run.add_callback(callback)
        run.train()
        assert same(raw(run.model), callback.ema.averages)
        stored = load_file(tmp_path / f"checkpoint-{STEPS}" / "ema.safetensors")
        assert torch.equal(stored["average/body.3.bias"], callback.ema.averages["body.3.bias"])
        run.remove_callback(callback)
    late = DynamicEMACallback(rule="fixed")
    run = trainer(tmp_path / "late", late, **saving)
    late.trainer = run
    run.train()
    assert same(raw(run.model), late.ema.averages)
    assert (tmp_path / "late" / "checkpoint-2" / "ema.safetensors").is_file()


class CallsOff(TrainerCallback):
    """Decides after everybody else that there is no evaluation."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = False


def test_an_evaluation_that_is_called_off_changes_nothing(tmp_path):
    evaluated = {"eval_dataset": Rows(8), "eval_strategy": "steps", "eval_steps": 1}
    recorders = [Recorder(), Recorder()]
    trainer(tmp_path, recorders[0], DynamicEMACallback(rule="fixed", fallback=0.9)).train()
    callback = DynamicEMACallback(rule="fixed", fallback=0.9, keep_raw=True)
    run = trainer(tmp_path, callback, recorders[1], CallsOff(), **evaluated)
    run.train()
    for plain, called_off in zip(recorders[0].weights, recorders[1].weights, strict=True):
        assert same(plain, called_off)
    assert same(raw(run.model), recorders[1].weights[-1])


def test_fisher_resumes_with_the_importance_of_its_checkpoint(tmp_path):
    importance = {name: torch.full_like(value, 0.1) for name, value in raw(Net()).items()}
    saving = {"save_strategy": "steps", "save_steps": 3}
    through = DynamicEMACallback(rule="fisher", importance=importance)
    trainer(tmp_path / "one", through, **saving).train()
    trainer(
        tmp_path / "two", DynamicEMACallback(rule="fisher", importance=importance), Recorder(stop_after=3), **saving
    ).train()
    resumed = DynamicEMACallback(rule="fisher")  # nobody hands it over again
    trainer(tmp_path / "two", resumed, **saving).train(resume_from_checkpoint=True)
    assert same(dict(through.ema.averages), dict(resumed.ema.averages))
    assert same(through.ema.importance, resumed.ema.importance)
    with pytest.raises(ValueError, match=r"the state has strength 1.0, this DynamicEMA has 0.3"):
        trainer(tmp_path / "two", DynamicEMACallback(rule="fisher", strength=0.3)).train(resume_from_checkpoint=True)


def test_fisher_can_read_the_trainers_optimizer(tmp_path):
    """8 bytes a parameter: F_new lies where AdamW keeps it anyway."""
    importance = {name: torch.full_like(value, 0.1) for name, value in raw(Net()).items()}
    found = {}
    for source in ("running", "adamw"):
        callback = DynamicEMACallback(rule="fisher", importance=importance, fisher_source=source)
        trainer(tmp_path, callback, max_grad_norm=0.0).train()
        found[source] = callback.ema
    assert sum(flat.numel() for flat in found["adamw"]._buffers.kept().values()) * 3 == 2 * sum(
        flat.numel() for flat in found["running"]._buffers.kept().values()
    )
    for name, value in found["running"].averages.items():  # without clipping both read the same squares
        assert torch.allclose(found["adamw"].averages[name], value, atol=1e-5), name


def test_fisher_sees_gradients_as_they_were_before_clipping(tmp_path):
    found = {}
    for max_grad_norm in (0.0, 0.01):
        callback = DynamicEMACallback(rule="fisher")
        # learning rate 0: the same gradients in both runs
        run = trainer(
            tmp_path,
            callback,
            max_grad_norm=max_grad_norm,
            learning_rate=0.0,
            gradient_accumulation_steps=2,
        )
        run.train()
        found[max_grad_norm] = callback.ema.importance
    for name, value in found[0.0].items():
        assert torch.allclose(value, found[0.01][name], rtol=1e-3), name


def test_training_is_the_same_with_and_without_the_callback(tmp_path):
    recorders = [Recorder(), Recorder()]
    trainer(tmp_path, recorders[0]).train()
    trainer(tmp_path, recorders[1], DynamicEMACallback(rule="fisher")).train()
    for plain, averaged in zip(recorders[0].weights, recorders[1].weights, strict=True):
        assert same(plain, averaged)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_does_not_touch_the_average(fused):
    """A fused optimizer skips inside its kernel, of which accelerate knows nothing."""
    Accelerator(cpu=True)  # AcceleratedOptimizer reads its state
    net = Net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    inner = torch.optim.AdamW(net.parameters(), lr=0.1, fused=True) if fused else torch.optim.SGD(net.parameters(), 0.1)
    optimizer = AcceleratedOptimizer(inner, device_placement=False, scaler=scaler)
    callback = DynamicEMACallback(rule="fisher", keep_raw=True)
    state = SimpleNamespace(max_steps=9, global_step=0, is_hyper_param_search=False)
    args = SimpleNamespace(
        deepspeed=None,
        auto_find_batch_size=False,
        fp16=True,
        train_batch_size=4,
        gradient_accumulation_steps=1,
        world_size=1,
        max_grad_norm=0.5,
    )
    events = {"model": net, "optimizer": optimizer}
    callback.on_train_begin(args, state, None, **events)
    rows = Rows()
    clean: list[torch.Tensor] = []
    for overflow in (False, True, False):
        loss = net(rows.x[:4], rows.labels[:4])["loss"]
        scaler.scale(loss).backward()
        if overflow:
            net.body[0].weight.grad[0, 0] = torch.inf
        else:
            clean.append(net.body[3].bias.grad / scaler.get_scale())
        scaler.unscale_(optimizer.optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        callback.on_pre_optimizer_step(args, state, None, **events)
        optimizer.step()
        before = {name: value.clone() for name, value in callback.ema.averages.items()}
        callback.on_optimizer_step(args, state, None, **events)
        assert optimizer.step_was_skipped == (overflow and not fused)
        if overflow:
            assert same(before, callback.ema.averages)
        net.zero_grad()
    assert (callback.ema.steps, callback.ema.skipped_steps) == (2, 1)
    assert callback.ema.fallback_fraction == 0
    weights = torch.tensor([0.999, 1.0]) / 1.999
    expected = 4 * sum(weight * gradient.square() for weight, gradient in zip(weights, clean, strict=True))
    assert torch.allclose(callback.ema.importance["body.3.bias"], expected, rtol=1e-3)


def test_deepspeed_is_refused():
    args = SimpleNamespace(deepspeed={"zero_optimization": {"stage": 2}})
    by_launcher = SimpleNamespace(deepspeed=None, deepspeed_plugin=object())
    for arguments_ in (args, by_launcher):
        with pytest.raises(RuntimeError, match="DeepSpeed makes the optimizer step"):
            DynamicEMACallback().on_train_begin(arguments_, None, None, model=Net(), optimizer=None)


def test_per_example_gradients_of_a_scaled_loss_are_refused():
    args, scaled = SimpleNamespace(deepspeed=None), SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))
    callback = DynamicEMACallback("fisher", fisher_source="per_example")
    with pytest.raises(ValueError, match="use bf16"):
        callback.on_train_begin(args, None, None, model=Net(), optimizer=scaled)


def test_gradients_that_a_trainer_has_shown_are_not_counted_again(tmp_path):
    class Showing(Trainer):
        def _clip_grad_norm(self, model: nn.Module) -> Any:
            callback.ema.observe()
            return super()._clip_grad_norm(model)

    importances = []
    for kind in (Trainer, Showing):
        callback = DynamicEMACallback(rule="fisher")
        kind(model=Net(), args=arguments(tmp_path), train_dataset=Rows(), callbacks=[callback]).train()
        importances.append(callback.ema.importance)
    for name, expected in importances[0].items():
        assert torch.allclose(importances[1][name], expected, rtol=1e-4)


def test_the_average_of_another_training_is_not_taken(tmp_path):
    """Both folders hold a checkpoint-2; the Trainer resumes from one, the callback would look into the other."""
    for name, rate in (("one", 0.05), ("two", 0.01)):
        run = (DynamicEMACallback(rule="fixed"), Recorder(stop_after=2))
        trainer(tmp_path / name, *run, save_strategy="steps", save_steps=2, learning_rate=rate).train()
    folder = str(tmp_path / "one" / "checkpoint-2")
    with pytest.raises(RuntimeError, match=r"two/checkpoint-2/trainer_state\.json has another history.*resume_from="):
        trainer(tmp_path / "two", DynamicEMACallback(rule="fixed")).train(resume_from_checkpoint=folder)


@pytest.mark.parametrize("logging", ["steps", "no"])
def test_an_earlier_average_of_this_training_is_not_taken(tmp_path, logging):
    """The Trainer itself does not read `args.resume_from_checkpoint`."""
    saving = {"save_strategy": "steps", "save_steps": 2, "logging_strategy": logging}
    trainer(tmp_path, DynamicEMACallback(rule="fixed"), Recorder(stop_after=4), **saving).train()
    earlier = {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    with pytest.raises(RuntimeError, match="the average after 2 steps, and training resumes behind step 4"):
        trainer(tmp_path, DynamicEMACallback(rule="fixed"), **earlier).train(resume_from_checkpoint=True)


def test_memory_that_is_short_when_training_resumes(tmp_path):
    """The attempt before has trained the weights, and Trainer does not read them again."""

    class Short(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, DynamicEMACallback(rule="fisher"), Recorder(stop_after=2), **saving).train()
    again = trainer(tmp_path, DynamicEMACallback(rule="fisher"), Short(), auto_find_batch_size=True)
    with pytest.raises(RuntimeError, match="resume once more, with per_device_train_batch_size=3"):
        again.train(resume_from_checkpoint=True)


def test_fisher_resumes_with_the_rows_that_are_trained_now(tmp_path):
    """With `auto_find_batch_size` the Trainer goes on with the rows that the checkpoint was trained with."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, DynamicEMACallback(rule="fisher"), Recorder(stop_after=2), **saving).train()
    callback = DynamicEMACallback(rule="fisher")
    changed = {"auto_find_batch_size": True, "per_device_train_batch_size": 3}
    trainer(tmp_path, callback, **changed).train(resume_from_checkpoint=True)
    assert callback.ema.examples_per_gradient == 4


def test_a_second_training_begins_with_its_own_clipping(tmp_path):
    callback = DynamicEMACallback(rule="fisher")
    trainer(tmp_path, callback, max_grad_norm=1e-3).train()
    assert callback._unclip > 1
    alone = DynamicEMACallback(rule="fisher")
    for one in (callback, alone):
        trainer(tmp_path, one, max_grad_norm=0.0).train()
    assert same(callback.ema.importance, alone.ema.importance)


def test_a_training_that_ends_in_its_rest_says_that_nothing_is_kept(tmp_path):
    callback = DynamicEMACallback(rule="fixed", retained=0.3, rest=0.5)
    run = trainer(tmp_path, callback, Recorder(stop_after=2))
    start = raw(run.model)
    with pytest.warns(UserWarning, match=rf"step 2, and by rest=0.5 the average moves from step {STEPS // 2 + 1} on"):
        run.train()
    assert same(start, raw(run.model))


def test_the_rows_of_a_step_are_those_that_fit(tmp_path):
    """`auto_find_batch_size` tries again with smaller batches where memory is short."""
    attempts = []

    class Short(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            attempts.append(state.train_batch_size)
            if state.train_batch_size == 4:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    callback = DynamicEMACallback(rule="fisher")
    with pytest.warns(UserWarning, match="begins again with smaller batches"):
        trainer(tmp_path, callback, Short(), auto_find_batch_size=True).train()
    assert attempts[0] == 4 > attempts[-1]
    assert callback.ema.examples_per_gradient == attempts[-1]


@pytest.mark.parametrize(
    ("args", "state", "message"),
    [
        ({"use_vllm": True, "eval_strategy": "steps"}, {}, "evaluate_average=False"),
        ({"save_strategy": "steps"}, {"is_hyper_param_search": True}, "save_strategy='no'"),
        ({"enable_jit_checkpoint": True}, {}, "enable_jit_checkpoint"),
        ({"optimizer": SimpleNamespace(eval=lambda: None)}, {}, "take another optimizer"),
    ],
)
def test_what_would_go_wrong_unseen_is_refused(args, state, message):
    own = args.pop("optimizer", None)
    args = SimpleNamespace(**{"deepspeed": None, "eval_strategy": "no", "save_strategy": "no", **args})
    state = SimpleNamespace(**{"is_hyper_param_search": False, **state})
    optimizer = SimpleNamespace(scaler=None, optimizer=own)
    with pytest.raises(ValueError, match=message):
        DynamicEMACallback().on_train_begin(args, state, None, model=Net(), optimizer=optimizer)


def test_importance_for_a_rule_that_reads_none_is_refused():
    with pytest.raises(ValueError, match="'eq45' does not read importance: take rule='fisher'"):
        DynamicEMACallback(importance={"weight": torch.ones(2)})


@pytest.mark.parametrize("first", [True, False])
def test_an_evaluation_that_sees_the_raw_weights_says_so(tmp_path, first):
    """One that is asked for behind the callback comes too late for it to put the average in its place."""

    class Asking(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_evaluate = state.global_step == 2

    callbacks = [Asking(), DynamicEMACallback(rule="fixed", fallback=0.5)]
    run = trainer(tmp_path, *(callbacks if first else reversed(callbacks)), eval_dataset=Rows())
    with contextlib.nullcontext() if first else pytest.warns(UserWarning, match="this evaluation saw the raw weights"):
        run.train()
