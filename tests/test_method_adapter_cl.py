"""AdapterCL: the bottleneck and the perplexity against their equations, the choice against a search, whole runs."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from lcia import training
from lcia.adapters.bottleneck import Bottleneck
from lcia.answering import answer_requests
from lcia.backbone import Backbone, answer_logits, collate, encode_row, load_backbone
from lcia.backbone.chat import IGNORED
from lcia.errors import UserError
from lcia.methods import adapter_cl, build_method
from lcia.methods.adapter_cl import AdapterCL
from lcia.methods.base import Placement, Training
from lcia.progress import Reporter
from lcia.run import resume, train
from lcia.run_folder import RunFolder
from lcia.session import open_run
from lcia.stream import Row, Task
from t5_oracle import t5_logits

LORA = {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "target_modules": "all-linear"}
TEXTS = ("Name the colour", "a", "Which animal is it\n\nanimals item 12", "two\nlines", "b", "Name the colours now")
ANSWERS = ("x", "yy", "", "a longer answer", "z", "w")


def measure(config: Any) -> dict[str, Any]:
    with Reporter() as reporter:
        return train(config, reporter)


def request(text: str, *outputs: str) -> Row:
    return Row("", text, (("user", text),), outputs)


@pytest.fixture
def method(tiny_model: Path) -> AdapterCL:
    """Three tasks learned, in adapters that all do something; the pool and the backbone are attached."""
    method = AdapterCL(bottleneck=8)
    backbone = load_backbone(str(tiny_model), dtype="float32")
    method.attach(method.make_pool(backbone, LORA, 0), backbone)
    generator = torch.Generator().manual_seed(0)
    for name in ("first", "second", "third"):
        method.pool.add(name)
        with torch.no_grad():
            for parameter in method.pool.parameters(name).values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    method.load_state_dict({"learned": ["first", "second", "third"]})
    return method


def plain_log_perplexity(model: torch.nn.Module, tokens: tuple[int, ...], until: int | None = None) -> float:
    """−1/(n−1) Σ_i log p(x_i | x_1 … x_{i−1}) of the first `until` tokens, of one row without padding, in float64."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(tokens)])).logits[0].double().tolist()
    total, count = 0.0, 0
    for i in range(1, len(tokens) if until is None else until):
        highest = max(logits[i - 1])
        normaliser = highest + math.log(sum(math.exp(value - highest) for value in logits[i - 1]))
        total += normaliser - logits[i - 1][tokens[i]]
        count += 1
    return total / count


def in_float64(method: AdapterCL, adapter: str) -> torch.nn.Module:
    """A copy of the model that answers with `adapter` wherever it is called inside `pool.active(adapter)`."""
    with method.pool.active(adapter) as model:
        return copy.deepcopy(model).double()


# --- the module


def test_the_bottleneck_equals_plain_loops() -> None:
    """h + U ReLU(D LayerNorm(h) + b) + c of each token, one number at a time, in float64."""
    module = Bottleneck(6, 4)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    h = torch.randn(2, 3, 6, generator=generator) * 3 + 1
    found = module(h, "an input that does not matter")
    weights = {name: value.double().tolist() for name, value in module.named_parameters()}
    for row in range(2):
        for token in range(3):
            x = h[row, token].double().tolist()
            mean = sum(x) / 6
            deviation = math.sqrt(sum((value - mean) ** 2 for value in x) / 6 + 1e-5)
            normed = [
                (value - mean) / deviation * gain + shift
                for value, gain, shift in zip(x, weights["norm.weight"], weights["norm.bias"], strict=True)
            ]
            inner = [
                max(0.0, sum(w * n for w, n in zip(line, normed, strict=True)) + bias)
                for line, bias in zip(weights["down.weight"], weights["down.bias"], strict=True)
            ]
            expected = [
                value + sum(w * k for w, k in zip(line, inner, strict=True)) + bias
                for value, line, bias in zip(x, weights["up.weight"], weights["up.bias"], strict=True)
            ]
            assert found[row, token].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_new_bottleneck_adds_nothing_also_to_bfloat16() -> None:
    module = Bottleneck(6, 4)
    h = torch.randn(5, 6).bfloat16()
    assert torch.equal(module(h), h)
    assert module(h).dtype == torch.bfloat16


# --- the choice


