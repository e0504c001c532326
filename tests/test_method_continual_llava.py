"""Continual LLaVA: choice, mixture and key stage against their equations in float64; mixed batches; whole runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from conftest import byte_tokenizer, interrupted
from lcia.adapters import stack_name
from lcia.adapters.increments import IncrementPool, shares
from lcia.adapters.targets import attention_outputs
from lcia.answering import answer_requests
from lcia.backbone import Backbone, Encoded, answer_logits, encode_row, load_backbone, told
from lcia.errors import UserError
from lcia.evaluation import Decoding, generate_answers
from lcia.grouping.sentence import encode, load_encoder
from lcia.methods import Placement, Training, build_method
from lcia.methods.continual_llava import train_keys
from lcia.progress import Reporter
from lcia.run import resume, train
from lcia.run_folder import RunFolder
from lcia.session import load_run_stream, open_run
from lcia.stream import Row, load_stream
from test_module_pool import TINY, tiny
from tiny_vision import square_stream, tiny_llava

SLOTS, RANK, WIDTH, CHOSEN = 3, 2, 5, 2
Matrix = list[list[float]]


def measure(config: Any) -> dict[str, Any]:
    with Reporter() as reporter:
        return train(config, reporter)


def made_up(row: Encoded) -> np.ndarray[Any, Any]:
    """A vector for any instruction, as a sentence encoder has one."""
    return np.random.default_rng(sum(map(ord, row.instruction))).normal(size=WIDTH).astype(np.float32)


def make_pool(backbone: Backbone, names: Sequence[str] = ("a", "b", "c"), one_pool: bool = False) -> IncrementPool:
    """Adapters that all do something; the backbone's reader makes queries."""
    backbone.reader.query = made_up
    pool = IncrementPool(backbone, SLOTS, RANK, WIDTH, CHOSEN, 0.5, one_pool, {"name": "test"})
    for name in names:
        pool.add(name)
        fill(pool, name)
    return pool


def fill(pool: IncrementPool, name: str) -> None:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for parameter in pool.parameters(name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        choice = pool.choice(name)
        choice.used.copy_(torch.rand(SLOTS, generator=generator))
        if choice.context is not None:
            choice.context.copy_(torch.rand(len(choice.context), generator=generator))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_t5: Path) -> dict[str, Path]:
    llava = tiny_llava(tmp_path_factory.mktemp("llava"))
    return {"llama": tiny_model, "t5": tiny_t5, "llava": llava}


@pytest.fixture
def backbone(folders: dict[str, Path]) -> Backbone:
    return load_backbone(str(folders["llama"]), dtype="float32")


