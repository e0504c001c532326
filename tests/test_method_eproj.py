"""EProj: directions, similarities and retrieval against plain loops in float64; what is trained; whole runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from conftest import interrupted
from lcia.adapters import find_projector
from lcia.adapters.projector import PROJECTOR_FILE
from lcia.backbone import Backbone, load_backbone
from lcia.errors import UserError
from lcia.grouping.sentence import encode
from lcia.methods import build_method
from lcia.methods.eproj import EProj, direction, group_scores, similarity
from lcia.progress import Reporter
from lcia.run import resume, train
from lcia.run_folder import RunFolder
from lcia.session import open_run
from lcia.stream import Row, Task, load_stream
from tiny_vision import square_stream, tiny_llava, tiny_qwen

MAKERS = {"llava": tiny_llava, "qwen": tiny_qwen}
GROUPED = {"name": "eproj", "threshold": 0.95}  # the squares of all tasks look alike, and so do the answers


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return square_stream(tmp_path_factory.mktemp("squares"))


@pytest.fixture
def see_config(tiny_config: Callable[..., Any], models: dict[str, Path], squares: Path) -> Callable[..., Any]:
    def make(model: str = "llava", **changes: Any) -> Any:
        return tiny_config(**{"model": str(models[model]), "stream": str(squares), "method": GROUPED, **changes})

    return make


def measure(config: Any) -> dict[str, Any]:
    with Reporter() as reporter:
        return train(config, reporter)


def attached(folder: Path, **options: Any) -> EProj:
    """The method with its pool, on a model of its own."""
    backbone = load_backbone(str(folder), dtype="float32")
    method = EProj(**options)
    projector = find_projector(backbone.model, "auto", "tiny")
    method.attach(method.make_pool(replace(backbone, projector=projector), {}, 0), backbone)
    return method


def learned(method: EProj, tasks: Sequence[Task]) -> dict[str, str]:
    """Pass the tasks through the method without training. Returns {task: adapter}."""
    groups = {}
    for task in tasks:
        placement = method.open_task(task)
        method._adapter, method._weights = placement.adapter, []
        method.close_task(task)
        groups[task.name] = placement.adapter
    return groups


# --- the equations, one number at a time, in float64


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(vector: Sequence[float]) -> list[float]:
    return [x / math.sqrt(dot(vector, vector)) for x in vector]


def plain_direction(vectors: Sequence[Sequence[float]]) -> list[float]:
    return unit([sum(column) for column in zip(*map(unit, vectors), strict=True)])


def plain_similarity(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> float:
    both = set(a) & set(b)
    return sum(dot(a[part], b[part]) for part in both) / len(both)


def test_the_direction_equals_plain_loops_and_no_other_key_is_nearer() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = (torch.randn(9, 5, generator=generator) + 0.5) * torch.arange(1, 10)[:, None]  # of different lengths
    found = direction(vectors)
    assert found.tolist() == pytest.approx(plain_direction(vectors.double().tolist()), rel=1e-5)

    def nearness(key: list[float]) -> float:
        return sum(dot(unit(vector), unit(key)) for vector in vectors.double().tolist())

    best = nearness(found.double().tolist())
    for _ in range(200):
        other = found + torch.randn(5, generator=generator) * 0.1
        assert nearness(other.double().tolist()) < best


def some_embeddings() -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    parts = {"instruction": 4, "output": 4, "image": 3}
    tasks: dict[str, dict[str, torch.Tensor]] = {}
    for name in ("one", "two", "text", "three"):
        kept = {part: width for part, width in parts.items() if name != "text" or part != "image"}
        tasks[name] = {part: direction(torch.randn(1, width, generator=generator)) for part, width in kept.items()}
    return tasks


def test_similarities_and_scores_equal_plain_loops_also_where_a_part_is_missing() -> None:
    tasks = some_embeddings()
    plain = {name: {part: v.double().tolist() for part, v in parts.items()} for name, parts in tasks.items()}
    groups = {"one": "g", "two": "h", "text": "g", "three": "h"}
    for name, embedding in tasks.items():
        for other in tasks:
            expected = plain_similarity(plain[name], plain[other])
            assert similarity(embedding, tasks[other]) == pytest.approx(expected, abs=1e-6)
            assert -1 <= similarity(embedding, tasks[other]) <= 1 + 1e-6
        scores = group_scores(embedding, tasks, groups)
        for group in ("g", "h"):
            members = [task for task, its in groups.items() if its == group]
            expected = max(plain_similarity(plain[name], plain[task]) for task in members)
            assert scores[group] == pytest.approx(expected, abs=1e-6)
        assert list(scores) == ["g", "h"]
    assert group_scores(tasks["one"], {}, {}) == {}


# --- embeddings of tasks and requests


@pytest.mark.parametrize("model", MAKERS)
def test_an_image_is_what_the_vision_tower_gives_the_projector(models, squares, model) -> None:
    method = attached(models[model])
    row = load_stream(str(squares))[0].train[1]
    inner = method.backbone.model.model
    reader = method.backbone.reader
    batch = reader.collate([reader.encode_prompt(row)])
    with torch.no_grad():
        if model == "llava":
            tower = inner.vision_tower(batch["pixel_values"], output_hidden_states=True)
            tokens = tower.hidden_states[-2][:, 1:].flatten(0, 1)
        else:
            tokens = inner.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"]).last_hidden_state
        found = method._images([row])[row.images]
    mean = [sum(column) / len(tokens) for column in zip(*tokens.double().tolist(), strict=True)]
    assert found.tolist() == pytest.approx(mean, rel=1e-4, abs=1e-5)


def test_a_task_is_embedded_by_its_images_instructions_and_outputs(models, squares) -> None:
    method = attached(models["llava"])
    task = load_stream(str(squares))[1]  # some of its rows have no image
    method.open_task(task)
    images = [method._images([row])[row.images].tolist() for row in task.train if row.images]
    assert 0 < len(images) < len(task.train)
    expected = {
        "image": plain_direction(images),
        "instruction": plain_direction([encode(row.instruction).tolist() for row in task.train]),
        "output": plain_direction([encode(row.outputs[0]).tolist() for row in task.train]),
    }
    assert method._opened.keys() == expected.keys()
    for part, vector in expected.items():
        assert method._opened[part].tolist() == pytest.approx(vector, abs=1e-5)
    assert method.cost()["extra_forward_rows"] == len(images)


def test_tasks_above_the_threshold_share_a_projector_and_others_do_not(models, squares) -> None:
    tasks = list(load_stream(str(squares)))
    similar = attached(models["llava"], threshold=0.0)
    assert learned(similar, tasks) == dict.fromkeys(["colours", "tints", "paints"], "colours")
    scores = similar.open_task(tasks[1]).scores
    assert list(scores) == ["colours"]
    plain = {name: {part: v.double().tolist() for part, v in e.items()} for name, e in similar._tasks.items()}
    tints, paints = (plain_similarity(plain["colours"], plain[name]) for name in ("tints", "paints"))
    assert tints < 0.95 < paints < 1.0
    for threshold, groups in (
        (tints - 1e-4, ["colours", "colours", "colours"]),
        (tints + 1e-4, ["colours", "tints", "colours"]),
        (1.0, ["colours", "tints", "paints"]),
    ):
        found = learned(attached(models["llava"], threshold=threshold), tasks)
        assert list(found.values()) == groups


def test_each_request_goes_to_the_nearest_key(models, squares, tmp_path) -> None:
    method = attached(models["llava"], threshold=1.0)
    tasks = list(load_stream(str(squares)))
    assert method.route([tasks[0].test[0]]) is None  # nothing is learned: the base model answers
    learned(method, tasks[:2])
    asked = [row for task in tasks for row in task.test]
    matches = method.route(asked)
    assert matches is not None
    keys = {
        name: {part: v.double().tolist() for part, v in e.items() if part != "output"}
        for name, e in method._tasks.items()
    }
    for row, match in zip(asked, matches, strict=True):
        query = {"instruction": unit(encode(row.instruction).tolist())}
        if row.images:
            query["image"] = unit(method._images([row])[row.images].tolist())
        expected = {name: plain_similarity(query, key) for name, key in keys.items()}
        assert match.scores == {name: pytest.approx(value, abs=1e-5) for name, value in expected.items()}
        assert match.group == max(expected, key=expected.__getitem__)
        assert match.score == match.scores[match.group]
    assert {match.group for match in matches} == {"colours", "tints"}
    assert method.routing_cost() == {"extra_forward_rows": sum(bool(row.images) for row in asked)}


def test_the_image_decides_between_tasks_of_one_instruction(models, squares, tmp_path) -> None:
    """Two tasks that ask the same of images that look different."""
    rows: dict[str, list[Row]] = {}
    for name, colour in (("dark", (20, 20, 20)), ("bright", (240, 240, 240))):
        for i in range(4):
            path = tmp_path / f"{name}-{i}.png"
            Image.new("RGB", (28, 28), tuple(value + i for value in colour)).save(path)
            rows.setdefault(name, []).append(Row("", "What is it", (("user", "What is it"),), ("x",), (str(path),)))
    method = attached(models["llava"], threshold=1.0)
    learned(method, [Task(name, ("What is it",), tuple(own[:3]), (), (), "exact") for name, own in rows.items()])
    matches = method.route([own[3] for own in rows.values()])
    assert matches is not None
    assert [match.group for match in matches] == ["dark", "bright"]


def test_equal_images_are_seen_once(models, squares) -> None:
    method = attached(models["llava"])
    row = next(row for row in load_stream(str(squares))[0].train if row.images)
    learned(method, [Task("one", (row.instruction,), (row, replace(row, id="again")), (), (), "exact")])
    assert method.cost()["extra_forward_rows"] == 1
    method.route([row] * 5)
    assert method.routing_cost()["extra_forward_rows"] == 1


# --- refusals


def test_a_model_of_text_is_refused_before_the_run_begins(tiny_config) -> None:
    config = tiny_config(method="eproj")
    with pytest.raises(UserError, match=r"eproj trains what turns images into tokens, and model .* reads text only"):
        measure(config)
    assert not Path(config.output_dir).exists()


def test_a_run_without_a_projector_is_refused(see_config) -> None:
    with pytest.raises(UserError, match="key 'projector': none leaves eproj nothing to train"):
        measure(see_config(projector="none"))


@pytest.mark.parametrize("value", [-0.1, 1.1, "high", None, True])
def test_a_bad_threshold_is_refused_by_name(value) -> None:
    with pytest.raises(UserError, match="eproj: threshold must be a number from 0 to 1"):
        build_method([("eproj", {"threshold": value})])


# --- whole runs


def projectors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.parent.name: load_file(path) for path in sorted(folder.rglob(PROJECTOR_FILE))}


def untrained(backbone: Backbone) -> dict[str, torch.Tensor]:
    path = find_projector(backbone.model, "auto", "tiny") or ""
    module = backbone.model.get_submodule(path)
    return {f"{path}.{name}": weights.detach() for name, weights in module.named_parameters()}


@pytest.mark.parametrize("model", MAKERS)
def test_a_run_trains_a_projector_per_group_and_nothing_else(see_config, model) -> None:
    config = see_config(model)
    start = untrained(load_backbone(config.model, dtype="float32"))
    results = measure(config)
    folder = Path(config.output_dir)
    assert results["groups"] == {"colours": "colours", "tints": "tints", "paints": "colours"}
    assert results["routing"]["accuracy"] == 100.0
    kept = projectors(folder / "pool")
    assert set(kept) == {"colours", "tints"}
    for weights in kept.values():
        assert weights.keys() == start.keys()
        assert all((weights[name] - start[name]).abs().max() > 1e-4 for name in start)
    one = sum(value.numel() for value in start.values())
    assert (results["cost"]["trained_parameters"], results["cost"]["stored_parameters"]) == (one, 2 * one)
    history = [projectors(folder / "history" / task) for task in results["tasks"]]
    for name in start:
        assert torch.equal(history[0]["colours"][name], history[1]["colours"][name])
        assert torch.equal(history[1]["tints"][name], history[2]["tints"][name])
    # trained on from where it was: nearer to it than to the start
    last, origins = history[2]["colours"], (history[0]["colours"], start)
    moved = [sum(float((last[name] - old[name]).norm()) for name in start) for old in origins]
    assert 0 < moved[0] < moved[1]
    session = open_run(folder)
    names = [name for name, _ in session.backbone.model.named_parameters() if ".adapters." in name]
    assert names
    assert all(".multi_modal_projector." in name or ".merger." in name for name in names)


def test_what_a_run_costs_is_counted(see_config, squares) -> None:
    config = see_config()
    results = measure(config)
    records = RunFolder(Path(config.output_dir)).records("stage_learned")
    shown = [sum(bool(row.images) for row in task.train) for task in load_stream(str(squares))]
    assert [record["method_cost"]["extra_forward_rows"] for record in records] == shown
    assert results["cost"]["numbers_stored"] == 3 * (384 + 384 + 32)
    # row 1 asks two tasks, row 2 and row 3 all three
    test_rows = [sum(bool(row.images) for row in task.test) for task in load_stream(str(squares))]
    routed = sum(test_rows[:2]) + 2 * sum(test_rows)
    assert results["cost"]["extra_forward_rows"] == sum(shown) + routed


def test_rows_without_images_train_nothing_and_are_answered(see_config, tiny_stream) -> None:
    config = see_config(stream=str(tiny_stream), method={"name": "eproj", "threshold": 1.0})
    results = measure(config)
    assert None not in results["matrix"][-1]
    start = untrained(load_backbone(config.model, dtype="float32"))
    for weights in projectors(Path(config.output_dir) / "pool").values():
        assert all(torch.equal(weights[name], start[name]) for name in start)
    assert results["cost"]["extra_forward_rows"] == 0


def test_it_composes_with_a_penalty(see_config) -> None:
    results = measure(see_config(method=[GROUPED, {"name": "l2", "strength": 1.0}]))
    assert results["groups"]["paints"] == "colours"


def test_a_kill_inside_a_task_changes_nothing(see_config, tmp_path) -> None:
    options = {"tasks": ["colours", "paints"], "save_steps": 1}
    whole, cut = (see_config(**options, output_dir=str(tmp_path / name)) for name in ("whole", "cut"))
    measure(whole)
    with interrupted(6):  # the third step of the second task
        measure(cut)
    with Reporter() as reporter:
        resume(tmp_path / "cut", reporter)
    records = [RunFolder(tmp_path / name).records("stage_learned") for name in ("whole", "cut")]
    for key in ("sha256", "method_cost", "placements"):
        assert [record[key] for record in records[0]] == [record[key] for record in records[1]]
    files = []
    for name in ("whole", "cut"):
        history = tmp_path / name / "history"
        files.append({str(path.relative_to(history)): path.read_bytes() for path in history.rglob("*.safetensors")})
    assert files[0] == files[1]
    assert any(path.endswith("method.safetensors") for path in files[0])


def test_a_run_opened_again_knows_its_tasks(see_config, models, squares) -> None:
    config = see_config()
    measure(config)
    (found,) = open_run(Path(config.output_dir)).method.parts
    expected = attached(models["llava"], threshold=GROUPED["threshold"])
    assert learned(expected, list(load_stream(str(squares)))) == found._groups
    assert found._tasks.keys() == expected._tasks.keys()
    for task, parts in expected._tasks.items():
        assert found._tasks[task].keys() == parts.keys()
        assert all(torch.equal(found._tasks[task][part], vector) for part, vector in parts.items())


def test_trains_in_bfloat16_with_float32_projectors(see_config) -> None:
    config = see_config(dtype="bfloat16", tasks=["colours"])
    measure(config)
    (weights,) = projectors(Path(config.output_dir) / "pool").values()
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_accumulated_micro_batches_are_one_batch(see_config, tmp_path) -> None:
    found = []
    for name, size, accumulation in (("whole", 4, 1), ("halves", 2, 2)):
        config = see_config(
            tasks=["colours", "tints"],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            output_dir=str(tmp_path / name),
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.3,
        )
        measure(config)
        found.append(projectors(tmp_path / name / "pool"))
    for group, weights in found[0].items():
        for key, weight in weights.items():
            torch.testing.assert_close(weight, found[1][group][key], atol=1e-5, rtol=1e-4)
