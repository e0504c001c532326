"""The pool: one named PEFT adapter per group on one frozen model."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lcia.adapters.base import Pool
from lcia.adapters.lora import use_own_forward
from lcia.adapters.naming import CHILD, PREFIX, key_of
from lcia.adapters.projector import PROJECTOR_FILE, Projectors
from lcia.backbone.layout import layout_of
from lcia.backbone.loading import weights_sha256
from lcia.errors import UserError
from lcia.seeds import stable_seed

WEIGHTS_FILE = "adapter_model.safetensors"
_AND = "+"


def stack_name(adapters: Sequence[str]) -> str:
    """The one name of adapters that are active together, their increments summed: `a+b+c`."""
    return _AND.join(adapters)


def stack_members(name: str) -> list[str]:
    """The adapters that a name joins; an adapter's own name is a stack of one."""
    return name.split(_AND)


class AdapterPool(Pool):
    """Named LoRA adapters (arXiv 2106.09685) on a frozen model; at most one is trained at a time.

    `active` and `sha256` take a stack's name (`stack_name`) as well.

    The base stays in its own dtype, adapters are fp32: averages and small updates need the digits.
    """

    library = "peft"
    kind = "LoRA adapter"

    def __init__(
        self,
        base: PreTrainedModel,
        lora: dict[str, Any],
        base_name: str,
        seed: int = 0,
        projector: str | None = None,
    ) -> None:
        """`projector`: path of a module in `base` that every adapter has a copy of its own of."""
        self._projectors = None if projector is None else Projectors(base, projector)
        self._base = base
        self._lora = lora
        self._base_name = base_name
        self._seed = seed
        self._peft: PeftModel | None = None

    @property
    def model(self) -> PeftModel | PreTrainedModel:
        """The model to call: the base itself before the first adapter exists."""
        return self._base if self._peft is None else self._peft

    @property
    def names(self) -> list[str]:
        return [] if self._peft is None else [name.removeprefix(PREFIX) for name in self._peft.peft_config]

    def add(self, name: str, start: str | None = None) -> None:
        """A new adapter: with the weights of `start`, else random A and zero B (the base model's function)."""
        if name in self.names:
            raise ValueError(f"adapter {name!r} exists already")
        if _AND in name:
            raise UserError(f"adapter {name!r}: {_AND!r} joins the names of adapters; choose a name without it")
        config = LoraConfig(task_type=layout_of(self._base.config).peft_task, **self._lora)
        # The start must not depend on what was drawn before, or a longer stream would differ from a shorter one.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT asks transformers under a name that transformers has renamed; nothing a user could do.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            torch.manual_seed(stable_seed(self._seed, name))
            if self._peft is None:
                self._peft = get_peft_model(self._base, config, adapter_name=PREFIX + name)
                use_own_forward(self._peft)
            else:
                self._peft.add_adapter(PREFIX + name, config)
        if self._projectors is not None:
            self._projectors.add(name)
        if start is not None:
            self._copy_in(name, self._state(start))

    def remove(self, name: str) -> None:
        """Drop an adapter and its weights."""
        self._require(name)
        assert self._peft is not None
        if len(self.names) == 1:
            raise ValueError(f"adapter {name!r} is the pool's last one")
        self._peft.set_adapter(PREFIX + next(other for other in self.names if other != name))
        self._peft.delete_adapter(PREFIX + name)
        if self._projectors is not None:
            self._projectors.remove(name)

    def parameters(self, name: str) -> dict[str, torch.nn.Parameter]:
        """{full parameter name: parameter} of one adapter, in the model's order."""
        self._require(name)
        belongs = _of_adapter(name)
        found = {key: parameter for key, parameter in self.model.named_parameters() if belongs.search(key)}
        if not found:
            raise RuntimeError(f"adapter {name!r} has no parameters")
        return found

    def projector_parameters(self, name: str) -> set[str]:
        return {key for key in self.parameters(name) if f".{CHILD}.{key_of(name)}." in key}

    def _state(self, name: str) -> dict[str, torch.Tensor]:
        """{parameter name without the adapter's: tensor}: what PEFT writes into adapter_model.safetensors."""
        found = {_without_name(name, key): value.detach() for key, value in self.parameters(name).items()}
        # of weights that are spread over processes (FSDP2), each process gets the whole
        return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in found.items()}

    @torch.no_grad()
    def _copy_in(self, name: str, state: dict[str, torch.Tensor]) -> None:
        for key, parameter in self.parameters(name).items():
            parameter.copy_(state[_without_name(name, key)])

    def train_only(self, name: str, beneath: Sequence[str] = ()) -> dict[str, torch.nn.Parameter]:
        """Make `name` the only thing that trains, active on top of the frozen adapters `beneath`; checked, not assumed.

        Returns its parameters.
        """
        self._activate([*beneath, name])
        assert self._peft is not None
        mine = self.parameters(name)
        for key, parameter in self._peft.named_parameters():
            parameter.requires_grad_(key in mine)
        trained = {key for key, parameter in self._peft.named_parameters() if parameter.requires_grad}
        if trained != set(mine):
            raise RuntimeError(f"adapter {name!r}: {len(trained ^ set(mine))} parameters are wrongly (un)trained")
        return mine

    @contextlib.contextmanager
    def active(self, name: str | None) -> Iterator[PeftModel | PreTrainedModel]:
        """The model answering with adapter `name`, or with a stack; None is the base model, bit for bit."""
        if self._peft is None or name is None:
            if name is not None:
                self._require(name)
            with contextlib.ExitStack() as without:
                if self._peft is not None:
                    without.enter_context(self._peft.disable_adapter())
                if self._projectors is not None:
                    without.enter_context(self._projectors.untrained())
                yield self.model
            return
        self._activate(stack_members(name))
        yield self._peft

    def can_mix(self, names: Collection[str | None]) -> bool:
        if self._projectors is not None:
            return super().can_mix(names)
        return all(name is None or len(stack_members(name)) == 1 for name in names)

    def mixed(self, names: Sequence[str | None]) -> dict[str, Any]:
        if not self.can_mix(names):
            return super().mixed(names)
        for name in names:
            if name is not None:
                self._require(name)
        if self._peft is None:
            return {}
        return {"adapter_names": ["__base__" if name is None else PREFIX + name for name in names]}

    def _activate(self, names: Sequence[str]) -> None:
        for name in names:
            self._require(name)
        assert self._peft is not None
        # The outer model knows one active adapter, its layers sum all of theirs. Both let every active one train.
        self._peft.set_adapter(PREFIX + names[-1])
        if len(names) > 1:
            self._peft.base_model.set_adapter([PREFIX + name for name in names])
        if self._projectors is not None:
            self._projectors.active = names[-1]  # a stack sums LoRA increments; projectors are no increments

    def sha256(self, name: str) -> str:
        """Content hash of an adapter's weights, independent of its name; of a stack, over its adapters in order."""
        hashes = [weights_sha256(self._state(member)) for member in stack_members(name)]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def save(self, name: str, folder: Path) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json`: plain PEFT loads the folder."""
        self._require(name)
        assert self._peft is not None
        folder.mkdir(parents=True, exist_ok=True)
        state = {key: value.cpu().contiguous() for key, value in self._state(name).items()}
        save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config = copy.copy(self._peft.peft_config[PREFIX + name])
        config.base_model_name_or_path = self._base_name  # PEFT puts the local cache folder here
        config.inference_mode = True
        if self._projectors is not None:
            self._projectors.save(name, folder / PROJECTOR_FILE)
            config.modules_to_save = [self._projectors.path.rsplit(".", 1)[-1]]  # plain PEFT loads the copy too
        config.save_pretrained(str(folder))

    def load(self, name: str, folder: Path) -> None:
        """Read an adapter that `save` wrote, adding it when it is new.

        Raises:
            UserError: files are missing, or do not fit this model and these LoRA settings.
        """
        path = folder / WEIGHTS_FILE
        if not path.is_file():
            raise UserError(f"{path}: missing; the pool's adapter {name!r} cannot be loaded")
        try:
            state = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable safetensors file: {error}") from error
        if name not in self.names:
            self.add(name)
        expected = self._state(name)
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in expected.items()}:
            raise UserError(f"{path}: its weights do not fit this model and lora_r, lora_target_modules")
        self._copy_in(name, state)

    def unload(self, projector: str | None = None) -> PreTrainedModel:
        """The model without its adapters, which the pool has no more; the base's weights are as they are by now.

        Args:
            projector: the adapter whose projector takes the place of the base's.
        """
        if self._projectors is not None:
            self._projectors.settle(projector)
        plain: PreTrainedModel = self._base if self._peft is None else self._peft.unload()
        self._peft = None
        return plain

    def _require(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"no adapter {name!r}; the pool has {self.names}")


def _of_adapter(name: str) -> re.Pattern[str]:
    """Matches the adapter's own part of a parameter's name and nothing of the base's modules: PEFT's `lora_A.NAME`, and
    `adapters.NAME` of a projector.
    """
    lora, projector = re.escape(PREFIX + name), re.escape(key_of(name))
    return re.compile(rf"(\blora_\w+)\.{lora}(?=\.|$)|\.{CHILD}\.{projector}(?=\.)")


def _without_name(name: str, key: str) -> str:
    return _of_adapter(name).sub(r"\1", key)
