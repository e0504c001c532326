"""The passes in C against those of torch, whatever they are shown."""

from __future__ import annotations

import ctypes
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lcia.ema import RULES, DynamicEMA, compiled
from lcia.ema.compiled import PIECE, CompiledPasses, RehearsedPasses
from lcia.ema.passes import Passes
from lcia.planning.zeros import floats_are_zero

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="lcia was installed without a C compiler")

PER_TENSOR = [name for name, rule in RULES.items() if rule.per == "tensor"]
SHAPES = [(1,), (3, 5), (257,), (64,), (65, 3), (PIECE + 3,), (2, PIECE)]


@contextmanager
def by_torch() -> Iterator[None]:
    with patch.object(compiled, "library", lambda: None):
        yield


def both(named: dict[str, nn.Parameter], **options: Any) -> tuple[DynamicEMA, DynamicEMA]:
    with by_torch():
        torchs = DynamicEMA(named, **options)
    ours = DynamicEMA(named, **options)
    assert type(torchs._passes) is Passes
    assert type(ours._passes) is CompiledPasses
    return ours, torchs


def assert_alike(ours: DynamicEMA, torchs: DynamicEMA) -> None:
    mine, right = ours.state_dict(), torchs.state_dict()
    assert mine.keys() == right.keys()
    for key, value in right.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(mine[key], value, rtol=3e-6, atol=3e-6, equal_nan=True, msg=key)
        else:
            assert mine[key] == value, key


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from([*PER_TENSOR, "fisher", "fisher of AdamW", "fisher per example"]),
    chosen=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5),
    first_task=st.booleans(),
    rest=st.sampled_from([0.0, 0.5]),
    missing=st.booleans(),
    strided=st.booleans(),
    apart=st.booleans(),
    bad=st.sampled_from([None, math.inf, math.nan]),
    seed=st.integers(0, 999),
)
def test_it_does_what_torch_does(
    rule: str,
    chosen: list[tuple[int, ...]],
    first_task: bool,
    rest: float,
    missing: bool,
    strided: bool,
    apart: bool,
    bad: float | None,
    seed: int,
) -> None:
    """Also where gradients are missing, strided or not finite, where θ* rests, and where `observe` is called apart."""
    torch.manual_seed(seed)
    shapes = [(1, *shape) if strided else shape for shape in [*chosen, (2, 3)]]
    named = {
        str(i): nn.Parameter(torch.randn(shape[::-1]).permute(*range(len(shape))[::-1]))
        if strided
        else nn.Parameter(torch.randn(shape))
        for i, shape in enumerate(shapes)
    }
    options: dict[str, Any] = {"rule": rule.partition(" ")[0], "total_steps": 6, "rest": rest}
    optimizer = torch.optim.AdamW(named.values(), lr=0.1)
    if rule.startswith("fisher"):
        source = {"fisher of AdamW": "adamw", "fisher per example": "per_example"}.get(rule, "running")
        importance = None
        if not first_task:
            importance = {name: torch.rand(p.shape) * (torch.rand(p.shape) < 0.8) for name, p in named.items()}
        options |= {"importance": importance, "fisher_source": source, "optimizer": optimizer, "strength": 0.3}
    ours, torchs = both(named, optional=["0"] if missing else [], **options)
    for step in range(6):
        optimizer.zero_grad()
        sum(((p - 1) * torch.randn_like(p)).square().sum() for p in named.values()).backward()
        optimizer.step()
        if missing and step in (0, 3):
            named["0"].grad = None
        if bad is not None and step == 2:
            grad = named[str(len(chosen))].grad
            grad[(0,) * grad.dim()] = bad
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* is not finite: a fallback")
            for ema in (ours, torchs):
                if apart:
                    ema.observe(scale=0.5)
                ema.step()
    assert_alike(ours, torchs)


@pytest.mark.parametrize("rule", [*PER_TENSOR, "fisher"])
def test_the_number_of_threads_changes_no_bit(rule: str) -> None:
    found = []
    for threads in (1, 2, 3):
        torch.manual_seed(0)
        shapes = [(5, 9), (3 * PIECE + 1,), (PIECE, 9)]
        named = {str(i): nn.Parameter(torch.randn(shape)) for i, shape in enumerate(shapes)}
        options = {"importance": {k: torch.rand(p.shape) for k, p in named.items()}} if rule == "fisher" else {}
        with (
            patch.object(torch, "get_num_threads", lambda threads=threads: threads),
            patch.object(compiled, "LEAST", 1),
        ):
            ema = DynamicEMA(named, rule, total_steps=3, **options)
            assert len(ema._passes._shares()) == threads
            for _ in range(3):
                for p in named.values():
                    p.data = torch.randn(p.shape)
                    p.grad = torch.randn(p.shape)
                ema.step()
        found.append(ema.state_dict())
    for other in found[1:]:
        for key, value in found[0].items():
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key], key


