"""Encoder-decoder models: loss, answers and a whole run, on a random T5 against the plain way of doing each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import byte_tokenizer
from lcia import run
from lcia.adapters import AdapterPool
from lcia.backbone import answer_logits, answer_loss, collate, encode_row, load_backbone
from lcia.backbone.layout import DECODER_ONLY, ENCODER_DECODER, flush_left
from lcia.backbone.loading import weights_sha256
from lcia.errors import UserError
from lcia.evaluation import Decoding, generate_answers
from lcia.export import export_run
from lcia.methods import METHODS
from lcia.progress import Reporter
from lcia.run import resume, train
from lcia.session import open_run
from lcia.stream import Row
from lcia.training import TaskTrainer
from test_method_penalties import learned
from test_method_pgp import RUN, leaks

QUESTIONS = [("what is it", "red"), ("a much longer question, to force padding", "a longer answer"), ("x", "y")]


def row(text: str, answer: str) -> Row:
    return Row(id="1", instruction=text, messages=(("user", text),), outputs=(answer,))


@pytest.fixture
def t5_config(tiny_config: Callable[..., Any], tiny_t5: Path) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        return tiny_config(**{"model": str(tiny_t5), "tasks": ["colours", "paints"], "max_new_tokens": 8, **changes})

    return make


def measure(config: Any) -> dict[str, Any]:
    with Reporter() as reporter:
        return train(config, reporter)


# --- the batch


def test_kept_values_move_to_the_left_in_order() -> None:
    values = torch.tensor([[9, 1, 2, 8], [3, 9, 9, 4], [9, 9, 9, 9]])
    keep = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]]).bool()
    assert flush_left(values, keep, -1).tolist() == [[1, 2], [3, 4], [-1, -1]]


def test_the_batched_answer_loss_is_the_mean_over_answer_tokens_of_each_row_alone(tiny_t5: Path) -> None:
    backbone = load_backbone(str(tiny_t5), dtype="float32")
    rows = [encode_row(backbone.tokenizer, row(*pair)) for pair in QUESTIONS]
    start = backbone.model.config.decoder_start_token_id
    total, alone = 0.0, []
    for encoded in rows:  # the plain way: one unpadded row, the decoder fed what came before each answer token
        logits = backbone.model(
            input_ids=torch.tensor([encoded.prompt]), decoder_input_ids=torch.tensor([[start, *encoded.answer[:-1]]])
        ).logits[0]
        alone.append(logits)
        log_probs = logits.double().log_softmax(-1)
        total -= sum(float(log_probs[i, token]) for i, token in enumerate(encoded.answer))
    batch = collate(rows, backbone.reader.pad_id)
    logits, targets = answer_logits(backbone.model, batch)
    assert targets.tolist() == [token for encoded in rows for token in encoded.answer]
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert float(answer_loss(backbone.model, batch, len(targets))) == pytest.approx(total / len(targets), rel=1e-5)


def test_the_encoder_reads_the_plain_text_and_no_answer(tiny_t5: Path) -> None:
    tokenizer = load_backbone(str(tiny_t5), dtype="float32").tokenizer
    encoded = encode_row(tokenizer, row("Input: x.\nOutput: ", "red"))
    assert tokenizer.decode(encoded.prompt) == "Input: x.\nOutput: "
    assert tokenizer.decode(encoded.answer) == "red<|end|>"


def test_lengths_count_prompt_and_answer_apart() -> None:
    limits = Decoding(max_new_tokens=4, batch_size=1, max_length=10)
    assert [ENCODER_DECODER.fits(*sizes, limits) for sizes in ((10, 4), (11, 4), (10, 5))] == [True, False, False]
    assert [DECODER_ONLY.fits(*sizes, limits) for sizes in ((6, 4), (7, 4), (5, 5))] == [True, False, True]


@pytest.mark.parametrize("groups", [["a", "a", "a"], ["a", None, "b"]], ids=["one group", "mixed"])
def test_batched_answers_are_those_of_each_prompt_alone(tiny_t5: Path, groups: list[str | None]) -> None:
    backbone = load_backbone(str(tiny_t5), dtype="float32")
    lora = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
    pool = AdapterPool(backbone.model, lora, "t5")
    generator = torch.Generator().manual_seed(1)
    for name in ("a", "b"):
        pool.add(name)
        with torch.no_grad():
            for weight in pool.parameters(name).values():
                weight.add_(torch.randn(weight.shape, generator=generator))
    prompts = [backbone.reader.encode_prompt(row(*pair)) for pair in QUESTIONS]
    start, end = backbone.model.config.decoder_start_token_id, backbone.tokenizer.eos_token_id

    def greedy(prompt: Sequence[int], group: str | None) -> str:
        """By hand, the whole answer read again for every token."""
        answer: list[int] = []
        with pool.active(group) as model, torch.no_grad():
            while len(answer) < 6 and end not in answer:
                decoder = torch.tensor([[start, *answer]])
                logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits
                answer.append(int(logits[0, -1].argmax()))
        return str(backbone.tokenizer.decode(answer, skip_special_tokens=True).strip())

    expected = [greedy(prompt.prompt, group) for prompt, group in zip(prompts, groups, strict=True)]
    found = generate_answers(pool, backbone.reader, groups, prompts, Decoding(6, batch_size=3, max_length=64))
    assert found == expected
    assert len(set(found)) > 1  # else nothing was compared


# --- loading


def test_a_model_without_a_start_token_is_named(tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="decoder_start_token_id"):
        load_backbone(str(tmp_path))


def test_a_model_that_answers_nothing_is_named(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=300, max_position_embeddings=8, **small)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **small)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="clip is not a language model"):
        load_backbone(str(tmp_path))


# --- a run


@pytest.mark.parametrize(("method", "dtype"), [("lora", "bfloat16"), ("lcia", "float32"), ("multi_task", "float32")])
def test_a_whole_run(t5_config: Callable[..., Any], method: str, dtype: str) -> None:
    config = t5_config(method=method, dtype=dtype)
    results = measure(config)
    assert len(results["matrix"]) == 3
    assert None not in results["matrix"][2]
    settings = (Path(config.output_dir) / "pool").glob("*/adapter_config.json")
    assert all('"task_type": "SEQ_2_SEQ_LM"' in path.read_text() for path in settings)


def test_lora_moves_the_adapter_and_nothing_else(
    t5_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []

    def remember(*arguments: Any) -> Any:
        loaded.append(load_backbone(*arguments))
        return loaded[-1]

    monkeypatch.setattr(run, "load_backbone", remember)
    measure(t5_config(method="lora"))
    weights = dict(loaded[0].model.named_parameters())  # the very model that was trained on, adapters in it
    base = {name.replace(".base_layer", ""): value for name, value in weights.items() if "lora_" not in name}
    assert weights_sha256(base) == loaded[0].fingerprint
    moved = {name: bool(value.detach().any()) for name, value in weights.items() if "lora_B" in name}
    assert all(moved.values())
    for part in ("encoder", "decoder", "EncDecAttention", "DenseReluDense"):
        assert any(part in name for name in moved)


def test_plain_peft_loads_the_adapter(t5_config: Callable[..., Any], tiny_t5: Path) -> None:
    from peft import PeftModelForSeq2SeqLM
    from transformers import AutoModelForSeq2SeqLM

    config = t5_config(method="lora")
    measure(config)
    base = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5, dtype=torch.float32, attn_implementation="eager")
    loaded = PeftModelForSeq2SeqLM.from_pretrained(base, Path(config.output_dir) / "pool" / "shared").eval()
    asked = {"input_ids": torch.arange(5, 25)[None], "decoder_input_ids": torch.arange(5, 9)[None]}
    session = open_run(Path(config.output_dir))
    with session.pool.active("shared") as model, torch.no_grad():
        assert torch.equal(loaded(**asked).logits, model(**asked).logits)


def test_a_merged_run_is_the_model_that_the_next_run_begins_with(t5_config: Callable[..., Any], tmp_path: Path) -> None:
    """CITB's Init: all of some tasks at once, then a stream from there."""
    measure(t5_config(method="multi_task", tasks=["colours"], output_dir=str(tmp_path / "init")))
    export_run(tmp_path / "init", tmp_path / "merged", "merged")
    session = open_run(tmp_path / "init")
    merged = load_backbone(str(tmp_path / "merged"), dtype="float32")
    batch = collate([encode_row(merged.tokenizer, row(*pair)) for pair in QUESTIONS], merged.reader.pad_id)
    with session.pool.active("shared") as model, torch.no_grad():
        expected, _ = answer_logits(model, batch)
    with session.pool.active(None) as model, torch.no_grad():
        base, _ = answer_logits(model, batch)
    with torch.no_grad():
        found, _ = answer_logits(merged.model, batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, base, atol=1e-2)
    results = measure(t5_config(model=str(tmp_path / "merged"), method="lora", tasks=["paints"]))
    assert None not in results["matrix"][1]


