"""What a step does with every element: passes over all weights, in plain torch.

A pass goes through blocks that stay in the processor's cache. lcia.ema.compiled has the same passes in C, for float32
on a processor.

Legend: n tensors, R rows of W elements; see lcia.ema.layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lcia.ema.followed import Followed
from lcia.ema.layout import Block, Layout, Scratch
from lcia.ema.rules import READS, Moment, Rule


@dataclass
class Buffers:
    """What a rule keeps of every element, each a flat buffer (R, W); None: it does not."""

    average: Tensor  # θ*
    previous_gradient: Tensor | None = None  # g_{t−1}
    previous_weights: Tensor | None = None  # θ_{t−1}
    importance: Tensor | None = None  # F_old
    squares: Tensor | None = None  # running mean of g²

    def kept(self) -> dict[str, Tensor]:
        return {name: flat for name, flat in vars(self).items() if flat is not None}


@dataclass(frozen=True)
class Shown:
    """What one step is shown: lists of n tensors, this process's parts."""

    weights: Sequence[Tensor]  # θ_t
    gradients: Sequence[Tensor]  # g_t
    squares: Sequence[Tensor] = ()  # running means of g² that an optimizer keeps


@dataclass(frozen=True)
class Seen:
    """Gradients that the running mean of squares has yet to see."""

    tensors: Sequence[Tensor]  # n of them
    weight: Tensor  # (n,) in the mean; 0: these are not counted
    scale: float | Tensor = 1.0  # of the gradients
    squared: bool = False  # whether they are squares already


