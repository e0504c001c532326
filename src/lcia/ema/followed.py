"""What is left of the start point, where every element has its own β."""

from __future__ import annotations

import torch
from torch import Tensor

from lcia.ema.layout import WIDTH, Block, Layout, wide_dtype

# Following all elements would be a third number a parameter. The mean over this many is exact for smaller tensors; for
# larger ones its standard error is at most 0.5 / √512 = 0.022.
FOLLOWED_PER_TENSOR = 512


class Followed:
    """Π β of some elements of each tensor, chosen once, at random with a fixed seed.

    Even spacing would not do: it aligns with the columns of a matrix and would follow two of its columns only.
    """

    def __init__(self, layout: Layout):
        generator = torch.Generator().manual_seed(0)
        chosen = []
        for row, size in zip(layout.first_row, layout.sizes, strict=True):
            picked = torch.randperm(size, generator=generator)[:FOLLOWED_PER_TENSOR].sort().values
            chosen.append(row * WIDTH + picked)
        index = torch.cat(chosen)  # (Q,) positions in the flat buffer, ascending
        counts = torch.tensor([len(picked) for picked in chosen])
        self._counts = counts.to(layout.device)  # (n,)
        bounds = torch.tensor([[block.first * WIDTH, block.last * WIDTH] for block in layout.blocks]).reshape(
            -1, 2
        )
        self._span = {
            block.first: (int(start), int(stop))
            for block, (start, stop) in zip(
                layout.blocks, torch.searchsorted(index, bounds).tolist(), strict=True
            )
        }
        starts = torch.cat(
            [index[slice(*self._span[block.first])] - block.first * WIDTH for block in layout.blocks]
            or [index]
        )
        self._index = starts.to(layout.device)  # (Q,) positions in their blocks
        self.product = torch.ones(
            len(index), dtype=wide_dtype(layout.device), device=layout.device
        )  # (Q,) Π β

    def multiply(self, block: Block, move: Tensor) -> None:  # (rows of the block, W)
        """Multiply by β = 1 − move in this block."""
        span = slice(*self._span[block.first])
        self.product[span] *= 1 - move.reshape(-1)[self._index[span]].to(self.product.dtype)

    def mean(self) -> Tensor:  # (n,)
        """Mean of Π β over the followed elements of each tensor; 0 for a tensor without elements here."""
        total = torch.segment_reduce(self.product, "sum", lengths=self._counts, unsafe=True)
        return total / self._counts.clamp_min(1)

    def restore(self, product: Tensor | None, mean: Tensor) -> None:  # (Q,) or None, (n,)
        """Continue from a stored product, or, where none was stored, from each tensor's mean."""
        if product is None:
            product = torch.repeat_interleave(mean, self._counts)
        self.product.copy_(product)
