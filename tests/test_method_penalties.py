"""l2, ewc and lwf: their equations against plain loops in float64, and what they carry through a run."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcia.adapters import AdapterPool
from lcia.backbone import Backbone, answer_logits, collate, encode_row, load_backbone
from lcia.errors import UserError
from lcia.methods import Placement, Training, build_method
from lcia.methods.base import SHARED, Method
from lcia.methods.ewc import EWC, diagonal_fisher
from lcia.methods.l2 import L2
from lcia.methods.lwf import LwF, distillation
from lcia.methods.passes import draw
from lcia.progress import Reporter
from lcia.run import resume, train
from lcia.run_folder import RunFolder, _load_method, _save_method
from lcia.session import open_run
from lcia.stream import Row, Stream, Task, load_stream
from lcia.training import TaskTrainer

PENALTIES = {"l2": {"strength": 0.3}, "ewc": {"strength": 3.0}, "lwf": {"weight": 2.0}}


class Bench:
    """The tiny model with one adapter that is not at its start, and the tiny stream, without a run around them."""

    def __init__(self, model: Path, stream: Path, dropout: float = 0.0) -> None:
        self.backbone: Backbone = load_backbone(str(model), "float32")
        self.stream: Stream = load_stream(str(stream))
        lora = {"r": 2, "lora_alpha": 4, "lora_dropout": dropout, "target_modules": "all-linear"}
        self.pool = AdapterPool(self.backbone.model, lora, "tiny", seed=0)
        self.pool.add(SHARED)
        self.weights = self.pool.train_only(SHARED)
        self.move(seed=1)

    def move(self, seed: int) -> None:
        """Stands for training."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.weights.values():
                weight += 0.1 * torch.randn(weight.shape, generator=generator)

    def begin(self, method: Method, task: Task, is_new: bool = False, adapter: str = SHARED) -> None:
        method.attach(self.pool, self.backbone)
        optimizer = torch.optim.SGD(self.weights.values())
        placement = Placement(adapter, is_new=is_new)
        method.begin(Training(task, placement, task.train, self.weights, self.pool.model, optimizer, 3, 4))

    def batch(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """As the trainer hands it to a method: with the logits of the training loss."""
        batch = collate([encode_row(self.backbone.tokenizer, row) for row in rows], self.backbone.reader.pad_id)
        logits, targets = answer_logits(self.pool.model, batch)
        return {**batch, "answer_logits": logits, "answer_tokens": torch.tensor(float(len(targets)))}


@pytest.fixture
def bench(tiny_model: Path, tiny_stream: Path) -> Bench:
    return Bench(tiny_model, tiny_stream)


def answer_scores(model: torch.nn.Module, backbone: Backbone, row: Row) -> tuple[torch.Tensor, tuple[int, ...]]:
    """(A, V) logits of one row's answer tokens, the row alone, without padding; and these tokens."""
    encoded = encode_row(backbone.tokenizer, row)
    if backbone.model.config.is_encoder_decoder:  # the decoder is fed what came before each answer token
        before = [backbone.model.config.decoder_start_token_id, *encoded.answer[:-1]]
        inputs = {"input_ids": torch.tensor([encoded.prompt]), "decoder_input_ids": torch.tensor([before])}
        return model(**inputs, use_cache=False).logits[0], encoded.answer
    logits = model(input_ids=torch.tensor([[*encoded.prompt, *encoded.answer]]), use_cache=False).logits[0]
    start = len(encoded.prompt)
    return logits[start - 1 : -1], encoded.answer


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(model).double().eval()


# --- options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("l2", {"strength": -0.1}, "strength must be a number from 0, got -0.1"),
        ("l2", {"strength": True}, "strength must be a number"),
        ("l2", {"strength": math.nan}, "strength must be a number"),
        ("ewc", {"strength": math.inf}, "strength must be a number"),
        ("ewc", {"fisher_examples": 0}, "fisher_examples must be a whole number from 1, or null for all; got 0"),
        ("ewc", {"fisher_examples": 1.5}, "fisher_examples must be a whole number"),
        ("ewc", {"decay": 1.1}, "decay must be a number from 0 to 1, got 1.1"),
        ("ewc", {"accumulate": "no"}, "accumulate must be true or false"),
        ("ewc", {"accumulate": False, "decay": 0.9}, "nothing is added up that could decay"),
        ("lwf", {"temperature": 0}, "temperature must be a number above 0, got 0"),
        ("lwf", {"weight": "1"}, "weight must be a number"),
    ],
)
def test_a_wrong_value_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_method([(name, options)])


