"""Model Tailor: score, kept share and compensation against direct float64 computations, and whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcia import training
from lcia.adapters import AdapterPool
from lcia.backbone import collate, encode_row, load_backbone
from lcia.errors import UserError
from lcia.methods import build_method
from lcia.methods.base import Placement, Training
from lcia.methods.model_tailor import (
    ModelTailor,
    compensation,
    damped,
    kept_elements,
    tailored,
)
from lcia.methods.passes import second_moments
from lcia.progress import Reporter
from lcia.run import resume, train
from lcia.session import load_run_stream, open_run
from lcia.stream import Task, load_stream

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.5, "target_modules": "all-linear"}


def problem(seed: int, out: int = 6, size: int = 10, tokens: int = 40) -> tuple[torch.Tensor, ...]:
    """θ' and θ (out, in) and the inputs X (tokens, in), correlated as the inputs of a layer are; float64."""
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(out, size, generator=generator, dtype=torch.float64)
    tuned = before + 0.3 * torch.randn(out, size, generator=generator, dtype=torch.float64)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, size, generator=generator, dtype=torch.float64) @ mixing
    return before, tuned, inputs


# --- the oracle: loops over numbers, and least squares solved directly


def plain_kept(before: torch.Tensor, tuned: torch.Tensor, inputs: torch.Tensor, keep: float, damping: float) -> Any:
    """The set of (row, column) kept."""
    moment = inputs.T @ inputs
    size = len(moment)
    ridge = damping * sum(float(moment[i, i]) for i in range(size)) / size
    inverse = torch.linalg.inv(moment + ridge * torch.eye(size, dtype=torch.float64))
    places = [(j, i) for j in range(before.shape[0]) for i in range(size)]
    changes = [abs(float(tuned[p] - before[p])) for p in places]
    sensitivities = [(float(tuned[p]) / float(inverse[p[1], p[1]])) ** 2 for p in places]

    def z(values: list[float]) -> list[float]:
        mean = sum(values) / len(values)
        deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
        return [(v - mean) / deviation for v in values]

    scores = [0.5 * a + 0.5 * b for a, b in zip(z(changes), z(sensitivities), strict=True)]
    ranked = sorted(range(len(places)), key=lambda n: -scores[n])
    return {places[n] for n in ranked[: round(keep * len(places))]}


def plain_tailored(
    before: torch.Tensor, tuned: torch.Tensor, inputs: torch.Tensor, keep: float, damping: float
) -> torch.Tensor:
    """Row by row, by a least-squares solver: what is kept minimises ‖X δ‖² + damping · ‖δ‖², the undone being given."""
    kept = plain_kept(before, tuned, inputs, keep, damping)
    moment = inputs.T @ inputs
    ridge = damping * float(moment.diagonal().mean())
    result = before.clone()
    for j in range(before.shape[0]):
        mine = [i for i in range(before.shape[1]) if (j, i) in kept]
        others = [i for i in range(before.shape[1]) if (j, i) not in kept]
        if not mine:
            continue
        given = inputs[:, others] @ (before[j, others] - tuned[j, others])  # (tokens,)
        system = torch.cat([inputs[:, mine], ridge**0.5 * torch.eye(len(mine), dtype=torch.float64)])
        target = torch.cat([-given, torch.zeros(len(mine), dtype=torch.float64)])
        change = torch.linalg.lstsq(system, target[:, None], driver="gelsd").solution[:, 0]
        result[j, mine] = tuned[j, mine] + change
    return result


# --- the pure functions


@pytest.mark.parametrize("keep", [0.1, 0.34, 0.8])
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_a_tailored_matrix_is_the_direct_least_squares_solution(keep, damping) -> None:
    for seed in range(3):
        before, tuned, inputs = problem(seed)
        result = tailored(before, tuned, inputs.T @ inputs, keep, damping)
        torch.testing.assert_close(result, plain_tailored(before, tuned, inputs, keep, damping), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.5, 1.0])
