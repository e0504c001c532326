"""What a frozen vision tower says about an image is computed once and kept on disk.

In continual learning the same images come again in every epoch, and test images after every task, while the tower never
changes. Shapes: B images, C channels, H × W pixels.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

from lcia.backbone import products
from lcia.backbone.cache import cache_dir
from lcia.errors import UserError
from lcia.files import file_sha256, warn_once

_NOT_SETTINGS = ("dtype", "architectures", "_name_or_path")  # where a tower came from; its weights have their dtype
_FIELDS = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")


class VisionMemo:
    """Stands in the place of a tower's `forward`, as long as it is set.

    Images are computed one at a time, so that what is kept does not depend on the batch in which an image first came.
    Outputs keep the dtype they were computed in: the numbers are those of the tower, bit for bit.

    An output is kept under the sha256 of the image's pixels, the tower's weights, settings and code, the arguments of
    the call, the device (of a CPU its instructions and threads) and the version of torch. Nothing is kept of a call
    that could give something else the next time, or has gradients: a tower that is trained, dropout in training,
    arguments that are tensors, pixels that are not (B, C, H, W). Such calls go to the tower and are counted in
    `passed_on`.

    Args:
        tower: the vision tower of any model; its weights must not change while the memo is set.
        folder: where outputs are kept; `vision` in the cache if not given. It may be removed at any time.
    """

    def __init__(self, tower: PreTrainedModel, folder: Path | None = None) -> None:
        self.tower = tower
        self.folder = folder or cache_dir() / "vision"
        self.found = 0  # images whose output was there
        self.computed = 0  # images whose output was not
        self.passed_on = 0  # calls that went to the tower as they were
        self._forward = tower.forward
        self._tower_key = ""

    def set(self) -> VisionMemo:
        """Use the memo from now on."""
        config = self.tower.config
        settings = {key: value for key, value in config.to_diff_dict().items() if key not in _NOT_SETTINGS}
        settings["attention"] = config._attn_implementation  # its kinds differ in the last bits
        described = json.dumps(settings, sort_keys=True, default=str)
        code = file_sha256(Path(inspect.getfile(type(self.tower))))
        on_cpu = f"{torch.backends.cpu.get_cpu_capability()}, {products.library()}, {torch.get_num_threads()} threads"
        kernels = torch.cuda.get_device_name() if self.tower.device.type == "cuda" else on_cpu
        digest = hashlib.sha256(
            f"{type(self.tower).__name__} {code} {described} torch {torch.__version__} {kernels}".encode()
        )
        for name, tensor in sorted(self.tower.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes(tensor))
        self._tower_key = digest.hexdigest()
        self.tower.forward = self._remember
        return self

    def unset(self) -> None:
        """Back to the tower's own forward pass."""
        with suppress(KeyError):  # it was not set
            del self.tower.__dict__["forward"]

    def _remember(self, pixel_values: torch.Tensor, **options: Any) -> Any:
        if pixel_values.ndim != 4 or not len(pixel_values) or not self._same_each_time(pixel_values, options):
            self.passed_on += 1
            return self._forward(pixel_values, **options)
        outputs = [self._of_one(pixels[None], options) for pixels in pixel_values]
        return _joined(outputs)

    def _same_each_time(self, pixel_values: torch.Tensor, options: dict[str, Any]) -> bool:
        plain = (bool, int, float, str, list, tuple, type(None))
        return (
            not pixel_values.requires_grad
            and not any(parameter.requires_grad for parameter in self.tower.parameters())
            and not (self.tower.training and _draws(self.tower))
            and all(isinstance(value, plain) for value in options.values())
            and options.get("return_dict") is not False
        )

    def _of_one(self, pixels: torch.Tensor, options: dict[str, Any]) -> dict[str, Any]:
        """The output for `pixels` (1, C, H, W): tensors (1, ...), or where a field has several, lists with gaps."""
        digest = hashlib.sha256(
            f"{self._tower_key} {json.dumps(options, sort_keys=True)} {pixels.device.type}".encode()
        )
        digest.update(f"{pixels.dtype} {tuple(pixels.shape)}".encode())
        digest.update(_bytes(pixels))
        key = digest.hexdigest()
        file = self.folder / key[:2] / f"{key}.safetensors"
        if file.is_file():
            self.found += 1
            return _read(file, pixels.device)
        with torch.no_grad():
            output = self._forward(pixels, **options)
        if not isinstance(output, BaseModelOutput | BaseModelOutputWithPooling):
            raise TypeError(f"{type(self.tower).__name__} gives {type(output).__name__}, of which no memo can be kept")
        self.computed += 1
        fields = {name: _as_list(output[name]) for name in _FIELDS if output.get(name) is not None}
        try:
            _write(file, fields)
        except OSError as error:  # what was computed is there all the same
            warn_once(f"{self.folder}: features cannot be kept here ({error.strerror}) and are computed each time")
        return fields


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _draws(tower: PreTrainedModel) -> bool:
    """Whether the tower's output is random, or depends on the other images of the batch, in training."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in tower.modules()):
        return True
    if any(type(module) is nn.BatchNorm2d for module in tower.modules()):
        return True
    rates = [value for key, value in tower.config.to_dict().items() if "drop" in key]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


# --- files: a tensor that stands in several places is kept once ------------------------------------------


def _write(file: Path, fields: dict[str, Any]) -> None:
    tensors: dict[str, torch.Tensor] = {}
    layout: dict[str, Any] = {}  # field → name of its tensor, or a list of names and gaps
    for field, value in fields.items():
        if isinstance(value, list):
            layout[field] = [None if part is None else _name(tensors, part) for part in value]
        else:
            layout[field] = _name(tensors, value)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        partial.write_bytes(save(kept, metadata={"layout": json.dumps(layout)}))
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _name(tensors: dict[str, torch.Tensor], tensor: torch.Tensor) -> str:
    for name, other in tensors.items():
        if other is tensor:
            return name
    tensors[str(len(tensors))] = tensor
    return str(len(tensors) - 1)


def _read(file: Path, device: torch.device) -> dict[str, Any]:
    try:
        with safe_open(file, framework="pt", device=str(device)) as kept:
            layout = json.loads(kept.metadata()["layout"])
            tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise UserError(f"{file}: kept features that cannot be read ({error}); remove the file") from error
    return {
        field: [tensors.get(part) for part in value] if isinstance(value, list) else tensors[value]
        for field, value in layout.items()
    }


def _joined(outputs: list[dict[str, Any]]) -> BaseModelOutputWithPooling:
    """Outputs of single images as that of a batch."""

    def join(parts: list[Any]) -> Any:
        return None if parts[0] is None else torch.cat(parts)

    fields: dict[str, Any] = {}
    for field, first in outputs[0].items():
        values = [output[field] for output in outputs]
        fields[field] = (
            tuple(join(list(p)) for p in zip(*values, strict=True)) if isinstance(first, list) else join(values)
        )
    return BaseModelOutputWithPooling(**fields)
