"""Continual LLaVA (Cao et al., arXiv 2411.02564): a pool of low-rank increments, chosen by what the user asks.

    W(x) = W₀ + Δθ(x) + Δδ(x)                     W₀: the output projection of every attention of the language model
    Δθ(x) = Σ_m (cos(q, k_m) / Σ cos) P_m          intrinsic: over the M keys nearest to q, the vector of x's text
    Δδ_t  = Σ_{l<t} w_tl Z̄_l                       contextual: Z̄_l = mean over task l's rows of their Δθ, w in [0, 1]

A task is learned in two stages: its keys, maximising the cosines with the keys that each row chooses; then increments P
and weights w, with the language model's loss. W₀ is frozen, and so are P and Z̄ of earlier tasks (stop-gradient).

A request is of no known task. It gets Δδ(x) = Σ_t s_t Δδ_t, where s_t is the share of its choice that task t's slots
have: one that chooses as the rows of task t did is answered by the very weights that task t trained.

The mixture itself is in lcia.adapters.increments. Shapes: n rows, S slots, D width of a query.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lcia.adapters import Pool, stack_name
from lcia.adapters.increments import IncrementPool, nearest, shares
from lcia.backbone import Backbone, Encoded
from lcia.errors import UserError
from lcia.files import write_json
from lcia.grouping import Match
from lcia.grouping.sentence import MINILM, encode, load_encoder
from lcia.methods.base import Method, Placement, Training
from lcia.methods.options import number, whole
from lcia.seeds import stable_seed
from lcia.stream import Row, Task

_FILE = "continual_llava.json"  # in a checkpoint inside a task: the encoder whose vectors its keys were trained on


def train_keys(
    keys: torch.Tensor,
    queries: torch.Tensor,
    chosen: int,
    learning_rate: float,
    epochs: int,
    batch_size: int,
    seed: int,
) -> torch.Tensor:
    """Stage 1: (S, D) keys after AdamW on − mean of cos(q, k) over rows and the `chosen` keys nearest to each.

    Args:
        keys: (S, D), where they start.
        queries: (n, D), one for each row.
        seed: of the order of the rows.
    """
    trained = keys.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([trained], lr=learning_rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(queries), generator=order).split(batch_size):
            cosines, _ = nearest(queries[rows], trained, chosen)
            optimizer.zero_grad()
            (-cosines.mean()).backward()
            optimizer.step()
    return trained.detach()


class ContinualLLaVA(Method):
    """Keys and increments of a task's own, or of one pool; each row mixes those whose keys are nearest to it.

    Args:
        slots: keys with increments, of each task or of the one pool.
        chosen: M, how many of them a row mixes.
        rank: of an increment.
        candidates: own (the released code): every task adds `slots` and, in training, chooses among these; a request
            chooses among those of all tasks. all (the paper): `slots` from the first task on, of which every task
            trains what it chooses.
        encoder: makes q; minilm (all-MiniLM-L6-v2), or the folder or hub id of a text model, whose token vectors are
            averaged.
        query: text: q is that of the whole user turn, without its image. instruction: of the instruction alone.
        context_start: w_tl before task t is learned.
        key_learning_rate: of stage 1.
        key_epochs: of stage 1, passes over the task's instructions.
        key_batch_size: of stage 1, rows a step.
    """

    name = "continual_llava"
    one_task_per_adapter = True

    def __init__(
        self,
        *,
        slots: int = 8,
        chosen: int = 4,
        rank: int = 8,
        candidates: str = "own",
        encoder: str = MINILM,
        query: str = "text",
        context_start: float = 0.5,
        key_learning_rate: float = 1e-3,
        key_epochs: int = 3,
        key_batch_size: int = 128,
    ) -> None:
        if candidates not in ("own", "all"):
            raise ValueError(f"candidates must be own or all, got {candidates!r}")
        if query not in ("text", "instruction"):
            raise ValueError(f"query must be text or instruction, got {query!r}")
        if not isinstance(encoder, str) or not encoder:
            raise ValueError(f"encoder must be {MINILM}, a folder or a hub id, got {encoder!r}")
        self._slots, self._chosen, self._rank = whole("slots", slots), whole("chosen", chosen), whole("rank", rank)
        if chosen > slots:
            raise ValueError(f"chosen must be at most slots = {slots}, got {chosen}")
        self._one_pool = candidates == "all"
        self._encoder, self._query = encoder, query
        self._context_start = number("context_start", context_start, high=1.0)
        self._key_learning_rate = number("key_learning_rate", key_learning_rate, positive=True)
        self._key_epochs = whole("key_epochs", key_epochs)
        self._key_batch_size = whole("key_batch_size", key_batch_size)
        self._learned: list[str] = []  # adapters, in the order in which they were learned

    def make_pool(self, backbone: Backbone, lora: dict[str, Any], seed: int) -> Pool:
        """Increments of the language model's attention; a projector stays the base model's."""
        encoder = load_encoder(self._encoder)
        return IncrementPool(
            backbone,
            self._slots,
            self._rank,
            encoder.width,
            self._chosen,
            self._context_start,
            self._one_pool,
            settings={
                "name": self.name,
                "slots": self._slots,
                "chosen": self._chosen,
                "rank": self._rank,
                "candidates": "all" if self._one_pool else "own",
                "encoder": self._encoder,
                "encoder_sha256": encoder.sha256,  # a folder may hold another model tomorrow
                "query": self._query,
            },
            seed=seed,
        )

    def attach(self, pool: Pool, backbone: Backbone) -> None:
        super().attach(pool, backbone)
        backbone.reader.query = self._vector

    def open_task(self, task: Task) -> Placement:
        last = self._learned[-1] if self._one_pool and self._learned else None
        return Placement(task.name, is_new=True, start=last)

    @torch.no_grad()
    def begin(self, training: Training) -> None:
        """Stage 1, and Z̄: the keys stay as they are from now on."""
        adapter = training.placement.adapter
        self._choice = self._increments.choice(adapter)
        queries = torch.stack([torch.tensor(self._vector(row)) for row in training.rows])  # (n, D)
        with torch.enable_grad():
            keys = train_keys(
                self._choice.keys.cpu(),
                queries,
                self._chosen,
                self._key_learning_rate,
                self._key_epochs,
                self._key_batch_size,
                stable_seed(self._increments.seed, training.task.name, "keys"),
            )
        self._choice.keys.copy_(keys)
        self._choice.used.copy_(shares(queries, keys, self._chosen).mean(0))

    @torch.no_grad()
    def after_step(self) -> None:
        if self._choice.context is not None:
            self._choice.context.clamp_(0.0, 1.0)

    def close_task(self, task: Task) -> None:
        self._learned.append(task.name)

    def route(self, requests: Sequence[Row]) -> list[Match] | None:
        """All slots answer every request; which of them, it chooses inside the model."""
        if not self._learned:
            return None
        return [Match(stack_name(self._learned), 1.0, {})] * len(requests)

    def state_dict(self) -> dict[str, Any]:
        return {"learned": list(self._learned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._learned = list(state["learned"])

    def save_progress(self, folder: Path) -> None:
        write_json(folder / _FILE, {"encoder_sha256": load_encoder(self._encoder).sha256})

    def load_progress(self, folder: Path) -> None:
        began = json.loads((folder / _FILE).read_text(encoding="utf-8"))["encoder_sha256"]
        if began != load_encoder(self._encoder).sha256:
            raise UserError(
                f"{folder}: the task was begun with another encoder than {self._encoder} is now; restore it, or start "
                "a new run"
            )

    def cost(self) -> dict[str, float]:
        """Numbers are those of keys and their use."""
        choices = [self._increments.choice(adapter) for adapter in self._learned]
        numbers = sum(buffer.numel() for choice in choices for buffer in choice.buffers())
        return {"adapters_stored": len(self._learned), "numbers_stored": numbers}

    def _vector(self, row: Row | Encoded) -> NDArray[np.float32]:
        """q, (D,)."""
        return encode(row.user_text if self._query == "text" else row.instruction, self._encoder)

    @property
    def _increments(self) -> IncrementPool:
        assert isinstance(self.pool, IncrementPool)
        return self.pool
