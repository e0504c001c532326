"""Which methods go together, and that the others are refused with a reason."""

from __future__ import annotations

import re
from itertools import combinations, permutations
from pathlib import Path

import pytest
import yaml

from lcia.errors import UserError
from lcia.methods import METHODS, build_method
from lcia.methods.base import Method
from lcia.stream import Task

PAGES = sorted((Path(__file__).resolve().parents[1] / "docs" / "methods").glob("*.md"))

# What a method does to an adapter's second task, in a stream whose adapters never learn one.
IDLE = ["replay", "agem", "ewc", "l2", "lwf", "pgp", "llaca", "stable_ema"]
NO_SECOND_TASK = ["o_lora", "adapter_cl", "continual_llava", "multi_task"]


def why(*names: str) -> str | None:
    """The reason these parts are refused in this order; None where they are not."""
    try:
        build_method([(name, {}) for name in names])
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("opens", NO_SECOND_TASK)
@pytest.mark.parametrize("idle", IDLE)
def test_what_only_acts_on_a_second_task_is_refused_where_none_comes(opens: str, idle: str) -> None:
    for parts in ((opens, idle), (idle, opens)):
        found = why(*parts)
        assert found is not None
        if idle != "pgp" or opens not in ("adapter_cl", "continual_llava"):  # these have no LoRA matrices either
            assert f"{idle} acts from an adapter's second task on, and with {opens}" in found
            assert "leave one of them out" in found


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"zero_shot"}))
def test_beside_no_training_everything_is_refused(name: str) -> None:
    for parts in (("zero_shot", name), (name, "zero_shot")):
        assert f"zero_shot trains nothing, so that {name} has nothing to do" in str(why(*parts))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_is_refused_twice(name: str) -> None:
    assert f"{name} is written twice" in str(why(name, name))
    assert f"{name} is written twice" in str(why(name, "moelora" if name != "moelora" else "l2", name))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("multi_task lcia", "multi_task learns all tasks at once, so that lcia has no adapters to choose among"),
        ("o_lora multi_task", "multi_task learns all tasks at once, so that o_lora has no adapters to choose among"),
        ("pgp model_tailor", "pgp keeps what a task changes out of some directions, and model_tailor undoes"),
        ("model_tailor pgp", "pgp keeps what a task changes out of some directions, and model_tailor undoes"),
        ("o_lora model_tailor", "o_lora keeps what a task changes out of some directions, and model_tailor undoes"),
        ("ewc model_tailor", "write ewc behind model_tailor: ewc needs the weights that the adapter keeps"),
        ("ewc pgp", "write ewc behind pgp"),
        ("ewc l2 llaca", "write ewc behind llaca"),
        ("model_tailor stable_ema", "write model_tailor behind stable_ema"),
        ("pgp lcia", "write pgp behind lcia"),
        ("lcia llaca", "two parts average the weights"),
    ],
)
def test_a_part_that_another_would_undo_is_refused(parts: str, message: str) -> None:
    assert message in str(why(*parts.split()))


def test_an_option_decides_whether_a_part_is_idle() -> None:
    build_method([("multi_task", {}), ("model_tailor", {})])
    with pytest.raises(UserError, match="model_tailor acts from an adapter's second task on, and with multi_task"):
        build_method([("multi_task", {}), ("model_tailor", {"tailor_first": False})])


@pytest.mark.parametrize(
    "parts",
    [
        *("lcia replay", "lcia agem", "lcia ewc", "lcia pgp", "lcia l2", "lwf lcia", "lcia model_tailor ewc"),
        *("lcia moelora", "moelora ewc", "moelora replay", "eproj llaca", "eproj l2", "multi_task moelora"),
        *("multi_task adapter_cl", "multi_task eproj", "multi_task continual_llava", "replay agem ewc l2 lwf"),
        *("llaca pgp ewc", "stable_ema model_tailor"),
    ],
)
def test_parts_that_do_their_work_go_together(parts: str) -> None:
    assert why(*parts.split()) is None


def test_what_the_pages_combine_goes_together() -> None:
    found = {text for page in PAGES for text in re.findall(r"`(?:method: )?(\[\w+, [^`]*\])`", page.read_text())}
    assert len(found) > 8
    for text in found:
        parts = [{"name": part} if isinstance(part, str) else part for part in yaml.safe_load(text)]
        build_method([(part.pop("name"), part) for part in parts])


def test_an_order_of_two_is_refused_only_with_a_way_out() -> None:
    """Where one order is refused and the other is not, the message says which."""
    for first, second in combinations(sorted(METHODS), 2):
        orders = {parts: why(*parts) for parts in permutations((first, second))}
        if sorted(reason is None for reason in orders.values()) == [False, True]:
            ((before, behind),) = (parts for parts, reason in orders.items() if reason is not None)
            assert f"write {before} behind {behind}" in str(orders[before, behind])


def test_a_new_method_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closing(Method):
        """Changes the weights of an adapter's second task when it is over."""

        name = "closing"
        idle_on_first_task = True
        changes_at_close = True

        def close_task(self, task: Task) -> None:
            """Not called here."""

    monkeypatch.setitem(METHODS, "closing", Closing)
    assert why("lcia", "closing", "ewc") is None
    assert "write ewc behind closing" in str(why("ewc", "closing"))
    assert "closing acts from an adapter's second task on" in str(why("closing", "adapter_cl"))