# --- the Fisher information


def test_the_fisher_information_is_the_mean_of_squared_gradients_example_by_example() -> None:
    """A network of 3 → 4 → 2 in float64, its examples one by one through backward(), element by element."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (2, 4)))
    inputs = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(2, (32,), generator=generator).tolist()

    def losses(weights: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        for x, label in zip(inputs, labels, strict=True):
            scores = weights[1] @ torch.tanh(weights[0] @ x)
            yield -(scores[label] - torch.log(torch.exp(scores[0]) + torch.exp(scores[1])))

    weights = [first.clone().requires_grad_(), second.clone().requires_grad_()]
    found = diagonal_fisher(losses(weights), weights)
    assert [weight.grad for weight in weights] == [None, None]

    total, mean_gradient = [0.0] * 20, [0.0] * 20
    for i in range(32):
        fresh = [first.clone().requires_grad_(), second.clone().requires_grad_()]
        list(losses(fresh))[i].backward()
        gradient = [*fresh[0].grad.flatten().tolist(), *fresh[1].grad.flatten().tolist()]
        for k, value in enumerate(gradient):
            total[k] += value**2 / 32
            mean_gradient[k] += value / 32
    torch.testing.assert_close(found, torch.tensor(total, dtype=torch.float64), rtol=1e-12, atol=0)
    assert sum(value**2 for value in mean_gradient) < 0.3 * float(found.sum()), "the square of a mean is another thing"


def brute_force_fisher(bench: Bench, rows: Sequence[Row]) -> list[torch.Tensor]:
    """In float64, each row alone and unpadded; the loss is the sum over the answer's tokens."""
    model = in_float64(bench.pool.model)
    weights = [dict(model.named_parameters())[name] for name in bench.weights]
    fisher = [torch.zeros_like(weight) for weight in weights]
    for row in rows:
        logits, answer = answer_scores(model, bench.backbone, row)
        loss = sum(logits[j].logsumexp(0) - logits[j, token] for j, token in enumerate(answer))
        model.zero_grad()
        loss.backward()
        for total, weight in zip(fisher, weights, strict=True):
            total += weight.grad * weight.grad / len(rows)
    return fisher


@pytest.mark.parametrize("model", ["tiny_model", "tiny_t5"])
def test_ewc_measures_the_adapter_without_dropout_and_leaves_nothing_behind(request, tiny_stream, model: str) -> None:
    bench = Bench(request.getfixturevalue(model), tiny_stream, dropout=0.5)
    task = bench.stream[0]
    bench.pool.model.train()
    bench.pool.model.base_model.model.lm_head.eval()  # modes are put back one by one
    modes = [module.training for module in bench.pool.model.modules()]
    method = EWC(fisher_examples=None)
    bench.begin(method, task, is_new=True)
    method.close_task(task)
    assert [module.training for module in bench.pool.model.modules()] == modes
    assert all(weight.grad is None for weight in bench.weights.values())
    fisher = method.state_dict()["fisher/shared"]
    assert fisher.dtype == torch.float32
    expected = torch.cat([part.flatten() for part in brute_force_fisher(bench, task.train)])
    torch.testing.assert_close(fisher.double(), expected, rtol=1e-3, atol=1e-6 * float(expected.max()))
    rows = len(task.train)
    assert method.cost() == {
        "numbers_stored": fisher.numel(),
        "extra_forward_rows": rows,
        "extra_backward_rows": rows,
    }


