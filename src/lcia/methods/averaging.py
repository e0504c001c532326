"""Averaged weights: θ*_t = β θ*_{t−1} + (1 − β) θ_t, from an adapter's second task on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lcia.adapters.naming import in_adapter
from lcia.ema import DynamicEMA
from lcia.ema.sharding import whole
from lcia.errors import UserError
from lcia.methods.base import Method, Training
from lcia.stream import Task

_RETAINED = 0.3  # chosen on dev rows: results/demo/README.md
_FILE = "ema.safetensors"  # in a checkpoint inside a task: θ* and what the rule needs


class Averaging(Method):
    """θ* starts at the weights before the task (LCIA, Eq. 1, Alg. 1); the average becomes the adapter.

    The first task of an adapter has nothing to keep: it is trained plainly.

    Args:
        rule: how β is found each step; see lcia.ema.
        retained: the constant β (or the fallback of an adaptive rule) is chosen such that the start point keeps
            this weight in the average at the end of the task, Π β = retained, whatever the number of steps. 0.3,
            unless `fallback` is given; `fisher` has none.
        fallback: the constant itself, instead of `retained`.
        rest: share of the task for which θ* rests at its start before it moves; see lcia.ema.DynamicEMA.
        strength: λ of `fisher`: how much F_old weighs against F_new; None: 1.
        forgetting: γ of `fisher`: F_old ← γ F_old + F_new behind each task; None: λ.
        fisher_source: where `fisher` reads F_new; None: its own running mean. "adamw": the optimizer's, which takes no
            memory and is of clipped gradients (lcia.ema.fisher).

    Raises:
        ValueError: an option that the rule does not have, or a value that it cannot have.
    """

    idle_on_first_task = True
    changes_at_close = True

    def __init__(
        self,
        *,
        rule: str = "fixed",
        retained: Any = ...,
        fallback: float | None = None,
        rest: float = 0.0,
        strength: float | None = None,
        forgetting: float | None = None,
        fisher_source: str | None = None,
    ) -> None:
        if fisher_source not in (None, "running", "adamw"):
            raise ValueError(f"fisher_source must be running or adamw, got {fisher_source!r}")
        self.options: dict[str, Any] = {"rule": rule, "rest": rest}
        if rule == "fisher":
            if retained not in (..., None) or fallback is not None:
                raise ValueError("retained and fallback: the rule fisher has no constant; its λ is `strength`")
        elif fallback is not None:
            if retained not in (..., None):
                raise ValueError("retained and fallback are two ways to say the constant β: give one of them")
            self.options["fallback"] = fallback
        elif retained is None:
            raise ValueError("retained is null: then say the constant itself, as in `fallback: 0.99`")
        else:
            self.options["retained"] = _RETAINED if retained is ... else retained
        of_fisher = {"strength": strength, "forgetting": forgetting, "fisher_source": fisher_source}
        given = {name: value for name, value in of_fisher.items() if value is not None}
        if given and rule != "fisher":
            raise ValueError(f"{' and '.join(given)}: only the rule fisher has it; this rule is {rule}")
        self.options |= given
        # DynamicEMA knows which values it takes; a wrong one must be refused now, not when the first task begins.
        check = torch.nn.Parameter(torch.zeros(1))
        DynamicEMA({"check": check}, total_steps=1, optimizer=torch.optim.AdamW([check]), **self.options)
        self._importance: dict[str, dict[str, torch.Tensor]] = {}  # adapter → {parameter: F_old}
        self._average: DynamicEMA | None = None
        self._report: dict[str, Any] = {}

    def counts_on_length(self) -> list[str]:
        """The options that spread what they do over all steps of a task."""
        by_rule = ["fisher"] if self.options["rule"] == "fisher" else []
        return [*by_rule, *(name for name in ("retained", "rest") if self.options.get(name))]

    @classmethod
    def works_sharded(cls) -> bool:
        return True  # lcia.ema does: averages stay sharded, sums travel

    def begin(self, training: Training) -> None:
        self._adapter = training.placement.adapter
        self._report = {}
        # `fisher` watches an adapter's first task too: that is where its importance comes from.
        if training.placement.is_new and self.options["rule"] != "fisher":
            self._average = None
            return
        self._average = DynamicEMA(
            training.parameters,
            total_steps=training.total_steps,
            importance=self._importance.get(self._adapter),
            examples_per_gradient=training.examples_per_gradient,
            optimizer=self._checked(training.optimizer),
            **self.options,
        )

    def _checked(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's has one inside
        is_adam = isinstance(inner, (torch.optim.Adam, torch.optim.AdamW))
        if self.options.get("fisher_source") == "adamw" and not is_adam:
            raise UserError(
                "key 'method': fisher_source adamw reads the second moment of an Adam or AdamW, and the optimizer of "
                "key 'optim' keeps none; fisher_source running works with all"
            )
        return optimizer

    def see_grads(self) -> None:
        if self._average is not None:
            self._average.observe()

    def after_step(self) -> None:
        if self._average is not None:
            self._average.step()

    def skipped_step(self) -> None:
        if self._average is not None:
            self._average.discard()

    def close_task(self, task: Task) -> None:
        if self._average is None:
            return
        self._average.copy_to_model()
        masses = list(self._average.retained_mass.values())
        self._report = {
            "fallback_fraction": self._average.fallback_fraction,
            "retained_mass": sum(masses) / len(masses),
        }
        if self.options["rule"] == "fisher":
            self._importance[self._adapter] = {name: whole(part) for name, part in self._average.importance.items()}
        self._average = None

    def log(self) -> dict[str, float]:
        if self._average is None or not self._average.betas:
            return {}
        betas = torch.tensor(list(self._average.betas.values()), dtype=torch.float64)
        masses = list(self._average.retained_mass.values())
        quantiles = betas.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        return {
            "beta_p10": quantiles[0],
            "beta_p50": quantiles[1],
            "beta_p90": quantiles[2],
            "fallback_fraction": self._average.fallback_fraction,
            "retained_mass": sum(masses) / len(masses),
        }

    def report(self) -> dict[str, Any]:
        return self._report

    def state_dict(self) -> dict[str, Any]:
        return {
            f"importance/{adapter}/{name}": tensor
            for adapter, tensors in self._importance.items()
            for name, tensor in tensors.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._importance = {}
        for key, tensor in state.items():
            _, adapter, name = key.split("/", 2)
            self._importance.setdefault(adapter, {})[name] = tensor

    def adapters_changed(self, origin: Mapping[str, str]) -> None:
        known = self._importance
        self._importance = {
            name: {in_adapter(parameter, source, name): tensor for parameter, tensor in known[source].items()}
            for name, source in origin.items()
            if source in known
        }

    def cost(self) -> dict[str, float]:
        numbers = sum(tensor.numel() for tensors in self._importance.values() for tensor in tensors.values())
        return {"numbers_stored": numbers}

    def save_progress(self, folder: Path) -> None:
        if self._average is not None:
            self._average.save(folder / _FILE)

    def load_progress(self, folder: Path) -> None:
        if self._average is not None:
            self._average.load(folder / _FILE)


class StableEMA(Averaging):
    """A constant β on every task, one adapter, no grouping (LCIA, Table 6: β = 0.99)."""

    name = "stable_ema"

    def __init__(self, *, beta: float | None = None, retained: float | None = None) -> None:
        if beta is not None and retained is not None:
            raise ValueError("retained and beta are two ways to say the constant β: give one of them")
        if retained is None:
            super().__init__(fallback=0.99 if beta is None else beta)
        else:
            super().__init__(retained=retained)


class LLaCA(Averaging):
    """Dynamic EMA on every task, one adapter, no grouping (LLaCA, arXiv 2410.10868 v1)."""

    name = "llaca"
