"""Replay and A-GEM: what the memory keeps, what is trained on, and which way a projected gradient points."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lcia import training
from lcia.adapters import AdapterPool
from lcia.backbone import Backbone, encode_row, load_backbone
from lcia.errors import UserError
from lcia.methods import Placement, Training, build_method
from lcia.methods.agem import AGEM, project
from lcia.methods.memory import EpisodicMemory, row_from_json, row_to_json
from lcia.methods.passes import flat
from lcia.methods.replay import Replay
from lcia.progress import Reporter
from lcia.run import resume
from lcia.run_folder import RunFolder
from lcia.session import open_run
from lcia.stream import Row, Task
from test_run import Killed, hashes, measure, without_cost


def interrupt(monkeypatch: pytest.MonkeyPatch, config: Any, step: int) -> None:
    """Let the run die behind its optimizer step `step`, counted over all tasks."""
    original = training._Moments.on_step_end
    left = step

    def dying(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training._Moments, "on_step_end", dying)
        with pytest.raises(Killed):
            measure(config)


def check_that_a_killed_run_goes_on_to_the_same_end(
    monkeypatch: pytest.MonkeyPatch, make_config: Any, folder: Path, method: Any, step: int
) -> None:
    """Weights, the method's state, its cost and its log are those of the run that was never killed.

    Step 8 of all is in the second task behind the checkpoint of its step 2, step 10 behind that of step 4.
    """
    options = {
        "method": method,
        "max_steps": 5,
        "save_steps": 2,
        "tasks": ["colours", "paints"],
        "max_eval_examples": 1,
    }
    whole = measure(make_config(**options, output_dir=str(folder / "whole")))
    interrupt(monkeypatch, make_config(**options, output_dir=str(folder / "cut")), step)
    kept = [path.name for path in (folder / "cut" / "state").iterdir()]
    assert kept == [f"checkpoint-{2 if step == 8 else 4}"]
    with Reporter() as reporter:
        resumed = resume(folder / "cut", reporter)
    assert without_cost(resumed) == without_cost(whole)
    assert hashes(folder / "cut") == hashes(folder / "whole")
    ends = []
    for name in ("cut", "whole"):
        stages = RunFolder(folder / name).records("stage_learned")
        state = [{key: sha for key, sha in stage["files"].items() if key.startswith("method.")} for stage in stages]
        log = [json.loads(line) for line in (folder / name / "training_log.jsonl").read_text().splitlines()]
        for record in log:
            del record["examples_per_s"]
        ends.append((state, [stage["method_cost"] for stage in stages], log))
    assert ends[0] == ends[1]


# --- the memory

texts = st.text(max_size=8)
rows = st.builds(
    Row,
    id=texts,
    instruction=texts,
    messages=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), texts)).map(tuple),
    outputs=st.lists(texts, min_size=1).map(tuple),
    images=st.lists(texts).map(tuple),
    source=texts,
    demonstrations=st.lists(texts).map(tuple),
)


@given(rows)
def test_a_row_survives_json(row: Row) -> None:
    value = row_to_json(row)
    assert json.loads(json.dumps(value)) == value, "JSON would give back something else"
    assert row_from_json(json.loads(json.dumps(value))) == row


def task_of(name: str, count: int) -> Task:
    train = tuple(Row(f"{name}-{i}", "say it", (("user", f"{name} {i}\nsay it"),), (f"{i}",)) for i in range(count))
    return Task(name, ("say it",), train, (), (), "exact_match")


def learned(method: EpisodicMemory, task: Task, placement: Placement, trained: tuple[Row, ...] | None = None) -> None:
    """The moments of a task without its steps."""
    method.begin(Training(task, placement, trained or task.train, {}, torch.nn.Module(), None, 1, 4))  # type: ignore[arg-type]
    method.close_task(task)


@pytest.mark.parametrize(("memory", "kept"), [(3, 3), (10, 10), (50, 20), (None, 20)])
def test_as_many_rows_are_kept_as_asked(memory: int | None, kept: int) -> None:
    method = Replay(memory=memory)
    assert method.cost() == {"examples_stored": 0}
    for number, name in enumerate(("a", "b"), start=1):
        learned(method, task_of(name, 20), Placement("shared", is_new=name == "a"))
        assert method.cost() == {"examples_stored": number * kept}
    assert len({row.id for row in method.remembered("shared")}) == 2 * kept


def test_the_draw_depends_on_the_task_and_nothing_else() -> None:
    shared = Placement("shared", is_new=False)
    alone, behind = Replay(memory=5), AGEM(memory=5)
    torch.manual_seed(1)
    learned(alone, task_of("b", 20), shared)
    torch.manual_seed(2)
    learned(behind, task_of("a", 7), shared)
    learned(behind, task_of("b", 20), shared)
    assert behind.remembered("shared")[5:] == alone.remembered("shared")
    other = Replay(memory=5)
    learned(other, task_of("c", 20), shared)
    numbers = [[row.outputs for row in method.remembered("shared")] for method in (alone, other)]
    assert numbers[0] != numbers[1], "every task would keep the rows of the same places"


def test_only_rows_of_the_task_that_were_trained_on_are_kept() -> None:
    """Rows that are too long are not in `training.rows`; replayed ones are, and belong to other tasks."""
    task, other = task_of("a", 20), task_of("z", 20)
    method = Replay(memory=10)
    learned(method, task, Placement("shared", is_new=True), trained=(*task.train[:4], *other.train))
    assert method.remembered("shared") == list(task.train[:4])


def test_memories_follow_their_adapters_and_never_mix() -> None:
    method = Replay(memory=2)
    learned(method, task_of("a", 5), Placement("one", is_new=True))
    learned(method, task_of("b", 5), Placement("two", is_new=True))
    a, b = method.remembered("one"), method.remembered("two")
    assert {row.id[0] for row in a} == {"a"}
    assert method.feed([], Placement("two", is_new=False)) == b
    assert method.feed([], Placement("three", is_new=True, start="two")) == []
    method.adapters_changed({"renamed": "one", "copy": "one"})
    assert method.remembered("renamed") == method.remembered("copy") == a
    assert method.remembered("one") == method.remembered("two") == []
    learned(method, task_of("c", 5), Placement("copy", is_new=False))
    assert method.remembered("renamed") == a
    again = Replay(memory=2)
    again.load_state_dict(json.loads(json.dumps(method.state_dict())))
    assert again.state_dict() == method.state_dict()
    assert again.remembered("copy") == method.remembered("copy")


@pytest.mark.parametrize("name", ["replay", "agem"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many"])
def test_a_wrong_size_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UserError, match="memory must be a whole number from 1"):
        build_method([(name, {"memory": value})])
    with pytest.raises(UserError, match="reference_batch must be a whole number from 1"):
        build_method([("agem", {"reference_batch": value})])


# --- replay in a run


@pytest.fixture
def trained_rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Row]]:
    """Task → the rows it was trained on."""
    seen: dict[str, list[Row]] = {}
    begin = EpisodicMemory.begin

    def remember(self: EpisodicMemory, training: Training) -> None:
        seen[training.task.name] = list(training.rows)
        begin(self, training)

    monkeypatch.setattr(EpisodicMemory, "begin", remember)
    return seen


def counts(rows: list[Row]) -> dict[str, int]:
    names = [row.id.partition("-")[0] for row in rows]
    return {name: names.count(name) for name in sorted(set(names))}


def test_later_tasks_are_trained_on_stored_rows_too(tiny_config, trained_rows) -> None:
    config = tiny_config(method={"name": "replay", "memory": 3}, max_eval_examples=1)
    results = measure(config)
    assert counts(trained_rows["colours"]) == {"colours": 16}
    assert counts(trained_rows["animals"]) == {"animals": 16, "colours": 3}
    assert counts(trained_rows["paints"]) == {"animals": 3, "colours": 3, "paints": 16}
    assert set(trained_rows["paints"][16:19]) == set(trained_rows["animals"][16:]) <= set(trained_rows["colours"])
    assert results["cost"]["examples_stored"] == 9
    assert len(open_run(Path(config.output_dir)).method.leaves()[0].remembered("shared")) == 9  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", [["lcia", "replay"], ["replay", "lcia"]])
def test_groups_replay_their_own_rows_only(tiny_config, trained_rows, method) -> None:
    results = measure(tiny_config(method=method, max_eval_examples=1))
    assert results["groups"] == {"colours": "colours", "animals": "animals", "paints": "colours"}
    assert counts(trained_rows["animals"]) == {"animals": 16}
    assert counts(trained_rows["paints"]) == {"colours": 10, "paints": 16}


@pytest.mark.parametrize("method", ["replay", "agem"])
@pytest.mark.parametrize("step", [8, 10])
def test_a_killed_task_goes_on_to_the_same_weights(tiny_config, tmp_path, monkeypatch, method, step) -> None:
    check_that_a_killed_run_goes_on_to_the_same_end(monkeypatch, tiny_config, tmp_path, method, step)


# --- the projection of A-GEM

numbers = st.floats(-1e3, 1e3).map(lambda value: value if abs(value) > 1e-6 else 0.0)
pairs = st.integers(1, 8).flatmap(
    lambda size: st.tuples(*[st.lists(numbers, min_size=size, max_size=size) for _ in range(2)])
)


def looped(gradient: list[float], reference: list[float]) -> list[float]:
    """The rule as it is written, number by number."""
    product = math.fsum(g * r for g, r in zip(gradient, reference, strict=True))
    if product >= 0:
        return gradient
    square = math.fsum(r * r for r in reference)
    return [g - product / square * r for g, r in zip(gradient, reference, strict=True)]


@given(pairs)
def test_the_projection_is_the_rule_and_never_points_uphill(pair: tuple[list[float], list[float]]) -> None:
    gradient, reference = (torch.tensor(values, dtype=torch.float64) for values in pair)
    result = project(gradient, reference)
    scale = float(gradient.norm())
    assert float(result @ reference) >= -1e-12 * scale * float(reference.norm())
    assert float(result.norm()) <= scale * (1 + 1e-12), "what was clipped stays within its bound"
    expected = torch.tensor(looped(*pair), dtype=torch.float64)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12 * max(scale, 1.0))


@given(pairs, st.floats(1e-3, 1e3))
def test_clipped_or_not_and_long_or_short_the_direction_is_the_same(pair: Any, factor: float) -> None:
    gradient, reference = (torch.tensor(values, dtype=torch.float64) for values in pair)
    expected = factor * project(gradient, reference)
    tolerance = {"rtol": 0.0, "atol": 1e-11 * max(float(gradient.norm()) * factor, 1.0)}
    torch.testing.assert_close(project(factor * gradient, reference), expected, **tolerance)
    torch.testing.assert_close(factor * project(gradient, factor * reference), expected, **tolerance)


# --- A-GEM on a model

Case = tuple[AGEM, Backbone, dict[str, torch.nn.Parameter], Training]


@pytest.fixture
def case(tiny_model: Path) -> Case:
    """A-GEM behind one task of 5 rows with answers of different lengths, at the beginning of another; dropout is on."""
    backbone = load_backbone(str(tiny_model), "float32", "eager")
    pool = AdapterPool(
        backbone.model, {"r": 3, "lora_alpha": 6, "lora_dropout": 0.5, "target_modules": "all-linear"}, "tiny"
    )
    pool.add("shared")
    weights = pool.train_only("shared")
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in weights.values():
            weight.copy_(0.2 * torch.randn_like(weight))
    train = tuple(Row(f"{i}", "say it", (("user", "x" * i),), ("abc"[: i % 3 + 1],)) for i in range(1, 6))
    method = AGEM(memory=4)
    method.attach(pool, backbone)
    optimizer = torch.optim.AdamW(weights.values())
    first = Training(
        Task("first", (), train, (), (), ""), Placement("shared", True), train, weights, pool.model, optimizer, 3, 3
    )
    method.begin(first)
    method.close_task(first.task)
    second = Training(task_of("second", 4), Placement("shared", False), (), weights, pool.model, optimizer, 3, 3)
    method.begin(second)
    pool.model.train()
    return method, backbone, dict(weights), second


def tokens(method: AGEM, backbone: Backbone, chosen: list[Row]) -> Iterator[tuple[list[int], int, int]]:
    """(ids, position, id that must follow) of every answer token."""
    for row in chosen:
        encoded = encode_row(backbone.tokenizer, row)
        ids = [*encoded.prompt, *encoded.answer]
        for position in range(len(encoded.prompt) - 1, len(ids) - 1):
            yield ids, position, ids[position + 1]


def direct_gradient(case: Case, chosen: list[Row]) -> torch.Tensor:
    """(P,) the gradient of the summed answer loss, token by token in float64, by `.grad`."""
    method, backbone, weights, training = case
    model = training.model.double().eval()
    for ids, position, target in tokens(method, backbone, chosen):
        logits = model(input_ids=torch.tensor([ids])).logits[0, position]
        (torch.logsumexp(logits, 0) - logits[target]).backward()
    return flat(weight.grad for weight in weights.values() if weight.grad is not None)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_the_reference_gradient_is_that_of_the_stored_rows(case, monkeypatch, at_once) -> None:
    method, _, weights, training = case
    chosen: list[Row] = []
    from lcia.methods import agem

    def draw(*args: Any) -> list[Row]:
        chosen.extend(original(*args))
        return chosen

    original = agem.draw
    monkeypatch.setattr(agem, "draw", draw)
    method.penalty({"labels": torch.zeros(at_once, 2)})
    state = torch.get_rng_state()
    modes = {name: module.training for name, module in training.model.named_modules()}
    reference = method.reference_gradient()
    assert torch.equal(torch.get_rng_state(), state), "a random number of the training was used up"
    assert {name: module.training for name, module in training.model.named_modules()} == modes
    assert all(weight.grad is None for weight in weights.values())
    assert len(chosen) == 3, "as many as the training's own step averages over"
    assert set(chosen) <= set(method.remembered("shared"))
    expected = direct_gradient(case, chosen)
    torch.testing.assert_close(reference.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_gradients_are_changed_only_where_they_point_uphill(case) -> None:
    method, _, weights, _ = case
    reference = method.reference_gradient()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(reference), generator=generator) * reference.norm() / len(reference) ** 0.5
    for sign, changed in ((1.0, False), (-1.0, True)):
        for weight, part in zip(weights.values(), split(sign * reference + noise, weights), strict=True):
            weight.grad = part.clone()
        before = flat(weight.grad for weight in weights.values() if weight.grad is not None)
        assert (float(before @ reference) < 0) == changed
        method._steps = 0  # the draw of this reference
        method.shape_grads()
        after = flat(weight.grad for weight in weights.values() if weight.grad is not None)
        if not changed:
            assert torch.equal(after, before), "bit for bit"
            continue
        g, r, result = before.double(), reference.double(), after.double()
        assert abs(float(result @ r)) < 1e-5 * float(g.norm() * r.norm())
        torch.testing.assert_close(result, g - (g @ r) / (r @ r) * r, rtol=1e-4, atol=1e-6)
    assert method.log() == {"projected_fraction": 1.0}


def split(vector: torch.Tensor, weights: dict[str, torch.nn.Parameter]) -> list[torch.Tensor]:
    parts = vector.split([weight.numel() for weight in weights.values()])
    return [part.view_as(weight) for part, weight in zip(parts, weights.values(), strict=True)]


def test_every_step_draws_its_own_reference(case) -> None:
    method, _, weights, _ = case
    for weight in weights.values():
        weight.grad = torch.zeros_like(weight)
    seen = []
    for _ in range(3):
        seen.append(method.reference_gradient())
        method.shape_grads()
    assert not torch.equal(seen[0], seen[1]) or not torch.equal(seen[1], seen[2])


def test_a_missing_gradient_is_an_error(case) -> None:
    with pytest.raises(RuntimeError, match="no gradient"):
        case[0].shape_grads()


def test_what_agem_did_is_counted(tiny_config) -> None:
    """16 rows a task, 3 steps of 4 rows: no memory in the first task, 2 rows a step in the later ones."""
    config = tiny_config(method={"name": "agem", "memory": 5, "reference_batch": 2}, max_eval_examples=1)
    results = measure(config)
    stages = RunFolder(config.output_dir).records("stage_learned")
    costs = [stage["method_cost"] for stage in stages]
    assert [cost["examples_stored"] for cost in costs] == [5, 10, 15]
    assert [cost["extra_forward_rows"] for cost in costs] == [0, 6, 6]
    assert [cost["extra_backward_rows"] for cost in costs] == [0, 6, 6]
    assert results["cost"]["examples_stored"] == 15
    lines = (Path(config.output_dir) / "training_log.jsonl").read_text().splitlines()
    shares = [json.loads(line).get("projected_fraction") for line in lines]
    assert shares[:3] == [None] * 3
    assert all(0.0 <= share <= 1.0 for share in shares[3:])


def test_agem_trains_the_first_task_as_lora_does_and_later_ones_otherwise(tiny_config, tmp_path) -> None:
    weights = {}
    for method in ("lora", "agem"):
        options = {"tasks": ["colours", "paints"], "max_eval_examples": 1}
        measure(tiny_config(method=method, output_dir=str(tmp_path / method), **options))
        for task in ("colours", "paints"):
            path = tmp_path / method / "history" / task / "shared" / "adapter_model.safetensors"
            weights[method, task] = flat(load_file(path).values())
    assert torch.equal(weights["lora", "colours"], weights["agem", "colours"])
    assert not torch.equal(weights["lora", "paints"], weights["agem", "paints"])


def test_groups_keep_to_their_own_memory(tiny_config) -> None:
    """The second group's first task has none: no pass, no projection."""
    config = tiny_config(method=["lcia", "agem"], max_eval_examples=1)
    measure(config)
    costs = [stage["method_cost"] for stage in RunFolder(config.output_dir).records("stage_learned")]
    assert [cost["extra_forward_rows"] for cost in costs] == [0, 0, 3 * 4]