def save_encoder(folder: Path, seed: int = 0) -> Path:
    """A random one-layer BERT without a pooler. Its vectors differ as widely as random ones can."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=42,
        initializer_range=1.0,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_encoder(tmp_path_factory.mktemp("encoder")))


def forget_encoders() -> None:
    """As a new process would."""
    load_encoder.cache_clear()
    encode.cache_clear()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """With and without an image, of three instructions; two rows differ in nothing but their instruction."""
    stream = load_stream(str(square_stream(tmp_path_factory.mktemp("squares"))))
    first, second = stream[0].train[0], next(row for row in stream[1].train if not row.images)
    return [first, second, replace(first, instruction="Something else"), stream[1].train[1]]


def encoded(backbone: Backbone, rows: Sequence[Row]) -> list[Encoded]:
    images = backbone.layout.sees
    return [backbone.reader.encode(row if images else replace(row, images=())) for row in rows]


# --- the equations, one number at a time, in float64


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def plain_shares(query: Sequence[float], keys: Matrix, chosen: int) -> list[float]:
    """cos(q, k_m) / Σ cos over the `chosen` keys of the highest cosine; cosines below 0 count as 0."""
    cosines = [cosine(query, key) for key in keys]
    best = sorted(range(len(keys)), key=lambda m: -cosines[m])[:chosen]
    total = sum(max(0.0, cosines[m]) for m in best)
    return [max(0.0, cosines[m]) / total if m in best and total else 0.0 for m in range(len(keys))]


def product(b: Matrix, a: Matrix) -> Matrix:
    return [[sum(p * q for p, q in zip(row, column, strict=True)) for column in zip(*a, strict=True)] for row in b]


def added(terms: list[tuple[float, Matrix]]) -> Matrix:
    """Σ weight · matrix."""
    height, width = len(terms[0][1]), len(terms[0][1][0])
    return [[sum(weight * matrix[i][j] for weight, matrix in terms) for j in range(width)] for i in range(height)]


def plain_increment(pool: IncrementPool, layer: str, query: Sequence[float], candidates: list[str]) -> Matrix:
    """Δθ + Σ_t s_t Δδ_t for one layer and one row, with dense matrices: the docstring of the method."""
    names = pool.names
    weights = dict(pool.model.named_parameters())
    P: dict[str, list[Matrix]] = {}
    for name in names:
        a = weights[f"{layer}.adapters.group_{name}.A"].double().tolist()
        b = weights[f"{layer}.adapters.group_{name}.B"].double().tolist()
        P[name] = [
            product([row[s * RANK : s * RANK + RANK] for row in b], a[s * RANK : s * RANK + RANK]) for s in range(SLOTS)
        ]
    keys = {name: pool.choice(name).keys.double().tolist() for name in names}
    found = plain_shares(query, [key for name in candidates for key in keys[name]], CHOSEN)
    alpha = {name: found[i * SLOTS : i * SLOTS + SLOTS] for i, name in enumerate(candidates)}
    zero = [[0.0] * len(P["a"][0][0])] * len(P["a"][0])
    terms = [(0.0, zero)] + [(alpha[name][s], P[name][s]) for name in candidates for s in range(SLOTS)]
    for t, name in enumerate(names):
        context = pool.choice(name).context
        if name not in candidates or context is None:
            continue
        for w, earlier in zip(context.double().tolist(), names[:t], strict=True):
            used = pool.choice(earlier).used.double().tolist()
            mean = added([(used[s], P[earlier][s]) for s in range(SLOTS)])  # Z̄
            terms.append((sum(alpha[name]) * w, mean))
    return added(terms)


def test_shares_equal_plain_loops_and_add_up_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(7, 4, generator=generator), torch.randn(6, 4, generator=generator) * 3
    found = shares(queries, keys, 3)
    for query, row in zip(queries.double().tolist(), found, strict=True):
        assert row.tolist() == pytest.approx(plain_shares(query, keys.double().tolist(), 3), rel=1e-5, abs=1e-7)
        assert row.sum() == pytest.approx(1)
        assert (row > 0).sum() <= 3


def test_a_query_that_every_key_points_away_from_chooses_nothing() -> None:
    keys = torch.tensor([[1.0, 0.0], [0.5, -0.1]])
    assert shares(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), keys, 2)[0].tolist() == [0.0, 0.0]
    assert shares(torch.tensor([[0.0, 1.0]]), keys[:1], 4).tolist() == [[0.0]]  # at a right angle; M above P


@pytest.mark.parametrize(("active", "one_pool"), [("a+b+c", False), ("b", False), ("a+b+c", True)])
def test_the_increment_of_each_row_is_that_of_the_equation(backbone, rows, active, one_pool) -> None:
    pool = make_pool(backbone, one_pool=one_pool)
    batch = backbone.reader.collate(encoded(backbone, rows))
    layers = attention_outputs(backbone.model, "tiny")
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for path, layer in layers.items():
        layer.register_forward_hook(lambda m, x, y, path=path: seen.update({path: (x[0].double(), y.double())}))
    with pool.active(active), torch.no_grad():
        answer_logits(pool.model, batch)
    candidates = ["c"] if one_pool else active.split("+")
    changed = 0
    for path, layer in layers.items():
        x, y = seen[path]  # (B, L, in), (B, L, out)
        for row, query in enumerate(batch["query"].double().tolist()):
            change = torch.tensor(plain_increment(pool, path, query, candidates), dtype=torch.float64)
            expected = x[row] @ (layer.weight.double() + change).T
            changed += bool((x[row] @ change.T).abs().max() > 0.1)
            torch.testing.assert_close(y[row], expected, atol=1e-5, rtol=1e-5)
    assert changed > 2


def plain_key_stage(keys: Matrix, queries: Matrix, chosen: int, rate: float, steps: int) -> Matrix:
    """Adam on −1/(n M) Σ_x Σ_m cos(q_x, k_m), all rows a step; d cos(q, k)/dk = (q/‖q‖ − cos k/‖k‖) / ‖k‖."""
    keys = [list(key) for key in keys]
    m = [[0.0] * len(keys[0]) for _ in keys]
    v = [[0.0] * len(keys[0]) for _ in keys]
    for step in range(1, steps + 1):
        gradient = [[0.0] * len(keys[0]) for _ in keys]
        for query in queries:
            cosines = [cosine(query, key) for key in keys]
            for s in sorted(range(len(keys)), key=lambda s: -cosines[s])[:chosen]:
                length_q = math.sqrt(sum(value * value for value in query))
                length_k = math.sqrt(sum(value * value for value in keys[s]))
                for d in range(len(query)):
                    slope = (query[d] / length_q - cosines[s] * keys[s][d] / length_k) / length_k
                    gradient[s][d] -= slope / (len(queries) * chosen)
        for s in range(len(keys)):
            for d in range(len(keys[0])):
                m[s][d] = 0.9 * m[s][d] + 0.1 * gradient[s][d]
                v[s][d] = 0.999 * v[s][d] + 0.001 * gradient[s][d] ** 2
                mean, square = m[s][d] / (1 - 0.9**step), v[s][d] / (1 - 0.999**step)
                keys[s][d] -= rate * mean / (math.sqrt(square) + 1e-8)
    return keys


def test_the_key_stage_equals_plain_loops() -> None:
    generator = torch.Generator().manual_seed(1)
    keys, queries = torch.randn(4, 3, generator=generator), torch.randn(5, 3, generator=generator)
    found = train_keys(keys.double(), queries.double(), 2, 0.05, epochs=6, batch_size=9, seed=0)
    expected = plain_key_stage(keys.double().tolist(), queries.double().tolist(), 2, 0.05, steps=6)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    assert (found - keys).abs().max() > 0.1


def test_the_key_stage_draws_the_chosen_keys_nearer_and_leaves_the_others() -> None:
    generator = torch.Generator().manual_seed(2)
    keys, queries = torch.randn(6, 8, generator=generator), torch.randn(1, 8, generator=generator).expand(20, 8)
    chosen = shares(queries[:1], keys, 2)[0] > 0
    assert chosen.sum() == 2
    after = train_keys(keys, queries, 2, 0.02, epochs=10, batch_size=8, seed=0)
    before, now = (torch.cosine_similarity(queries[:1], k) for k in (keys, after))
    assert (now[chosen] > before[chosen] + 0.1).all()
    assert torch.equal(after[~chosen], keys[~chosen])


def test_the_key_stage_depends_on_its_seed_and_on_nothing_before() -> None:
    generator = torch.Generator().manual_seed(3)
    keys, queries = torch.randn(4, 3, generator=generator), torch.randn(9, 3, generator=generator)
    found = []
    for seed in (0, 0, 1):
        torch.rand(5)
        found.append(train_keys(keys, queries, 2, 0.05, epochs=2, batch_size=2, seed=seed))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# --- batches


@pytest.mark.parametrize("model", ["llama", "t5", "llava"])
def test_a_batch_with_mixed_instructions_equals_each_row_alone(folders, rows, model) -> None:
    backbone = load_backbone(str(folders[model]), dtype="float32")
    pool = make_pool(backbone)
    asked = encoded(backbone, rows)
    with pool.active("a+b+c"), torch.no_grad():
        logits, targets = answer_logits(pool.model, backbone.reader.collate(asked))
        alone = [answer_logits(pool.model, backbone.reader.collate([row])) for row in asked]
    torch.testing.assert_close(logits, torch.cat([part for part, _ in alone]), rtol=1e-4, atol=1e-5)
    assert torch.equal(targets, torch.cat([part for _, part in alone]))
    assert (alone[0][0] - alone[2][0]).abs().max() > 1e-2  # the same tokens, another instruction
    prompts = [replace(row, answer=()) for row in asked]
    # tokens without text: a random T5 would write nothing else
    backbone.model.generation_config.suppress_tokens = backbone.tokenizer.all_special_ids
    decoding = Decoding(max_new_tokens=5, batch_size=4, max_length=256)
    together = generate_answers(pool, backbone.reader, ["a+b+c"] * 4, prompts, decoding)
    assert together == [generate_answers(pool, backbone.reader, ["a+b+c"], [one], decoding)[0] for one in prompts]
    assert len(set(together)) > 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_that_chooses_nothing_is_the_base_models_bit_for_bit(folders, rows, dtype) -> None:
    backbone = load_backbone(str(folders["llama"]), dtype=dtype)
    pool = make_pool(backbone, names=("a", "b"))
    asked = encoded(backbone, rows)
    directions = dict.fromkeys(row.instruction for row in rows)
    for text, direction in zip(directions, np.eye(WIDTH, dtype=np.float32), strict=False):
        directions[text] = direction
    backbone.reader.query = lambda row: directions[row.instruction]
    for name in pool.names:
        pool.choice(name).keys.copy_(-torch.eye(WIDTH)[1])
    pool.choice("a").keys[0] = torch.eye(WIDTH)[0]
    batch = backbone.reader.collate(asked)
    owner = torch.tensor([i for i, row in enumerate(asked) for _ in row.answer])
    with torch.no_grad():
        with pool.active(None):
            base, _ = answer_logits(pool.model, batch)
        with pool.active("a+b"):
            mixed, _ = answer_logits(pool.model, batch)
    nothing = shares(batch["query"], pool.choice("a").keys, CHOSEN).sum(1) == 0
    assert nothing[1]
    assert not nothing[0]
    assert torch.equal(mixed[owner == 1], base[owner == 1])
    assert (mixed[owner == 0] - base[owner == 0]).abs().max() > 1e-2


def test_a_request_like_a_tasks_rows_is_answered_by_what_that_task_trained(backbone, rows) -> None:
    """Whatever is learned later, as long as its keys are farther."""
    pool = make_pool(backbone)
    for i, name in enumerate(pool.names):
        pool.choice(name).keys.copy_(torch.eye(WIDTH)[i] + 0.01 * torch.arange(15.0).reshape(SLOTS, WIDTH))
    backbone.reader.query = lambda row: np.eye(WIDTH, dtype=np.float32)[1]
    batch = backbone.reader.collate(encoded(backbone, rows))
    found = []
    for active in ("b", "a+b", "a+b+c"):
        with pool.active(active), torch.no_grad():
            found.append(answer_logits(pool.model, batch)[0])
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[2], found[0], atol=1e-6, rtol=1e-5)


def test_a_model_called_without_queries_says_so(backbone) -> None:
    pool = make_pool(backbone)
    with pool.active("a"), pytest.raises(RuntimeError, match="outside of `told`"):
        pool.model(input_ids=torch.arange(5, 9)[None])
    with told(pool.model, {"query": torch.ones(1, WIDTH)}), pool.active("a"):
        pool.model(input_ids=torch.arange(5, 9)[None])
    with pool.active("a"), pytest.raises(RuntimeError, match="outside of `told`"):  # nothing is left behind
        pool.model(input_ids=torch.arange(5, 9)[None])


# --- the pool


def test_only_the_tasks_own_parameters_are_trained(backbone) -> None:
    pool = make_pool(backbone)
    mine = pool.train_only("c")
    assert len(mine) == 2 * 2 + 1  # A and B of two layers, and w
    assert {name for name, value in pool.model.named_parameters() if value.requires_grad} == set(mine)


@pytest.mark.parametrize("one_pool", [False, True])
def test_earlier_increments_take_part_and_get_no_gradient(backbone, rows, one_pool) -> None:
    """stop_grad(Z̄): even where everything asks for gradients, the layers beneath included."""
    pool = make_pool(backbone, one_pool=one_pool)
    pool.model.requires_grad_(True)
    batch = backbone.reader.collate(encoded(backbone, rows))
    found = []
    for weight in (1.0, 0.0):
        context = pool.choice("c").context
        assert context is not None
        context.data.fill_(weight)
        with pool.active("c"):
            found.append(answer_logits(pool.model, batch)[0])
    assert (found[0] - found[1]).abs().max() > 1e-2  # Z̄ counts
    found[0].square().sum().backward()
    for name in ("a", "b"):
        assert not any(value.grad is not None and value.grad.any() for value in pool.parameters(name).values())
    assert all(value.grad is not None and value.grad.any() for value in pool.parameters("c").values())


def test_slots_that_no_row_chose_get_no_gradient(backbone, rows) -> None:
    """Two rows with two choices, of three slots: each row's loss reaches its own, and both together their union."""
    pool = make_pool(backbone)
    pool.choice("c").keys.copy_(torch.eye(SLOTS, WIDTH))
    choices = [{0}, {2}]
    asked = [replace(row, instruction=str(*choice)) for row, choice in zip(rows[:2], choices, strict=True)]
    backbone.reader.query = lambda row: np.eye(WIDTH, dtype=np.float32)[int(row.instruction)]
    batch = backbone.reader.collate(encoded(backbone, asked))
    mine = pool.train_only("c")
    for meant in ([0], [1], [0, 1]):
        pool.model.zero_grad()
        logits, _ = answer_logits(pool.model, batch)
        first = int((batch["labels"][0] != -100).sum())  # answer tokens of row 0
        sum(part.square().sum() for i, part in enumerate((logits[:first], logits[first:])) if i in meant).backward()
        expected = set().union(*(choices[i] for i in meant))
        for name, value in mine.items():
            if name.endswith(".context"):
                continue
            assert value.grad is not None
            grad = value.grad if name.endswith(".A") else value.grad.T  # (S R, features)
            reached = grad.unflatten(0, (SLOTS, RANK)).flatten(1).any(1)  # (S,)
            assert {s for s in range(SLOTS) if reached[s]} == expected, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_adapter_is_the_base_model_bit_for_bit_and_its_keys_are_directions(folders, rows, dtype) -> None:
    backbone = load_backbone(str(folders["llama"]), dtype=dtype)
    backbone.reader.query = made_up
    batch = backbone.reader.collate(encoded(backbone, rows))
    with torch.no_grad():
        base, _ = answer_logits(backbone.model, batch)  # no pool has touched it
        pool = make_pool(backbone, names=())
        pool.add("a")
        assert pool.choice("a").keys.norm(dim=1).tolist() == pytest.approx([1.0] * SLOTS)
        for active in ("a", None):
            with pool.active(active):
                assert torch.equal(answer_logits(pool.model, batch)[0], base)
        fill(pool, "a")
        with pool.active("a"):
            assert not torch.equal(answer_logits(pool.model, batch)[0], base)


