"""Conversations of several questions: every answer is learned, each behind what stands before it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from coin_folder import build, write
from conftest import byte_tokenizer
from lcia import load_stream
from lcia.backbone import Backbone, answer_logits, collate, encode_row, layout_of, load_backbone, packing
from lcia.backbone.chat import IGNORED
from lcia.errors import UserError
from lcia.methods.memory import row_from_json, row_to_json
from lcia.progress import Reporter
from lcia.run import resume, train
from lcia.session import check_lengths, rows_sha256
from lcia.stream import Row, Stream
from lcia.training import TaskTrainer
from tiny_vision import square_stream, tiny_llava, tiny_qwen, tiny_qwen3, tiny_qwen25

MAKERS = {"llava": tiny_llava, "qwen": tiny_qwen, "qwen2.5": tiny_qwen25, "qwen3": tiny_qwen3}
# A line per turn as LLaVA-1.5's on the hub: no end of the turn behind answers that are history.
LLAVA_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{{ m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
REWRITING = (
    "{% for m in messages %}[{{ m['role'] }}]{% if m['role'] == 'assistant' and loop.last %}(thought){% endif %}"
    "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant](thought){% endif %}"
)


def conversation(*pairs: tuple[str, str], system: str | None = None, **more: Any) -> Row:
    """Questions and answers, every answer to be learned."""
    turns = [("system", system)] if system else []
    for question, answer in pairs:
        turns += [("user", question), ("assistant", answer)]
    return Row("1", "x", tuple(turns[:-1]), (pairs[-1][1],), source="file.json:7", every_answer=True, **more)


def one_by_one(row: Row) -> list[Row]:
    """One row for each answer, with what stands before it as its prompt."""
    turns = (*row.messages, ("assistant", row.outputs[0]))
    places = [place for place, (role, _) in enumerate(turns) if role == "assistant"]
    return [replace(row, messages=turns[:at], outputs=(turns[at][1],), every_answer=False) for at in places]


TALK = conversation(("how many", "two"), ("which is longer", "the left one"), ("sure", "y"), system="Say little.")


def same_as_one_by_one(backbone: Backbone, rows: list[Row]) -> None:
    """The logits and targets of a batch are those of a row for each of its answers."""
    encoded = [backbone.reader.encode(row) for row in rows]
    logits, targets = answer_logits(backbone.model, backbone.reader.collate(encoded))
    single = [one for row in rows for one in (one_by_one(row) if row.every_answer else [row])]
    alone = [answer_logits(backbone.model, backbone.reader.collate([backbone.reader.encode(one)])) for one in single]
    assert targets.tolist() == torch.cat([part for _, part in alone]).tolist()
    torch.testing.assert_close(logits, torch.cat([part for part, _ in alone]), rtol=1e-4, atol=1e-5)


# --- tokens


def test_every_answer_is_learned_and_no_question() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode_row(tokenizer, TALK)
    assert tokenizer.decode(encoded.prompt).endswith("<|user|>how many<|end|>\n<|assistant|>")
    learned = "".join(tokenizer.decode([token]) if token != IGNORED else "_" for token in encoded.labels)
    parts = [part for part in learned.split("_") if part]
    assert parts == ["two<|end|>", "the left one<|end|>", "y<|end|>"]
    last = one_by_one(TALK)[-1]
    whole = encode_row(tokenizer, last)
    assert (*encoded.prompt, *encoded.answer) == (*whole.prompt, *whole.answer)
    assert len(encoded) == len(whole)


def test_a_row_of_one_question_is_what_it_was() -> None:
    tokenizer = byte_tokenizer()
    row = conversation(("how many", "two"))
    assert row.opening == row.opening.opening
    assert encode_row(tokenizer, replace(row, every_answer=False)) == encode_row(tokenizer, row)
    context = replace(TALK, every_answer=False)
    assert context.opening is context
    assert encode_row(tokenizer, context).unlearned == ()


def test_an_answer_in_the_history_ends_as_vicuna_v1_writes_it() -> None:
    """Where the template leaves the end of the turn out of the history: it is learned all the same."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = LLAVA_TEMPLATE
    encoded = encode_row(tokenizer, TALK)
    assert tokenizer.decode([*encoded.prompt, *encoded.answer]) == (
        "Say little. USER: how many ASSISTANT: two <|end|>USER: which is longer ASSISTANT: the left one <|end|>"
        "USER: sure ASSISTANT: y <|end|>"
    )
    kept = [token for token in encoded.labels if token != IGNORED]
    assert tokenizer.decode(kept) == " two <|end|> the left one <|end|> y <|end|>"


