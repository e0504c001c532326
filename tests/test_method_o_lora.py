"""O-LoRA: the penalty against its equation, the stack against the sum it stands for, and a whole run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcia import measuring, run, training
from lcia.adapters import AdapterPool, stack_members, stack_name
from lcia.answering import answer_requests
from lcia.backbone import load_backbone
from lcia.backbone.loading import weights_sha256
from lcia.errors import UserError
from lcia.methods import build_method
from lcia.methods.base import Placement, Training
from lcia.methods.o_lora import OLoRA, overlap
from lcia.progress import Reporter
from lcia.run import extend, resume, rollback, train
from lcia.run_folder import RunFolder
from lcia.session import open_run
from lcia.stream import Row, Task

LORA = {"r": 4, "lora_alpha": 12, "lora_dropout": 0.0, "target_modules": "all-linear"}
SCALE = 3.0  # lora_alpha / r
IDS = torch.arange(5, 25)[None]


@pytest.fixture
def pool(tiny_model: Path) -> AdapterPool:
    """Three adapters that all do something."""
    pool = AdapterPool(load_backbone(str(tiny_model), dtype="float32").model, LORA, "tiny")
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b", "c"):
        pool.add(name)
        with torch.no_grad():
            for parameter in pool.parameters(name).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return pool


def logits(pool: AdapterPool, name: str | None) -> torch.Tensor:
    with pool.active(name) as model, torch.no_grad():
        return model(input_ids=IDS).logits


def measure(config: Any) -> dict[str, Any]:
    with Reporter() as reporter:
        return train(config, reporter)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# --- the penalty


def plain_overlap(new: torch.Tensor, earlier: list[torch.Tensor]) -> float:
    """Σ_prev Σ_j Σ_k |Σ_i A_new[j, i] A_prev[k, i]|, one number at a time."""
    total = 0.0
    for matrix in earlier:
        for row in new.tolist():
            for other in matrix.tolist():
                total += abs(sum(x * y for x, y in zip(row, other, strict=True)))
    return total


def test_the_penalty_is_exactly_zero_for_orthogonal_rows_and_not_for_others() -> None:
    basis = torch.eye(8)
    assert overlap(3.0 * basis[:3], -2.0 * basis[3:7]).item() == 0.0
    assert overlap(basis[:3], basis[2:5]).item() == 1.0


def test_the_penalty_equals_plain_loops() -> None:
    generator = torch.Generator().manual_seed(1)
    new, *earlier = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(4))
    assert overlap(new, torch.cat(earlier)).item() == pytest.approx(plain_overlap(new, earlier), rel=1e-12)


def begin(method: OLoRA, pool: AdapterPool, beneath: tuple[str, ...]) -> dict[str, torch.nn.Parameter]:
    """The method as it is while adapter `c` is learned."""
    method.attach(pool, None)  # type: ignore[arg-type]
    placement = Placement("c", is_new=True, beneath=beneath)
    parameters = pool.train_only("c", beneath)
    task = Task("c", (), (), (), (), "exact_match")
    optimizer = torch.optim.SGD(list(parameters.values()))
    method.begin(Training(task, placement, [], parameters, pool.model, optimizer, 1, 1))
    return parameters


def test_the_loss_gets_both_terms_over_all_layers_and_earlier_adapters(pool) -> None:
    parameters = begin(method := OLoRA(orthogonality=0.7, shrinkage=0.3), pool, ("a", "b"))
    penalty = method.penalty({})
    assert penalty is not None
    expected, layers = 0.0, 0
    for name, weight in parameters.items():
        expected += 0.3 * sum(x**2 for x in weight.flatten().tolist()) ** 0.5
        if "lora_A" in name:
            layers += 1
            earlier = [pool.parameters(other)[name.replace("group_c", f"group_{other}")] for other in ("a", "b")]
            expected += 0.7 * plain_overlap(weight, earlier)
    assert layers == 14  # seven linear layers in each of two blocks
    assert penalty.item() == pytest.approx(expected, rel=1e-5)


def test_the_penalty_pushes_the_new_adapter_alone(pool) -> None:
    begin(method := OLoRA(), pool, ("a", "b"))
    penalty = method.penalty({})
    assert penalty is not None
    penalty.backward()
    moved = {name for name, value in pool.model.named_parameters() if value.grad is not None and value.grad.any()}
    assert moved == {name for name in pool.parameters("c") if "lora_A" in name}


def test_the_first_task_has_no_penalty(pool) -> None:
    begin(method := OLoRA(), pool, ())
    assert method.penalty({}) is None


@pytest.mark.parametrize("option", ["orthogonality", "shrinkage"])
@pytest.mark.parametrize("value", [-0.1, "0.5", True, float("nan")])
def test_a_bad_strength_is_refused_by_name(option, value) -> None:
    with pytest.raises(UserError, match=rf"o_lora: {option} must be a number"):
        build_method([("o_lora", {option: value})])


# --- the stack


def test_a_stack_is_the_base_plus_the_sum_of_the_increments(pool, tiny_model) -> None:
    """Against a plain model whose weights hold the sum: W₀ + (α / r) Σ B A, summed in float64."""
    plain = load_backbone(str(tiny_model), dtype="float32").model
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            layer = name.removesuffix(".weight")
            for adapter in ("a", "b", "c"):
                mine = {
                    kind: value.double()
                    for key, value in pool.parameters(adapter).items()
                    for kind in ("lora_A", "lora_B")
                    if key == f"base_model.model.{layer}.{kind}.group_{adapter}.weight"
                }
                if mine:
                    weight.copy_(weight.double() + SCALE * mine["lora_B"] @ mine["lora_A"])
        expected = plain(input_ids=IDS).logits
    base, stacked = logits(pool, None), logits(pool, "a+b+c")
    torch.testing.assert_close(stacked, expected, atol=2e-5, rtol=1e-4)
    assert (stacked - base).norm() > 100 * (stacked - expected).norm()
    assert (logits(pool, "a+c") - expected).norm() > 100 * (stacked - expected).norm()


def test_after_a_stack_the_base_and_the_single_adapters_are_what_they_were(pool) -> None:
    before = [logits(pool, name) for name in (None, "a", "c")]
    logits(pool, "a+b+c")
    assert all(torch.equal(logits(pool, name), value) for name, value in zip((None, "a", "c"), before, strict=True))


def test_only_the_new_adapter_trains_on_top_of_the_frozen_ones(pool) -> None:
    pool.train_only("c", ("a", "b"))
    trained = {name for name, parameter in pool.model.named_parameters() if parameter.requires_grad}
    assert trained == set(pool.parameters("c"))
    stacked = pool.model(input_ids=IDS).logits.detach()
    assert torch.equal(stacked, logits(pool, "a+b+c"))
    logits(pool, "a+b+c")
    pool.train_only("b")
    assert torch.equal(pool.model(input_ids=IDS).logits.detach(), logits(pool, "b"))


def test_the_hash_of_a_stack_follows_its_members_and_their_order(pool) -> None:
    hashes = [pool.sha256(name) for name in ("a", "b", "a+b", "b+a", "a+b+c")]
    assert len(set(hashes)) == 5
    with torch.no_grad():
        next(iter(pool.parameters("b").values())).add_(1.0)
    assert [pool.sha256(name) != old for name, old in zip(("a", "b", "a+b", "b+a", "a+b+c"), hashes, strict=True)] == [
        False,
        True,
        True,
        True,
        True,
    ]


def test_an_adapter_cannot_bear_the_name_of_a_stack(pool) -> None:
    assert stack_members(stack_name(["a", "c"])) == ["a", "c"]
    with pytest.raises(UserError, match=r"adapter 'a\+b'"):
        pool.add("a+b")


def test_an_unknown_member_is_named(pool) -> None:
    with pytest.raises(ValueError, match="no adapter 'x'"), pool.active("a+x"):
        pass


# --- a whole run


def test_a_run_learns_an_adapter_per_task_and_answers_with_all(tiny_config, monkeypatch) -> None:
    loaded: list[Any] = []

    def remember(*arguments: Any) -> Any:
        loaded.append(load_backbone(*arguments))
        return loaded[-1]

    asked: list[tuple[str, str | None]] = []
    evaluate_task = measuring.evaluate_task

    def note(pool: Any, tokenizer: Any, task: Task, rows: Any, matches: Any, *rest: Any) -> Any:
        asked.append((task.name, matches[0].group))
        return evaluate_task(pool, tokenizer, task, rows, matches, *rest)

    monkeypatch.setattr(run, "load_backbone", remember)
    monkeypatch.setattr(measuring, "evaluate_task", note)
    config = tiny_config(method="o_lora")
    results = measure(config)
    folder = Path(config.output_dir)
    assert results["groups"] == {name: name for name in ("colours", "animals", "paints")}
    everything = "colours+animals+paints"
    assert results["routing"]["confusion"] == {name: {everything: 4} for name in results["tasks"]}
    assert results["routing"]["accuracy"] == 100.0
    assert results["routing"]["base_model_answers"] == 0
    assert asked[-5:] == [  # the last row, and behind each task its oracle: the stack in which it was learned
        ("colours", everything),
        ("colours", "colours"),
        ("animals", everything),
        ("animals", "colours+animals"),
        ("paints", everything),
    ]
    diagonal = [results["matrix"][i + 1][i] for i in range(3)]
    assert results["routing"]["oracle_avg_acc"] == pytest.approx(sum(diagonal) / 3)
    predictions = (folder / "predictions" / "2" / "colours.jsonl").read_text().splitlines()
    assert {json.loads(line)["group"] for line in predictions} == {"colours+animals"}

    base = {
        name.replace(".base_layer", ""): value
        for name, value in loaded[0].model.named_parameters()
        if "lora_" not in name
    }
    assert weights_sha256(base) == loaded[0].fingerprint
    hashes = [record["sha256"] for record in RunFolder(folder).records("stage_learned")]
    assert [list(stage) for stage in hashes] == [
        ["colours"],
        ["colours", "animals"],
        ["colours", "animals", "paints"],
    ]
    for stage in hashes:
        assert all(stage[name] == hashes[-1][name] for name in stage)  # an earlier adapter never moves
    moved = weights(folder / "pool" / "paints")
    assert any(value.any() for name, value in moved.items() if "lora_B" in name)

    placements = [record["placements"] for record in RunFolder(folder).records("stage_learned")]
    assert [placements[i][name]["beneath"] for i, name in enumerate(results["tasks"])] == [
        [],
        ["colours"],
        ["colours", "animals"],
    ]
    records = RunFolder(folder).records("stage_learned")
    one = sum(value.numel() for value in moved.values())
    assert [record["trained_parameters"] for record in records] == [one, one, one]
    assert [record["stored_parameters"] for record in records] == [one, 2 * one, 3 * one]
    assert (results["cost"]["trained_parameters"], results["cost"]["stored_parameters"]) == (one, 3 * one)
    assert results["cost"]["adapters_stored"] == 3
    assert "and summed with: colours, animals" in (folder / "pool" / "paints" / "README.md").read_text()

    answer = answer_requests(folder, [("animals item 5", "Which animal is it")])[0]
    assert answer.group == everything
    record = json.loads((folder / "predictions" / "3" / "animals.jsonl").read_text().splitlines()[0])
    text = record["prompt"].removeprefix("<|user|>").removesuffix("<|end|>\n<|assistant|>")
    assert answer_requests(folder, [(text, None)])[0].answer == record["prediction"]


def test_the_oracle_of_a_run_that_was_rolled_back_is_measured(tiny_config, tmp_path, monkeypatch) -> None:
    """Here a score tells who answered: the length of the group's name."""
    evaluate_task = measuring.evaluate_task

    def telling(pool: Any, reader: Any, task: Task, rows: Any, matches: Any, *rest: Any) -> Any:
        result = evaluate_task(pool, reader, task, rows, matches, *rest)
        return replace(result, score=float(len(matches[0].group or "")))

    monkeypatch.setattr(measuring, "evaluate_task", telling)
    short = measure(tiny_config(method="o_lora", tasks=["colours", "animals"], output_dir=str(tmp_path / "short")))
    assert short["routing"]["oracle"] == {"colours": len("colours"), "animals": len("colours+animals")}
    measure(tiny_config(method="o_lora", output_dir=str(tmp_path / "long")))
    with Reporter() as reporter:
        back = rollback(tmp_path / "long", "animals", reporter)
    assert back["routing"] == short["routing"]
    assert back["matrix"] == short["matrix"]