def test_ewc_draws_its_examples_the_same_way_each_time(bench) -> None:
    task = bench.stream[0]
    few = draw(task.train, 5, task.name, "fisher")
    assert few == draw(task.train, 5, task.name, "fisher") != draw(task.train, 5, "other", "fisher")
    assert few == [row for row in task.train if row in few]
    assert len(few) == 5
    assert draw(task.train, 1000, task.name) == draw(task.train, None, task.name) == list(task.train)
    method = EWC(fisher_examples=5)
    bench.begin(method, task, is_new=True)
    method.close_task(task)
    assert method.cost()["extra_forward_rows"] == 5
    expected = torch.cat([part.flatten() for part in brute_force_fisher(bench, few)])
    torch.testing.assert_close(
        method.state_dict()["fisher/shared"].double(), expected, rtol=1e-3, atol=1e-6 * float(expected.max())
    )


@pytest.mark.parametrize(
    ("options", "kept"), [({}, 1.0), ({"decay": 0.5}, 0.5), ({"accumulate": False}, 0.0)], ids=["sum", "decay", "last"]
)
def test_ewc_adds_up_or_overwrites(bench, options: dict[str, Any], kept: float) -> None:
    one, two = bench.stream[0], bench.stream[2]
    alone = []
    method = EWC(fisher_examples=4, **options)
    for seed, task in enumerate((one, two)):
        bench.begin(method, task, is_new=task is one)
        bench.move(seed)
        method.close_task(task)
        single = EWC(fisher_examples=4)
        bench.begin(single, task, is_new=True)
        single.close_task(task)
        alone.append(single.state_dict()["fisher/shared"])
    torch.testing.assert_close(method.state_dict()["fisher/shared"], kept * alone[0] + alone[1])
    assert not torch.allclose(alone[0], alone[1], rtol=0.1)


# --- penalties


def loop(terms: list[torch.Tensor], moved: list[torch.Tensor], strength: float) -> tuple[float, list[list[float]]]:
    """strength Σ F d² and its gradient 2 strength F d, number by number."""
    value, gradients = 0.0, []
    for importance, distance in zip(terms, moved, strict=True):
        gradients.append([])
        for f, d in zip(importance.flatten().tolist(), distance.flatten().tolist(), strict=True):
            value += strength * f * d * d
            gradients[-1].append(2 * strength * f * d)
    return value, gradients


@pytest.mark.parametrize("name", ["l2", "ewc"])
def test_the_penalty_and_its_gradient_are_the_equation(bench, name: str) -> None:
    method: Method = L2(strength=0.3) if name == "l2" else EWC(strength=50.0, fisher_examples=None)
    first, second = bench.stream[0], bench.stream[2]
    bench.begin(method, first, is_new=True)
    method.close_task(first)
    importance = [torch.ones_like(weight) for weight in bench.weights.values()]
    if name == "ewc":
        importance = brute_force_fisher(bench, first.train)
    bench.begin(method, second)
    start = [weight.detach().double().clone() for weight in bench.weights.values()]
    batch = bench.batch(second.train[:2])
    at_start = method.penalty(batch)
    assert at_start is not None
    assert at_start.detach() == 0
    bench.move(seed=5)
    penalty = method.penalty(batch)
    assert penalty is not None
    gradients = torch.autograd.grad(penalty, list(bench.weights.values()))
    moved = [weight.detach().double() - before for weight, before in zip(bench.weights.values(), start, strict=True)]
    value, expected = loop(importance, moved, 0.3 if name == "l2" else 50.0 / 2)
    assert value > 0
    assert float(penalty.detach()) == pytest.approx(value, rel=1e-3)
    scale = max(abs(number) for numbers in expected for number in numbers)
    for gradient, numbers in zip(gradients, expected, strict=True):
        torch.testing.assert_close(
            gradient.flatten().double(), torch.tensor(numbers, dtype=torch.float64), rtol=1e-3, atol=1e-6 * scale
        )