def test_a_model_without_a_template() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    encoded = encode_row(tokenizer, TALK)
    assert tokenizer.decode([*encoded.prompt, *encoded.answer]) == (
        "Say little.\nhow many\ntwo<|end|>which is longer\nthe left one<|end|>sure\ny<|end|>"
    )


def test_a_template_that_rewrites_answers_is_refused_with_the_row(tiny_model: Path) -> None:
    reader = load_backbone(str(tiny_model), dtype="float32").reader
    reader.tokenizer.chat_template = REWRITING
    with pytest.raises(UserError, match=r"file\.json:7: the model's chat template writes the earlier turns"):
        reader.encode(TALK)
    reader.encode(replace(TALK, every_answer=False))


def test_labels_of_a_batch_begin_at_the_first_answer() -> None:
    tokenizer = byte_tokenizer()
    rows = [encode_row(tokenizer, row) for row in (TALK, conversation(("a", "b")))]
    labels = collate(rows, 0)["labels"]
    assert labels.shape[1] == len(rows[0].answer) + 1
    assert labels[0, 1:].tolist() == rows[0].labels
    assert labels[1, -len(rows[1].answer) :].tolist() == list(rows[1].answer)
    assert (labels[1, : -len(rows[1].answer)] == IGNORED).all()


# --- loss


@pytest.mark.parametrize("model", MAKERS)
def test_logits_are_those_of_a_row_for_each_answer(model: str, tmp_path: Path) -> None:
    squares = square_stream(tmp_path / "squares")
    images = [str(squares / f"images/colours/{n}.png") for n in range(3)]
    backbone = load_backbone(str(MAKERS[model](tmp_path / "model")), dtype="float32")
    plain = Row("2", "x", (("user", "what is it"),), ("red",), (images[2],))
    same_as_one_by_one(backbone, [replace(TALK, images=tuple(images[:2])), plain, TALK])


def test_the_loss_is_the_plain_model_s(tiny_model: Path) -> None:
    """Against the model called with everything, its loss taken where an answer stands."""
    backbone = load_backbone(str(tiny_model), dtype="float32")
    ids = torch.tensor([[*(encoded := backbone.reader.encode(TALK)).prompt, *encoded.answer]])  # (1, L)
    logits = backbone.model(input_ids=ids).logits[0].double()  # (L, V)
    text = backbone.tokenizer.decode(ids[0])
    total, count = 0.0, 0
    for answer in ("two<|end|>", "the left one<|end|>", "y<|end|>"):
        start = len(
            backbone.tokenizer(text[: text.index(f"<|assistant|>{answer}") + len("<|assistant|>")])["input_ids"]
        )
        for place in range(start, start + len(backbone.tokenizer(answer)["input_ids"])):
            total -= float(logits[place - 1].log_softmax(0)[ids[0, place]])
            count += 1
    found, targets = answer_logits(backbone.model, backbone.reader.collate([encoded]))
    assert len(targets) == count
    assert float(cross_entropy(found, targets, reduction="sum")) == pytest.approx(total, rel=1e-5)