@pytest.mark.parametrize("model", ["llama", "t5", "llava"])
def test_checkpointed_activations_give_the_same_gradients(folders, rows, model) -> None:
    """A layer that is computed again in the backward pass still mixes what each of the rows asks."""
    backbone = load_backbone(str(folders[model]), dtype="float32")
    pool = make_pool(backbone)
    batch = backbone.reader.collate(encoded(backbone, rows))
    mine = pool.train_only("c")
    calls = 0

    def count(module: torch.nn.Module, inputs: Any) -> None:
        nonlocal calls
        calls += 1

    for layer in attention_outputs(pool.model, "tiny").values():
        layer.register_forward_pre_hook(count)
    found, called = [], []
    pool.model.train()  # else nothing is computed again
    for checkpointing in (False, True):
        torch.manual_seed(0)  # T5 drops out
        if checkpointing:
            pool.model.activation_checkpointing_enable()
        pool.model.zero_grad()
        before = calls
        answer_logits(pool.model, batch)[0].square().sum().backward()
        called.append(calls - before)
        found.append({name: value.grad.clone() for name, value in mine.items() if value.grad is not None})
    assert called[1] == 2 * called[0]
    assert found[0].keys() == found[1].keys() == mine.keys()
    for name, gradient in found[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_checkpoints_that_would_go_back_through_the_mixture_twice_are_refused(backbone, rows) -> None:
    pool = make_pool(backbone)
    pool.train_only("c")
    pool.model.train()
    pool.model.enable_input_require_grads()
    pool.model.activation_checkpointing_enable({"use_reentrant": True})
    batch = backbone.reader.collate(encoded(backbone, rows))
    with pytest.raises(UserError, match=r"'activation_checkpointing_kwargs'.* use_reentrant: true cannot"):
        answer_logits(pool.model, batch)


def test_what_is_saved_computes_the_same_in_a_new_pool(folders, rows, tmp_path) -> None:
    found, hashes = [], []
    for names in (("a", "b"), ()):
        backbone = load_backbone(str(folders["llama"]), dtype="float32")
        pool = make_pool(backbone, names)
        for name in ("a", "b"):
            pool.save(name, tmp_path / name) if names else pool.load(name, tmp_path / name)
        with pool.active("a+b"), torch.no_grad():
            found.append(answer_logits(pool.model, backbone.reader.collate(encoded(backbone, rows)))[0])
        hashes.append([pool.sha256(name) for name in ("a", "b", "a+b")])
    assert torch.equal(found[0], found[1])
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 3
    with torch.no_grad():  # a key that moves, of an earlier adapter, is another function
        pool.choice("a").keys[0, 0] += 1
    assert set(hashes[0]).isdisjoint(pool.sha256(name) for name in ("a", "b", "a+b"))


def test_one_pool_goes_on_with_the_slots_it_has(backbone) -> None:
    pool = make_pool(backbone, names=("a", "b"), one_pool=True)
    pool.add("c", start="b")
    theirs = {key.replace("group_b", "group_c"): value for key, value in pool.parameters("b").items()}
    mine = pool.parameters("c")
    same = {key for key in mine if mine[key].shape == theirs[key].shape and torch.equal(mine[key], theirs[key])}
    assert {key.rpartition(".")[2] for key in set(mine) - same} == {"context"}
    assert torch.equal(pool.choice("c").keys, pool.choice("b").keys)
    context = pool.choice("c").context
    assert context is not None
    assert context.tolist() == [0.5, 0.5]


def test_an_adapter_that_others_build_on_stays(backbone) -> None:
    pool = make_pool(backbone)
    with pytest.raises(ValueError, match="'c' builds on it"):
        pool.remove("a")
    pool.remove("c")
    assert pool.names == ["a", "b"]


OUTPUTS = {
    "gpt2": "attn.c_proj",
    "opt": "self_attn.out_proj",
    "gpt_neox": "attention.dense",
    "gemma": "self_attn.o_proj",
}


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_output_projections_of_every_architecture_are_found(name) -> None:
    found = list(attention_outputs(tiny(name), name))
    assert len(found) == 3
    assert all(path.endswith(OUTPUTS[name]) for path in found)


def test_cross_attention_counts_and_the_vision_tower_does_not(folders) -> None:
    t5 = list(attention_outputs(load_backbone(str(folders["t5"])).model, "t5"))
    assert sorted(path.split(".", 1)[0] for path in t5) == ["decoder"] * 4 + ["encoder"] * 2
    assert all(path.endswith("Attention.o") for path in t5)
    llava = list(attention_outputs(load_backbone(str(folders["llava"])).model, "llava"))
    assert len(llava) == 2
    assert all("language_model" in path for path in llava)


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots must be a whole number from 1"),
        ({"chosen": 9}, "chosen must be at most slots = 8, got 9"),
        ({"rank": 1.5}, "rank must be a whole number"),
        ({"candidates": "some"}, "candidates must be own or all"),
        ({"query": "image"}, "query must be text or instruction"),
        ({"encoder": 3}, "encoder must be minilm, a folder or a hub id, got 3"),
        ({"context_start": 1.1}, "context_start must be a number from 0 to 1"),
        ({"key_learning_rate": 0}, "key_learning_rate must be a number above 0"),
    ],
)
def test_a_bad_option_is_refused_by_name(options, message) -> None:
    with pytest.raises(UserError, match=f"continual_llava: {message}"):
        build_method([("continual_llava", options)])