def test_exactly_the_kept_share_changes_and_the_rest_is_as_before_bit_for_bit(keep) -> None:
    before, tuned, inputs = (tensor.float() for tensor in problem(1, out=20, size=30))
    result = tailored(before, tuned, inputs.T @ inputs, keep, 0.01)
    assert result.dtype == torch.float32
    assert int((result != before).sum()) == round(keep * before.numel())


def test_the_largest_changes_are_kept_where_the_inputs_tell_nothing() -> None:
    """With equal weights and white inputs the sensitivity is the same everywhere: z of it is 0."""
    before, tuned = torch.zeros(2, 4, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64)
    start = tuned - torch.tensor([[1.0, 5.0, 2.0, 3.0], [9.0, 4.0, 0.0, 1.0]], dtype=torch.float64)
    kept = kept_elements(start, tuned, torch.eye(4, dtype=torch.float64), 3 / 8)
    assert kept.tolist() == [[False, True, False, False], [True, True, False, False]]
    assert int(kept_elements(before, before, torch.eye(4, dtype=torch.float64), 0.01).sum()) == 1


def test_compensation_lowers_the_error_and_nothing_nearby_is_better() -> None:
    before, tuned, inputs = problem(2)
    moment = inputs.T @ inputs
    hessian = damped(moment, 0.01)
    kept = kept_elements(before, tuned, hessian, 0.3)
    undone = torch.where(kept, 0.0, before - tuned)

    def error(change: torch.Tensor) -> float:
        delta = undone + change
        return float(((inputs @ delta.T) ** 2).sum() + 0.01 * moment.diagonal().mean() * (delta**2).sum())

    best = compensation(undone, kept, hessian)
    assert (best[~kept] == 0).all()
    assert error(best) < 0.7 * error(torch.zeros_like(best))
    assert error(best) < error(-best)  # the sign
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        step = 1e-3 * torch.randn(best.shape, generator=generator, dtype=torch.float64) * kept
        assert error(best) <= error(best + step)


def test_rows_are_solved_in_any_number_at_once_to_the_same_result(monkeypatch) -> None:
    from lcia.methods import model_tailor

    before, tuned, inputs = problem(4, out=13)
    whole = tailored(before, tuned, inputs.T @ inputs, 0.1, 0.01)
    for elements in (1, 300):  # one row, three rows; some have nothing to keep
        monkeypatch.setattr(model_tailor, "_ELEMENTS_AT_ONCE", elements)
        torch.testing.assert_close(tailored(before, tuned, inputs.T @ inputs, 0.1, 0.01), whole, atol=1e-12, rtol=0)


def test_a_multiple_of_the_second_moment_gives_the_same_and_zero_inputs_compensate_nothing() -> None:
    before, tuned, inputs = problem(5)
    one = tailored(before, tuned, inputs.T @ inputs, 0.2, 0.01)
    torch.testing.assert_close(tailored(before, tuned, 7.0 * inputs.T @ inputs, 0.2, 0.01), one)
    idle = tailored(before, tuned, torch.zeros(10, 10, dtype=torch.float64), 0.2, 0.01)
    assert ((idle == before) | (idle == tuned)).all()
    assert int((idle != before).sum()) == 12


def test_second_moments_are_those_of_all_tokens_and_shared_inputs_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = {name: torch.nn.Linear(5, 3) for name in ("query", "key", "other", "idle")}
    batches = [torch.randn(2, n, 5, generator=generator) for n in (3, 4)]

    def passes() -> Any:
        for batch in batches:
            layers["query"](batch)
            layers["key"](batch)
            layers["other"](batch + 1.0)
            yield

    moments = second_moments(layers, passes())
    tokens = torch.cat([batch.flatten(0, 1) for batch in batches])
    assert set(moments) == {"query", "key", "other"}
    for name, inputs in (("query", tokens), ("key", tokens), ("other", tokens + 1.0)):
        expected = sum(torch.outer(token, token) for token in inputs.double())
        torch.testing.assert_close(moments[name].double(), expected, atol=1e-4, rtol=1e-5)
    assert not any(layer._forward_pre_hooks for layer in layers.values())


