"""What a run trains and answers with: named adapters on one frozen model, whatever they are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from transformers import PreTrainedModel


class Pool(ABC):
    """Named adapters on a frozen model; at most one is trained at a time.

    The base stays in its own dtype, adapters are fp32: averages and small updates need the digits.
    """

    library: ClassVar[str]  # what loads a saved adapter, as a model card names it
    kind: str  # what one adapter is, for people

    @property
    @abstractmethod
    def model(self) -> PeftModel | PreTrainedModel:
        """The model to call: the base itself before the first adapter exists."""

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """The adapters, in the order in which they were added."""

    @abstractmethod
    def add(self, name: str, start: str | None = None) -> None:
        """A new adapter: with the weights of `start`, else at random such that it is the base model's function."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Drop an adapter and its weights."""

    @abstractmethod
    def parameters(self, name: str) -> dict[str, torch.nn.Parameter]:
        """{full parameter name: parameter} of one adapter, in the model's order."""

    @abstractmethod
    def projector_parameters(self, name: str) -> set[str]:
        """Which of an adapter's parameters are its projector's; none in a model of text."""

    @abstractmethod
    def train_only(self, name: str, beneath: Sequence[str] = ()) -> dict[str, torch.nn.Parameter]:
        """Make `name` the only thing that trains, active on top of the frozen adapters `beneath`; checked, not assumed.

        Returns its parameters.
        """

    @abstractmethod
    def active(self, name: str | None) -> AbstractContextManager[PeftModel | PreTrainedModel]:
        """The model answering with adapter `name`; None is the base model, bit for bit."""

    def can_mix(self, names: Collection[str | None]) -> bool:
        """Whether one batch may hold rows of all these adapters; None is the base model."""
        return len(set(names)) == 1

    def mixed(self, names: Sequence[str | None]) -> dict[str, Any]:
        """What `generate` of `model` is told besides, so that row i is answered with adapter names[i].

        Raises:
            ValueError: a batch cannot mix them.
        """
        raise ValueError(f"a batch of {self.kind}s cannot mix {sorted(map(str, set(names)))}")

    @abstractmethod
    def sha256(self, name: str) -> str:
        """Content hash of an adapter's weights, independent of its name."""

    @abstractmethod
    def save(self, name: str, folder: Path) -> None:
        """Write an adapter's files."""

    @abstractmethod
    def load(self, name: str, folder: Path) -> None:
        """Read an adapter that `save` wrote, adding it when it is new.

        Raises:
            UserError: files are missing, or do not fit this model and these settings.
        """