# --- whole runs


@pytest.mark.parametrize("candidates", ["own", "all"])
def test_a_run_adds_an_adapter_a_task_and_all_of_them_answer(tiny_config, encoder, candidates) -> None:
    options = {"candidates": candidates, "encoder": encoder, "query": "instruction"}
    config = tiny_config(method={"name": "continual_llava", **options})
    results = measure(config)
    folder = Path(config.output_dir)
    tasks = results["tasks"]
    assert results["groups"] == {task: task for task in tasks}
    assert results["routing"]["accuracy"] == 100.0
    assert results["routing"]["confusion"]["colours"] == {stack_name(tasks): 4}
    assert results["cost"]["adapters_stored"] == 3
    assert results["cost"]["numbers_stored"] == 3 * (8 * 16 + 8)
    hashes = [record["sha256"] for record in RunFolder(folder).records("stage_learned")]
    assert hashes[0]["colours"] == hashes[1]["colours"] == hashes[2]["colours"]
    saved = {task: load_file(folder / "pool" / task / "weights.safetensors") for task in tasks}
    layer = "model.layers.0.self_attn.o_proj"
    assert saved["colours"][f"{layer}.A"].shape == (64, 32)
    assert {task: saved[task].get("model.context", torch.zeros(0)).numel() for task in tasks} == dict(
        zip(tasks, (0, 1, 2), strict=True)
    )
    for weights in saved.values():
        assert weights["model.used"].sum() == pytest.approx(1)
        assert 1 <= (weights["model.used"] > 0).sum() <= 4  # one instruction: M slots, less those that point away
        unchosen = (weights["model.used"] == 0).repeat_interleave(8)
        if candidates == "own":
            assert not weights[f"{layer}.B"][:, unchosen].any()
        assert weights[f"{layer}.B"][:, ~unchosen].any()
    for before, after in pairwise(tasks):
        kept = saved[after]["model.used"] == 0  # a slot that nobody chose is that of the task before, in one pool
        for name, slots in (("model.keys", kept), (f"{layer}.A", kept.repeat_interleave(8))):
            same = torch.equal(saved[after][name][slots], saved[before][name][slots])
            assert same == (candidates == "all")
    assert open_run(folder).pool.sha256(stack_name(tasks)) != hashes[2]["paints"]
    answer = answer_requests(folder, [("colours item 3", "Name the colour"), ("animals item 3", "Which animal is it")])
    assert {one.group for one in answer} == {stack_name(tasks)}