@pytest.mark.parametrize("exponent", [1, 0.3, 1e-2, 1e-5])
def test_fishers_move_is_that_of_float64(exponent: float) -> None:
    """1 − (1 + F_new / F_old)^(−1/T) within 4e-7 of itself, from the smallest ratios to the largest."""
    ratios = np.concatenate([np.geomspace(1e-36, 3.3e38, 12000), np.linspace(0, 3, 4000)]).astype(np.float32)
    ones, moves, sums = np.ones(len(ratios), np.float32), np.zeros(len(ratios), np.float32), np.zeros(1)
    assert len(ratios) <= PIECE

    def at(*values: Any, dtype: Any = np.int64) -> Any:
        return kept.append(np.array(values, dtype)) or ctypes.c_void_p(kept[-1].ctypes.data)

    kept: list[Any] = []
    one, nothing = at(1, dtype=np.float32), at(0, 0)
    addresses = [at(array.ctypes.data) for array in (moves, ones, ones, ratios)]  # θ* = 0 becomes the move of θ = 1
    compiled.library().move_by_fisher(
        *(ctypes.c_int64(0), ctypes.c_int64(1), at(len(ratios)), *addresses),
        *(None, None, ctypes.c_float(1), ctypes.c_int(0), one, ctypes.c_float(exponent), one),
        *(nothing, nothing, one, ctypes.c_void_p(sums.ctypes.data)),
    )
    right = -np.expm1(-np.float64(np.float32(exponent)) * np.log1p(ratios.astype(np.float64)))
    np.testing.assert_allclose(moves, right, rtol=4e-7, atol=1e-44)
    assert sums[0] == pytest.approx(moves.astype(np.float64).sum(), rel=1e-6)


@pytest.mark.parametrize("options", [{"rule": "fixed", "fallback": 0}, {"rule": "fisher", "total_steps": 3}])
def test_where_nothing_is_kept_it_is_the_weights_exactly(options: dict[str, Any]) -> None:
    """Also far from them, where θ* + (θ − θ*) would not be."""
    weight = nn.Parameter(torch.ones(300))
    if options["rule"] == "fisher":
        options = options | {"importance": {"w": torch.zeros(300)}}
    ema = DynamicEMA({"w": weight}, **options)
    with torch.no_grad():
        weight.copy_(torch.rand(300) * 1e-9)
    weight.grad = torch.ones(300)
    ema.step()
    assert torch.equal(ema.averages["w"], weight)


def test_what_undoing_a_clip_by_zero_gives_is_not_counted() -> None:
    """0 · ∞: where a norm overflowed, and all gradients were scaled to 0."""
    ours, torchs = both({"w": nn.Parameter(torch.ones(3))}, rule="fisher", total_steps=3)
    for ema in (ours, torchs):
        ema._parameters.by_name["w"].grad = torch.zeros(3)
        ema.observe(scale=math.inf)
        assert torch.equal(ema._buffers.squares, torch.zeros_like(ema._buffers.squares))


def test_a_library_of_another_source_is_not_used(tmp_path: Path) -> None:
    """Its functions may take other arguments."""
    library, source = Path(compiled.library()._name), Path(compiled.__file__).with_name("compiled.c")

    def found(name: str, of_library: bytes, more: str) -> tuple[object, str | None]:
        folder = tmp_path / name  # one each: what is loaded from a path stays loaded
        folder.mkdir()
        (folder / library.name).write_bytes(of_library)
        (folder / "compiled.c").write_text(source.read_text() + more)
        with patch.object(compiled, "__file__", str(folder / "compiled.py")):
            return compiled._found.__wrapped__()

    assert found("same", library.read_bytes(), "")[1] is None
    assert "another compiled.c" in found("other", library.read_bytes(), "/* more */")[1]
    assert "cannot be loaded" in found("broken", b"no library", "")[1]
    with patch.object(compiled, "__file__", str(tmp_path / "compiled.py")):
        assert compiled._found.__wrapped__() == (None, "lcia was installed without gcc")


def test_it_is_for_float32_on_a_processor_and_rules_it_knows() -> None:
    def kind(dtype: torch.dtype = torch.float32, **options: Any) -> type:
        return type(DynamicEMA({"w": nn.Parameter(torch.zeros(3, dtype=dtype))}, **options)._passes)

    assert kind(rule="eq45") is CompiledPasses
    assert kind(torch.bfloat16, rule="eq45") is Passes
    assert kind(rule="eq45", grad_dtype=torch.bfloat16) is Passes
    assert kind(rule="eq12") is Passes
    assert kind(rule="fisher", total_steps=3) is CompiledPasses
    assert kind(rule="fisher", total_steps=3, per="tensor") is Passes


@pytest.mark.parametrize(("device", "kind"), [("cpu", RehearsedPasses), ("cuda", Passes)])
def test_a_plan_counts_the_passes_of_its_device(device: str, kind: type) -> None:
    with floats_are_zero(device):
        weight = nn.Parameter(torch.zeros(3, 5, device="meta"))
        ema = DynamicEMA({"w": weight}, "fisher", total_steps=3)
        assert type(ema._passes) is kind
        weight.grad = torch.zeros(3, 5, device="meta")
        ema.step()
        assert ema.steps == 1


def test_a_fork_has_threads_of_its_own() -> None:
    """Those of the process it was forked from do not run there."""
    assert compiled._workers(1) is compiled._workers(1)
    assert compiled._workers(1) is not compiled._workers(2)