def test_each_request_goes_to_the_adapter_of_its_lowest_perplexity(method) -> None:
    requests = [request(text) for text in TEXTS]
    matches = method.route(requests)
    assert matches is not None
    chosen = set()
    for row, match in zip(requests, matches, strict=True):
        prompt = encode_row(method.backbone.tokenizer, replace(row, outputs=("",))).prompt
        expected = {}
        for adapter in ("first", "second", "third"):
            model = in_float64(method, adapter)
            with method.pool.active(adapter):
                expected[adapter] = plain_log_perplexity(model, prompt)
        lowest = min(expected.values())
        assert sorted(expected.values())[1] - lowest > 1e-4  # the choice is no matter of rounding
        assert expected[match.group] == lowest
        assert match.nearest == match.group
        assert match.score == match.scores[match.group]
        for adapter, value in expected.items():
            assert match.scores[adapter] == pytest.approx(math.exp(-value), rel=1e-4)
        chosen.add(match.group)
    assert len(chosen) > 1


def test_batching_does_not_decide(method, monkeypatch) -> None:
    requests = [request(text) for text in TEXTS]
    together = method.route(requests)
    for limit in (1, 70):
        monkeypatch.setattr(adapter_cl, "_TOKENS", limit)
        for one, other in zip(together, method.route(requests), strict=True):
            assert one.group == other.group
            assert one.scores == pytest.approx(other.scores, rel=1e-5)


def test_batches_hold_every_prompt_once_and_few_tokens() -> None:
    prompts = [(0,) * length for length in (5, 900, 7, 2000, 5, 500, 520, 1)]
    batches = list(adapter_cl._batches(prompts))
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(prompts[i]) for i in batch) <= 1024
    assert [sorted(batch) for batch in batches] == [[0, 2, 4, 7], [5], [6], [1], [3]]


def test_among_equals_the_earliest_answers(method) -> None:
    method.pool.add("twin", start="first")
    for order in (["first", "twin"], ["twin", "first"]):
        method.load_state_dict({"learned": order})
        assert {match.group for match in method.route([request(text) for text in TEXTS])} == {order[0]}


def test_a_request_longer_than_the_model_reads_is_told_by_its_end(method, monkeypatch) -> None:
    """Such a row counts as wrong; it must not end the run with an index out of range."""
    prompt = method.backbone.reader.encode_prompt(request("a long request")).prompt
    seen: list[int] = []
    measure = method._log_perplexities
    monkeypatch.setattr(
        method, "_log_perplexities", lambda model, asked: seen.extend(map(len, asked)) or measure(model, asked)
    )
    for limit in (5, None):
        monkeypatch.setattr(method.backbone.reader, "positions", limit)
        method.route([request("a long request")])
    assert set(seen) == {5, len(prompt)}


def test_reference_answers_play_no_part(method) -> None:
    with_answers = [request(text, "some answer", "another") for text in TEXTS]
    assert method.route(with_answers) == method.route([request(text) for text in TEXTS])


def test_nothing_is_dropped_while_routing(method) -> None:
    requests = [request(text) for text in TEXTS]
    quiet = method.route(requests)
    for layer in method.pool.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    method.pool.model.train()
    assert method.route(requests) == quiet


def test_routing_leaves_modes_gradients_and_the_active_adapter_alone_and_is_counted(method) -> None:
    mine = method.pool.train_only("second")
    model = method.pool.model
    model.train()
    model.lm_head.eval()
    ids = torch.arange(5, 25)[None]
    before = model(input_ids=ids).logits.detach()
    matches = method.route([request(text) for text in TEXTS])
    assert {match.group for match in matches} <= {"first", "second", "third"}
    assert model.training
    assert not model.lm_head.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in mine.values())
    assert torch.equal(model(input_ids=ids).logits, before)
    assert method.routing_cost() == {"extra_forward_rows": 3 * len(TEXTS)}
    begin(method, "second")
    assert method.cost() == {"extra_forward_rows": 0, "extra_backward_rows": 0}  # of training, which it is not


def test_before_the_first_task_it_does_not_route(tiny_model) -> None:
    assert AdapterCL().route([request("anything")]) is None
    combined = build_method([("adapter_cl", {})])
    backbone = load_backbone(str(tiny_model), dtype="float32")
    combined.attach(combined.make_pool(backbone, LORA, 0), backbone)
    assert combined.route([request("anything")])[0].group is None


def test_only_what_was_learned_is_tried_whatever_the_pool_holds(method) -> None:
    """An earlier state of a run is measured with a pool that holds the later adapters as well."""
    method.load_state_dict({"learned": ["second"]})
    assert {match.group for match in method.route([request(text) for text in TEXTS])} == {"second"}
    assert method.state_dict() == {"learned": ["second"]}


def test_adapters_follow_their_new_names(method) -> None:
    method.adapters_changed({"first": "first", "new": "third"})
    assert method.state_dict() == {"learned": ["first", "new"]}


