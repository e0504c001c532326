"""Micro-batches of a plan: drawn as training draws them, the largest of them kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from lcia.planning.draws import draw
from lcia.planning.lengths import Length
from lcia.planning.rehearsal import Drawn
from lcia.stream import Row


def arguments(**values: object) -> TrainingArguments:
    return TrainingArguments(output_dir="unused", report_to="none", use_cpu=True, **values)


def drawn(lengths: list[tuple[int, int]], steps: int = 1, processes: int = 1, **values: object) -> tuple[Drawn, dict]:
    rows = [Row(str(i), "", (("user", str(i)),), ("",)) for i in range(len(lengths))]
    known = {row.id: Length(*length) for row, length in zip(rows, lengths, strict=True)}
    found = draw("task", rows, lambda row: known[row.id], arguments(**values), steps, processes, seed=0)
    return found, known


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 50)), min_size=1, max_size=30),
    size=st.integers(1, 8),
    steps=st.integers(1, 20),
    accumulation=st.integers(1, 3),
)
def test_what_is_drawn_is_a_batch_and_the_largest_is_no_smaller(
    lengths: list[tuple[int, int]], size: int, steps: int, accumulation: int
) -> None:
    found, known = drawn(lengths, steps, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    for batch in (*found.largest, *found.typical):
        assert 1 <= len(batch) <= size
        assert len({row.id for row in batch}) == len(batch)  # a row once an epoch

    def sizes(batch: tuple[Row, ...]) -> tuple[int, int, int]:
        tokens, answers = [known[row.id].total for row in batch], [known[row.id].answer for row in batch]
        return len(batch) * max(tokens), sum(tokens), sum(answers)

    for i, batch in enumerate(found.largest):
        assert sizes(batch)[i] >= max(sizes(other)[i] for other in (*found.largest, *found.typical))


def test_a_long_row_is_found_in_an_epoch_and_alone_in_its_batch() -> None:
    """All rows are seen in an epoch; the longest fills one batch with padding, not all of it with tokens."""
    found, known = drawn([(1000, 4), *[(50, 4)] * 40], steps=11, per_device_train_batch_size=4)
    most, own, _ = found.largest
    assert sum(known[row.id].total > 1000 for row in most) == 1
    assert sum(known[row.id].total for row in own) == 1004 + 3 * 54
    # two thirds of all tokens, padded ones included, are its batch's
    assert [max(known[row.id].total for row in batch) for batch in found.typical] == [54, 1004, 1004]
    assert found.padded == pytest.approx((9 * 4 * 54 + 54 + 4 * 1004) / 11)


def test_the_most_to_learn_need_not_be_the_longest() -> None:
    found, _ = drawn([(10, 90), *[(200, 2)] * 20], steps=10, per_device_train_batch_size=2)
    assert "0" in {row.id for row in found.largest[2]}
    assert "0" not in {row.id for row in found.largest[1]}


def test_several_processes_fill_the_last_batch() -> None:
    """As accelerate does: every device has a whole one."""
    alone, _ = drawn([(5, 1)] * 5, per_device_train_batch_size=16)
    shared, _ = drawn([(5, 1)] * 5, processes=2, per_device_train_batch_size=16)
    assert {len(batch) for batch in alone.typical} == {5}
    assert {len(batch) for batch in shared.typical} == {16}


@pytest.mark.parametrize("drops", [False, True])
def test_a_batch_that_is_dropped_is_not_drawn(drops: bool) -> None:
    found, _ = drawn([(5, 1)] * 5, steps=50, per_device_train_batch_size=4, dataloader_drop_last=drops)
    assert {len(batch) for batch in found.typical} == ({4} if drops else {1, 4})
    assert found.padded == pytest.approx(24 if drops else 15)


def test_a_plan_draws_the_same_again_and_disturbs_nobody(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    first, _ = drawn([(i, 1) for i in range(1, 40)], steps=3, per_device_train_batch_size=4)
    again, _ = drawn([(i, 1) for i in range(1, 40)], steps=3, per_device_train_batch_size=4)
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
