"""EProj (He et al., arXiv 2311.16206): a projector per group of similar tasks; everything else of the model is frozen.

    e_t        = (v̄_t, ī_t, ō_t)    directions of task t's images, instructions and outputs
    sim(a, b)  = mean over the parts that both have of a_part · b_part
    task t     sim(e_t, e_s) of the nearest earlier task s ≥ threshold: s's projector is trained on; else a new one is
    request x  the projector of argmax_t sim(q_x, k_t), with q_x = (v_x, i_x) and the key k_t = (v̄_t, ī_t)

A key is trained to be near the requests of its task. What training it approaches is known in closed form: the k of
length 1 that maximises Σ_x cos(x, k) is Σ_x x/‖x‖, normalised. That is the task's direction; keys cost no training.

Images are seen as the projector is given them by the frozen vision tower, texts as a frozen sentence encoder's vectors.

Shapes: n vectors of D numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import normalize

from lcia.adapters import ModulePool, Pool
from lcia.backbone import Backbone
from lcia.errors import UserError
from lcia.grouping import Match
from lcia.grouping.sentence import MINILM, encode, load_encoder
from lcia.methods.base import Method, Placement, Training
from lcia.methods.options import number
from lcia.methods.passes import evaluating
from lcia.stream import Row, Task

PARTS = ("instruction", "output", "image")
Embedding = dict[str, torch.Tensor]  # part → (D of the part,), of length 1


def direction(vectors: torch.Tensor) -> torch.Tensor:
    """(D,) of length 1: where the `vectors` (n, D) point on average, each of them counting alike."""
    return normalize(normalize(vectors, dim=1).sum(0), dim=0)


def similarity(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """The mean cosine of the parts that both embeddings have, from −1 to 1."""
    cosines = [float(a[part] @ b[part]) for part in a if part in b]
    return sum(cosines) / len(cosines)


def group_scores(
    embedding: Mapping[str, torch.Tensor], tasks: Mapping[str, Mapping[str, torch.Tensor]], groups: Mapping[str, str]
) -> dict[str, float]:
    """{group: similarity to the nearest of its tasks}, in the order of the groups' first tasks.

    Args:
        tasks: task → embedding; groups: task → its group.
    """
    scores: dict[str, float] = {}
    for task, other in tasks.items():
        found = similarity(embedding, other)
        scores[groups[task]] = max(found, scores.get(groups[task], found))
    return scores


class EProj(Method):
    """Retrain the projector of the most similar task, or expand the pool of projectors; retrieve one for each request.

    Args:
        threshold: from this similarity on, a task trains the nearest projector on; the paper's is not published.
    """

    name = "eproj"

    def __init__(self, *, threshold: float = 0.8) -> None:
        self._threshold = number("threshold", threshold, high=1.0)
        self._tasks: dict[str, Embedding] = {}  # the learned ones
        self._groups: dict[str, str] = {}  # task → adapter
        self._rows_seen = 0  # by the vision tower, for the task being learned
        self._rows_routed = 0  # the same, of requests

    def make_pool(self, backbone: Backbone, lora: dict[str, Any], seed: int) -> Pool:
        if not backbone.layout.sees:
            raise UserError(
                f"key 'method': eproj trains what turns images into tokens, and model {backbone.name} reads text only; "
                "choose a vision-language model, or another method"
            )
        if backbone.projector is None:
            raise UserError("key 'projector': none leaves eproj nothing to train; write auto, or the projector's path")
        load_encoder(MINILM)  # a package that is missing is said now, not when the first task begins
        return ModulePool(
            backbone.model,
            {},
            lambda target: target,  # there is no target
            kind="Projector",
            settings={"name": self.name},
            base_name=backbone.name,
            seed=seed,
            projector=backbone.projector,
        )

    def open_task(self, task: Task) -> Placement:
        images = self._images(task.train)
        self._rows_seen = len(images)
        self._opened: Embedding = {
            "instruction": direction(torch.stack([_text(row.instruction) for row in task.train])),
            "output": direction(torch.stack([_text(row.outputs[0]) for row in task.train])),
        }
        shown = [images[row.images] for row in task.train if row.images]
        if shown:
            self._opened["image"] = direction(torch.stack(shown))
        scores = group_scores(self._opened, self._tasks, self._groups)
        best = max(scores, key=scores.__getitem__, default=None)  # max keeps the first of equals
        if best is None or scores[best] < self._threshold:
            return Placement(task.name, is_new=True, scores=scores)
        return Placement(best, is_new=False, scores=scores)

    def begin(self, training: Training) -> None:
        self._adapter = training.placement.adapter
        self._weights = list(training.parameters.values())

    def penalty(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """0, with a gradient of 0: the loss of rows without images does not depend on a projector."""
        return 0.0 * torch.stack([weight.sum() for weight in self._weights]).sum()

    def close_task(self, task: Task) -> None:
        self._tasks[task.name] = self._opened
        self._groups[task.name] = self._adapter
        self._weights = []

    def route(self, requests: Sequence[Row]) -> list[Match] | None:
        """The projector whose key is nearest to a request's image and instruction, the earliest among equals."""
        if not self._tasks:
            return None
        images = self._images(requests)
        self._rows_routed += len(images)
        matches = []
        for row in requests:
            query = {"instruction": _text(row.instruction)}
            if row.images:
                query["image"] = normalize(images[row.images], dim=0)
            scores = group_scores(query, self._tasks, self._groups)
            best = max(scores, key=scores.__getitem__)
            matches.append(Match(best, scores[best], scores))
        return matches

    @torch.no_grad()
    def _images(self, rows: Sequence[Row]) -> dict[tuple[str, ...], torch.Tensor]:
        """{a row's images: (D,) what the vision tower says of them}, each once; of several images, the mean."""
        asked = {row.images: row for row in reversed(rows) if row.images}
        with evaluating(self.backbone.model):
            return {images: self._image(row) for images, row in asked.items()}

    def _image(self, row: Row) -> torch.Tensor:
        """(D,) fp32: the mean over all tokens that the projector is given for the row's images.

        One row at a time: in a batch its last bits would depend on its neighbours.
        """
        assert isinstance(self.pool, ModulePool)
        assert self.pool.projector is not None
        model, reader = self.backbone.model, self.backbone.reader
        known = inspect.signature(model.get_image_features).parameters
        batch = reader.collate([reader.encode_prompt(row)])
        shown = {name: values.to(model.device) for name, values in batch.items() if name in known}
        given: list[torch.Tensor] = []
        projector = model.get_submodule(self.pool.projector)
        handle = projector.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
        try:
            model.get_image_features(**shown)
        finally:
            handle.remove()
        return torch.cat([features.flatten(0, -2) for features in given]).float().mean(0).cpu()

    def state_dict(self) -> dict[str, Any]:
        parts = {f"{part}/{task}": vector for task, found in self._tasks.items() for part, vector in found.items()}
        return {"groups": dict(self._groups), **parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._groups = dict(state["groups"])
        self._tasks = {
            task: {part: state[f"{part}/{task}"] for part in PARTS if f"{part}/{task}" in state}
            for task in self._groups
        }

    def adapters_changed(self, origin: Mapping[str, str]) -> None:
        heirs = {source: name for name, source in reversed(list(origin.items()))}  # of several, the first
        self._groups = {task: heirs[group] for task, group in self._groups.items() if group in heirs}
        self._tasks = {task: found for task, found in self._tasks.items() if task in self._groups}

    def cost(self) -> dict[str, float]:
        """Rows are those that passed the vision tower alone, an image that several of them show counted once."""
        numbers = sum(vector.numel() for found in self._tasks.values() for vector in found.values())
        return {"extra_forward_rows": self._rows_seen, "numbers_stored": numbers}

    def routing_cost(self) -> dict[str, float]:
        return {"extra_forward_rows": self._rows_routed}


def _text(text: str) -> torch.Tensor:
    """(D,) of length 1."""
    return torch.tensor(encode(text))
