"""The dynamic exponential moving average: it remembers, the rule computes."""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lcia.ema import fisher
from lcia.ema.compiled import passes_for
from lcia.ema.followed import Followed
from lcia.ema.layout import Layout, wide_dtype
from lcia.ema.parameters import Parameters
from lcia.ema.passes import Buffers, Seen, Shown
from lcia.ema.rules import READS, constant_retaining, find_rule
from lcia.ema.sharding import forget_gathered
from lcia.errors import did_you_mean

_PER = ("element", "tensor", "layer")  # fine to coarse
_GRADIENT_NORMS = {"gradient", "gradient_plus_one"}
_GRADIENT = {*_GRADIENT_NORMS, "gradient_change"}
_HISTORY = {"gradient_change", "step", "previous_offset"}  # what the first step does not have


class DynamicEMA:
    """θ*_t = β_t θ*_{t−1} + (1 − β_t) θ_t, β_t from a rule (arXiv 2410.10868, Eq. 1; lcia.ema.rules).

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

    Averages are fp32 whatever the model's dtype: in bf16 a move of 0.001 is mostly rounded away. Sharded
    parameters (FSDP2) have sharded averages, and then every method must be called on all processes.

    Args:
        named_parameters: (name, parameter) pairs or a mapping; those without requires_grad are left out.
        rule: a name in lcia.ema.RULES.
        fallback: β of `fixed`, and of any other rule where its own β is outside (0, 1) or not finite.
        total_steps: optimizer steps of the task. `fisher` and `retained` need it.
        importance: {name: F_old}, the `importance` of the previous task's DynamicEMA. None: the first task;
            nothing is protected, θ* follows θ.
        examples_per_gradient: how many examples a gradient is the mean of (batch × accumulation × processes).
        retained: instead of `fallback`: the share of the start point that is left after total_steps.
        rest: share of total_steps, in [0, 1), for which θ* rests at its start before it begins to move. `retained`
            and `fisher` reach the same Π β in the steps that are left, so that the average holds less of the weights
            from early in the task, when they had learned little.
        per: one β per "element", "tensor" or "layer" (the tensors of one module). None: as the rule has it.
        grad_dtype: dtype in which g_{t−1} is kept; torch.bfloat16 halves it. None: fp32.
        strength: λ, how much F_old weighs against F_new.
        forgetting: F_old's factor in the importance handed on. None: strength, as in online EWC.
        fisher_source: where F_new is read: "running", "adamw" (give `optimizer`) or "per_example"; see
            lcia.ema.fisher. With "adamw" `observe` has nothing to do, gradients count as the optimizer sees them,
            and it must be a new optimizer: one of an earlier task has that task's gradients in its mean.
        fisher_decay: decay of the running mean of squared gradients.
        optimizer: the Adam or AdamW whose second moment is read.
        optional: names whose gradient may be missing (an expert without a token): θ* stays, counted.

    Raises:
        ValueError: an unknown rule or option, something missing that the rule needs, or importance that
            does not fit.
        RuntimeError: parameters that something shards in a way that cannot be read.
    """

    @torch.no_grad()
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
        rest: float = 0.0,
        per: str | None = None,
        grad_dtype: torch.dtype | None = None,
        strength: float = 1.0,
        forgetting: float | None = None,
        fisher_source: str = "running",
        fisher_decay: float = 0.999,
        optimizer: Any = None,
        optional: Collection[str] = (),
    ):
        self.rule = rule
        self._rule = find_rule(rule)
        reads = self._rule.reads
        self.per = self._checked_per(per)
        self.total_steps = total_steps
        self.rest_steps = self._checked_rest(rest)
        self.fallback = self._checked_fallback(fallback, retained)
        self.examples_per_gradient = examples_per_gradient
        if "curvature" in reads:
            self._check_fisher(fisher_source, optimizer, strength, forgetting)
        self._refuse_unread(strength, forgetting, fisher_source, retained)
        self.strength = strength
        self.forgetting = strength if forgetting is None else forgetting
        self.fisher_source = fisher_source
        self.fisher_decay = fisher_decay
        self._optimizer = optimizer

        self._parameters = Parameters(named_parameters, optional)
        weights = self._parameters.weights()
        self._layout = Layout([part.shape for part in weights], weights[0].device)
        zeros = self._vector([0] * len(weights))
        self._layers = self._parameters.layers().to(zeros.device)  # (n,)
        self._elements = self._sum(self._vector(self._layout.sizes)[None])[0]  # (n,) on all processes

        buffers = Buffers(self._layout.of(weights))
        if "step" in reads:
            buffers.previous_weights = buffers.average.clone()
        if "gradient_change" in reads:
            buffers.previous_gradient = self._layout.new(grad_dtype or torch.float32)
        if "importance" in reads and importance is not None:
            buffers.importance = self._layout.of(self._checked_importance(importance))
        if "curvature" in reads and fisher_source != "adamw":
            buffers.squares = self._layout.new()
        self._buffers = buffers
        self._examples: list[Tensor] = []
        if buffers.squares is not None and fisher_source == "per_example":
            if self._parameters.reduction.processes > 1:
                raise ValueError(
                    "fisher_source='per_example' sees the gradients of its own process only, and there are "
                    f"{self._parameters.reduction.processes}: use 'running' or 'adamw'"
                )
            self._examples, hooks = fisher.watch_backward_passes(self._parameters.by_name.values())
            # the hooks must not outlive this object: the next task's has its own
            self._unwatch = weakref.finalize(self, fisher.remove_hooks, hooks)

        self._followed = None
        if self.per == "element":
            self._followed = Followed(self._layout, *self._parameters.sizes_and_positions())
        self._passes = passes_for(self._layout, self._rule, buffers, self._followed, weights)
        self._memory = {  # all (n,)
            "seen": zeros.clone(),  # 1 where there is a g_{t−1}
            "offset": zeros.clone(),  # ‖θ_t − θ*_t‖ after the last step
            "observed": zeros.clone(),  # how many gradients the running mean of squares has seen
            "beta": zeros + 1,  # of the last step
            "retained": zeros + 1,  # Π β
            "moved": zeros.clone(),  # steps in which it moved
            "fell_back": zeros.clone(),  # of these, with the fallback: a fraction where β is per element
            "missing": zeros.clone(),  # steps without a gradient
        }
        self.steps = self.skipped_steps = 0
        self._observed_sums: Tensor | None = None  # (n,) of the gradients that observe() has seen in this step
        self._warned = False

    # ------------------------------------------------------------------------------------------ one step

    @torch.no_grad()
    def observe(self, scale: float | Tensor = 1.0) -> None:
        """Let `fisher` see this step's gradients as they are now, times `scale`; other rules ignore it.

        Call it after backward, before anything clips or reshapes the gradients. Where the clip coefficient c
        is known, calling it after clipping with scale=1/c does the same. Without a call, `step` reads the
        gradients it finds. Gradients of which one is not finite are not counted in F_new.
        """
        if self._buffers.squares is None:
            return
        gradients, present = self._gradients()
        tensors = self._examples or gradients
        sums = self._sums(Shown((), gradients), [], {"gradients": tensors})
        self._observed_sums = sums["gradients"]
        self._passes.observe(self._seen(tensors, present, self._observed_sums, scale))

    def _seen(self, tensors: Sequence[Tensor], present: Tensor, sums: Tensor, scale: float | Tensor = 1.0) -> Seen:
        """What the running mean of squares sees of these gradients, which count as observed from here on.

        All or nothing: where one number is not finite, a gradient scaler will skip the step, and a bad number must not
        stay in the mean for the rest of the task.
        """
        counted = present * sums.isfinite().all()
        self._memory["observed"] += counted
        return Seen(tensors, (1 - self.fisher_decay) * counted, scale, squared=bool(self._examples))

    @property
    def observed(self) -> bool:
        """Whether `observe` has seen this step's gradients."""
        return self._observed_sums is not None

    def discard(self) -> None:
        """Instead of `step`, where no step is made: a gradient scaler found the gradients infinite."""
        self.skipped_steps += 1
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        self._observed_sums = None
        if self._examples:
            torch._foreach_zero_(self._examples)

    def close(self) -> None:
        """Stop watching backward passes ("per_example"). What has been gathered stays readable."""
        if self._examples:
            self._unwatch()

    @torch.no_grad()
    def step(self) -> None:
        """Move the average: after optimizer.step(), before zero_grad().

        Raises:
            RuntimeError: a gradient is missing and was not declared optional, or a weight is not finite. The
                message names the parameter. The averages are as they were; what a rule remembers of gradients is not.
        """
        weights = self._parameters.weights()
        gradients, present = self._gradients()
        if self._followed is None and not self.observed:
            self.observe()  # the norm of F_new is wanted before anything moves
        to_see = self._buffers.squares is not None and not self.observed
        unseen = (self._examples or gradients) if to_see else None
        moment = self._second_moment()
        shown = Shown(weights, gradients, moment[0])
        norms = self._norms(shown, present, unseen, self._weighted(self._correction(moment)))
        bad_gradient = self._refuse_nonfinite(norms)
        seen = None if unseen is None else self._seen(unseen, present, norms["gradients"])
        resting = self.steps + self.skipped_steps < self.rest_steps
        moves = torch.zeros_like(present) if resting else present  # (n,) 1 where θ* moves
        if self._followed is None:
            beta, fell_back, retained = self._move_tensors(shown, present, moves, norms)
        else:
            beta, fell_back, retained = self._move_elements(
                shown, seen, moves, self._weighted(self._correction(moment)), self._followed
            )

        memory = self._memory
        memory["beta"] = beta
        memory["retained"] = retained
        memory["moved"] += moves
        memory["missing"] += 1 - present
        memory["fell_back"] += torch.maximum(fell_back, bad_gradient) * moves
        memory["seen"] = torch.maximum(memory["seen"], present)
        if "previous_offset" in self._rule.reads:
            memory["offset"] = torch.where(present > 0, beta * norms["offset"], memory["offset"])
        self._forget_gradients()
        self.steps += 1

    def _norms(
        self, shown: Shown, present: Tensor, unseen: Sequence[Tensor] | None, correction: Tensor | None
    ) -> dict[str, Tensor]:  # {read: (n,)}
        """All that is added up over whole tensors: one pass over the elements, one message of processes.

        Beside the norms that the rule reads these are "weights" and "gradients": finite where all terms are.
        """
        names = [name for name in self._rule.reads if name in READS] if self._followed is None else []
        checks = {} if "offset" in names else {"weights": shown.weights}  # the offset's norm is a check already
        if unseen is not None:
            checks["gradients"] = unseen
        elif _GRADIENT & set(self._rule.reads) and not _GRADIENT_NORMS & set(names):
            checks["gradients"] = shown.gradients
        norms = self._sums(shown, names, checks, correction)
        norms.setdefault("weights", norms.get("offset", present))
        for name in _GRADIENT_NORMS & set(names):
            norms["gradients"] = norms[name]
        if self._observed_sums is not None:
            norms["gradients"] = self._observed_sums
        norms.setdefault("gradients", present)  # not read by the rule: nothing to refuse
        return norms

    def _sums(
        self,
        shown: Shown,
        norms: list[str],
        checks: dict[str, Sequence[Tensor]],
        correction: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """`Passes.sums` over all processes."""
        sums = self._passes.sums(shown, norms, checks, correction)
        return dict(zip(sums, self._sum(torch.stack(list(sums.values()))), strict=True)) if sums else {}

    def _move_tensors(
        self, shown: Shown, present: Tensor, moves: Tensor, norms: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One β per tensor or layer. Returns β, whether it fell back, and Π β, each (n,)."""
        reads = {name: self._over_layer(norms[name] * present) for name in norms if name in READS}
        reads["previous_offset"] = self._over_layer(self._memory["offset"] * present)
        offered = {**reads, **self._numbers_read()}
        move = self._rule.move(**{name: offered[name] for name in self._rule.reads}).to(present).expand_as(present)
        fell_back = torch.zeros_like(present)
        if self._rule.falls_back:
            usable = (move > 0) & (move < 1)  # False where it is not a number
            if _HISTORY & set(self._rule.reads):
                usable &= self._memory["seen"] > 0
            move = torch.where(usable, move, 1 - self.fallback)
            fell_back = (~usable).to(move)
        move = move * moves
        self._passes.move_tensors(shown, move)
        return 1 - move, fell_back, self._memory["retained"] * (1 - move)

    def _move_elements(
        self, shown: Shown, seen: Seen | None, moves: Tensor, correction: Tensor | None, followed: Followed
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One β per element. Returns the means of β, of whether it fell back, and of Π β, each (n,)."""
        known = self._memory["seen"] > 0
        sums = self._passes.move_elements(shown, seen, moves, known, correction, self._numbers_read())
        total = self._sum(torch.stack([*sums, followed.mean_parts()]))
        return 1 - total[0] / self._elements, total[1] / self._elements, total[2]

    def _numbers_read(self) -> dict[str, float]:
        """What a rule may read that is one number."""
        return {"fallback": self.fallback, "exponent": 1 / self._moving_steps}

    def _refuse_nonfinite(self, norms: dict[str, Tensor]) -> Tensor:  # (n,)
        """Raise for a weight that is not finite; warn, once, of such a gradient. Returns 1 where one is.

        The only place where a step waits for a GPU.
        """
        bad = ~torch.stack([norms["weights"], norms["gradients"]]).isfinite()  # (2, n)
        if bad.any():
            names = self._parameters.names
            weights, gradients = ([names[i] for i in row.nonzero().flatten().tolist()] for row in bad)
            if weights:
                self._forget_gradients()
                raise RuntimeError(f"{weights[0]} is not finite after {self.steps} steps: θ* was not moved")
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"the gradient of {gradients[0]} is not finite: a fallback; counted, not reported again",
                    stacklevel=3,
                )
        return bad[1].to(norms["weights"])

    def _gradients(self) -> tuple[list[Tensor], Tensor]:
        """g_t, and (n,) where it is present."""
        flat = self._buffers.previous_gradient
        kept = None if flat is None or not self._parameters.optional else self._layout.views(flat)
        gradients, missing = self._parameters.gradients(kept)
        present = torch.ones_like(self._elements)
        if missing:
            present[missing] = 0
        return gradients, present

    def _second_moment(self) -> tuple[list[Tensor], Tensor | None]:
        """Where the rule reads them: the optimizer's running means of g², and (n,) what makes them unbiased."""
        if "curvature" not in self._rule.reads or self._buffers.squares is not None:
            return [], None
        return fisher.adamw_second_moment(self._optimizer, self._parameters.by_name, self._parameters.optional)

    def _weighted(self, correction: Tensor | None) -> Tensor | None:
        """What makes F_new / λ, of what makes F_new."""
        return None if correction is None else correction / self.strength

    def _correction(self, moment: tuple[list[Tensor], Tensor | None]) -> Tensor | None:
        """(n,) what makes an F_new of a running mean of g², that of `_second_moment` or our own; None: none is read."""
        if "curvature" not in self._rule.reads:
            return None
        correction = moment[1]
        if correction is None:
            correction = fisher.bias_correction(self.fisher_decay, self._memory["observed"])
        return self.examples_per_gradient * correction

    # ------------------------------------------------------------------------------------------- reading

    @property
    def wants_unclipped(self) -> bool:
        """Whether `observe` must see the gradients before they are clipped: the rule squares them itself."""
        return self._buffers.squares is not None and not self._examples

    @property
    def averages(self) -> dict[str, Tensor]:
        """{name: θ*}, fp32; they share the memory of the averages."""
        return self._parameters.named(self._layout.views(self._buffers.average))

    @property
    def betas(self) -> dict[str, float]:
        """{name: β of the last step}, the mean over elements where β is per element; 1 where θ* stayed."""
        return self._numbers("beta")

    @property
    def retained_mass(self) -> dict[str, float]:
        """{name: Π β since the start}, the weight that θ*_0 still has in θ* (Eq. 21).

        The mean over elements where β is per element; of tensors with more than 256, the mean over 256.
        """
        return self._numbers("retained")

    @property
    def fallback_fraction(self) -> float:
        """Share of (tensor, step) pairs in which β was the fallback or the gradient not finite, in [0, 1]."""
        moved = float(self._memory["moved"].sum())
        return float(self._memory["fell_back"].sum()) / moved if moved else 0.0

    @property
    def has_moved(self) -> bool:
        """Whether any average has left its start."""
        return bool(self._memory["moved"].any())

    @property
    def missing_gradients(self) -> dict[str, int]:
        """{name: steps without a gradient}, of the optional parameters that had such steps."""
        return {name: int(count) for name, count in self._numbers("missing").items() if count}

    @property
    @torch.no_grad()
    def importance(self) -> dict[str, Tensor]:
        """{name: forgetting · F_old + F_new}, fp32: `importance` for the next task's DynamicEMA.

        Raises:
            ValueError: the rule does not estimate it.
        """
        moment, kept = self._second_moment(), self._buffers
        correction = self._correction(moment)
        if correction is None:
            raise ValueError(f"rule {self.rule!r} estimates no importance, only 'fisher' does")
        flat = self._layout.of(moment[0]) if kept.squares is None else kept.squares.clone()
        flat *= self._layout.spread(correction.to(flat))
        if kept.importance is not None:
            flat.add_(kept.importance, alpha=self.forgetting)
        # each with memory of its own: safetensors refuses views of one buffer
        return self._parameters.named([view.clone() for view in self._layout.views(flat)])

    @contextmanager
    def applied(self, model: nn.Module | None = None) -> Iterator[None]:
        """The model holds θ* inside and θ, bit for bit, after. `model`: as of `copy_to_model`."""
        weights = self._parameters.weights()
        kept = [part.detach().clone() for part in weights]
        self.copy_to_model(model)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, kept)
            forget_gathered(model)

    @torch.no_grad()
    def copy_to_model(self, model: nn.Module | None = None) -> None:
        """Write θ* into the model's parameters, in their dtype.

        Args:
            model: the whole model, where FSDP2 shards it: else it may go on with weights that it has gathered before.
        """
        torch._foreach_copy_(self._parameters.weights(), self._layout.views(self._buffers.average))
        forget_gathered(model)

    # --------------------------------------------------------------------------------------------- state

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on as if nothing had happened: copies, and plain numbers.

        Of sharded parameters it holds whole tensors, the same on every process: any number can resume.
        """
        state: dict[str, Any] = {"rule": self.rule, "per": self.per, **self._settings()}
        state |= {"steps": self.steps, "skipped_steps": self.skipped_steps}
        for kind, flat in self._buffers.kept().items():
            for name, value in self._parameters.named_whole(self._layout.views(flat)).items():
                state[f"{kind}/{name}"] = value.clone()
        order = self._parameters.alphabetical()
        for kind, vector in self._memory.items():
            state[f"memory/{kind}"] = vector[order]
        if self._followed is not None:
            state["memory/followed"] = self._sum(self._followed.product())[:, order]
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state_dict()` of a DynamicEMA with this rule over these parameters.

        `importance` need not be given again: the state holds it.

        Raises:
            ValueError: another rule, other settings of it, or other parameters; the message names the difference.
        """
        for key, mine in {"rule": self.rule, "per": self.per, **self._settings()}.items():
            if state.get(key, mine) != mine:
                advice = ": batch × accumulation × processes" if key == "examples_per_gradient" else ""
                raise ValueError(f"the state has {key} {state[key]!r}, this DynamicEMA has {mine!r}{advice}")
        if self._buffers.importance is None and any(key.startswith("importance/") for key in state):
            self._buffers.importance = self._layout.new()
        parts = {}
        for kind in self._buffers.kept():
            prefix = f"{kind}/"
            values = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
            parts[kind] = self._parameters.parts_of(kind, values)
        for kind, flat in self._buffers.kept().items():
            torch._foreach_copy_(self._layout.views(flat), parts[kind])
        order = self._parameters.alphabetical()
        for kind, vector in self._memory.items():
            vector[order] = state[f"memory/{kind}"].to(vector)
        if self._followed is not None:
            known = state["memory/followed"].to(self._buffers.average)  # (F, n)
            followed = torch.empty_like(known)
            followed[:, order] = known
            self._followed.restore(followed)
        self.steps, self.skipped_steps = int(state["steps"]), int(state.get("skipped_steps", 0))
        self._forget_gradients()

    def save(self, path: str | Path, *, write: bool = True) -> None:
        """Write `state_dict()` as one safetensors file; the numbers go into its metadata, as JSON.

        With write=False a process takes part in gathering sharded averages and leaves the file to another.
        """
        if not write and not self._parameters.reduction.sharded:
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
            state = json.loads((file.metadata() or {}).get("dynamic_ema", "{}"))
            for key in file.keys():  # noqa: SIM118 - it is not a mapping
                state[key] = file.get_tensor(key)
        self.load_state_dict(state)

    def _settings(self) -> dict[str, Any]:
        """What makes this rule another one in the middle of a task."""
        settings: dict[str, Any] = {"fallback": self.fallback, "rest_steps": self.rest_steps}
        if self._buffers.previous_gradient is not None:
            settings["grad_dtype"] = str(self._buffers.previous_gradient.dtype)
        if "curvature" in self._rule.reads:
            names = ("total_steps", "strength", "forgetting", "fisher_source", "fisher_decay", "examples_per_gradient")
            settings |= {name: getattr(self, name) for name in names}
        return settings

    # ------------------------------------------------------------------------------------------- helpers

    def _vector(self, values: list[int]) -> Tensor:  # (n,)
        return torch.tensor(values, dtype=wide_dtype(self._layout.device), device=self._layout.device)

    def _numbers(self, kind: str) -> dict[str, float]:
        return dict(zip(self._parameters.names, self._memory[kind].tolist(), strict=True))

    def _sum(self, per_tensor: Tensor) -> Tensor:  # (k, n) -> (k, n)
        """The sum over all processes."""
        return self._parameters.reduction.sum(per_tensor)

    def _over_layer(self, per_tensor: Tensor) -> Tensor:  # (n,) -> (n,)
        """The sum over the tensors that share a β, given to each of them."""
        if self.per != "layer":
            return per_tensor
        return torch.zeros_like(per_tensor).index_add_(0, self._layers, per_tensor)[self._layers]

    def _checked_per(self, per: str | None) -> str:
        if per is None:
            return self._rule.per
        if per not in _PER:
            raise ValueError(f"unknown per {per!r}. {did_you_mean(per, _PER)}")
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
            raise ValueError("retained is the share of the start point left after total_steps: give those too")
        return constant_retaining(retained, self._moving_steps)

    def _checked_rest(self, rest: float) -> int:
        if not 0 <= rest < 1:
            raise ValueError(f"rest is {rest}, it must lie in [0, 1)")
        if rest and self.total_steps is None:
            raise ValueError("rest is a share of total_steps: give those too")
        # the last step always moves
        return min(int(rest * self.total_steps), self.total_steps - 1) if rest and self.total_steps else 0

    @property
    def _moving_steps(self) -> int:
        return (self.total_steps or 1) - self.rest_steps

    def _refuse_unread(self, strength: float, forgetting: float | None, source: str, retained: float | None) -> None:
        given = {"retained": retained is not None}
        if "curvature" not in self._rule.reads:
            given = {
                "strength": strength != 1,
                "forgetting": forgetting is not None,
                "fisher_source": source != "running",
            }
        unread = next((option for option, is_given in given.items() if is_given), None)
        if unread is not None:
            raise ValueError(f"rule {self.rule!r} does not read {unread}: leave it out, or take another rule")

    def _check_fisher(self, source: str, optimizer: Any, strength: float, forgetting: float | None) -> None:
        if self.total_steps is None:
            raise ValueError(f"rule {self.rule!r} needs total_steps: it spreads its work over the task")
        if source not in fisher.SOURCES:
            raise ValueError(f"unknown fisher_source {source!r}. {did_you_mean(source, fisher.SOURCES)}")
        if source == "adamw" and optimizer is None:
            raise ValueError("fisher_source='adamw' reads the optimizer's second moment: give optimizer=")
        if not strength > 0:
            raise ValueError(f"strength is {strength}, it must be positive")
        if forgetting is not None and not 0 <= forgetting < float("inf"):
            raise ValueError(f"forgetting is {forgetting}, it must be a number from 0")
        if not self.examples_per_gradient > 0:
            raise ValueError(f"examples_per_gradient is {self.examples_per_gradient}, it must be positive")

    def _checked_importance(self, importance: Mapping[str, Tensor]) -> list[Tensor]:
        parts = self._parameters.parts_of("importance", importance)
        for name, part in zip(self._parameters.names, parts, strict=True):
            if not (part >= 0).all() or part.isinf().any():
                raise ValueError(f"importance of {name} has an element that is negative or not finite")
        return parts
