"""Low-rank increments that each row of a batch mixes for itself, as modules of a pool.

An adapter has S slots. A slot is a key and, for each adapted layer W₀, an increment B_as A_as:

    y_b = W₀ x_b + Σ_a Σ_s c_bas B_as A_as x_b        a: adapters, oldest first; s: slots; b: rows

Rows are told apart by their queries (lcia.backbone.RowWise), so one batch may hold rows with different mixtures c_b.
One of zeros is the base model, bit for bit.

Shapes: B rows, T adapters, S slots of one adapter, P slots to choose from, D width of queries and keys, R rank of a
slot, L tokens; in and out features of a layer.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.functional import linear, normalize, pad

from lcia.adapters.modules import ModulePool, small_module
from lcia.adapters.pool import stack_members
from lcia.adapters.targets import attention_outputs, features
from lcia.backbone import Backbone, RowWise
from lcia.backbone.loading import weights_sha256
from lcia.errors import UserError


def nearest(queries: torch.Tensor, keys: torch.Tensor, chosen: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines with the `chosen` nearest of the keys (P, D), or with all where there are fewer, and their indices.

    Args:
        queries: (B, D).

    Returns:
        Two tensors (B, min(chosen, P)), the nearest first.
    """
    cosines = normalize(queries, dim=-1) @ normalize(keys, dim=-1).T  # (B, P)
    found = cosines.topk(min(chosen, len(keys)), dim=-1)
    return found.values, found.indices


def shares(queries: torch.Tensor, keys: torch.Tensor, chosen: int) -> torch.Tensor:
    """(B, P): cos(q, k_m) / Σ cos over the chosen keys m, 0 for all others.

    A chosen key that points away from the query has no share; where all do, the row is 0: nothing here is for it.
    """
    cosines, indices = nearest(queries, keys, chosen)
    cosines = cosines.clamp(min=0)
    total = cosines.sum(-1, keepdim=True).clamp(min=torch.finfo(cosines.dtype).tiny)
    return cosines.new_zeros(len(queries), len(keys)).scatter(1, indices, cosines / total)