# --- the loss on requests


def begin(method: AdapterCL, adapter: str) -> None:
    """The method as it is while a task is learned in `adapter`."""
    parameters = method.pool.train_only(adapter)
    optimizer = torch.optim.SGD(list(parameters.values()))
    task = Task(adapter, (), (), (), (), "exact_match")
    placement = Placement(adapter, is_new=True)
    method.begin(Training(task, placement, [], parameters, method.pool.model, optimizer, 1, 1))


def batch_of(method: AdapterCL) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Rows with answers of different lengths, and the batch they make."""
    rows = [request(text, answer) for text, answer in zip(TEXTS, ANSWERS, strict=True)]
    encoded = [encode_row(method.backbone.tokenizer, row) for row in rows]
    return encoded, {**collate(encoded, method.backbone.reader.pad_id), "rows": torch.tensor(float(len(encoded)))}


def test_the_loss_gets_the_mean_log_perplexity_of_the_requests_without_their_answers(method) -> None:
    encoded, batch = batch_of(method)
    method._request_weight = 0.7
    begin(method, "second")
    penalty = method.penalty(batch)
    assert penalty is not None
    model = in_float64(method, "second")
    values = [plain_log_perplexity(model, row.prompt + row.answer, until=len(row.prompt)) for row in encoded]
    assert penalty.item() == pytest.approx(0.7 * sum(values) / len(values), rel=1e-5)
    assert method.cost() == {"extra_forward_rows": len(encoded), "extra_backward_rows": len(encoded)}
    penalty.backward()
    moved = {
        name for name, value in method.pool.model.named_parameters() if value.grad is not None and value.grad.any()
    }
    assert moved == set(method.pool.parameters("second"))


def test_unequal_micro_batches_weigh_their_rows(method) -> None:
    """A step of 4 rows and then 2: what the trainer halves is the mean over all 6 of them."""
    encoded, _ = batch_of(method)
    begin(method, "second")
    pad_id, rows = method.backbone.reader.pad_id, torch.tensor(3.0)  # on average
    parts = [method.penalty({**collate(part, pad_id), "rows": rows}) for part in (encoded[:4], encoded[4:])]
    model = in_float64(method, "second")
    values = [plain_log_perplexity(model, row.prompt + row.answer, until=len(row.prompt)) for row in encoded]
    assert sum(part.item() for part in parts) / 2 == pytest.approx(sum(values) / 6, rel=1e-5)
    unweighted = (sum(values[:4]) / 4 + sum(values[4:]) / 2) / 2
    assert unweighted != pytest.approx(sum(values) / 6, rel=1e-4)


def test_a_question_between_answers_is_no_part_of_the_request(method) -> None:
    """Nothing behind the first answer's first token is, learned or not."""
    _, batch = batch_of(method)
    begin(method, "second")
    whole = method.penalty(batch)
    labels = batch["labels"].clone()
    longest = (labels != IGNORED).sum(1).argmax()
    labels[longest, -4:-2] = IGNORED
    assert torch.equal(method.penalty({**batch, "labels": labels}), whole)


def test_without_weight_there_is_no_second_pass(method) -> None:
    method._request_weight = 0.0
    begin(method, "second")
    assert method.penalty(batch_of(method)[1]) is None
    assert method.cost() == {"extra_forward_rows": 0, "extra_backward_rows": 0}


# --- options


@pytest.mark.parametrize("value", [0, -1, 8.0, "8", True, None])
def test_a_bad_bottleneck_is_refused_by_name(value) -> None:
    with pytest.raises(UserError, match="adapter_cl: bottleneck must be a whole number from 1"):
        build_method([("adapter_cl", {"bottleneck": value})])


@pytest.mark.parametrize("value", [-0.1, "1", True, float("nan")])
def test_a_bad_weight_is_refused_by_name(value) -> None:
    with pytest.raises(UserError, match="adapter_cl: request_weight must be a number from 0"):
        build_method([("adapter_cl", {"request_weight": value})])


# --- encoder-decoders


@pytest.fixture
def on_t5(tiny_t5: Path) -> AdapterCL:
    """As `method`, on an encoder-decoder."""
    method = AdapterCL(bottleneck=8)
    backbone = load_backbone(str(tiny_t5), dtype="float32")
    method.attach(method.make_pool(backbone, LORA, 0), backbone)
    generator = torch.Generator().manual_seed(0)
    for name in ("first", "second", "third"):
        method.pool.add(name)
        with torch.no_grad():
            for parameter in method.pool.parameters(name).values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    method.load_state_dict({"learned": ["first", "second", "third"]})
    return method


