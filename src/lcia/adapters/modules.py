"""The pool of adapters that are modules of our own: each changes what some modules of a frozen model give.

An adapter is one small module per chosen module of the model. It is called by a forward hook as
`adapter(output, *inputs)`, with what the chosen module gave and its positional inputs, and returns the new output. The
chosen modules stay what and where they are; the small ones hang below them:

    model.layers.0.self_attn.q_proj.weight                       the base's
    model.layers.0.self_attn.q_proj.adapters.group_NAME.router   the adapter's
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from lcia.adapters.base import Pool
from lcia.adapters.naming import CHILD, key_of
from lcia.adapters.pool import stack_members
from lcia.adapters.projector import PROJECTOR_FILE, Projectors
from lcia.backbone.loading import weights_sha256
from lcia.errors import UserError
from lcia.files import write_json
from lcia.seeds import stable_seed

WEIGHTS_FILE = "weights.safetensors"
SETTINGS_FILE = "method.json"


class ModulePool(Pool):
    """Named adapters made of modules.

    Args:
        base: the frozen model.
        targets: {path in `base`: module whose output is changed}, in the model's order.
        make: a new small module for one target, in fp32; at first it must return the output it is given.
        kind: what one adapter is, for the model card.
        settings: JSON values; together with the weights they say what an adapter computes. Adapters saved with other
            ones are refused.
        base_name: how the user calls the model.
        seed: of the random start of a new adapter.
        projector: path of a module in `base` that every adapter has a copy of its own of.

    Without targets, an adapter is its copy of the projector and nothing else.
    """

    library = "lcia"

    def __init__(
        self,
        base: PreTrainedModel,
        targets: Mapping[str, torch.nn.Module],
        make: Callable[[torch.nn.Module], torch.nn.Module],
        kind: str,
        settings: Mapping[str, Any],
        base_name: str,
        seed: int = 0,
        projector: str | None = None,
    ) -> None:
        self.projector = projector
        self._projectors = None if projector is None else Projectors(base, projector)
        self._base = base
        self._targets = dict(targets)
        self._make = make
        self.kind = kind
        self._settings = dict(settings)
        self._base_name = base_name
        self._seed = seed
        self._names: list[str] = []
        self._active: str | None = None
        self._attached = False

    @property
    def model(self) -> PreTrainedModel:
        return self._base

    @property
    def names(self) -> list[str]:
        return list(self._names)

    def add(self, name: str, start: str | None = None) -> None:
        if name in self._names:
            raise ValueError(f"adapter {name!r} exists already")
        if stack_members(name) != [name]:
            raise UserError(f"adapter {name!r}: '+' joins the names of adapters; choose a name without it")
        if not self._attached:
            self._attach()
        # The start must not depend on what was drawn before, or a longer stream would differ from a shorter one.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stable_seed(self._seed, name))
            for target in self._targets.values():
                device = next(target.parameters()).device
                made = self._make(target).to(device).requires_grad_(False)
                target.get_submodule(CHILD).add_module(key_of(name), made)
        if self._projectors is not None:
            self._projectors.add(name)
        self._names.append(name)
        if start is not None:
            self._copy_in(name, self._state(start))

    def _attach(self) -> None:
        """Hooks that do nothing until an adapter is active."""

        def change(target: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if self._active is None:
                return None  # the output stays as it is
            if isinstance(output, tuple):  # attention gives its weights as well
                return (self._changed(target, inputs, output[0]), *output[1:])
            return self._changed(target, inputs, output)

        for target in self._targets.values():
            target.add_module(CHILD, torch.nn.ModuleDict())
            target.register_forward_hook(change)
        self._attached = True

    def _changed(self, target: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """What the active adapter makes of the output of `target`."""
        assert self._active is not None
        return small_module(target, self._active)(output, *inputs)

    def remove(self, name: str) -> None:
        self._require(name)
        for target in self._targets.values():
            delattr(target.get_submodule(CHILD), key_of(name))
        if self._projectors is not None:
            self._projectors.remove(name)
        self._names.remove(name)
        if self._active == name:
            self._switch(None)

    def parameters(self, name: str) -> dict[str, torch.nn.Parameter]:
        self._require(name)
        projector = {} if self._projectors is None else self._projectors.parameters(name)
        return projector | {
            f"{path}.{CHILD}.{key_of(name)}.{key}": parameter
            for path, target in self._targets.items()
            for key, parameter in small_module(target, name).named_parameters()
        }

    def projector_parameters(self, name: str) -> set[str]:
        return set() if self._projectors is None else set(self._projectors.parameters(name))

    def _state(self, name: str) -> dict[str, torch.Tensor]:
        """{parameter name without the adapter's: tensor}: what `save` writes."""
        own = f".{CHILD}.{key_of(name)}."
        return {key.replace(own, ".", 1): value.detach() for key, value in self.parameters(name).items()}

    @torch.no_grad()
    def _copy_in(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        for key, tensor in self._state(name).items():
            tensor.copy_(state[key])

    def train_only(self, name: str, beneath: Sequence[str] = ()) -> dict[str, torch.nn.Parameter]:
        self._require(name)
        if beneath:
            raise UserError(f"key 'method': a part sums several adapters, which only LoRA can; these are {self.kind}s")
        self._switch(name)
        mine = self.parameters(name)
        for key, parameter in self._base.named_parameters():
            parameter.requires_grad_(key in mine)
        trained = {key for key, parameter in self._base.named_parameters() if parameter.requires_grad}
        if trained != set(mine):
            raise RuntimeError(f"adapter {name!r}: {len(trained ^ set(mine))} parameters are wrongly (un)trained")
        return mine

    @contextlib.contextmanager
    def active(self, name: str | None) -> Iterator[PreTrainedModel]:
        if name is not None:
            self._require(name)
        before = self._active
        self._switch(name)
        try:
            yield self._base
        finally:
            self._switch(before)

    def _switch(self, name: str | None) -> None:
        self._active = name
        if self._projectors is not None:
            self._projectors.active = name

    def sha256(self, name: str) -> str:
        """Content hash of what an adapter computes: the settings are part of it."""
        content = [weights_sha256(self._state(name)), self._settings]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def save(self, name: str, folder: Path) -> None:
        """Write `weights.safetensors`, and `method.json`: {base_model, settings}."""
        self._require(name)
        folder.mkdir(parents=True, exist_ok=True)
        state = {key: value.cpu().contiguous() for key, value in self._state(name).items()}
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        if self._projectors is not None:
            self._projectors.save(name, folder / PROJECTOR_FILE)
        write_json(folder / SETTINGS_FILE, {"base_model": self._base_name, "settings": self._settings})

    def load(self, name: str, folder: Path) -> None:
        weights, settings = folder / WEIGHTS_FILE, folder / SETTINGS_FILE
        for path in (weights, settings):
            if not path.is_file():
                raise UserError(f"{path}: missing; the pool's adapter {name!r} cannot be loaded")
        try:
            state = load_file(weights)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{weights}: not a readable safetensors file: {error}") from error
        try:
            saved = json.loads(settings.read_text(encoding="utf-8"))["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{settings}: not the JSON that was saved with the weights: {error}") from error
        if saved != json.loads(json.dumps(self._settings)):
            raise UserError(
                f"{settings}: the adapter was trained with {saved}, this run's settings are {self._settings}"
            )
        if name not in self._names:
            self.add(name)
        expected = self._state(name)
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in expected.items()}:
            raise UserError(f"{weights}: its weights do not fit this model and these settings: {self._settings}")
        self._copy_in(name, state)

    def _require(self, name: str) -> None:
        if name not in self._names:
            raise ValueError(f"no adapter {name!r}; the pool has {self._names}")


def small_module(target: torch.nn.Module, name: str) -> torch.nn.Module:
    """The adapter's module below `target`."""
    return target.get_submodule(f"{CHILD}.{key_of(name)}")