@pytest.mark.parametrize("query", ["text", "instruction"])
def test_rows_of_one_instruction_choose_different_slots_by_their_text(tiny_config, encoder, query) -> None:
    options = {"encoder": encoder, "query": query, "chosen": 2}
    config = tiny_config(method={"name": "continual_llava", **options}, tasks=["colours"])
    measure(config)
    session = open_run(Path(config.output_dir))
    task = load_run_stream(config)[0]
    assert len({row.instruction for row in task.train}) == 1
    asked = [session.backbone.reader.encode(row) for row in task.train]
    assert isinstance(session.pool, IncrementPool)
    choice = session.pool.choice("colours")
    found = shares(session.backbone.reader.collate(asked)["query"], choice.keys, 2)  # (n, S)
    choices = {tuple(row.nonzero().flatten().tolist()) for row in found}
    assert (len(choices) > 1) == (query == "text")
    torch.testing.assert_close(choice.used, found.mean(0))  # Z̄: over rows, what each of them chose
    used = choice.used > 0
    assert (used.sum() > 2) == (query == "text")
    b = load_file(Path(config.output_dir) / "pool" / "colours" / "weights.safetensors")[
        "model.layers.0.self_attn.o_proj.B"
    ]
    trained = b.T.unflatten(0, (8, 8)).flatten(1).any(1)  # (S,)
    assert not trained[~used].any()
    assert trained[used].any()