def test_the_penalty_makes_the_adapters_more_orthogonal(tiny_config, tmp_path) -> None:
    overlaps = {}
    for strength in (0.0, 0.5):
        folder = tmp_path / str(strength)
        method = {"name": "o_lora", "orthogonality": strength}
        measure(tiny_config(method=method, output_dir=str(folder), tasks=["colours", "animals"], max_steps=6))
        old, new = (weights(folder / "pool" / name) for name in ("colours", "animals"))
        overlaps[strength] = sum(overlap(new[key], old[key]).item() for key in new if "lora_A" in key)
    assert overlaps[0.5] < 0.5 * overlaps[0.0]


def test_the_earlier_adapters_are_active_while_a_new_one_is_learned(tiny_config, monkeypatch) -> None:
    """A new adapter's B is zero: its first loss is that of the stack beneath it, and not that of the base model."""
    active: list[list[str]] = []
    on_train_begin = training._Moments.on_train_begin

    def note(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        active.append([name.removeprefix("group_") for name in kwargs["model"].base_model.active_adapters])
        return on_train_begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(training._Moments, "on_train_begin", note)
    measure(tiny_config(method="o_lora"))
    assert active == [["colours"], ["colours", "animals"], ["colours", "animals", "paints"]]


class Killed(Exception):
    """Stands for the process dying at this very call."""


def test_a_task_goes_on_behind_its_last_checkpoint_to_the_same_bits(tiny_config, tmp_path, monkeypatch) -> None:
    """It dies behind the third step of the second task."""
    options = {"method": {"name": "o_lora", "shrinkage": 0.1}, "max_steps": 4, "save_steps": 2}
    options["tasks"] = ["colours", "animals"]
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
    for name in ("colours", "animals"):
        whole, cut = (weights(tmp_path / folder / "pool" / name) for folder in ("whole", "cut"))
        assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_the_sum_survives_save_and_load_and_grows_when_the_run_is_extended(tiny_config, tiny_stream, tmp_path) -> None:
    folder = tmp_path / "grown"
    measure(tiny_config(method="o_lora", output_dir=str(tmp_path / "whole")))
    measure(tiny_config(method="o_lora", tasks=["colours", "animals"], output_dir=str(folder)))
    session = open_run(folder)
    row = Row("", "Name the colour", (("user", "Name the colour"),), ())
    assert session.method.route([row])[0].group == "colours+animals"
    assert session.placements["animals"].group == "colours+animals"
    with Reporter() as reporter:
        extend(folder, str(tiny_stream / "paints.jsonl"), None, reporter)
    assert open_run(folder).method.route([row])[0].group == "colours+animals+paints"
    hashes = [RunFolder(tmp_path / name).records("stage_learned")[-1]["sha256"] for name in ("whole", "grown")]
    assert hashes[0] == hashes[1]
    # an earlier state answers with the adapters it had, although the pool holds the later ones
    session = open_run(folder)
    session.go_to(RunFolder(folder).snapshots()[0])
    assert session.method.route([row])[0].group == "colours"
    session.go_to(None)
    assert session.method.route([row])[0].group is None


def test_a_second_part_that_places_tasks_is_refused() -> None:
    with pytest.raises(UserError, match="two parts decide which adapter"):
        build_method([("lcia", {}), ("o_lora", {})])
