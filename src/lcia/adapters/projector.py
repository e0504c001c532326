"""The projector of a vision-language model, from the features of an image to tokens: one of its own for each adapter.

A copy is trained, averaged, kept and restored with its adapter; without one, the base's projector is in its place. The
copies hang below the base's module, which stays what and where it is:

    model.multi_modal_projector.linear_1.weight                       the base's
    model.multi_modal_projector.adapters.group_NAME.linear_1.weight   the adapter's, fp32
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from lcia.adapters.naming import CHILD, key_of
from lcia.errors import UserError

PROJECTOR_FILE = "projector.safetensors"
# What transformers' models call it: LLaVA, Gemma 3, InternVL; Qwen-VL; Idefics, SmolVLM.
_KNOWN = ("multi_modal_projector", "visual.merger", "connector")


def find_projector(model: PreTrainedModel, wanted: str, name: str) -> str | None:
    """The path of the module that is trained as projector.

    Args:
        wanted: the configuration's `projector`: auto, none, or the end of a path.
        name: how the user calls the model.

    Raises:
        UserError: there is none, or more than one.
    """
    if wanted == "none":
        return None
    ends = _KNOWN if wanted == "auto" else (wanted,)
    found = [path for path, _ in model.named_modules() if any(f".{path}".endswith(f".{end}") for end in ends)]
    if len(found) == 1:
        return found[0]
    problem = f"has no module {' or '.join(ends)}" if not found else f"has several: {', '.join(found)}"
    raise UserError(f"key 'projector': model {name} {problem}; write the projector's path in the model, or none")


class Projectors:
    """A copy of the projector at `path` per adapter; at most one is in its place."""

    def __init__(self, model: PreTrainedModel, path: str) -> None:
        self.path = path
        self._model = model
        self._called = False  # in the forward pass that is being made
        self.active: str | None = None  # None: the base's own
        self._module = model.get_submodule(path)
        self._untrained = copy.deepcopy(self._module).float()
        self._attached = False

    def add(self, name: str) -> None:
        """A copy that starts as the base's projector."""
        if not self._attached:
            self._module.add_module(CHILD, torch.nn.ModuleDict())
            self._hooks = [
                self._module.register_forward_hook(self._instead, with_kwargs=True),
                self._model.register_forward_pre_hook(self._begun),
                self._model.register_forward_hook(self._take_part),
            ]
            self._attached = True
        device = next(self._module.parameters()).device
        made = copy.deepcopy(self._untrained).to(device).requires_grad_(False)
        self._module.get_submodule(CHILD).add_module(key_of(name), made)

    def remove(self, name: str) -> None:
        delattr(self._module.get_submodule(CHILD), key_of(name))
        if self.active == name:
            self.active = None

    @contextlib.contextmanager
    def untrained(self) -> Iterator[None]:
        """The base's own in its place inside."""
        before, self.active = self.active, None
        try:
            yield
        finally:
            self.active = before

    @torch.no_grad()
    def settle(self, name: str | None) -> None:
        """Take all copies out of the model, the weights of `name`'s for good in the base's place, in their dtype."""
        if not self._attached:
            return
        if name is not None:
            own = self._module.get_submodule(f"{CHILD}.{key_of(name)}")
            for key, weights in own.named_parameters():
                self._module.get_parameter(key).copy_(weights)
        for hook in self._hooks:
            hook.remove()
        delattr(self._module, CHILD)
        self._attached = False

    def parameters(self, name: str) -> dict[str, torch.nn.Parameter]:
        """{name in the model: parameter} of one copy."""
        own = self._module.get_submodule(f"{CHILD}.{key_of(name)}")
        return {f"{self.path}.{CHILD}.{key_of(name)}.{key}": weights for key, weights in own.named_parameters()}

    def save(self, name: str, path: Path) -> None:
        """A copy's weights, under the names that the base's projector has in the model."""
        state = {
            key.replace(f".{CHILD}.{key_of(name)}.", ".", 1): weights.detach().cpu().contiguous()
            for key, weights in self.parameters(name).items()
        }
        save_file(state, path, metadata={"format": "pt"})

    def _instead(
        self, module: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], output: torch.Tensor
    ) -> torch.Tensor | None:
        self._called = True
        if self.active is None:
            return None  # the output stays as it is
        own = module.get_submodule(f"{CHILD}.{key_of(self.active)}")
        result: torch.Tensor = own(*map(_wide, inputs), **{key: _wide(value) for key, value in options.items()})
        return result.to(output.dtype)

    def _begun(self, model: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        self._called = False

    def _take_part(self, model: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """A projector that is trained, in a batch without images: its gradient is 0, not missing. Each process of
        several may have such batches, and DDP waits for the gradients of what took part in its forward pass.
        """
        if self.active is None or self._called or not torch.is_grad_enabled():
            return
        trained = [weights for weights in self.parameters(self.active).values() if weights.requires_grad]
        if trained:
            output.logits = output.logits + 0 * torch.stack([weights.sum() for weights in trained]).sum()


def _wide(value: Any) -> Any:
    """Features in the dtype of the copies; masks and sizes, which some projectors are given too, as they are."""
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
