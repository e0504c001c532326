"""Prompts, padding and the loss: against the plain way of doing each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from conftest import byte_tokenizer
from lcia.backbone import answer_loss, collate, encode_row, find_model, load_backbone
from lcia.backbone.chat import IGNORED, render_answer, render_prompt
from lcia.errors import UserError
from lcia.progress import Reporter
from lcia.run import train
from lcia.stream import Row


def row(text: str, answer: str) -> Row:
    return Row(id="1", instruction=text, messages=(("user", text),), outputs=(answer,))


def test_the_prompt_is_the_models_own_template_and_the_answer_ends_the_turn() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode_row(tokenizer, row("hello", "red"))
    assert tokenizer.decode(encoded.prompt) == "<|user|>hello<|end|>\n<|assistant|>"
    assert tokenizer.decode(encoded.answer) == "red<|end|>"  # not the newline that the template writes behind it


def test_a_row_brings_its_own_system_message_and_none_is_invented() -> None:
    tokenizer = byte_tokenizer()
    messages = (("system", "be brief"), ("user", "hi"), ("assistant", "yes?"), ("user", "go"))
    prompt = render_prompt(tokenizer, messages)
    assert (
        prompt
        == "<|system|>be brief<|end|>\n<|user|>hi<|end|>\n<|assistant|>yes?<|end|>\n<|user|>go<|end|>\n<|assistant|>"
    )


def test_an_answer_that_contains_the_end_token_is_not_cut() -> None:
    tokenizer = byte_tokenizer()
    assert render_answer(tokenizer, (("user", "x"),), "a<|end|>b") == "a<|end|>b<|end|>"


def test_without_a_template_the_text_stands_alone() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    assert render_prompt(tokenizer, (("user", "x"),)) == "x\n"
    assert render_answer(tokenizer, (("user", "x"),), "y") == "y<|end|>"


def test_collate_pads_left_and_labels_only_answers() -> None:
    tokenizer = byte_tokenizer()
    rows = [encode_row(tokenizer, row("a long question", "no")), encode_row(tokenizer, row("q", "blue"))]
    batch = collate(rows, pad_id=0)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["position_ids"].shape
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    assert batch["labels"].shape[1] == max(len(r.answer) for r in rows) + 1
    for encoded, labels in zip(rows, batch["labels"], strict=True):
        assert labels[labels != IGNORED].tolist() == list(encoded.answer)
    first = batch["attention_mask"].argmax(1)
    assert batch["position_ids"][range(2), first].tolist() == [0, 0]


def test_the_batched_answer_loss_is_the_mean_over_answer_tokens_of_each_row_alone(tiny_model: Path) -> None:
    backbone = load_backbone(str(tiny_model), dtype="float32")
    questions = [
        ("what is it", "red"),
        ("a much longer question, to force padding", "a longer answer"),
        ("x", "y"),
    ]
    rows = [encode_row(backbone.tokenizer, row(*pair)) for pair in questions]
    total, count = 0.0, 0
    for encoded in rows:  # the plain way: full logits of one unpadded row
        ids = torch.tensor([[*encoded.prompt, *encoded.answer]])
        logits = backbone.model(input_ids=ids).logits[0].double()
        log_probs = logits.log_softmax(-1)
        for i, token in enumerate(encoded.answer):
            total -= float(log_probs[len(encoded.prompt) + i - 1, token])
            count += 1
    batch = collate(rows, backbone.tokenizer.pad_token_id)
    assert float(answer_loss(backbone.model, batch, count)) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{}"), "no weights"),
        (lambda folder: (folder / "model.safetensors").write_text(""), "no config.json"),
    ],
)
def test_an_incomplete_model_folder_is_named(tmp_path: Path, make, message: str) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        find_model(str(tmp_path))


def test_a_misspelt_built_in_model_is_corrected() -> None:
    with pytest.raises(UserError, match="smollm2-135m"):
        find_model("smollm2-135n")


def test_damaged_weights_are_the_users_error(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(str(tmp_path))


def test_a_readers_settings_do_not_follow_its_calls(tiny_model: Path, tmp_path: Path) -> None:
    """Nor padding and truncation that a tokenizer.json brings; they do follow the template."""
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    truncation = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps({**json.loads(path.read_text()), "truncation": truncation}))
    reader = load_backbone(str(tmp_path / "model"), dtype="float32").reader
    before = reader.settings()
    reader.tokenizer(["a", "b c"], padding=True)
    assert reader.settings() == before
    reader.chat.chat_template = "other"
    assert reader.settings() != before


def test_the_fingerprint_follows_the_weights(tiny_model: Path) -> None:
    one, two = (
        load_backbone(str(tiny_model), dtype="float32"),
        load_backbone(str(tiny_model), dtype="float32"),
    )
    assert one.fingerprint == two.fingerprint
    assert load_backbone(str(tiny_model), dtype="bfloat16").fingerprint != one.fingerprint


def test_a_models_own_sampling_defaults_do_not_reach_the_evaluation(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = {"do_sample": True, "temperature": 0.3, "repetition_penalty": 1.5, "eos_token_id": [1, 7]}
    (tmp_path / "generation_config.json").write_text(json.dumps(own))
    settings = load_backbone(str(tmp_path), dtype="float32").model.generation_config
    assert settings.do_sample is False
    assert settings.repetition_penalty in (None, 1.0)
    assert settings.eos_token_id == [1, 7]  # the tokenizer's end of turn, and the model's own


def test_a_model_that_cannot_be_trained_here_is_refused(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="position_ids"):
        load_backbone(str(tmp_path))


def test_limits_beyond_the_models_positions_are_refused(tiny_config, tmp_path: Path) -> None:
    """A model with a vector for each position would fail in the middle of a run, at the first longer row."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = byte_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=200, **ends)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    long = tiny_config(model=str(tmp_path / "gpt2"), max_length=201)
    with (
        Reporter() as reporter,
        pytest.raises(UserError, match=r"max_length is 201, .* 200 positions: give"),
    ):
        train(long, reporter)