class Killed(Exception):
    """Stands for the process dying inside a task."""


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"zero_shot", "eproj"}))  # no step; a model that sees
def test_an_interrupted_task_goes_on_to_the_same_result(
    t5_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Weights, state, counted passes and scores. Methods make and read batches without knowing whom they serve."""
    settings = {"method": method, "max_steps": 2, "save_steps": 1, "max_eval_examples": 1}
    whole = measure(t5_config(output_dir=str(tmp_path / "whole"), **settings))
    assert None not in whole["matrix"][-1]
    original, steps = TaskTrainer.compute_loss, 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:  # the second task's second step, or the last of all tasks' only stage
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(TaskTrainer, "compute_loss", dying)
    with pytest.raises(Killed):
        measure(t5_config(output_dir=str(tmp_path / "cut"), **settings))
    (checkpoint,) = (tmp_path / "cut" / "state").glob("checkpoint-*")
    assert checkpoint.name == ("checkpoint-3" if method == "multi_task" else "checkpoint-1")
    monkeypatch.setattr(TaskTrainer, "compute_loss", original)
    with Reporter() as reporter:
        resumed = resume(tmp_path / "cut", reporter)
    for results in (whole, resumed):
        del results["cost"], results["date"]
    assert resumed == whole
    assert learned(tmp_path / "cut") == learned(tmp_path / "whole")


def test_pgp_moves_nothing_in_the_subspace_it_protects(t5_config: Callable[..., Any]) -> None:
    """In the encoder, which reads the request, as in the decoder, which reads the answer and what was encoded."""
    config = t5_config(**RUN, method={"name": "pgp", "energy": 0.7})
    measure(config)
    assert max(leaks(Path(config.output_dir), "shared", "colours", "paints")) < 1e-5


def test_accumulated_micro_batches_are_one_batch(t5_config: Callable[..., Any], tmp_path: Path, tiny_t5: Path) -> None:
    """Without dropout: it draws once per micro-batch."""
    import json
    import shutil

    from safetensors.torch import load_file

    model = tmp_path / "t5"
    shutil.copytree(tiny_t5, model)
    facts = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**facts, "dropout_rate": 0.0}))
    pools = []
    for name, size, accumulation in (("whole", 4, 1), ("halves", 2, 2)):
        config = t5_config(
            model=str(model),
            method="lora",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            output_dir=str(tmp_path / name),
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.1,
        )
        measure(config)
        pools.append(load_file(tmp_path / name / "pool" / "shared" / "adapter_model.safetensors"))
    for key, weight in pools[0].items():
        torch.testing.assert_close(weight, pools[1][key], atol=1e-6, rtol=1e-4)
