"""What is left of the start point, where every element has its own β."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lcia.ema.layout import WIDTH, Block, Layout, wide_dtype

# Following all elements would be a third number a parameter. The mean over F is exact for tensors that have no more
# elements; for larger ones its standard error is at most 0.5 / √256 = 0.031.
FOLLOWED = 256


class Followed:
    """Π β of F elements of each tensor, chosen once, at random with a fixed seed.

    Even spacing would not do: it aligns with the columns of a matrix and would follow two of its columns only. The
    choice is among all elements, whoever holds them, so that another number of processes can go on with it.

    Args:
        layout: where this process's parts of the n tensors lie.
        sizes: how many elements the whole tensors have.
        positions: for each part, which elements of its whole tensor it holds, ascending; None: all.
    """

    def __init__(self, layout: Layout, sizes: Sequence[int], positions: Sequence[Tensor | None]):
        n, device = len(sizes), layout.device
        generator = torch.Generator().manual_seed(0)
        flat, slots = [], []
        for tensor, (size, held) in enumerate(zip(sizes, positions, strict=True)):
            picked = torch.arange(size)
            if size > FOLLOWED:
                picked = torch.randint(size, (FOLLOWED,), generator=generator).sort().values
            slot = torch.arange(len(picked))
            if held is not None:
                place = torch.searchsorted(held.contiguous(), picked).clamp_max(max(0, len(held) - 1))
                mine = held[place] == picked if len(held) else torch.zeros_like(picked, dtype=torch.bool)
                picked, slot = place[mine], slot[mine]
            flat.append(layout.first_row[tensor] * WIDTH + picked)
            slots.append(slot * n + tensor)
        self._shape = (FOLLOWED, n)
        self._count = torch.tensor([min(size, FOLLOWED) for size in sizes], device=device)  # (n,)
        self._held = torch.tensor([len(mine) for mine in slots], device=device)  # (n,) of these, by this process
        self._slot = torch.cat(slots).to(device)  # (K,) where in (F, n)
        self.index = index = torch.cat(flat)  # (K,) positions in the flat buffer, ascending
        self.left = torch.ones(len(index), device=device)  # (K,) Π β, in this order: a block's are neighbours
        self._of_block = {}
        for block in layout.blocks:
            bounds = torch.tensor([block.first * WIDTH, block.last * WIDTH])
            first, last = torch.searchsorted(index, bounds).tolist()
            inside = (index[first:last] - block.first * WIDTH).to(device)
            self._of_block[block.first] = (inside, self.left[first:last])

    def multiply(self, block: Block, move: Tensor) -> None:  # (rows of the block, W)
        """Multiply by β = 1 − move in this block."""
        inside, product = self._of_block[block.first]
        product.mul_(1 - move.reshape(-1).index_select(0, inside))

    def mean_parts(self) -> Tensor:  # (n,)
        """What this process adds to the mean of Π β over the followed elements of each tensor."""
        wide = self.left.to(wide_dtype(self.left.device))
        return torch.segment_reduce(wide, "sum", lengths=self._held, unsafe=True) / self._count

    def product(self) -> Tensor:  # (F, n)
        """Π β, 0 where another process holds the element."""
        found = self.left.new_zeros(self._shape)
        found.view(-1)[self._slot] = self.left
        return found

    def restore(self, product: Tensor) -> None:  # (F, n)
        """Continue from the product of all processes."""
        self.left.copy_(product.to(self.left).view(-1)[self._slot])
