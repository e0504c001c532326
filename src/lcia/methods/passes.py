"""What methods need for passes of their own through the model, beside those of the training.

Shapes: P trained numbers of one adapter, B rows, L tokens, A answer tokens + 1 (see lcia.backbone.chat).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch

from lcia.backbone import Backbone
from lcia.seeds import stable_seed
from lcia.stream import Row


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """All numbers of `tensors` as one new vector (P,), in their order: it does not depend on an adapter's name."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, every module's own mode again after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def draw(rows: Sequence[Row], limit: int | None, *names: str) -> list[Row]:
    """`limit` of the rows in their order, None or too many: all. The draw depends on `names` and nothing else."""
    if limit is None or limit >= len(rows):
        return list(rows)
    chosen = random.Random(stable_seed(0, *names)).sample(range(len(rows)), limit)
    return [rows[i] for i in sorted(chosen)]


def as_batch(rows: Sequence[Row], backbone: Backbone, device: torch.device) -> dict[str, torch.Tensor]:
    """A training batch of `rows`: input_ids, attention_mask, position_ids (B, L); labels (B, A)."""
    batch = backbone.reader.collate([backbone.reader.encode(row) for row in rows])
    return {name: tensor.to(device) for name, tensor in batch.items()}


def second_moments(layers: Mapping[str, torch.nn.Module], passes: Iterable[object]) -> dict[str, torch.Tensor]:
    """{layer: (in, in) X Xᵀ of its inputs}, fp32, summed over every token that passes; no input is kept.

    Args:
        layers: linear layers by name; one that is never called is left out of the result.
        passes: each item is made by a pass through the model.
    """
    sums: dict[str, torch.Tensor] = {}
    seen, product = torch.empty(0), torch.empty(0)

    def add(name: str, layer: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal seen, product
        if arguments[0] is not seen:  # query, key and value are given the very same tensor
            seen = arguments[0]
            inputs = seen.flatten(0, -2).float()  # (tokens, in)
            product = inputs.T @ inputs
        sums[name] = sums[name] + product if name in sums else product

    handles = [layer.register_forward_pre_hook(partial(add, name)) for name, layer in layers.items()]
    try:
        for _ in passes:
            pass
    finally:
        for handle in handles:
            handle.remove()
    return sums