def test_the_query_is_that_of_the_last_user_turn_or_of_the_instruction(backbone, encoder) -> None:
    turns = (("system", "Be kind"), ("user", "First"), ("assistant", "Yes"), ("user", "A cat\nName it"))
    row = Row("1", "Name it", turns, ("cat",))
    conversation = replace(row, every_answer=True)  # one mixture for all its answers: that of its first question
    cases = [("text", row, "A cat\nName it"), ("instruction", row, "Name it"), ("text", conversation, "First")]
    for query, asked, text in cases:
        assert query == "instruction" or asked.user_text == text  # what stage 1 takes
        method = build_method([("continual_llava", {"encoder": encoder, "query": query})])
        method.attach(method.make_pool(backbone, {}, 0), backbone)
        for ids in (backbone.reader.encode(asked), encode_row(backbone.reader.chat, asked)):
            found = backbone.reader.collate([ids])["query"]
            assert torch.equal(found, torch.tensor(encode(text, encoder))[None])


def test_the_order_of_rows_in_the_key_stage_is_drawn_from_the_runs_seed(folders, encoder, tiny_stream) -> None:
    task = load_stream(str(tiny_stream))[0]
    found = []
    for seed in (0, 0, 1):
        backbone = load_backbone(str(folders["llama"]), dtype="float32")
        method = build_method([("continual_llava", {"encoder": encoder, "key_batch_size": 3, "chosen": 2})])
        pool = method.make_pool(backbone, {}, seed)
        method.attach(pool, backbone)
        assert isinstance(pool, IncrementPool)
        pool.add("colours")
        keys = pool.choice("colours").keys
        keys.copy_(torch.eye(8, 16))  # which depend on the seed as well
        parameters = pool.train_only("colours")
        optimizer = torch.optim.SGD(parameters.values())
        placement = Placement("colours", is_new=True)
        method.begin(Training(task, placement, task.train, parameters, pool.model, optimizer, 1, 1))
        found.append(keys.clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_run_with_checkpointed_activations_learns_the_same(tiny_config, encoder, tmp_path) -> None:
    options = {"method": {"name": "continual_llava", "encoder": encoder}, "tasks": ["colours", "animals"]}
    measure(tiny_config(**options, output_dir=str(tmp_path / "plain")))
    measure(tiny_config(**options, output_dir=str(tmp_path / "again"), activation_checkpointing=True))
    for task in options["tasks"]:
        kept, found = (
            load_file(tmp_path / name / "pool" / task / "weights.safetensors") for name in ("plain", "again")
        )
        assert kept.keys() == found.keys()
        for name, value in kept.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)


