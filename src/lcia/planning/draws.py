"""The micro-batches of a stage, drawn as training draws them: in each epoch another order of the rows, cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from transformers import TrainingArguments

from lcia.planning.lengths import Length
from lcia.planning.rehearsal import Drawn
from lcia.seeds import stable_seed
from lcia.stream import Row

# Of a run's own micro-batches the largest is larger than that of as many others every second time, than that of four
# times as many every fifth time.
_TIMES = 4
_MOST = 100_000  # micro-batches that are looked at


def draw(
    name: str,
    rows: Sequence[Row],
    length: Callable[[Row], Length],
    arguments: TrainingArguments,
    steps: int,
    processes: int,
    seed: int,
) -> Drawn:
    """The largest of four times as many micro-batches as `steps` take, and typical ones.

    Args:
        name: of the stage; rows: those that are trained on, at least one.
        steps: of the optimizer.
    """
    size = arguments.per_device_train_batch_size
    drops = arguments.dataloader_drop_last
    count = max(len(rows) // size, 1) if drops else math.ceil(len(rows) / size)  # an epoch's
    tokens = np.array([*(length(row).total for row in rows), 0])
    answers = np.array([*(length(row).answer for row in rows), 0])
    draws = np.random.default_rng(stable_seed(seed, name, "plan"))
    wanted = min(_TIMES * steps * arguments.gradient_accumulation_steps * processes, _MOST)
    best: list[tuple[int, Sequence[int]]] = [(0, ())] * 3
    typical: list[Sequence[int]] = []
    for done in range(0, wanted, count):
        order = draws.permutation(len(rows))
        if processes > 1:  # accelerate fills the last one with the first rows
            order = np.resize(order, count * size)
        chosen = np.full(count * size, len(rows))  # no row: of no tokens
        chosen[: len(order)] = order[: count * size]
        chosen = chosen.reshape(count, size)[: wanted - done]
        of_rows = tokens[chosen]
        padded = (chosen < len(rows)).sum(axis=1) * of_rows.max(axis=1)
        for i, sizes in enumerate((padded, of_rows.sum(axis=1), answers[chosen].sum(axis=1))):
            most = int(sizes.argmax())
            if sizes[most] > best[i][0]:
                best[i] = int(sizes[most]), chosen[most].tolist()
        if not typical:
            last = len(chosen) - 1
            thirds = sorted({round(last / 6), round(last / 2), round(5 * last / 6)})  # the middle one of each
            typical = chosen[padded.argsort(kind="stable")[thirds]].tolist()

    def rows_of(batch: Sequence[int]) -> tuple[Row, ...]:
        return tuple(rows[i] for i in batch if i < len(rows))

    return Drawn(tuple(rows_of(batch) for _, batch in best), tuple(map(rows_of, typical)))
