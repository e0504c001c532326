"""PGP: which directions are protected, and that nothing moves in them, whatever the optimizer does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lcia.adapters import AdapterPool
from lcia.backbone import encode_row, load_backbone
from lcia.errors import UserError
from lcia.methods import METHODS, Placement, Training, build_method
from lcia.methods.pgp import PGP, inside, joined_basis
from lcia.run_folder import RunFolder
from lcia.stream import Row, Task
from test_method_memory import check_that_a_killed_run_goes_on_to_the_same_end
from test_run import measure

# --- the subspace


@st.composite
def input_matrices(draw: st.DrawFn) -> list[torch.Tensor]:
    """The inputs X (tokens, in) of several tasks, their directions of very different strength."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = draw(st.integers(2, 12))
    tasks = []
    for _ in range(draw(st.integers(1, 4))):
        tokens = draw(st.integers(1, 20))
        strength = 2.0 ** -torch.randint(0, 8, (size,), generator=generator).double()
        mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
        tasks.append(torch.randn(tokens, size, generator=generator, dtype=torch.float64) * strength @ mixing)
    return tasks


def looped(basis: list[torch.Tensor], inputs: torch.Tensor, energy: float) -> list[torch.Tensor]:
    """GPM by the singular vectors of what the basis leaves of X, one after the other until enough is held."""
    total = sum(float(x @ x) for x in inputs)
    left = inputs.clone()
    for column in basis:
        left = torch.stack([x - float(x @ column) * column for x in left])
    held = total - sum(float(x @ x) for x in left)
    _, sizes, directions = torch.linalg.svd(left, full_matrices=False)
    result = list(basis)
    for size, direction in zip(sizes.tolist(), directions, strict=True):
        if held >= energy * total:
            break
        result.append(direction)
        held += size**2
    return result


@settings(max_examples=50)
@given(input_matrices(), st.sampled_from([0.5, 0.9, 0.97]))
def test_the_joined_subspace_is_orthonormal_grows_and_holds_what_it_should(inputs, energy) -> None:
    size = inputs[0].shape[1]
    basis, expected = torch.zeros(size, 0, dtype=torch.float64), []
    for seen in inputs:
        before, basis = basis, joined_basis(basis, seen.T @ seen, energy)
        assert torch.equal(basis[:, : before.shape[1]], before), "what is protected stays protected"
        identity = torch.eye(basis.shape[1], dtype=torch.float64)
        torch.testing.assert_close(basis.T @ basis, identity, rtol=0, atol=1e-10)
        held = float((seen @ basis).square().sum() / seen.square().sum())
        assert held >= energy - 1e-9
        if basis.shape[1] > before.shape[1]:  # and with one direction less it would not
            less = float((seen @ basis[:, :-1]).square().sum() / seen.square().sum())
            assert less < energy + 1e-9
        expected = looped(expected, seen, energy)
        assert len(expected) == basis.shape[1]
        columns = torch.stack(expected, dim=1)
        torch.testing.assert_close(basis @ basis.T, columns @ columns.T, rtol=0, atol=1e-6)


def test_inputs_that_say_nothing_protect_nothing() -> None:
    assert joined_basis(torch.zeros(5, 0), torch.zeros(5, 5), 0.9).shape == (5, 0)


def test_a_basis_of_everything_stays_as_it_is() -> None:
    basis = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
    assert torch.equal(joined_basis(basis, torch.eye(4), 0.97), basis)


def test_the_part_inside_is_the_sum_over_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    displacement = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(6, 2, generator=generator, dtype=torch.float64)).Q
    expected = torch.zeros(3, 6, dtype=torch.float64)
    for row in range(3):
        for column in basis.T:
            expected[row] += float(displacement[row] @ column) * column
    torch.testing.assert_close(inside(displacement, basis), expected)


# --- what is protected in a model

TRAIN = tuple(Row(f"{i}", "say it", (("user", "xyz"[i % 3] * i),), ("abc"[: i % 3 + 1],)) for i in range(1, 7))


def begin(method: PGP, pool: AdapterPool, adapter: str, rows: tuple[Row, ...], is_new: bool) -> Training:
    task = Task(f"task of {len(rows)}", (), rows, (), (), "")
    weights = pool.train_only(adapter)
    training = Training(
        task, Placement(adapter, is_new), rows, weights, pool.model, torch.optim.AdamW(weights.values()), 3, 3
    )
    method.begin(training)
    return training


@pytest.fixture
def pool(tiny_model: Path) -> AdapterPool:
    backbone = load_backbone(str(tiny_model), "float32", "eager")
    options = {"r": 6, "lora_alpha": 12, "lora_dropout": 0.5, "target_modules": "all-linear"}
    pool = AdapterPool(backbone.model, options, "tiny")
    pool.add("shared")
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in pool.parameters("shared").values():
            weight.copy_(0.2 * torch.randn_like(weight))
    return pool


@pytest.fixture
def method(pool: AdapterPool, tiny_model: Path) -> PGP:
    method = PGP(energy=0.9, examples=None)
    method.attach(pool, load_backbone(str(tiny_model), "float32", "eager"))
    return method