def mixture(intrinsic: torch.Tensor, weights: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """(B, T, S): c_bas = α_bas + Σ_t (Σ_s' α_bts') w_ta z̄_as.

    Args:
        intrinsic: α, (B, T, S), the shares of the slots that each row chose.
        weights: w, (T, T), 0 on and above the diagonal: w_ta of adapter t for the earlier adapter a.
        used: z̄, (T, S), what the rows that trained adapter a chose of it, on average.
    """
    return intrinsic + torch.einsum("bt,ta,as->bas", intrinsic.sum(-1), weights, used)


class Slots(torch.nn.Module):
    """The increments of S slots for one linear layer, one below the other: A (S R, in) and B (out, S R).

    A starts uniform within ±1/√in, as in PEFT, B at zero.
    """

    def __init__(self, inputs: int, outputs: int, slots: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.A = torch.nn.Parameter(torch.empty(slots * rank, inputs))
        self.B = torch.nn.Parameter(torch.zeros(outputs, slots * rank))
        torch.nn.init.uniform_(self.A, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    def forward(self, x: torch.Tensor, share: torch.Tensor, fixed: bool = False) -> torch.Tensor:
        """Σ_s c_bs B_s A_s x_b, (B, L, out), in fp32; x is (B, L, in), `share` = c (B, S).

        fixed: no gradient for A and B.
        """
        A, B = (self.A.detach(), self.B.detach()) if fixed else (self.A, self.B)
        inner = linear(x.to(A.dtype), A)  # (B, L, S R)
        return linear(inner * share.repeat_interleave(self.rank, dim=1)[:, None], B)


class Choice(RowWise):
    """What an adapter has once: the keys k_s of its slots, their average use z̄_s, and w_a of each earlier adapter a.

    Keys and use are not trained with the language model. Keys start as random directions.
    """

    keys: torch.Tensor  # (S, D)
    used: torch.Tensor  # (S,)
    context: torch.nn.Parameter | None  # (earlier adapters,); the first adapter has none

    def __init__(self, slots: int, width: int, earlier: int, start: float) -> None:
        super().__init__()
        self.register_buffer("keys", normalize(torch.randn(slots, width), dim=-1))
        self.register_buffer("used", torch.zeros(slots))
        context = torch.nn.Parameter(torch.full((earlier,), start)) if earlier else None
        self.register_parameter("context", context)


class IncrementPool(ModulePool):
    """Adapters of slots. A later one builds on all before it: their order is part of what they compute.

    A stack's name (`stack_name`) means that rows choose among the slots of all its members; with `one_pool`, among
    those of the last. What `Choice` keeps hangs below the decoder.

    Args:
        slots: S; rank: R; width: D.
        chosen: how many slots a row chooses at most.
        context_start: where the weights w of earlier adapters start, in [0, 1].
        one_pool: a new adapter starts with the slots of its `start`, as a later state of one pool.
        settings, seed: see ModulePool.
    """

    def __init__(
        self,
        backbone: Backbone,
        slots: int,
        rank: int,
        width: int,
        chosen: int,
        context_start: float,
        one_pool: bool,
        settings: Mapping[str, Any],
        seed: int = 0,
    ) -> None:
        model = backbone.model
        self._decoder = model.get_decoder()
        self._stacks = [model.get_encoder(), self._decoder] if model.config.is_encoder_decoder else [self._decoder]
        self._chosen, self._one_pool = chosen, one_pool
        self.seed = seed
        # Of the batch that is passing through; a layer that is computed again in its backward pass needs it still.
        self._mixture: dict[str, torch.Tensor] = {}  # adapter → (B, S)
        self._with_grad = False

        def make(target: torch.nn.Module) -> torch.nn.Module:
            if target is self._decoder:
                return Choice(slots, width, len(self.names), context_start)
            return Slots(*features(target), slots, rank)

        self._path = next(path for path, module in model.named_modules() if module is self._decoder)
        super().__init__(
            model,
            {self._path: self._decoder, **attention_outputs(model, backbone.name)},
            make,
            kind=f"Pool of {slots} increments",
            settings=settings,
            base_name=backbone.name,
            seed=seed,
        )

    def choice(self, name: str) -> Choice:
        """An adapter's keys, their use, and its weights of earlier adapters."""
        found = small_module(self._decoder, name)
        assert isinstance(found, Choice)
        return found

    def add(self, name: str, start: str | None = None) -> None:
        super().add(name)
        if start is not None:
            new = self._state(name)
            slots = {key: value for key, value in self._state(start).items() if not key.endswith(".context")}
            self._copy_in(name, new | slots)

    def remove(self, name: str) -> None:
        self._require(name)
        if name != self.names[-1]:
            raise ValueError(f"adapter {name!r}: {self.names[-1]!r} builds on it and would not be the same without it")
        super().remove(name)

    def sha256(self, name: str) -> str:
        """Content hash of what an adapter or a stack computes: earlier adapters and the settings are part of it."""
        acting = self._acting(name)
        content = [weights_sha256(self._state(adapter)) for adapter in acting]
        members = [acting.index(member) for member in stack_members(name)]
        return hashlib.sha256(json.dumps([content, members, self._settings], sort_keys=True).encode()).hexdigest()

    def _state(self, name: str) -> dict[str, torch.Tensor]:
        kept = {f"{self._path}.{key}": value for key, value in self.choice(name).named_buffers()}
        return super()._state(name) | kept

    def _acting(self, name: str) -> list[str]:
        """The adapters that take part in what `name` computes, oldest first."""
        self._require(name)
        return self._names[: 1 + max(self._names.index(member) for member in stack_members(name))]

    def _require(self, name: str) -> None:
        for member in stack_members(name):
            super()._require(member)

    def _attach(self) -> None:
        super()._attach()
        for stack in self._stacks:
            stack.register_forward_pre_hook(lambda module, inputs: self._mix())

    def _mix(self) -> None:
        """Before the layers: the mixture of each row of the batch."""
        if self._active is None:
            return
        acting = self._acting(self._active)
        choices = [self.choice(name) for name in acting]
        queries = choices[-1].queries  # (B, D)
        if queries is None:
            raise RuntimeError("the model was called outside of `told`, whose queries say how increments are mixed")
        members = stack_members(self._active)
        candidates = [acting.index(member) for member in (members[-1:] if self._one_pool else members)]
        keys = torch.cat([choices[i].keys for i in candidates])  # (P, D)
        found = shares(queries, keys, self._chosen)
        intrinsic = found.new_zeros(len(queries), len(acting), len(choices[0].keys))
        intrinsic[:, candidates] = found.unflatten(1, (len(candidates), -1))
        weights = [keys.new_zeros(0) if choice.context is None else choice.context for choice in choices]
        weights = [pad(row, (0, len(acting) - len(row))) for row in weights]
        used = torch.stack([choice.used for choice in choices])
        mixed = mixture(intrinsic, torch.stack(weights), used)
        self._mixture = dict(zip(acting, mixed.unbind(1), strict=True))
        self._with_grad = torch.is_grad_enabled()

    def _changed(self, target: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if target is self._decoder:
            return output
        if self._with_grad and not torch.is_grad_enabled():  # each layer would go back through the one mixture
            raise UserError(
                "key 'activation_checkpointing_kwargs': increments share their mixture over all layers, which "
                "use_reentrant: true cannot; leave the key out"
            )
        changed = output
        newest = next(reversed(self._mixture))
        for name, share in self._mixture.items():
            # fp32, whatever the base's dtype; stop_grad(Z̄): earlier adapters take part, and do not learn
            changed = changed + small_module(target, name)(inputs[0], share, fixed=name != newest)
        return changed.to(output.dtype)