def oracle_surprise(method: AdapterCL, adapter: str, encoder: Sequence[int], target: Sequence[int]) -> list[float]:
    """−log p of each token of `target` in float64, by T5's and the adapter's equations."""
    weights = {name: value.double().numpy() for name, value in method.pool.model.state_dict().items()}
    config = method.pool.model.config
    decoder = [config.decoder_start_token_id, *target[:-1]]
    logits = t5_logits(weights, f"adapters.group_{adapter}", config.num_heads, encoder, decoder)
    surprise = []
    for line, token in zip(logits, target, strict=True):
        highest = line.max()
        surprise.append(highest + math.log(sum(math.exp(value - highest) for value in line)) - line[token])
    return surprise


def test_an_adapter_stands_behind_every_sublayer_of_t5(on_t5) -> None:
    places = {name.split(".adapters.")[0] for name in on_t5.pool.parameters("first")}
    inside = {"encoder": ("SelfAttention", "DenseReluDense")}
    inside["decoder"] = ("SelfAttention", "EncDecAttention", "DenseReluDense")
    assert places == {
        f"{stack}.block.{block}.layer.{i}.{name}"
        for stack, names in inside.items()
        for block in (0, 1)
        for i, name in enumerate(names)
    }


def test_answers_of_t5_with_an_adapter_have_the_logits_of_the_equations(on_t5) -> None:
    row = encode_row(on_t5.backbone.tokenizer, request("Which animal is it, item 12?", "a cat"))
    expected = oracle_surprise(on_t5, "second", row.prompt, row.answer)
    with on_t5.pool.active("second") as model, torch.no_grad():
        logits, targets = answer_logits(model, collate([row], on_t5.backbone.reader.pad_id))
    found = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_new_adapter_is_the_function_of_t5_itself(tiny_t5) -> None:
    method = AdapterCL()
    backbone = load_backbone(str(tiny_t5), dtype="float32")
    method.attach(method.make_pool(backbone, LORA, 0), backbone)
    batch = batch_of(method)[1]
    with torch.no_grad():
        base = answer_logits(backbone.model, batch)[0]
        method.pool.add("new")
        with method.pool.active("new") as model:
            assert torch.equal(answer_logits(model, batch)[0], base)


def test_on_t5_each_request_goes_to_the_adapter_whose_decoder_finds_it_likeliest(on_t5) -> None:
    """−1/n Σ_i log p(x_i | x_1 … x_{i−1}), the encoder reading nothing but the end token."""
    requests = [request(text) for text in TEXTS]
    end = on_t5.backbone.tokenizer.eos_token_id
    chosen = set()
    for row, match in zip(requests, on_t5.route(requests), strict=True):
        prompt = encode_row(on_t5.backbone.tokenizer, replace(row, outputs=("",))).prompt
        expected = {}
        for adapter in ("first", "second", "third"):
            surprise = oracle_surprise(on_t5, adapter, [end], prompt)
            expected[adapter] = sum(surprise) / len(prompt)
        lowest = min(expected.values())
        assert sorted(expected.values())[1] - lowest > 1e-4  # the choice is no matter of rounding
        assert expected[match.group] == lowest
        for adapter, value in expected.items():
            assert match.scores[adapter] == pytest.approx(math.exp(-value), rel=1e-4)
        chosen.add(match.group)
    assert len(chosen) > 1


def test_on_t5_the_loss_gets_the_same_perplexity_and_no_answer(on_t5) -> None:
    encoded, batch = batch_of(on_t5)
    on_t5._request_weight = 0.7
    begin(on_t5, "second")
    penalty = on_t5.penalty(batch)
    assert penalty is not None
    end = on_t5.backbone.tokenizer.eos_token_id
    values = [sum(oracle_surprise(on_t5, "second", [end], row.prompt)) / len(row.prompt) for row in encoded]
    assert penalty.item() == pytest.approx(0.7 * sum(values) / len(values), rel=1e-5)
    penalty.backward()
    moved = {name for name, value in on_t5.pool.model.named_parameters() if value.grad is not None and value.grad.any()}
    assert moved <= set(on_t5.pool.parameters("second"))
    assert any("decoder" in name for name in moved)


def test_a_run_on_t5_finds_its_adapters_again(tiny_config, tiny_t5) -> None:
    method = {"name": "adapter_cl", "bottleneck": 50}
    config = tiny_config(model=str(tiny_t5), method=method, max_steps=8, max_new_tokens=8)
    results = measure(config)
    assert results["routing"]["accuracy"] == 100.0
    record = json.loads((Path(config.output_dir) / "predictions" / "3" / "animals.jsonl").read_text().splitlines()[0])
    answer = answer_requests(Path(config.output_dir), [(record["prompt"].strip(), None)])[0]
    assert (answer.group, answer.answer) == ("animals", record["prediction"])


