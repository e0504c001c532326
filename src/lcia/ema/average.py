"""The dynamic exponential moving average: it remembers, the rule computes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcia.ema import fisher, sharding
from lcia.ema.followed import Followed
from lcia.ema.layout import Block, Layout, Scratch, wide_dtype
from lcia.ema.rules import READS, Moment, constant_retaining, find_rule
from lcia.errors import did_you_mean

_PER = ("element", "tensor", "layer")  # fine to coarse
_GRADIENT_NORMS = {"gradient", "gradient_plus_one"}
_GRADIENT = {*_GRADIENT_NORMS, "gradient_change"}
_HISTORY = {"gradient_change", "step", "previous_offset"}  # reads that the first step does not have


@dataclass(frozen=True)
class _Step:
    """What one step is given: lists of n tensors, this process's parts."""

    weights: list[Tensor]  # θ_t
    gradients: list[Tensor]  # g_t, zeros where there is none
    present: Tensor  # (n,) 1 where there is a gradient, 0 where it is missing
    squares: list[Tensor]  # the optimizer's running means of g², where they are read
    correction: Tensor | None  # (n,) what makes the running mean of g² an F_new


class DynamicEMA:
    """θ*_t = β_t θ*_{t−1} + (1 − β_t) θ_t with β_t from a rule (arXiv 2410.10868, Eq. 1; rules in lcia.ema.rules).

    ```python
    ema = DynamicEMA(model.named_parameters(), rule="fisher", total_steps=300, importance=before)
    for batch in batches:
        model(**batch).loss.backward()
        ema.observe()            # only needed where gradients are clipped or reshaped before the step
        optimizer.step()
        ema.step()
        optimizer.zero_grad()
    ema.copy_to_model()
    ```

    Averages are fp32 whatever the model's dtype: in bf16 a move of 0.001 is mostly rounded away. Sharded parameters
    (FSDP2) have sharded averages, and every method is then called on all processes.

    Args:
        named_parameters: (name, parameter) pairs or a mapping; those that do not require a gradient are left out.
        rule: a name in lcia.ema.RULES.
        fallback: β of `fixed`, and of any other rule where its own β is outside (0, 1) or not finite.
        total_steps: optimizer steps of the task. `fisher` and `retained` need it.
        importance: {name: F_old}, the `importance` of the previous task's DynamicEMA. None: the first task; nothing is
            protected, θ* follows θ.
        examples_per_gradient: how many examples one gradient is the mean of (batch × accumulation × processes).
        retained: instead of `fallback`: the constant whose product over total_steps is this share of the start point.
        per: one β per "element", "tensor" or "layer" (the tensors of one module). None: what the rule was made for.
        grad_dtype: dtype in which g_{t−1} is kept; torch.bfloat16 halves it. None: fp32.
        strength: λ, how much F_old weighs against F_new.
        forgetting: F_old's factor in the importance that is handed on. None: strength, as in online EWC.
        fisher_source: where F_new is read: "running", "adamw" (give `optimizer`) or "per_example"; see lcia.ema.fisher.
        fisher_decay: decay of the running mean of squared gradients.
        optimizer: the Adam or AdamW whose second moment is read.
        optional: names whose gradient may be missing (an expert that got no token): θ* stays where it is, counted.

    Raises:
        ValueError: an unknown rule or option, an argument missing that the rule needs, importance that does not fit.
        RuntimeError: parameters that something shards in a way that cannot be read.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor],
        rule: str = "eq45",
        fallback: float = 0.99,
        total_steps: int | None = None,
        importance: Mapping[str, Tensor] | None = None,
        examples_per_gradient: float = 1,
        *,
        retained: float | None = None,
        per: str | None = None,
        grad_dtype: torch.dtype | None = None,
        strength: float = 1.0,
        forgetting: float | None = None,
        fisher_source: str = "running",
        fisher_decay: float = 0.999,
        optimizer: Any = None,
        optional: Collection[str] = (),
    ):
        pairs = named_parameters.items() if isinstance(named_parameters, Mapping) else named_parameters
        self._parameters = {name: parameter for name, parameter in pairs if parameter.requires_grad}
        self._optional = frozenset(optional)
        self._check_parameters()
        self.rule = rule
        self._rule = find_rule(rule)
        reads = self._rule.reads
        self.per = self._checked_per(per)
        self.total_steps = total_steps
        self.fallback = self._checked_fallback(fallback, retained)
        if "curvature" in reads:
            self._check_fisher(fisher_source, optimizer, strength)
        self.strength = strength
        self.forgetting = strength if forgetting is None else forgetting
        self.fisher_source = fisher_source
        self.fisher_decay = fisher_decay
        self.examples_per_gradient = examples_per_gradient
        self._optimizer = optimizer

        weights = self._local_weights()
        self._layout = Layout([part.shape for part in weights], weights[0].device)
        self._reduction = sharding.Reduction(self._parameters)
        self._elements = self._reduction.sum(self._vector(self._layout.sizes)[None])[
            0
        ]  # (n,) on all processes
        self._layers = self._group_layers()  # (n,)

        self._average = self._layout.of(weights)
        self._previous_weights = self._average.clone() if "step" in reads else None
        self._previous_gradient = None
        if "gradient_change" in reads:
            self._previous_gradient = self._layout.new(grad_dtype or torch.float32)
        self._importance = None
        if "importance" in reads and importance is not None:
            self._importance = self._layout.of(self._checked_importance(importance))
        self._squares = self._layout.new() if "curvature" in reads and fisher_source != "adamw" else None
        self._examples: list[Tensor] = []
        if self._squares is not None and fisher_source == "per_example":
            self._examples = self._watch_backward_passes()

        self._weights_scratch = Scratch(self._layout)
        self._gradient_scratch = Scratch(self._layout)
        self._work = torch.empty_like(self._weights_scratch.buffer)
        zeros = self._vector([0] * len(weights))
        self._memory = {  # all (n,)
            "seen": zeros.clone(),  # 1 where there is a g_{t−1}
            "offset": zeros.clone(),  # ‖θ_t − θ*_t‖ after the last step
            "observed": zeros.clone(),  # how many gradients the running mean of squares has seen
            "beta": zeros + 1,  # of the last step
            "retained": zeros + 1,  # Π β
            "averaged": zeros.clone(),  # steps that moved it
            "fell_back": zeros.clone(),  # of these: with the fallback; a fraction where β is per element
            "missing": zeros.clone(),  # steps without a gradient
        }
        self._followed = Followed(self._layout) if self.per == "element" else None
        self.steps = 0
        self._observed_sums: Tensor | None = None  # (n,) Σ g² of the step that observe() has seen
        self._warned = False

    # -------------------------------------------------------------------------------------------------- one step

    @torch.no_grad()
    def observe(self, scale: float | Tensor = 1.0) -> None:
        """Let `fisher` see this step's gradients as they are now, times `scale`; the other rules need no call.

        Call it after backward, before anything clips or reshapes the gradients. Where the clip coefficient c is known,
        calling it after clipping with scale=1/c does the same. Without a call, `step` reads the gradients it finds.
        """
        if self._squares is None:
            return
        gradients, present = self._local_gradients()
        sums = self._layout.row_sums(1)  # (1, R)
        weight = (1 - self.fisher_decay) * present.float()  # (n,)
        for block in self._layout.blocks:
            if self._examples:
                squared = self._gradient_scratch.fill(block, self._examples)
            else:
                squared = self._gradient_scratch.fill(block, gradients).mul_(scale).square_()
            torch.sum(squared, 1, out=sums[0, block.rows])
            squared.nan_to_num_(0, 0, 0)  # one bad number must not stay in the mean for the rest of the task
            self._squares[block.rows].lerp_(squared, self._layout.spread(weight, block))
        self.discard()
        self._memory["observed"] += present
        self._observed_sums = self._reduction.sum(self._layout.sum_rows(sums))[0]

    def discard(self) -> None:
        """Forget the gradients of a step that is not made: a gradient scaler found them infinite."""
        self._observed_sums = None
        if self._examples:
            torch._foreach_zero_(self._examples)

    @torch.no_grad()
    def step(self) -> None:
        """Move the average: after optimizer.step(), before zero_grad().

        Raises:
            RuntimeError: a gradient is missing and was not declared optional, or a weight is not finite. The message
                names the parameter; the averages are as they were.
        """
        weights = self._local_weights()
        gradients, present = self._local_gradients()
        if self._observed_sums is None:
            self.observe()
        now = _Step(weights, gradients, present, *self._squared_gradients())
        norms = self._norms(now)
        bad_gradient = self._refuse_nonfinite(norms)
        if self._followed is None:
            beta, fell_back, retained = self._move_tensors(now, norms)
        else:
            beta, fell_back, retained = self._move_elements(now, self._followed)

        memory, moved = self._memory, present > 0
        memory["beta"] = beta
        memory["retained"] = retained
        memory["averaged"] += present
        memory["missing"] += 1 - present
        memory["fell_back"] += torch.maximum(fell_back, bad_gradient) * present
        if self._previous_gradient is not None:
            self._copy_moved(self._previous_gradient, gradients)
            memory["seen"] = torch.where(moved, torch.ones_like(beta), memory["seen"])
        if self._previous_weights is not None:
            self._copy_moved(self._previous_weights, weights)
        if "previous_offset" in self._rule.reads:
            memory["offset"] = torch.where(moved, beta * norms["offset"], memory["offset"])
        self.discard()
        self.steps += 1

    def _moment(self, block: Block, now: _Step) -> Moment:
        """What the rule may read in one block. Only what it reads is copied."""
        reads = self._rule.reads
        rows = block.rows
        gradient = squares = correction = None
        if _GRADIENT & set(reads):
            gradient = self._gradient_scratch.fill(block, now.gradients)
        if now.squares:
            squares = self._gradient_scratch.fill(block, now.squares)
        elif self._squares is not None:
            squares = self._squares[rows]
        if now.correction is not None:
            correction = self._layout.spread(now.correction, block)
        return Moment(
            weights=self._weights_scratch.fill(block, now.weights),
            average=self._average[rows],
            gradient=gradient,
            previous_gradient=None if self._previous_gradient is None else self._previous_gradient[rows],
            previous_weights=None if self._previous_weights is None else self._previous_weights[rows],
            importance=None if self._importance is None else self._importance[rows],
            strength=self.strength,
            squares=squares,
            correction=correction,
        )

    def _norms(self, now: _Step) -> dict[str, Tensor]:  # {read: (n,)}
        """All that is added up over whole tensors: one pass over the elements, one message between processes.

        Beside the norms that the rule reads: "weights" and "gradient", which are finite where all terms are.
        """
        names = [] if self._followed is not None else [name for name in self._rule.reads if name in READS]
        sums = self._layout.row_sums(len(names) + 2)  # (k, R)
        for block in self._layout.blocks:
            moment = self._moment(block, now)
            work = self._work[: block.last - block.first]
            for i, name in enumerate(names):
                absolute = torch.abs(READS[name](moment, work), out=work)
                torch.sum(block.clear_padding(absolute), 1, out=sums[i, block.rows])
            if "offset" not in names:
                torch.sum(moment.weights, 1, out=sums[-2, block.rows])
            if moment.gradient is not None and not _GRADIENT_NORMS & set(names):
                torch.sum(moment.gradient, 1, out=sums[-1, block.rows])
        total = self._reduction.sum(self._layout.sum_rows(sums))  # (k, n)
        norms = dict(zip(names, total, strict=False))
        norms["weights check"] = norms.get("offset", total[-2])
        norms["gradient check"] = next((norms[name] for name in names if name in _GRADIENT_NORMS), total[-1])
        if self._observed_sums is not None:
            norms["gradient check"] = self._observed_sums
        return norms

    def _move_tensors(self, now: _Step, norms: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """One β per tensor or layer. Returns β, whether it fell back, Π β, each (n,)."""
        reads = {
            name: self._over_layer(norms[name] * now.present) for name in self._rule.reads if name in READS
        }
        reads["previous_offset"] = self._over_layer(self._memory["offset"] * now.present)
        move = self._rule.move(**self._with_numbers(reads)).to(now.present).expand_as(now.present)
        fell_back = torch.zeros_like(now.present)
        if self._rule.falls_back:
            usable = (move > 0) & (move < 1)  # False where the move is not a number
            if _HISTORY & set(self._rule.reads):
                usable &= self._memory["seen"] > 0
            move = torch.where(usable, move, 1 - self.fallback)
            fell_back = (~usable).to(move)
        move = move * now.present
        narrow = move.float()
        for block in self._layout.blocks:
            weights = self._weights_scratch.fill(block, now.weights)
            self._average[block.rows].lerp_(weights, self._layout.spread(narrow, block))
        return 1 - move, fell_back, self._memory["retained"] * (1 - move)

    def _move_elements(self, now: _Step, followed: Followed) -> tuple[Tensor, Tensor, Tensor]:
        """One β per element. Returns the means of β, of whether it fell back, and of Π β, each (n,)."""
        sums = self._layout.row_sums(2)  # (2, R)
        present, seen = now.present.float(), self._memory["seen"] > 0
        for block in self._layout.blocks:
            moment = self._moment(block, now)
            reads = {name: READS[name](moment, None) for name in self._rule.reads if name in READS}
            move = self._rule.move(**self._with_numbers(reads))
            if self._rule.falls_back:
                usable = (move > 0) & (move < 1) & self._layout.spread(seen, block)
                move = torch.where(usable, move, 1 - self.fallback)
                torch.sum(block.clear_padding((~usable).float()), 1, out=sums[1, block.rows])
            move = block.clear_padding(move.mul_(self._layout.spread(present, block)))
            torch.sum(move, 1, out=sums[0, block.rows])
            followed.multiply(block, move)
            moment.average.lerp_(moment.weights, move)
        retained = followed.mean() * self._vector(self._layout.sizes)
        total = self._reduction.sum(torch.cat([self._layout.sum_rows(sums), retained[None]])) / self._elements
        return 1 - total[0], total[1], total[2]

    def _with_numbers(self, reads: dict[str, Tensor]) -> dict[str, Any]:
        """The rule's arguments: of what is there, and the numbers, those that it reads."""
        numbers = {"fallback": self.fallback, "exponent": 1 / (self.total_steps or 1)}
        return {name: value for name, value in {**reads, **numbers}.items() if name in self._rule.reads}

    def _refuse_nonfinite(
        self, norms: dict[str, Tensor]
    ) -> Tensor:  # -> (n,) 1 where the gradient is not finite
        """Raise for a weight that is not finite; warn, once, of such a gradient. The only wait for a GPU in a step."""
        bad = torch.stack([~norms["weights check"].isfinite(), ~norms["gradient check"].isfinite()])  # (2, n)
        if bad.any():
            names = list(self._parameters)
            weights, gradients = ([names[i] for i in row.nonzero().flatten().tolist()] for row in bad)
            if weights:
                raise RuntimeError(
                    f"{weights[0]} is not finite after {self.steps} steps: the averages were not moved"
                )
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the gradient of {gradients[0]} is not finite; counted as a fallback, and not reported again",
                    stacklevel=3,
                )
        return bad[1].to(norms["weights check"])

    def _squared_gradients(self) -> tuple[list[Tensor], Tensor | None]:
        """The optimizer's running means of g², where they are read, and the (n,) factors that make an F_new of them."""
        if "curvature" not in self._rule.reads:
            return [], None
        if self.fisher_source == "adamw":
            moments, correction = fisher.adamw_second_moment(self._optimizer, self._parameters.items())
            squares = [sharding.local(moment) for moment in moments]
        else:
            squares, correction = [], fisher.bias_correction(self.fisher_decay, self._memory["observed"])
        return squares, (self.examples_per_gradient * correction).to(self._average)

    # ---------------------------------------------------------------------------------------------------- reading

    @property
    def wants_unclipped(self) -> bool:
        """Whether `observe` must see gradients before clipping: False where the rule does not square them itself."""
        return self._squares is not None and not self._examples

    @property
    def averages(self) -> dict[str, Tensor]:
        """{name: θ*}, fp32; they share the memory of the averages."""
        return self._named(self._average)

    @property
    def betas(self) -> dict[str, float]:
        """{name: β of the last step}, the mean over elements where β is per element; 1 where θ* stayed."""
        return self._numbers("beta")

    @property
    def retained_mass(self) -> dict[str, float]:
        """{name: Π β since the start} (Eq. 21): how much of θ*_0 is left in θ*. The mean over elements for a β per
        element, of large tensors over 512 of them."""
        return self._numbers("retained")

    @property
    def fallback_fraction(self) -> float:
        """The share of (tensor, step) pairs whose β was the fallback, or whose gradient was not finite, in [0, 1]."""
        averaged = float(self._memory["averaged"].sum())
        return float(self._memory["fell_back"].sum()) / averaged if averaged else 0.0

    @property
    def missing_gradients(self) -> dict[str, int]:
        """{name: steps in which an optional parameter had no gradient}, of those that had such a step."""
        return {name: int(count) for name, count in self._numbers("missing").items() if count}

    @property
    def importance(self) -> dict[str, Tensor]:
        """{name: forgetting · F_old + F_new}, fp32: what the next task's DynamicEMA takes as `importance`.

        Raises:
            ValueError: the rule does not estimate it.
        """
        optimizer_squares, correction = self._squared_gradients()
        if correction is None:
            raise ValueError(f"rule {self.rule!r} estimates no importance, only 'fisher' does")
        flat = self._layout.of(optimizer_squares) if self._squares is None else self._squares.clone()
        flat *= correction[self._layout.tensor_of_row][:, None]
        if self._importance is not None:
            flat.add_(self._importance, alpha=self.forgetting)
        return self._named(flat)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds θ* inside and θ, bit for bit, after."""
        weights = self._local_weights()
        kept = [part.clone() for part in weights]
        self.copy_to_model()
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)

    def copy_to_model(self) -> None:
        """Write θ* into the model's parameters, in their dtype."""
        torch._foreach_copy_(self._local_weights(), self._layout.views(self._average))

    # ------------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on as if nothing had happened: copies of tensors, and plain numbers.

        Of sharded parameters it holds whole tensors, the same on all processes, so that any number of them can resume.
        """
        state: dict[str, Any] = {"rule": self.rule, "per": self.per, "steps": self.steps}
        for kind, flat in self._buffers().items():
            for name, part in zip(self._parameters, self._layout.views(flat), strict=True):
                state[f"{kind}/{name}"] = sharding.whole(part, self._parameters[name]).detach().clone()
        order = self._alphabetical()
        for kind, vector in self._memory.items():
            state[f"memory/{kind}"] = vector[order]
        if self._followed is not None and not self._reduction.sharded:
            state["memory/followed"] = self._followed.product.clone()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of a DynamicEMA with the same rule over the same parameters.

        Raises:
            ValueError: another rule, or other parameters; the message names the difference.
        """
        for key, mine in (("rule", self.rule), ("per", self.per)):
            if state.get(key) != mine:
                raise ValueError(
                    f"the state is of {key} {state.get(key)!r}, this DynamicEMA has {key} {mine!r}"
                )
        buffers = self._buffers()
        expected = {f"{kind}/{name}" for kind in buffers for name in self._parameters}
        found = {
            key for key, value in state.items() if isinstance(value, Tensor) and not key.startswith("memory/")
        }
        if expected != found:
            raise ValueError(_difference("state", expected=expected, found=found))
        for kind, flat in buffers.items():
            parts = []
            for name, parameter in self._parameters.items():
                full = state[f"{kind}/{name}"]
                if full.shape != parameter.shape:
                    raise ValueError(
                        f"{kind}/{name} is {tuple(full.shape)}, the parameter {tuple(parameter.shape)}"
                    )
                parts.append(sharding.shard_like(full, parameter))
            torch._foreach_copy_(self._layout.views(flat), parts)
        order = self._alphabetical()
        for kind, vector in self._memory.items():
            vector[order] = state[f"memory/{kind}"].to(vector)
        if self._followed is not None:
            self._followed.restore(state.get("memory/followed"), self._memory["retained"])
        self.steps = int(state["steps"])
        self.discard()

    def save(self, path: str | Path, *, write: bool = True) -> None:
        """Write `state_dict()` as one safetensors file; numbers go into its metadata, as JSON.

        With `write=False` a process takes part in gathering sharded averages and leaves the file to another one.
        """
        if not write and not self._reduction.sharded:
            return
        state = self.state_dict()
        if not write:
            return
        tensors = {key: value.contiguous() for key, value in state.items() if isinstance(value, Tensor)}
        numbers = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        save_file(tensors, str(path), metadata={"dynamic_ema": json.dumps(numbers)})

    def load(self, path: str | Path) -> None:
        """`load_state_dict` from a file that `save` wrote."""
        with safe_open(str(path), framework="pt") as file:
            numbers = json.loads((file.metadata() or {}).get("dynamic_ema", "{}"))
            self.load_state_dict({**numbers, **{key: file.get_tensor(key) for key in file.keys()}})  # noqa: SIM118

    # ---------------------------------------------------------------------------------------------------- helpers

    def _buffers(self) -> dict[str, Tensor]:
        """The flat buffers that this rule keeps."""
        buffers = {
            "average": self._average,
            "previous_gradient": self._previous_gradient,
            "previous_weights": self._previous_weights,
            "importance": self._importance,
            "squares": self._squares,
        }
        return {kind: flat for kind, flat in buffers.items() if flat is not None}

    def _named(self, flat: Tensor) -> dict[str, Tensor]:
        views = zip(self._parameters.items(), self._layout.views(flat), strict=True)
        return {name: sharding.like(part, parameter) for (name, parameter), part in views}

    def _numbers(self, kind: str) -> dict[str, float]:
        return dict(zip(self._parameters, self._memory[kind].tolist(), strict=True))

    def _vector(self, values: list[int]) -> Tensor:  # (n,)
        return torch.tensor(values, dtype=wide_dtype(self._layout.device), device=self._layout.device)

    def _alphabetical(self) -> list[int]:
        """Parameters by name: vectors are stored in an order that does not depend on how a model lists them."""
        names = list(self._parameters)
        return sorted(range(len(names)), key=names.__getitem__)

    def _local_weights(self) -> list[Tensor]:
        return self._local(parameter.detach() for parameter in self._parameters.values())

    def _local_gradients(self) -> tuple[list[Tensor], Tensor]:
        """This process's gradients, and (n,) where they are present.

        Where an optional one is missing stands g_{t−1}, so that nothing changes, or zeros, if the rule keeps none.
        """
        gradients = [parameter.grad for parameter in self._parameters.values()]
        missing = [i for i, gradient in enumerate(gradients) if gradient is None]
        present = torch.ones_like(self._elements)
        if not missing:
            return self._local(gradients), present
        names = list(self._parameters)
        for i in missing:
            if names[i] not in self._optional:
                raise RuntimeError(
                    f"{names[i]} has no gradient. Call this after backward() and before zero_grad(); a parameter "
                    "that some steps do not use can be named in optional="
                )
            kept = self._average.new_zeros(()) if self._previous_gradient is None else None
    def _group_layers(self) -> Tensor:  # (n,)
        """Which β a tensor shares: its own, or that of its layer."""
        groups = [layer_of(name) if self.per == "layer" else name for name in self._parameters]
        numbers = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        return torch.tensor([numbers[group] for group in groups], device=self._layout.device)

    def _over_layer(self, per_tensor: Tensor) -> Tensor:  # (n,) -> (n,)
        """The sum over the tensors that share a β, given to each of them."""
        if self.per != "layer":
            return per_tensor
        return torch.zeros_like(per_tensor).index_add_(0, self._layers, per_tensor)[self._layers]

    def _watch_backward_passes(self) -> list[Tensor]:
        """Add up the square of what each backward pass adds to a gradient."""
        if self._reduction.sharded or (
            torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        ):
            raise ValueError(
                "fisher_source='per_example' sees the gradients of its own process only: use 'running' or 'adamw'"
            )
        squares = [torch.zeros_like(part, dtype=torch.float32) for part in self._local_weights()]

        def add_square_to(total: Tensor) -> Any:
            def hook(gradient: Tensor) -> None:
                wide = gradient.detach().float()
                total.addcmul_(wide, wide)

            return hook

        for parameter, total in zip(self._parameters.values(), squares, strict=True):
            parameter.register_hook(add_square_to(total))
        return squares

    # ----------------------------------------------------------------------------------------------------- checks

    def _check_parameters(self) -> None:
        if not self._parameters:
            raise ValueError("no parameter requires a gradient: there is nothing to average")
        for name, parameter in self._parameters.items():
            sharding.refuse_unreadable(name, parameter)
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{name} is {parameter.dtype}, only real floating point weights can be averaged"
                )
        devices = {str(parameter.device) for parameter in self._parameters.values()}
        if len(devices) > 1:
            raise ValueError(
                f"the parameters lie on {', '.join(sorted(devices))}: use one DynamicEMA per device"
            )
        unknown = sorted(self._optional - set(self._parameters))
        if unknown:
            raise ValueError(f"optional names {unknown[0]!r}. {did_you_mean(unknown[0], self._parameters)}")

    def _checked_per(self, per: str | None) -> str:
        if per is None:
            return self._rule.per
        if per not in _PER:
            raise ValueError(f"unknown per {per!r}, it is one of {', '.join(_PER)}")
        if per == "element" and self._rule.per != "element":
            raise ValueError(f"rule {self.rule!r} has no β per element, only per tensor or layer")
        return per

    def _checked_fallback(self, fallback: float, retained: float | None) -> float:
        if not 0 <= fallback <= 1:
            raise ValueError(f"fallback is {fallback}, it must lie in [0, 1]")
        if self.total_steps is not None and self.total_steps < 1:
            raise ValueError(f"total_steps is {self.total_steps}, it must be at least 1")
        if retained is None:
            return fallback
        if self.total_steps is None:
            raise ValueError(
                "retained= is the share of the start point left after total_steps: give total_steps too"
            )
        return constant_retaining(retained, self.total_steps)

    def _check_fisher(self, source: str, optimizer: Any, strength: float) -> None:
        if self.total_steps is None:
            raise ValueError(
                f"rule {self.rule!r} needs total_steps: it reaches its retained share over the task"
            )
        if source not in fisher.SOURCES:
            raise ValueError(f"unknown fisher_source {source!r}. {did_you_mean(source, fisher.SOURCES)}")
        if source == "adamw" and optimizer is None:
            raise ValueError("fisher_source='adamw' reads the optimizer's second moment: give optimizer=")
        if not strength > 0:
            raise ValueError(f"strength is {strength}, it must be positive")

    def _checked_importance(self, importance: Mapping[str, Tensor]) -> list[Tensor]:
        if set(importance) != set(self._parameters):
            raise ValueError(_difference("importance", expected=set(self._parameters), found=set(importance)))
        parts = []
        for name, parameter in self._parameters.items():
            value = importance[name]
            if value.shape != parameter.shape:
                raise ValueError(
                    f"importance of {name} is {tuple(value.shape)}, the parameter {tuple(parameter.shape)}"
                )
            part = sharding.shard_like(value.detach(), parameter)
            if not (part >= 0).all() or part.isinf().any():
                raise ValueError(f"importance of {name} has an element that is negative or not finite")
            parts.append(part)
        return parts


def layer_of(name: str) -> str:
    """The module whose layer a parameter belongs to: the two factors of a LoRA pair belong to the layer they change.

    `h.0.mlp.weight` and `h.0.mlp.bias` → `h.0.mlp`; `h.0.mlp.lora_A.default.weight` → `h.0.mlp`.
    """
    module, _, _ = name.rpartition(".")
    return module.partition(".lora_")[0]


def _difference(what: str, *, expected: set[str], found: set[str]) -> str:
    missing, extra = sorted(expected - found), sorted(found - expected)
    parts = [f"lacks {missing[0]} (and {len(missing) - 1} more)"] if missing else []
    parts += [f"has {extra[0]} (and {len(extra) - 1} more) that is not expected"] if extra else []
    return f"the {what} {' and '.join(parts)}"