def test_weights_of_earlier_tasks_stay_within_their_range(tiny_config, encoder) -> None:
    options = {"encoder": encoder, "context_start": 1.0}
    config = tiny_config(method={"name": "continual_llava", **options}, learning_rate=0.3, max_steps=6)
    measure(config)
    pool = open_run(Path(config.output_dir)).pool
    assert isinstance(pool, IncrementPool)
    contexts = torch.cat([pool.choice(name).context for name in pool.names[1:]])  # type: ignore[misc]
    assert ((contexts >= 0) & (contexts <= 1)).all()
    assert (contexts < 1).any()


def test_the_answers_kept_for_later_know_the_instruction(backbone, rows) -> None:
    first, same_tokens = backbone.reader.encode(replace(rows[0], images=())), rows[2]
    other = backbone.reader.encode(replace(same_tokens, images=()))
    assert backbone.reader.content(first) == backbone.reader.content(other)
    backbone.reader.query = made_up
    assert backbone.reader.content(first) != backbone.reader.content(other)


@pytest.mark.parametrize("candidates", ["own", "all"])
def test_a_kill_inside_a_task_changes_nothing(tiny_config, encoder, tmp_path, candidates) -> None:
    method = {"name": "continual_llava", "candidates": candidates, "encoder": encoder}
    options: dict[str, Any] = {"method": method, "save_steps": 1}
    options["tasks"] = ["colours", "animals"]
    whole, cut = (tiny_config(**options, output_dir=str(tmp_path / name)) for name in ("whole", "cut"))
    measure(whole)
    with interrupted(6):  # the third step of the second task
        measure(cut)
    with Reporter() as reporter:
        resume(tmp_path / "cut", reporter)
    records = [RunFolder(tmp_path / name).records("stage_learned") for name in ("whole", "cut")]
    assert [record["sha256"] for record in records[0]] == [record["sha256"] for record in records[1]]
    assert [record["method_cost"] for record in records[0]] == [record["method_cost"] for record in records[1]]
    files = []
    for name in ("whole", "cut"):
        pool = tmp_path / name / "pool"
        files.append({str(path.relative_to(pool)): path.read_bytes() for path in pool.rglob("*.safetensors")})
    assert files[0] == files[1]
    assert len(files[0]) == 2


