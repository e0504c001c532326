"""Laws that every method keeps, and the page on adding one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lcia import run, run_folder
from lcia.backbone import load_backbone
from lcia.backbone.loading import weights_sha256
from lcia.errors import UserError
from lcia.methods import METHODS, build_method
from lcia.methods.base import Combined, Method
from lcia.progress import Reporter
from lcia.run import train
from lcia.session import open_run

PAGE = Path(__file__).resolve().parents[1] / "docs" / "add-a-method.md"


def measure(config: Any) -> Any:
    with Reporter() as reporter:
        return train(config, reporter)


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    """The class that docs/add-a-method.md shows, registered as the page says."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    space: dict[str, Any] = {"__name__": "documented"}
    exec(code[1], space)
    monkeypatch.setitem(METHODS, "stay_close", space["StayClose"])
    return space["StayClose"]


def test_the_documented_method_works_and_stays_close(documented, tiny_config, tmp_path) -> None:
    moved = {}
    for strength in (0.0, 100.0):
        folder = tmp_path / str(strength)
        config = tiny_config(method={"name": "stay_close", "strength": strength}, output_dir=str(folder))
        measure(config)
        first, last = (
            torch.cat([t.flatten() for t in _adapter(folder / "history" / task / "shared").values()])
            for task in ("colours", "paints")
        )
        moved[strength] = float((last - first).norm())
    assert moved[100.0] < 0.5 * moved[0.0]


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (weights,) = folder.glob("*.safetensors")  # its name says which kind of pool wrote it
    return load_file(weights)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_base_model_never_moves(tiny_config, monkeypatch, method) -> None:
    """The very model in memory that was trained on, not a copy read again from disk."""
    loaded: list[Any] = []

    def remember(*arguments: Any) -> Any:
        loaded.append(load_backbone(*arguments))
        return loaded[-1]

    monkeypatch.setattr(run, "load_backbone", remember)
    measure(tiny_config(method=method))
    base = {
        name.replace(".base_layer", ""): value
        for name, value in loaded[0].model.named_parameters()
        if "lora_" not in name and ".adapters." not in name
    }
    assert weights_sha256(base) == loaded[0].fingerprint


@pytest.mark.parametrize("method", [*sorted(METHODS), "stay_close"])
def test_accumulated_micro_batches_are_one_batch(documented, tiny_config, tmp_path, method) -> None:
    """Two halves accumulated give the update of the whole batch, to rounding.

    Plain SGD without clipping: Adam would hide a loss that is wrong by a constant factor.
    """
    # A stiffer penalty is unstable under plain SGD with this learning rate, and makes much of rounding.
    mild = {"stay_close": {"strength": 0.3}, "ewc": {"strength": 3.0}}
    pools = []
    for name, size, accumulation in (("whole", 4, 1), ("halves", 2, 2)):
        config = tiny_config(
            method={"name": method, **mild.get(method, {})},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            output_dir=str(tmp_path / name),
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.3,
        )
        measure(config)
        folder = tmp_path / name / "pool"
        pools.append({path.name: _adapter(path) for path in folder.iterdir()} if folder.is_dir() else {})
    whole, halves = pools
    assert whole.keys() == halves.keys()
    for group, weights in whole.items():
        for key, weight in weights.items():
            torch.testing.assert_close(weight, halves[group][key], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_trains_in_bfloat16_with_float32_adapters(tiny_config, method) -> None:
    config = tiny_config(method=method, dtype="bfloat16")
    measure(config)
    for path in Path(config.output_dir).glob("history/*/*"):
        if path.is_dir():
            assert {weight.dtype for weight in _adapter(path).values()} == {torch.float32}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_state_survives_save_and_load(tiny_config, method) -> None:
    """A run opened again carries the very state it ended with."""
    kept: list[Any] = []
    original = run_folder._save_method

    def save(method: Combined, folder: Path) -> None:
        kept.append(method.state_dict())
        original(method, folder)

    run_folder._save_method, config = save, tiny_config(method=method)
    try:
        measure(config)
    finally:
        run_folder._save_method = original
    state = open_run(Path(config.output_dir)).method.state_dict()
    expected = kept[-1] if kept else build_method(config.method_parts()).state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value) if isinstance(value, torch.Tensor) else state[key] == value


@pytest.mark.parametrize("method", sorted(METHODS))
def test_an_unknown_option_is_refused(method) -> None:
    with pytest.raises(UserError, match="no option 'no_such_option'"):
        build_method([(method, {"no_such_option": 1})])


def test_the_average_is_what_the_adapter_keeps(tiny_config, tmp_path) -> None:
    """retained = m: the adapter is m θ_start + (1 − m) (a mean of the path); with m near 1 it hardly moves."""
    distance = {}
    for retained in (0.01, 0.999):
        folder = tmp_path / str(retained)
        measure(tiny_config(method={"name": "llaca", "rule": "fixed", "retained": retained}, output_dir=str(folder)))
        start, end = (_adapter(folder / "history" / task / "shared") for task in ("colours", "animals"))
        distance[retained] = sum(float((end[key] - start[key]).abs().sum()) for key in start)
    assert distance[0.999] < 0.01 * distance[0.01]


def test_methods_compose(documented, tiny_config, tmp_path) -> None:
    """lcia and a penalty: groups as lcia alone, weights that stay closer."""
    alone = measure(tiny_config(output_dir=str(tmp_path / "alone")))
    both = measure(tiny_config(method=["lcia", {"name": "stay_close", "strength": 100.0}]))
    assert both["method"] == "lcia+stay_close"
    assert both["groups"] == alone["groups"]
    moved = []
    for folder in (tmp_path / "alone", tmp_path / "run"):
        first, last = (_adapter(folder / "history" / task / "colours") for task in ("colours", "paints"))
        moved.append(sum(float((last[key] - first[key]).norm()) for key in first))
    assert moved[1] < 0.5 * moved[0]


def test_two_averages_are_refused() -> None:
    with pytest.raises(UserError, match="two parts average"):
        build_method([("lcia", {}), ("stable_ema", {})])


def test_fisher_importance_is_carried_between_tasks(tiny_config) -> None:
    config = tiny_config(method={"name": "lcia", "rule": "fisher", "retained": None})
    results = measure(config)
    assert results["ema"]["fallback_fraction"] == 0.0
    assert 0.0 < results["ema"]["retained_mass"]["paints"] < 1.0
    state = open_run(Path(config.output_dir)).method.state_dict()
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert all((tensor >= 0).all() and tensor.dtype == torch.float32 for tensor in tensors)