class Passes:
    """The passes of one rule over the tensors of one layout.

    Args:
        followed: where every element has its own β: of which the product is kept.
    """

    def __init__(self, layout: Layout, rule: Rule, buffers: Buffers, followed: Followed | None) -> None:
        self._layout, self._rule, self._buffers, self._followed = layout, rule, buffers, followed
        self._weights = Scratch(layout)
        self._gradients = Scratch(layout)
        in_optimizer = "curvature" in rule.reads and buffers.squares is None
        self._squares = Scratch(layout) if in_optimizer else None
        self._work = torch.empty_like(self._weights.buffer)

    def sums(
        self,
        shown: Shown,
        norms: Sequence[str],
        checks: Mapping[str, Sequence[Tensor]],
        correction: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """What is added up over each tensor, (n,) each, in float64; of whole tensors, g_t becomes g_{t−1}.

        Args:
            norms: reads of the rule (READS) of which the sum of absolute values is wanted.
            checks: {name: n tensors} of which a sum is wanted that is finite where every element is.
            correction: (n,) what makes F_new / λ of a running mean of squares.
        """
        row_correction = self._spread(correction)
        sums = self._layout.row_sums(len(norms) + len(checks))  # (k, R)
        for block in self._layout.blocks:
            moment = self._moment(block, shown, row_correction) if norms else None
            work = self._work[: block.last - block.first]
            for i, name in enumerate(norms):
                assert moment is not None
                absolute = torch.abs(READS[name](moment, work), out=work)
                torch.sum(block.clear_padding(absolute), 1, out=sums[i, block.rows])
            for i, tensors in enumerate(checks.values(), start=len(norms)):
                torch.sum(self._weights.fill(block, tensors), 1, out=sums[i, block.rows])
            if moment is not None:
                _remember_gradient(moment)  # read for the last time, and still in the cache
        return dict(zip([*norms, *checks], self._layout.sum_rows(sums), strict=True))

    def observe(self, seen: Seen) -> None:
        """Let the running mean of squares see gradients."""
        weight = self._spread(seen.weight)
        for block in self._layout.blocks:
            self._observe(block, seen, weight)

    def _observe(self, block: Block, seen: Seen, weight: Tensor | None) -> None:
        assert self._buffers.squares is not None
        assert weight is not None
        squared = self._gradients.fill(block, seen.tensors)
        if not seen.squared:
            if not isinstance(seen.scale, float) or seen.scale != 1:
                squared.mul_(seen.scale)
            squared.square_()
        # of a gradient of 10²⁰; what is not finite has no weight, and must not become 0 · ∞
        squared.nan_to_num_(nan=0, posinf=torch.finfo(squared.dtype).max)
        self._buffers.squares[block.rows].lerp_(squared, weight[block.rows])

    def move_tensors(self, shown: Shown, move: Tensor) -> None:
        """θ* ← θ* + move · (θ − θ*), one number a tensor, (n,)."""
        row_move = self._spread(move)
        assert row_move is not None
        for block in self._layout.blocks:
            weights = self._weights.fill(block, shown.weights)
            self._buffers.average[block.rows].lerp_(weights, row_move[block.rows])
            if self._buffers.previous_weights is not None:
                self._buffers.previous_weights[block.rows].copy_(weights)

    def move_elements(
        self,
        shown: Shown,
        seen: Seen | None,
        moves: Tensor,
        known: Tensor,
        correction: Tensor | None,
        numbers: Mapping[str, float],
    ) -> tuple[Tensor, Tensor]:
        """θ* ← θ* + move · (θ − θ*), a number of the rule's for each element.

        Args:
            seen: what `observe` should see first.
            moves: (n,) 1 where a tensor may move, else 0.
            known: (n,) whether there was a gradient before.
            correction: as of `sums`.
            numbers: what the rule reads that is one number.

        Returns:
            (n,) each, in float64: the sum of the elements' moves, and how many fell back.
        """
        assert self._followed is not None
        rule = self._rule
        sums = self._layout.row_sums(2)  # (2, R)
        row_known = self._layout.spread(known)  # (R, 1)
        row_correction, weight = self._spread(correction), self._spread(None if seen is None else seen.weight)
        # nearly always; a GPU would have to be waited for, to know whether
        all_move = moves.device.type == "cpu" and bool(moves.all())
        row_moves = self._spread(None if all_move else moves)
        for block in self._layout.blocks:
            if seen is not None:
                self._observe(block, seen, weight)
            moment = self._moment(block, shown, row_correction)
            work = self._work[: block.last - block.first]
            reads: dict[str, Any] = {
                name: READS[name](moment, work if name == rule.into else None) for name in rule.reads if name in READS
            }
            reads |= {name: number for name, number in numbers.items() if name in rule.reads}
            move = rule.move(**reads, **({"out": work} if rule.into else {}))
            if rule.falls_back:
                usable = (move > 0) & (move < 1) & row_known[block.rows]
                move = torch.where(usable, move, 1 - numbers["fallback"])
                torch.sum(block.clear_padding((~usable).float()), 1, out=sums[1, block.rows])
            move = block.clear_padding(move if row_moves is None else move.mul_(row_moves[block.rows]))
            torch.sum(move, 1, out=sums[0, block.rows])
            self._followed.multiply(block, move)
            moment.average.lerp_(moment.weights, move)
            _remember_gradient(moment)
            if moment.previous_weights is not None:
                moment.previous_weights.copy_(moment.weights)
        moved, fell_back = self._layout.sum_rows(sums)
        return moved, fell_back

    def _spread(self, per_tensor: Tensor | None) -> Tensor | None:  # (n,) -> (R, 1)
        return None if per_tensor is None else self._layout.spread(per_tensor.float())

    def _moment(self, block: Block, shown: Shown, correction: Tensor | None = None) -> Moment:
        """What the rule may read in one block. Only what it reads is copied there."""
        rows = {name: flat[block.rows] for name, flat in self._buffers.kept().items()}
        if any(name.startswith("gradient") for name in self._rule.reads):
            rows["gradient"] = self._gradients.fill(block, shown.gradients)
        if self._squares is not None:
            rows["squares"] = self._squares.fill(block, shown.squares)
        if correction is not None:
            rows["correction"] = correction[block.rows]
        return Moment(weights=self._weights.fill(block, shown.weights), **rows)


def _remember_gradient(moment: Moment) -> None:
    if moment.previous_gradient is not None and moment.gradient is not None:
        moment.previous_gradient.copy_(moment.gradient)