@pytest.mark.parametrize(
    ("option", "value"),
    [("keep", 0.0), ("keep", 1.1), ("keep", "10%"), ("calibration", 0), ("damping", 0.0), ("tailor_first", 1)],
)
def test_a_bad_option_is_refused_by_name(option, value) -> None:
    with pytest.raises(UserError, match=f"model_tailor: {option} must be"):
        build_method([("model_tailor", {option: value})])


# --- in the model


def measure(config: Any) -> dict[str, Any]:
    with Reporter() as reporter:
        return train(config, reporter)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_the_weights_of_a_run_are_those_computed_by_hand(tiny_config, tmp_path) -> None:
    """Of the first layer: its inputs are caught behind the layer norm, for every training row by itself."""
    options = {"tasks": ["colours"], "max_steps": 6}
    measure(tiny_config(method="lora", output_dir=str(tmp_path / "lora"), **options))
    method = {"name": "model_tailor", "keep": 0.25, "calibration": None, "damping": 0.05}
    config = tiny_config(method=method, output_dir=str(tmp_path / "tailor"), **options)
    results = measure(config)
    rows = load_run_stream(config)[0].train
    assert results["cost"]["extra_forward_rows"] == len(rows) == 16

    session = open_run(tmp_path / "lora")
    caught: list[torch.Tensor] = []
    with session.pool.active("shared") as model, torch.no_grad():
        block = model.get_submodule("base_model.model.model.layers.0")
        handle = block.input_layernorm.register_forward_hook(lambda module, given, out: caught.append(out[0].double()))
        for row in rows:
            batch = collate([encode_row(session.backbone.tokenizer, row)], session.backbone.reader.pad_id)
            model.eval()(input_ids=batch["input_ids"])
        handle.remove()
    inputs = torch.cat(caught)  # (tokens, in)
    fresh = AdapterPool(
        load_backbone(config.model, "float32").model, {**LORA, "lora_dropout": 0.0}, "tiny", seed=config.seed
    )
    fresh.add("shared")
    start = {name.replace(".group_shared", ""): value for name, value in fresh.parameters("shared").items()}
    tuned, kept = weights(tmp_path / "lora" / "pool" / "shared"), weights(tmp_path / "tailor" / "pool" / "shared")
    layer = "base_model.model.model.layers.0.self_attn.k_proj"
    a, b = (f"{layer}.lora_{kind}.weight" for kind in "AB")
    for name, given in ((a, inputs), (b, inputs @ tuned[a].double().T)):
        expected = plain_tailored(start[name].detach().double(), tuned[name].double(), given, 0.25, 0.05)
        torch.testing.assert_close(kept[name].double(), expected, atol=2e-5, rtol=1e-3)
        assert int((kept[name] != start[name]).sum()) == kept[name].numel() // 4


def test_it_starts_from_the_weights_before_each_task(tiny_config, tmp_path) -> None:
    measure(tiny_config(method={"name": "model_tailor", "keep": 0.1}, tasks=["colours", "animals"]))
    first, second = (weights(tmp_path / "run" / "history" / task / "shared") for task in ("colours", "animals"))
    for name, value in second.items():
        assert int((value != first[name]).sum()) == round(0.1 * value.numel())


def test_the_first_task_can_be_left_whole(tiny_config, tmp_path) -> None:
    options = {"tasks": ["colours", "animals"]}
    measure(tiny_config(method="lora", output_dir=str(tmp_path / "lora"), **options))
    method = {"name": "model_tailor", "tailor_first": False}
    results = measure(tiny_config(method=method, output_dir=str(tmp_path / "tailor"), **options))
    whole, left = (weights(tmp_path / name / "history" / "colours" / "shared") for name in ("lora", "tailor"))
    assert all(torch.equal(whole[name], left[name]) for name in whole)
    second = weights(tmp_path / "tailor" / "pool" / "shared")
    assert all(int((second[name] != left[name]).sum()) == round(0.1 * left[name].numel()) for name in left)
    assert results["cost"]["extra_forward_rows"] == 16  # of the second task alone