def test_layers_that_cannot_be_told_apart_are_refused_by_name() -> None:
    """BART's layers hold the two matrices of their MLP directly; as wide as the model, both look like writers."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=50, d_model=16, max_position_embeddings=20, decoder_ffn_dim=32, **sizes)
    for width, refused in ((32, False), (16, True)):
        config.encoder_ffn_dim = width
        backbone = Backbone("small", BartForConditionalGeneration(config), None, "")  # type: ignore[arg-type]
        if refused:
            with pytest.raises(UserError, match=r"model small: .* exactly 2 of them in every layer of BartEncoder"):
                AdapterCL().make_pool(backbone, LORA, 0)
        else:
            AdapterCL().make_pool(backbone, LORA, 0)


# --- whole runs


def test_a_run_learns_an_adapter_per_task_and_finds_it_again(tiny_config) -> None:
    """Two tasks share their instruction: what is left to tell them apart is the request as a whole."""
    config = tiny_config(method={"name": "adapter_cl", "bottleneck": 50}, max_steps=8)
    results = measure(config)
    folder = Path(config.output_dir)
    names = ["colours", "animals", "paints"]
    assert results["groups"] == {name: name for name in names}
    assert results["routing"]["confusion"] == {name: {name: 4} for name in names}
    assert results["metrics"]["forgetting"] == 0.0
    hashes = [record["sha256"] for record in RunFolder(folder).records("stage_learned")]
    assert [list(stage) for stage in hashes] == [names[:1], names[:2], names]
    for stage in hashes:
        assert all(stage[name] == hashes[-1][name] for name in stage)  # what was learned is never trained again
    # 8 steps of 4 rows a task; row j asks j adapters about the tasks it measures, 4 rows each
    trained, asked = 3 * 8 * 4, {0: 0, 1: 1 * 2 * 4, 2: 2 * 3 * 4, 3: 3 * 3 * 4}
    assert results["cost"]["extra_backward_rows"] == trained
    assert results["cost"]["extra_forward_rows"] == trained + sum(asked.values())
    stages, rows = RunFolder(folder).records("stage_learned"), RunFolder(folder).rows()
    assert all(stage["method_cost"]["extra_forward_rows"] == 8 * 4 for stage in stages)
    assert {row: facts["method_cost"]["extra_forward_rows"] for row, facts in rows.items()} == asked
    settings = json.loads((folder / "pool" / "animals" / "method.json").read_text())
    assert settings["settings"] == {"name": "adapter_cl", "bottleneck": 50}
    assert "Bottleneck adapter" in (folder / "pool" / "animals" / "README.md").read_text()

    record = json.loads((folder / "predictions" / "3" / "animals.jsonl").read_text().splitlines()[0])
    text = record["prompt"].removeprefix("<|user|>").removesuffix("<|end|>\n<|assistant|>")
    answer = answer_requests(folder, [(text, None)])[0]
    assert (answer.group, answer.answer) == ("animals", record["prediction"])
    assert 0.0 < answer.similarity < 1.0
    session = open_run(folder)
    session.go_to(RunFolder(folder).snapshots()[0])
    assert session.method.route([request(text)])[0].group == "colours"


def test_the_choice_needs_the_loss_on_requests(tiny_config) -> None:
    """As above, but trained on answers alone: an adapter has no reason to find its own task's requests likely."""
    method = {"name": "adapter_cl", "bottleneck": 50, "request_weight": 0.0}
    assert measure(tiny_config(method=method, max_steps=8))["routing"]["accuracy"] < 60.0


class Killed(Exception):
    """Stands for the process dying at this very call."""


def test_a_task_goes_on_behind_its_last_checkpoint_to_the_same_bits(tiny_config, tmp_path, monkeypatch) -> None:
    options: dict[str, Any] = {"method": "adapter_cl", "max_steps": 4, "save_steps": 2, "tasks": ["colours", "animals"]}
    whole = measure(tiny_config(**options, output_dir=str(tmp_path / "whole")))
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
        resumed = resume(tmp_path / "cut", reporter)
    hashes = [[r["sha256"] for r in RunFolder(tmp_path / run).records("stage_learned")] for run in ("whole", "cut")]
    assert hashes[0] == hashes[1]
    assert resumed["matrix"] == whole["matrix"]
    for name in ("extra_forward_rows", "extra_backward_rows"):
        assert resumed["cost"][name] == whole["cost"][name]
