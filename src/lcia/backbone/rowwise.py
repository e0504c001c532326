"""Modules below a model that treat the rows of a batch apart, and how they are told what each row asks.

Shapes: B rows, D width of a query.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch


class RowWise(torch.nn.Module):
    """`queries` (B, D) are those of the batch that is passing through the model; None where none is."""

    queries: torch.Tensor | None = None


@contextlib.contextmanager
def told(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The row-wise modules of `model` know the batch's `query`, where it has one, inside."""
    modules = [module for module in model.modules() if isinstance(module, RowWise)] if "query" in batch else []
    for module in modules:
        module.queries = batch["query"]
    try:
        yield
    finally:
        for module in modules:
            module.queries = None