def divergence_loop(new: torch.Tensor, old: torch.Tensor, temperature: float) -> float:
    """Σ p_old (log p_old − log p_new), token by token, p = softmax(z / T)."""
    total = 0.0
    for new_row, old_row in zip(new.tolist(), old.tolist(), strict=True):
        p_new = [math.exp(score / temperature) for score in new_row]
        p_old = [math.exp(score / temperature) for score in old_row]
        for a, b in zip(p_new, p_old, strict=True):
            total += b / sum(p_old) * (math.log(b / sum(p_old)) - math.log(a / sum(p_new)))
    return total


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_of_lwf_is_that_of_finite_differences(temperature: float) -> None:
    """Of a network of 3 → 4 → 5 in float64; the divergence is not symmetric, and the teacher stands first."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 3), (5, 4))
    weights = [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    inputs = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    old = torch.randn(6, 5, generator=generator, dtype=torch.float64)  # (N, V)

    def new() -> torch.Tensor:
        return torch.tanh(inputs @ weights[0].T) @ weights[1].T

    value = distillation(new(), old, temperature)
    assert float(value.detach()) == pytest.approx(divergence_loop(new(), old, temperature), rel=1e-12)
    assert float(value.detach()) != pytest.approx(divergence_loop(old, new(), temperature), rel=1e-2)
    gradients = torch.autograd.grad(value, weights)
    step = 1e-6
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            numbers = weight.view(-1)
            for k in range(len(numbers)):
                sides = []
                for sign in (1, -1):
                    numbers[k] += sign * step
                    sides.append(divergence_loop(new(), old, temperature))
                    numbers[k] -= sign * step
                expected = (sides[0] - sides[1]) / (2 * step)
                assert float(gradient.view(-1)[k]) == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_lwf_teaches_what_the_adapter_answered_before_the_task(tiny_model, tiny_stream) -> None:
    """Against two separate models in float64, row by row and unpadded; the rows have answers of unequal length."""
    bench = Bench(tiny_model, tiny_stream, dropout=0.0)
    method, task = LwF(weight=3.0, temperature=2.0), bench.stream[2]
    teacher = in_float64(bench.pool.model)
    bench.begin(method, task)
    bench.move(seed=5)
    bench.pool.model.train()
    student = in_float64(bench.pool.model)
    rows = task.train[:3]

    batch = bench.batch(rows)
    before = {name: (weight.detach().clone(), weight.data_ptr()) for name, weight in bench.weights.items()}
    penalty = method.penalty(batch)
    assert penalty is not None
    assert bench.pool.model.training
    for name, weight in bench.weights.items():
        assert torch.equal(weight, before[name][0])
        assert weight.data_ptr() == before[name][1]
        assert weight.grad is None
    penalty.backward()

    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        new, answer = answer_scores(student, bench.backbone, row)
        with torch.no_grad():
            old, _ = answer_scores(teacher, bench.backbone, row)
        for j in range(len(answer)):
            p_new, p_old = (torch.softmax(logits[j] / 2.0, dim=0) for logits in (new, old))
            total = total + (p_old * (torch.log(p_old) - torch.log(p_new))).sum()
            tokens += 1
    expected = 3.0 * total / tokens
    expected.backward()
    assert float(penalty.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    oracle = dict(student.named_parameters())
    scale = max(float(oracle[name].grad.abs().max()) for name in bench.weights)
    for name, weight in bench.weights.items():
        torch.testing.assert_close(weight.grad.double(), oracle[name].grad, rtol=1e-3, atol=1e-5 * scale)
    assert method.cost() == {"extra_forward_rows": 3}


def test_the_teacher_of_lwf_has_no_dropout(tiny_model, tiny_stream) -> None:
    """A student in training mode before its first step differs from the teacher by its dropout alone."""
    bench = Bench(tiny_model, tiny_stream, dropout=0.5)
    task = bench.stream[2]
    method = LwF()
    bench.begin(method, task)
    bench.pool.model.eval()
    quiet = method.penalty(bench.batch(task.train[:2]))
    bench.pool.model.train()
    drawn = torch.get_rng_state()
    noisy_batch = bench.batch(task.train[:2])
    after_student = torch.get_rng_state()
    noisy = method.penalty(noisy_batch)
    assert quiet is not None
    assert noisy is not None
    assert float(quiet.detach()) == pytest.approx(0.0, abs=1e-9)
    assert float(noisy.detach()) > 1e-6
    assert not torch.equal(drawn, after_student)
    assert torch.equal(after_student, torch.get_rng_state()), "the teacher draws nothing"


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_the_first_task_of_an_adapter_has_no_penalty(bench, name: str) -> None:
    method = build_method([(name, PENALTIES[name])])
    task = bench.stream[0]
    bench.begin(method, task, is_new=True)
    bench.move(seed=5)
    assert method.penalty(bench.batch(task.train[:2])) is None
    method.close_task(task)
    bench.begin(method, task)
    bench.move(seed=6)
    assert method.penalty(bench.batch(task.train[:2])).detach() > 0
    method.close_task(task)
    bench.begin(method, task, is_new=True, adapter="another")
    assert method.penalty(bench.batch(task.train[:2])) is None


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_the_penalty_is_the_same_after_a_restart(bench, tmp_path, name: str) -> None:
    """The method's state goes through the files of a snapshot; anchor and teacher are made again by `begin`."""
    first, second = bench.stream[0], bench.stream[2]
    method = build_method([(name, PENALTIES[name])])
    bench.begin(method, first, is_new=True)
    bench.move(seed=5)
    method.close_task(first)
    _save_method(method, tmp_path)
    restarted = build_method([(name, PENALTIES[name])])
    _load_method(restarted, tmp_path)
    for each in (method, restarted):
        bench.begin(each, second)
    bench.move(seed=6)
    penalties = [each.penalty(bench.batch(second.train[:2])).detach() for each in (method, restarted)]
    assert penalties[0] > 0
    assert torch.equal(*penalties)


