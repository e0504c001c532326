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
    epochs = []
    for _ in range(math.ceil(wanted / count)):
        order = draws.permutation(len(rows))
        if processes > 1:  # accelerate fills the last one with the first rows
            order = np.resize(order, count * size)
        epoch = np.full(count * size, len(rows))  # no row: of no tokens
        epoch[: len(order)] = order[: count * size]
        epochs.append(epoch.reshape(count, size))
    batches = np.concatenate(epochs)[:wanted]
    own = tokens[batches]
    padded = (batches < len(rows)).sum(axis=1) * own.max(axis=1)
    largest = [sizes.argmax() for sizes in (padded, own.sum(axis=1), answers[batches].sum(axis=1))]
    # Drawn with chances in proportion to their size, a sum over all is estimated by the mean share of size, whether
    # padding is part of it or not.
    order = padded.argsort(kind="stable")
    upto = padded[order].cumsum()
    typical = order[np.searchsorted(upto, upto[-1] * np.array([1, 3, 5]) / 6)]

    def rows_of(batch: int) -> tuple[Row, ...]:
        return tuple(rows[i] for i in batches[batch] if i < len(rows))

    return Drawn(tuple(map(rows_of, largest)), tuple(map(rows_of, typical)), float(padded.mean()))