def inputs_of(pool: AdapterPool, method: PGP, rows: tuple[Row, ...]) -> dict[str, torch.Tensor]:
    """{trained parameter: (tokens, in) what its own linear module is given}, all kept, row by row."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    pool.model.eval()
    for name in pool.parameters("shared"):
        module = pool.model.get_submodule(name.removesuffix(".weight"))

        def keep(module: Any, arguments: tuple[torch.Tensor], name: str = name) -> None:
            seen.setdefault(name, []).append(arguments[0].detach()[0].double())

        handles.append(module.register_forward_pre_hook(keep))
    for row in rows:
        encoded = encode_row(method.backbone.tokenizer, row)
        pool.model(input_ids=torch.tensor([[*encoded.prompt, *encoded.answer]]))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def bases_by_parameter(method: PGP, pool: AdapterPool, adapter: str = "shared") -> dict[str, torch.Tensor]:
    begin(method, pool, adapter, TRAIN, is_new=False)
    names = {id(weight): name for name, weight in pool.parameters(adapter).items()}
    return {names[id(weight)]: basis for weight, _, basis in method._protected}


def test_the_inputs_of_every_matrix_are_protected(pool, method) -> None:
    """A by what its layer reads, B by A x; against the singular vectors of all inputs in float64."""
    training = begin(method, pool, "shared", TRAIN, is_new=True)
    pool.model.train()
    modes = {name: module.training for name, module in pool.model.named_modules()}
    method.close_task(training.task)
    assert {name: module.training for name, module in pool.model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in pool.model.parameters())
    assert method.cost()["extra_forward_rows"] == len(TRAIN)
    bases = bases_by_parameter(method, pool)
    seen = inputs_of(pool, method, TRAIN)
    assert bases.keys() == seen.keys() == pool.parameters("shared").keys()
    for name, inputs in seen.items():
        columns = torch.stack(looped([], inputs, 0.9), dim=1)
        basis = bases[name].double()
        assert basis.shape == columns.shape
        # both hold the same inputs: directions of nearly equal strength may differ between the two
        torch.testing.assert_close(inputs @ basis @ basis.T, inputs @ columns @ columns.T, rtol=1e-3, atol=1e-4)


def test_layers_that_read_the_same_inputs_share_one_basis(pool, method) -> None:
    training = begin(method, pool, "shared", TRAIN, is_new=True)
    method.close_task(training.task)
    state = method.state_dict()
    layers = 2
    kept = [key for key in state if key.endswith("lora_A")]
    assert len(kept) == layers * 4, "query = key = value; output; gate = up; down"
    assert len(state["same"]["shared"]) == layers * 3
    assert method.cost()["numbers_stored"] == sum(v.numel() for v in state.values() if isinstance(v, torch.Tensor))
    again = PGP(energy=0.9)
    again.load_state_dict(json.loads(json.dumps({"same": state["same"]})) | {k: state[k] for k in state if k != "same"})
    assert again.state_dict().keys() == state.keys()
    before, after = bases_by_parameter(method, pool), bases_by_parameter(again, pool)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_protected_follows_its_adapter(pool, method) -> None:
    training = begin(method, pool, "shared", TRAIN, is_new=True)
    method.close_task(training.task)
    before = list(bases_by_parameter(method, pool).values())
    pool.add("renamed", start="shared")
    pool.add("new", start="shared")
    method.adapters_changed({"renamed": "shared"})
    after = list(bases_by_parameter(method, pool, "renamed").values())
    assert len(before) == len(after) == 28
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert bases_by_parameter(method, pool, "shared") == bases_by_parameter(method, pool, "new") == {}


def test_only_some_rows_are_looked_at_and_always_the_same(pool, method) -> None:
    few = PGP(examples=2)
    few.attach(pool, method.backbone)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        few.load_state_dict({"same": {}})
        few.close_task(begin(few, pool, "shared", TRAIN, is_new=True).task)
        states.append(few.state_dict())
    assert few.cost()["extra_forward_rows"] == 2
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0] if key != "same")


def test_other_weights_than_lora_are_refused(method) -> None:
    weight = {"projector.weight": torch.nn.Parameter(torch.zeros(2, 2))}
    training = Training(Task("a", (), TRAIN, (), (), ""), Placement("shared", True), TRAIN, weight, None, None, 1, 1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"projector\.weight is trained"):
        method.begin(training)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": 0.0}, "energy must be a number above 0 to 1"),
        ({"energy": 1.0}, "energy must be below 1"),
        ({"energy": 1.5}, "energy must be a number above 0 to 1"),
        ({"energy": "high"}, "energy must be a number"),
        ({"examples": 0}, "examples must be a whole number from 1"),
    ],
)
def test_wrong_options_are_refused(options, message) -> None:
    with pytest.raises(UserError, match=message):
        build_method([("pgp", options)])


def test_pgp_stands_behind_the_part_that_averages() -> None:
    build_method([("lcia", {}), ("pgp", {})])
    with pytest.raises(UserError, match="write pgp behind lcia"):
        build_method([("pgp", {}), ("lcia", {})])


# --- in a run


class GradientOnly(PGP):
    """What is not enough: projects what AdamW is given, and not what it makes of it."""

    name = "gradient_only"

    def shape_grads(self) -> None:
        for weight, _, basis in self._protected:
            assert weight.grad is not None
            weight.grad.sub_(inside(weight.grad, basis))

    def _project(self) -> None:
        """Nothing."""


def leaks(folder: Path, group: str, first: str, last: str) -> list[float]:
    """‖ΔW U‖ / ‖ΔW‖ of each matrix from the end of task `first` to that of `last`, U as it was between them."""
    before, after = (
        load_file(folder / "history" / task / group / "adapter_model.safetensors") for task in (first, last)
    )
    kept = load_file(folder / "history" / first / "method.safetensors")
    bases = {key.split("/")[-1]: value for key, value in kept.items()}
    same = json.loads((folder / "history" / first / "method.json").read_text())
    shared: Mapping[str, str] = next(value for key, value in same.items() if key.endswith("same"))[group]
    found = []
    for name, weight in after.items():
        matrix = name.removesuffix(".weight")
        moved = (weight - before[name]).double()
        basis = bases[shared.get(matrix, matrix)].double()
        if moved.norm() > 1e-7:  # else all directions are protected, and nothing moves at all
            found.append(float((moved @ basis).norm() / moved.norm()))
    assert len(found) > 0.5 * len(after)
    return found


RUN: dict[str, Any] = {
    "tasks": ["colours", "paints"],
    "max_steps": 6,
    "weight_decay": 0.1,
    "lora_r": 8,
    "max_eval_examples": 1,
}


def test_nothing_moves_in_the_protected_subspace_under_adamw(tiny_config, monkeypatch, tmp_path) -> None:
    monkeypatch.setitem(METHODS, "gradient_only", GradientOnly)
    found = {}
    for name in ("pgp", "gradient_only"):
        folder = tmp_path / name
        measure(tiny_config(**RUN, method={"name": name, "energy": 0.7}, output_dir=str(folder)))
        found[name] = leaks(folder, "shared", "colours", "paints")
    assert max(found["pgp"]) < 1e-5
    assert max(found["gradient_only"]) > 1e-2
    assert sum(leak > 1e-5 for leak in found["gradient_only"]) > 0.9 * len(found["gradient_only"])


@pytest.mark.parametrize("rule", ["fixed", "fisher"])
def test_the_average_of_a_group_keeps_to_it_too(tiny_config, rule) -> None:
    """Averaged element by element (fisher), θ* leaves the subspace that every θ was in: so it is projected again."""
    config = tiny_config(**RUN, method=[{"name": "lcia", "rule": rule}, {"name": "pgp", "energy": 0.7}])
    results = measure(config)
    assert results["groups"] == {"colours": "colours", "paints": "colours"}
    assert max(leaks(Path(config.output_dir), "colours", "colours", "paints")) < 1e-5


def test_a_group_is_not_held_back_by_another(tiny_config, tmp_path) -> None:
    """The first task of a second group is trained as without PGP."""
    stages = []
    for name, method in (("with", ["lcia", "pgp"]), ("without", ["lcia"])):
        config = tiny_config(
            method=method, tasks=["colours", "animals"], max_eval_examples=1, output_dir=str(tmp_path / name)
        )
        measure(config)
        stages.append(RunFolder(config.output_dir).records("stage_learned")[-1]["sha256"])
    assert stages[0] == stages[1]


def test_the_share_that_is_protected_is_logged_and_grows(tiny_config) -> None:
    config = tiny_config(method={"name": "pgp", "examples": 4}, max_eval_examples=1)
    measure(config)
    log = [json.loads(line) for line in (Path(config.output_dir) / "training_log.jsonl").read_text().splitlines()]
    shares = {
        task: [(r.get("protected_A"), r.get("protected_B")) for r in log if r["task"] == task][-1]
        for task in ("colours", "animals", "paints")
    }
    assert shares["colours"] == (None, None)
    assert all(0 < first <= second < 1 for first, second in zip(shares["animals"], shares["paints"], strict=True))
    costs = [stage["method_cost"] for stage in RunFolder(config.output_dir).records("stage_learned")]
    assert [cost["extra_forward_rows"] for cost in costs] == [4, 4, 4]
    assert costs[0]["numbers_stored"] <= costs[1]["numbers_stored"] <= costs[2]["numbers_stored"]


@pytest.mark.parametrize("step", [8, 10])
@pytest.mark.parametrize("name", ["pgp", ["lcia", "pgp"]], ids=["alone", "with lcia"])
def test_a_killed_task_goes_on_to_the_same_weights(tiny_config, tmp_path, monkeypatch, name, step) -> None:
    check_that_a_killed_run_goes_on_to_the_same_end(monkeypatch, tiny_config, tmp_path, name, step)
