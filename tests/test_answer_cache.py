"""Predictions are kept by what they depend on, and never made twice."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from lcia.evaluation import AnswerCache, Decoding
from lcia.session import open_run
from test_run import measure

ASKED: dict[str, Any] = {
    "adapter": "a" * 64,
    "prompts": [[1, 2], [3]],
    "max_new_tokens": 4,
    "batch_size": 2,
    "base": "b" * 64,
}


def ask(folder: Path | None, answer: str, **changes: Any) -> tuple[list[str], AnswerCache]:
    asked = {**ASKED, **changes}
    cache = AnswerCache(folder, asked["base"])
    decoding = Decoding(asked["max_new_tokens"], asked["batch_size"], max_length=64)
    return cache.answers(asked["adapter"], asked["prompts"], decoding, lambda: [answer] * len(asked["prompts"])), cache


def test_the_same_question_is_answered_once(tmp_path: Path) -> None:
    assert ask(tmp_path, "first")[0] == ["first"] * 2
    found, cache = ask(tmp_path, "second")
    assert found == ["first"] * 2
    assert (cache.run, cache.reused) == (0, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"adapter": None},
        {"adapter": "c" * 64},
        {"prompts": [[1, 2], [4]]},
        {"prompts": [[3], [1, 2]]},
        {"max_new_tokens": 5},
        {"batch_size": 1},
        {"base": "d" * 64},
    ],
    ids=str,
)
def test_another_question_is_answered_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    ask(tmp_path, "first")
    found, cache = ask(tmp_path, "second", **change)
    assert found == ["second"] * 2
    assert (cache.run, cache.reused) == (1, 0)


def test_of_two_runs_side_by_side_one_answers(tmp_path: Path) -> None:
    at_work, go_on = threading.Event(), threading.Event()
    made: list[str] = []
    found: dict[str, list[str]] = {}

    def run(name: str) -> None:
        def compute() -> list[str]:
            made.append(name)
            at_work.set()
            assert go_on.wait(60)
            return [name, name]

        cache = AnswerCache(tmp_path, ASKED["base"])
        found[name] = cache.answers(ASKED["adapter"], ASKED["prompts"], Decoding(4, 2, 64), compute)

    first, second = (threading.Thread(target=run, args=(name,)) for name in ("first", "second"))
    first.start()
    assert at_work.wait(60)
    second.start()
    second.join(0.2)  # without the lock it would be at work by now
    go_on.set()
    first.join(60)
    second.join(60)
    assert made == ["first"]
    assert found == {"first": ["first"] * 2, "second": ["first"] * 2}


def test_where_answers_cannot_be_kept_they_are_told_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    folder.write_text("")  # a file in the place of the folder
    with pytest.warns(UserWarning, match="answers cannot be kept here") as told:
        asked = [ask(folder, "first"), ask(folder, "second", adapter=None)]
    assert [found for found, _ in asked] == [["first"] * 2, ["second"] * 2]
    assert [(cache.run, cache.reused) for _, cache in asked] == [(1, 0)] * 2
    assert len(told) == 1


def test_what_can_change_an_answer_is_another_engine(tiny_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tasks=["colours"], max_steps=1)
    measure(config)
    session = open_run(Path(config.output_dir))
    model, reader = session.backbone.model, session.backbone.reader
    found = [session.engine()]
    changes: list[tuple[Any, str, Any]] = [
        (model.config, "_attn_implementation", "flex_attention"),
        (model.config, "rms_norm_eps", 0.1),
        (model.generation_config, "repetition_penalty", 1.5),
        (session.config, "lora_alpha", 1.0),
        (reader.tokenizer, "chat_template", "{{ messages }}"),
    ]
    for owner, name, value in changes:
        with monkeypatch.context() as changed:
            changed.setattr(owner, name, value)
            found.append(session.engine())
    for name in ("library_versions", "machine", "_decoding_code"):
        with monkeypatch.context() as changed:
            changed.setattr(f"lcia.session.{name}", lambda: {"another": "one"})
            found.append(session.engine())
    assert len(set(found)) == len(found)
    assert session.engine() == found[0]