def test_a_common_beginning_ends_before_the_first_answer(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two conversations that go alike for two questions: what is computed once must not take answers in."""
    monkeypatch.setattr(packing, "LEAST_SHARE", 0.0)
    backbone = load_backbone(str(tiny_model), dtype="float32")
    rows = [conversation(("how many", "two"), ("and now", "three"), ("sure", last), system="s") for last in ("y", "no")]
    batch = backbone.reader.collate([backbone.reader.encode(row) for row in rows])
    packed = packing.of_batch(backbone.model, batch)
    assert packed is not None
    assert packed.shared == len(backbone.reader.encode(rows[0]).prompt) - 1
    same_as_one_by_one(backbone, rows)


def test_an_encoder_decoder_refuses_them(tiny_t5: Path, tiny_config: Callable[..., Any]) -> None:
    backbone = load_backbone(str(tiny_t5), dtype="float32")
    task = replace(load_stream("assistant")[0], train=(TALK,))
    with pytest.raises(UserError, match=r"file\.json:7: .*which an encoder-decoder cannot"):
        check_lengths([task], backbone.reader, layout_of(backbone.model.config), tiny_config(max_new_tokens=64))


# --- streams


def talk(root: Path) -> Path:
    """A CoIN download whose GQA rows ask three, two and one questions."""
    build(root)
    file = root / "Instructions/GQA/train.json"
    rows = json.loads(file.read_text())
    for number, row in enumerate(rows):
        for again in range(2 - number % 3):
            row["conversations"] += [
                {"from": "human", "value": f"And {again}?"},
                {"from": "gpt", "value": f"answer {again}"},
            ]
    write(file, rows)
    return root


def gqa(root: Path) -> Stream:
    return load_stream({"name": "coin", "path": str(root)}, tasks=["GQA"])


def test_coin_learns_every_answer(tmp_path: Path) -> None:
    stream = gqa(talk(tmp_path))
    train = stream[0].train
    assert [row.every_answer for row in train] == [True, True, False] * 4
    assert train[0].messages[1:] == (
        ("assistant", "left"),
        ("user", "And 0?"),
        ("assistant", "answer 0"),
        ("user", "And 1?"),
    )
    assert len(train) == 12  # a conversation is one row, as in CoIN's own training
    assert "GQA: 8 of 12 training rows ask several questions: all 20 answers in them are learned" in stream.notes
    assert {row.instruction for row in train} == set(stream[0].instructions)
    last = [replace(row, every_answer=False) for row in train]
    assert rows_sha256(stream[0]) != rows_sha256(replace(stream[0], train=tuple(last)))
    assert row_from_json(json.loads(json.dumps(row_to_json(train[0])))) == train[0]


def test_coast_learns_every_answer_and_measures_the_last(tmp_path: Path) -> None:
    square_stream(tmp_path / "train2017")
    rows = []
    for number in range(20):
        turns = [{"from": who, "value": f"{who} {number} {n}"} for n in range(2) for who in ("human", "gpt")]
        rows.append({"id": str(number), "image": "images/colours/1.png", "conversations": turns})
    write(tmp_path / "conversation_58k.json", rows)
    source = {"name": "coast", "path": str(tmp_path), "configuration": "capability"}
    stream = load_stream(source, tasks=["conversation"])
    assert all(row.every_answer for row in stream[0].train)
    assert not any(row.every_answer for row in (*stream[0].dev, *stream[0].test))
    assert "conversation: 16 of 16 training rows ask several questions: all 32 answers in them are learned" in (
        stream.notes
    )
    assert any("4 of 4 evaluation rows ask several questions: the last answer is measured" in n for n in stream.notes)


def test_other_streams_learn_the_last_answer(tmp_path: Path) -> None:
    turns = [{"from": who, "value": f"{who} {n}"} for n in range(2) for who in ("human", "gpt")]
    write(tmp_path / "chat.json", [{"conversations": turns, "instruction": "Chat"}] * 20)
    assert not any(row.every_answer for row in load_stream(str(tmp_path))[0].train)


def test_a_run_on_conversations_goes_on_behind_a_kill(
    tiny_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = talk(tmp_path / "coin")
    options = {
        "stream": {"name": "coin", "path": str(root)},
        "tasks": ["GQA"],
        "model": str(tiny_llava(tmp_path / "model")),
        "method": "replay",
        "save_steps": 1,
        "max_eval_examples": 1,
        "max_new_tokens": 1,
        "max_length": 512,
    }
    seen: list[int] = []
    original = TaskTrainer.compute_loss

    def noted(self: Any, model: Any, inputs: Any, **more: Any) -> Any:
        seen.append(int((inputs["labels"] != IGNORED).sum()))
        if len(seen) == 5:  # the second step of the second run
            raise KeyboardInterrupt
        return original(self, model, inputs, **more)

    monkeypatch.setattr(TaskTrainer, "compute_loss", noted)
    whole, cut = (tiny_config(**options, output_dir=str(tmp_path / name)) for name in ("whole", "cut"))
    with Reporter() as reporter:
        train(whole, reporter)
        with pytest.raises(KeyboardInterrupt):
            train(cut, reporter)
        resume(Path(cut.output_dir), reporter)
    # each answer once an epoch, with the token that ends it
    task = gqa(root)[0]
    texts = [one.outputs[0] for row in task.train for one in (one_by_one(row) if row.every_answer else [row])]
    assert sum(seen[:3]) == sum(len(text) + 1 for text in texts)
    files = [
        {path.name: path.read_bytes() for path in Path(config.output_dir, "pool").rglob("*.safetensors")}
        for config in (whole, cut)
    ]
    assert files[0] == files[1]