def test_an_adapter_is_refused_by_a_pool_that_would_compute_something_else_of_it(
    tiny_config, encoder, tmp_path
) -> None:
    config = tiny_config(method="continual_llava", tasks=["colours"], max_steps=1)
    measure(config)
    folder = Path(config.output_dir) / "pool" / "colours"
    settings = json.loads((folder / "method.json").read_text())["settings"]
    assert len(settings.pop("encoder_sha256")) == 64
    sizes = {"slots": 8, "chosen": 4, "rank": 8}
    assert settings == {
        "name": "continual_llava", **sizes, "candidates": "own", "encoder": "minilm", "query": "text"
    }  # fmt: skip
    backbone = load_backbone(config.model, dtype="float32")
    for other in ({"chosen": 3}, {"query": "instruction"}, {"encoder": encoder}):
        pool = build_method([("continual_llava", other)]).make_pool(backbone, {}, 0)
        with pytest.raises(UserError, match="was trained with"):
            pool.load("colours", folder)


# --- the sentence encoder


def test_an_encoders_vector_is_the_mean_over_the_tokens_that_fit(encoder) -> None:
    tokenizer = byte_tokenizer()
    model = BertModel.from_pretrained(encoder, add_pooling_layer=False).double().eval()
    for text in ("Name the colour", "x" * 39, "y" * 60):  # the last is longer than the 40 tokens it reads
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][:40]
        with torch.no_grad():
            tokens = model(torch.tensor([ids])).last_hidden_state[0].tolist()
        mean = [sum(column) / len(tokens) for column in zip(*tokens, strict=True)]
        length = math.sqrt(sum(value * value for value in mean))
        assert encode(text, encoder).tolist() == pytest.approx([value / length for value in mean], abs=1e-6)
    assert not np.allclose(encode("x" * 39, encoder), encode("x" * 40, encoder), atol=1e-6)


def test_an_encoder_is_known_by_its_weights_and_its_tokenizer(encoder, tmp_path) -> None:
    first = load_encoder(encoder).sha256
    forget_encoders()
    assert load_encoder(encoder).sha256 == first  # its pooler, which is not saved, is another one now
    assert load_encoder(str(save_encoder(tmp_path / "same"))).sha256 == first
    assert load_encoder(str(save_encoder(tmp_path / "other", seed=1))).sha256 != first
    tokenizer = tmp_path / "same" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"<|end|>"', '"<|fin|>"'))
    forget_encoders()
    assert load_encoder(str(tmp_path / "same")).sha256 != first


def test_what_is_no_encoder_is_refused(folders, encoder, tmp_path) -> None:
    for name in ("minilmm", "./nothing", "a/b/c"):
        with pytest.raises(UserError, match="no such folder, and no hub id `owner/name`; the built-in one is minilm"):
            load_encoder(name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"encoder .*empty: cannot be loaded"):
        load_encoder(str(tmp_path / "empty"))
    for kind in ("t5", "llava"):
        with pytest.raises(UserError, match=f"{kind} does not turn a text alone into a vector for each token"):
            load_encoder(str(folders[kind]))
    part = save_encoder(tmp_path / "part")
    weights = load_file(part / "model.safetensors")
    weights.pop("encoder.layer.0.output.dense.weight")
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its weights are not all there: encoder.layer.0.output.dense.weight"):
        load_encoder(str(part))


@pytest.mark.parametrize("killed_after", [2, 4])  # inside the first task, and inside the second
def test_a_run_goes_on_and_answers_with_its_own_encoder_only(tiny_config, tmp_path, killed_after) -> None:
    folder = save_encoder(tmp_path / "mine")
    method = {"name": "continual_llava", "encoder": str(folder)}
    config = tiny_config(method=method, tasks=["colours", "animals"], save_steps=1)
    run = Path(config.output_dir)
    with interrupted(killed_after + 1):
        measure(config)
    save_encoder(folder, seed=1)
    forget_encoders()
    with Reporter() as reporter:
        with pytest.raises(UserError, match="begun with another encoder" if killed_after == 2 else "was trained with"):
            resume(run, reporter)
        save_encoder(folder)
        forget_encoders()
        resume(run, reporter)
    save_encoder(folder, seed=1)
    forget_encoders()
    with pytest.raises(UserError, match="was trained with"):
        answer_requests(run, [("colours item 3", "Name the colour")])