# --- in a run

# Weights are compared here, not scores.
# The answers of colours have unequal lengths, those of paints do not.
QUICK = {"tasks": ["paints", "colours"], "max_eval_examples": 1, "max_new_tokens": 1}


def measure(config: Any) -> dict[str, Any]:
    with Reporter() as reporter:
        return train(config, reporter)


def learned(folder: Path) -> list[Any]:
    """What every stage left: weights, the method's state, its cost."""
    return [
        (
            record["sha256"],
            record["files"]["method.safetensors"],
            record["files"]["method.json"],
            record["method_cost"],
        )
        for record in RunFolder(folder).records("stage_learned")
    ]


class Killed(Exception):
    """Stands for the process dying."""


def killed_at(monkeypatch: pytest.MonkeyPatch, micro_batch: int) -> Callable[[], None]:
    """The process dies in the forward pass of this micro-batch, counted over the run from 1; returns the revival."""
    original, seen = TaskTrainer.compute_loss, 0

    def dying(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if seen == micro_batch:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(TaskTrainer, "compute_loss", dying)
    return lambda: monkeypatch.setattr(TaskTrainer, "compute_loss", original)


@pytest.mark.parametrize("parts", [["l2"], ["ewc"], ["lwf"], ["lcia", "ewc"]], ids="+".join)
def test_a_task_killed_in_its_middle_goes_on_bit_for_bit(tiny_config, tmp_path, monkeypatch, parts) -> None:
    """Killed in step 4 of 5 of the second task, in the second of two micro-batches; checkpoints after every 2 steps."""
    common = {
        **QUICK,
        "method": [{"name": part, **PENALTIES.get(part, {})} for part in parts],
        "max_steps": 5,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "lora_dropout": 0.2,
    }
    measure(tiny_config(**common, output_dir=str(tmp_path / "whole")))
    revive = killed_at(monkeypatch, micro_batch=5 * 2 + 3 * 2 + 2)
    with pytest.raises(Killed):
        measure(tiny_config(**common, output_dir=str(tmp_path / "cut")))
    revive()
    (checkpoint,) = (tmp_path / "cut" / "state").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-2"
    steps: list[int] = []
    original = TaskTrainer.compute_loss

    def counting(self: TaskTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(self.state.global_step)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TaskTrainer, "compute_loss", counting)
    with Reporter() as reporter:
        resume(tmp_path / "cut", reporter)
    assert steps == [2, 2, 3, 3, 4, 4]
    assert learned(tmp_path / "cut") == learned(tmp_path / "whole")


@pytest.mark.parametrize("name", sorted(PENALTIES))
def test_a_penalty_of_micro_batches_is_that_of_the_whole_batch(tiny_config, tmp_path, name: str) -> None:
    """Micro-batches have answers of unequal length. Plain SGD without clipping: Adam would hide a wrong factor."""
    pools = []
    for folder, size, accumulation in (("whole", 4, 1), ("parts", 1, 4)):
        config = tiny_config(
            method={"name": name, **PENALTIES[name]},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            output_dir=str(tmp_path / folder),
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.3,
            **QUICK,
        )
        measure(config)
        pools.append(load_file(tmp_path / folder / "pool" / "shared" / "adapter_model.safetensors"))
    measure(tiny_config(method="lora", optim="sgd", max_grad_norm=0.0, learning_rate=0.3, **QUICK))
    free = load_file(tmp_path / "run" / "pool" / "shared" / "adapter_model.safetensors")
    apart = max(float((free[key] - weight).abs().max()) for key, weight in pools[0].items())
    assert apart > 1e-4, "without a penalty that does something, this test shows nothing"
    for key, weight in pools[0].items():
        torch.testing.assert_close(weight, pools[1][key], atol=min(1e-6, 1e-2 * apart), rtol=1e-5)


def test_ewc_keeps_an_importance_per_group(tiny_config) -> None:
    """colours and paints share a group, animals has its own; F is that of the averaged weights the adapter keeps."""
    config = tiny_config(
        method=["lcia", {"name": "ewc", "strength": 3.0, "fisher_examples": None}], max_eval_examples=1
    )
    results = measure(config)
    assert results["groups"] == {"colours": "colours", "animals": "animals", "paints": "colours"}
    folder = Path(config.output_dir)
    session = open_run(folder)
    state = session.method.state_dict()
    fisher = {key: value for key, value in state.items() if "fisher/" in key}
    assert set(fisher) == {"1.fisher/colours", "1.fisher/animals"}
    costs = [json.dumps(record["method_cost"]) for record in RunFolder(folder).records("stage_learned")]
    numbers = len(fisher["1.fisher/animals"])
    assert [json.loads(cost)["numbers_stored"] for cost in costs] == [numbers, 2 * numbers, 2 * numbers]

    earlier = load_file(folder / "history" / "colours" / "method.safetensors")["1.fisher/colours"]
    added = fisher["1.fisher/colours"] - earlier
    alone = EWC(fisher_examples=None)
    alone.attach(session.pool, session.backbone)
    weights = session.pool.train_only("colours")
    task = load_stream(config.stream)[2]
    model, optimizer = session.pool.model, torch.optim.SGD(weights.values())
    alone.begin(Training(task, Placement("colours", is_new=True), task.train, weights, model, optimizer, 1, 1))
    alone.close_task(task)
    expected = alone.state_dict()["fisher/colours"]
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


def test_ewc_must_stand_behind_an_average() -> None:
    build_method([("lcia", {}), ("ewc", {})])
    build_method([("l2", {}), ("ewc", {}), ("lwf", {})])
    build_method([("l2", {}), ("lcia", {}), ("lwf", {})])
    with pytest.raises(UserError, match="write ewc behind lcia"):
        build_method([("ewc", {}), ("lcia", {})])


def test_ewc_follows_groups_that_change_their_names(bench) -> None:
    method = EWC()
    method.load_state_dict({"fisher/a": torch.ones(3), "fisher/b/c": torch.zeros(3), "fisher/gone": torch.ones(1)})
    method.adapters_changed({"renamed": "a", "b/c": "b/c", "split": "b/c"})
    state = method.state_dict()
    assert list(state) == ["fisher/renamed", "fisher/b/c", "fisher/split"]
    assert torch.equal(state["fisher/renamed"], torch.ones(3))
    assert torch.equal(state["fisher/split"], torch.zeros(3))