Moment = tuple[ModelTailor, AdapterPool, Task]


@pytest.fixture
def closing(tiny_model: Path, tiny_stream: Path) -> Callable[[], Moment]:
    """The method in the moment before `close_task`, in training mode, the weights moved as training would move them."""

    def make() -> Moment:
        backbone = load_backbone(str(tiny_model), dtype="float32")
        pool = AdapterPool(backbone.model, LORA, "tiny")
        pool.add("a")
        parameters = pool.train_only("a")
        task = load_stream(str(tiny_stream))[0]
        method = ModelTailor(calibration=3)
        method.attach(pool, backbone)
        optimizer = torch.optim.SGD(list(parameters.values()))
        method.begin(Training(task, Placement("a", True), task.train, parameters, pool.model, optimizer, 1, 1))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        pool.model.train()
        return method, pool, task

    return make


def test_the_passes_leave_no_gradient_and_the_models_mode(closing) -> None:
    method, pool, task = closing()
    method.close_task(task)
    assert all(parameter.grad is None for parameter in pool.model.parameters())
    assert all(module.training for module in pool.model.modules())
    assert not any(module._forward_pre_hooks for module in pool.model.modules())
    assert method.cost() == {"extra_forward_rows": 3}


def test_the_inputs_are_those_without_dropout(closing) -> None:
    hashes = []
    for seed in (0, 1):
        method, pool, task = closing()
        torch.manual_seed(seed)
        method.close_task(task)
        hashes.append(pool.sha256("a"))
    assert hashes[0] == hashes[1]


class Killed(Exception):
    """Stands for the process dying at this very call."""


def test_a_task_goes_on_behind_its_last_checkpoint_to_the_same_bits(tiny_config, tmp_path, monkeypatch) -> None:
    """It dies behind the third step of the second task."""
    options = {"method": "model_tailor", "max_steps": 4, "save_steps": 2, "tasks": ["colours", "animals"]}
    measure(tiny_config(**options, output_dir=str(tmp_path / "whole")))
    on_step_end, taken = training._Moments.on_step_end, 0

    def dying(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 7:
            raise Killed
        return on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(training._Moments, "on_step_end", dying)
    with pytest.raises(Killed):
        measure(tiny_config(**options, output_dir=str(tmp_path / "cut")))
    assert [path.name for path in (tmp_path / "cut" / "state").iterdir()] == ["checkpoint-2"]
    with Reporter() as reporter:
        resume(tmp_path / "cut", reporter)
    whole, cut = (weights(tmp_path / folder / "pool" / "shared") for folder in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_it_composes_with_groups_and_the_average_before_it(tiny_config, tmp_path) -> None:
    """Of the group that learns twice, only the kept share of the average's way from the first task is left."""
    results = measure(tiny_config(method=["lcia", "model_tailor"]))
    assert results["groups"] == {"colours": "colours", "animals": "animals", "paints": "colours"}
    first, last = (weights(tmp_path / "run" / "history" / task / "colours") for task in ("colours", "paints"))
    assert all(int((last[name] != first[name]).sum()) == round(0.1 * last[name].numel()) for name in last)


def test_an_average_behind_it_would_bring_back_what_it_undid() -> None:
    with pytest.raises(UserError, match="write model_tailor behind lcia"):
        build_method([("model_tailor", {}), ("lcia", {})])


def test_anything_else_than_the_lora_of_linear_layers_is_refused(closing) -> None:
    method, pool, task = closing()
    other = {"model.router.weight": torch.nn.Parameter(torch.zeros(2, 2))}
    with pytest.raises(UserError, match=r"model\.router\.weight is trained"):
        method.begin(
            Training(task, Placement("a", True), [], other, pool.model, torch.optim.SGD(list(other.values())), 1, 1)
        )
