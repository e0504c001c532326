"""Predictions and scores: every test input is routed by its own instruction and answered greedily."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lcia.adapters import Pool, answering
from lcia.backbone import Encoded, Reader, layout_of, told
from lcia.files import alone, warn_once, write_text
from lcia.grouping import Match
from lcia.processes import count, gathered, on_main, rank
from lcia.stream import SCORERS, Row, Task


@dataclass(frozen=True)
class Decoding:
    """What, beside weights and prompt, a prediction depends on."""

    max_new_tokens: int
    batch_size: int
    max_length: int


@torch.no_grad()
@answering()
def generate_answers(
    pool: Pool,
    reader: Reader,
    groups: Sequence[str | None],
    prompts: Sequence[Encoded],
    decoding: Decoding,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> list[str]:
    """Greedy answers, prompt i with the weights of groups[i] (None: the base model), in the order of `prompts`.

    A prompt that comes several times is answered once. Batches hold prompts of like length, so that little is padding.
    They mix groups where the pool's adapters can be mixed; else each group has batches of its own. Several processes
    take turns at the batches, which are the same for any number of them: so are the answers.
    """
    asked = [(group, json.dumps(reader.content(prompt))) for group, prompt in zip(groups, prompts, strict=True)]
    times = Counter(asked)
    first = {question: i for i, question in reversed(list(enumerate(asked)))}  # where it stands
    distinct = list(dict.fromkeys(groups))
    parts = [sorted(first.values())]
    if not pool.can_mix(distinct):
        parts = [[i for i in parts[0] if groups[i] == one] for one in distinct]
    mine: dict[int, str] = {}  # prompt → this process's answer
    number = 0  # of the batch
    layout = layout_of(pool.model.config)
    for part in parts:
        order = sorted(part, key=lambda i: (len(prompts[i]), i))
        single = len({groups[i] for i in part}) == 1
        with pool.active(groups[part[0]]) if single else contextlib.nullcontext(pool.model) as model:
            model.eval()
            for start in range(0, len(order), decoding.batch_size):
                chosen = order[start : start + decoding.batch_size]
                on_batch(sum(times[asked[i]] for i in chosen))
                number += 1
                if number % count() != rank():
                    continue
                batch = reader.collate([prompts[i] for i in chosen])
                batch = {name: values.to(model.device) for name, values in batch.items()}
                options = {} if single else pool.mixed([groups[i] for i in chosen])
                with told(model, batch):
                    output = layout.generate(model, batch, decoding.max_new_tokens, **options)  # (B, new)
                texts = reader.tokenizer.batch_decode(output, skip_special_tokens=True)
                mine |= {i: text.strip() for i, text in zip(chosen, texts, strict=True)}
    answers = {i: answer for part in gathered(mine) for i, answer in part.items()}
    return [answers[first[question]] for question in asked]


class AnswerCache:
    """Predictions by content: base weights, adapter weights, decoding options and the prompts asked together.

    The unit is the whole list of prompts one group answers for one task, because in bfloat16 an answer may depend
    on what else is in its batch: reusing the list repeats exactly what a new computation would give. Of runs side by
    side, each in one process, one answers a list and the others wait for it, where files can be locked.

    Args:
        folder: where they are kept; None: nowhere, everything is answered anew.
    """

    def __init__(self, folder: Path | None, base_sha256: str) -> None:
        self._folder = folder
        self._base = base_sha256
        self.run = 0
        self.reused = 0

    def answers(
        self,
        adapter_sha256: str | None,
        prompts: Sequence[list[Any]],
        decoding: Decoding,
        compute: Callable[[], list[str]],
    ) -> list[str]:
        folder = self._folder
        if folder is None:
            self.run += 1
            return compute()
        content = [
            self._base,
            adapter_sha256,
            prompts,
            decoding.max_new_tokens,
            decoding.batch_size,
        ]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        path = folder / f"{key}.json"

        @on_main
        def stored() -> list[str] | None:
            try:
                return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
            except ValueError:  # damaged: made again
                return None

        @on_main
        def store(found: list[str]) -> None:
            try:
                write_text(path, json.dumps(found, ensure_ascii=False))
            except OSError as error:  # what was answered is there all the same
                warn_once(f"{folder}: answers cannot be kept here ({error.strerror}) and may have to be made again")

        known = stored()
        if known is None:
            # Several processes of one run do not wait for another run: those that do not hold the lock would run into
            # the time limit of the messages between them.
            with alone(folder / f".{key}.lock") if count() == 1 else contextlib.nullcontext():
                known = stored()
                if known is None:
                    found = compute()
                    store(found)
                    self.run += 1
                    return found
        self.reused += 1
        return known


@dataclass(frozen=True)
class TaskResult:
    """One cell of the matrix."""

    score: float  # percent
    records: list[dict[str, Any]]  # one per test row, as in predictions/ROW/TASK.jsonl
    too_long: int  # rows whose prompt does not fit; they count as wrong


def evaluate_task(
    pool: Pool,
    reader: Reader,
    task: Task,
    rows: Sequence[Row],
    matches: Sequence[Match],
    cache: AnswerCache,
    decoding: Decoding,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> TaskResult:
    """Answer and score `rows`, each with the weights of its own match."""
    scorer = SCORERS[task.scorer]
    prompts = [reader.encode_prompt(row) for row in rows]
    layout = layout_of(pool.model.config)
    fits = [layout.fits(len(prompt.prompt), decoding.max_new_tokens, decoding) for prompt in prompts]
    predictions = [""] * len(rows)
    for group in dict.fromkeys(match.group for match in matches):
        mine = [i for i, match in enumerate(matches) if match.group == group and fits[i]]
        if not mine:
            continue
        asked = [prompts[i] for i in mine]
        answers = cache.answers(
            None if group is None else pool.sha256(group),
            [reader.content(prompt) for prompt in asked],
            decoding,
            lambda group=group, asked=asked: generate_answers(
                pool, reader, [group] * len(asked), asked, decoding, on_batch
            ),  # type: ignore[misc]
        )
        for i, answer in zip(mine, answers, strict=True):
            predictions[i] = answer
    records: list[dict[str, Any]] = []
    for row, prompt, match, prediction, fit in zip(rows, prompts, matches, predictions, fits, strict=True):
        score = scorer(prediction, row.outputs) if fit else 0.0
        records.append(
            {
                "id": row.id,
                "prompt": prompt.text or reader.tokenizer.decode(prompt.prompt),
                **({"images": list(prompt.images)} if prompt.images else {}),
                "prediction": prediction,
                "reference": list(row.outputs),
                "score": score,
                "group": match.group,
                **({} if fit else {"too_long": True}),
            }
        )
    total = sum(record["score"] for record in records)
    return TaskResult(100.0 * total / len(records), records, fits.count(False))
