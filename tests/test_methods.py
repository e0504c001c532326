"""Laws that every entry of METHODS keeps, with its default options, and what some methods share.

The method of docs/add-a-method.md stands for a new entry: the laws run on it as well.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from documented import register_documented
from lcia import run, run_folder, training
from lcia.backbone import load_backbone
from lcia.backbone.loading import weights_sha256
from lcia.config import parse_config
from lcia.errors import UserError
from lcia.methods import METHODS, build_method
from lcia.methods.base import Combined, Method, Training
from lcia.progress import Reporter
from lcia.run import resume, train
from lcia.run_folder import RunFolder
from lcia.session import make_pool, open_run
from tiny_vision import square_stream, tiny_llava

ENTRIES = [*sorted(METHODS), "wise_ft"]

# Entries that a law cannot be asked of; everything else is.
TRAINS_NOTHING = {"zero_shot": "it takes no step"}
NEEDS_IMAGES = {"eproj"}  # run on a model and a stream with images
ON_TEXT = [name for name in sorted(METHODS) if name not in NEEDS_IMAGES]
# Not what a method keeps: code, the model and the optimizer it was shown; tensors are counted by themselves.
CODE = (type, ModuleType, FunctionType, BuiltinFunctionType)
ELSEWHERE = (*CODE, torch.nn.Module, torch.optim.Optimizer, torch.Tensor)

# Entries whose class can carry a state, and has none under its default options.
STATELESS = {"stable_ema", "llaca"}  # an average ends with its task; only `fisher` carries its importance


def entries(without: dict[str, str] | None = None) -> list[Any]:
    """One case a method; those of `without` are reported as skipped, with the reason."""
    reasons = without or {}
    return [
        pytest.param(name, marks=[pytest.mark.skip(reason=f"{name}: {reasons[name]}")] if name in reasons else [])
        for name in ENTRIES
    ]


# Of a run's cost: what another process, or the answers it finds kept, need not repeat.
TIMES = {"train_s", "eval_s", "peak_memory_mib", "evaluations_run", "evaluations_reused"}


class Killed(Exception):
    """Stands for the process dying at this very call."""


def measure(config: Any) -> dict[str, Any]:
    with Reporter() as reporter:
        return train(config, reporter)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model and a stream with images; its first and its last task are called as those of the text stream."""
    model, stream = (make(tmp_path_factory.mktemp(make.__name__)) for make in (tiny_llava, square_stream))
    return {"model": str(model), "stream": str(stream)}


@pytest.fixture
def law_config(tiny_config: Callable[..., Any], seeing: dict[str, str]) -> Callable[..., Any]:
    """`tiny_config` on what the method can learn; few and short answers, as laws are about training."""

    def make(method: str, options: dict[str, Any] | None = None, **changes: Any) -> Any:
        values = {"method": {"name": method, **(options or {})}, "max_eval_examples": 1, "max_new_tokens": 2}
        return tiny_config(**values, **(seeing if method in NEEDS_IMAGES else {}), **changes)

    return make


@pytest.fixture
def documented(monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    """The class that docs/add-a-method.md shows, registered as the page says."""
    return register_documented(monkeypatch)


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    kinds = (folder / name for name in ("adapter_model.safetensors", "weights.safetensors"))
    return load_file(next(path for path in kinds if path.is_file()))


def snapshots(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """{STAGE/ADAPTER: weights} of everything a run has learned."""
    return {
        f"{stage['stage']}/{name}": _adapter(folder / "history" / stage["stage"] / name)
        for stage in RunFolder(folder).records("stage_learned")
        for name in stage["sha256"]
    }


def require_training(config: Any) -> None:
    """A law says something only where steps were taken, and each moved what it should."""
    folder = Path(config.output_dir)
    log = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    steps: dict[str, int] = {}
    for record in log:
        steps[record["task"]] = steps.get(record["task"], 0) + 1
        assert record["grad_norm"] > 0
    tasks = config.tasks or json.loads((Path(config.stream) / "tasks.json").read_text())
    joint = list(steps) == ["all"]
    assert steps == ({"all": config.max_steps * len(tasks)} if joint else dict.fromkeys(tasks, config.max_steps))
    learned = snapshots(folder)
    backbone = load_backbone(config.model, config.dtype, config.attn_implementation)
    pool = make_pool(config, backbone)
    for place, weights in learned.items():
        name = place.split("/")[1]
        if name not in pool.names:
            pool.add(name)
        start = {key: value.clone() for key, value in pool._state(name).items()}  # type: ignore[attr-defined]
        assert max(float((weights[key] - start[key]).abs().max()) for key in start) > 1e-3


# --- one run of each method, looked at from several sides


class Finished:
    """A run of three tasks, two of which share a group, with what was in memory while it was made."""

    def __init__(self, config: Any, model: torch.nn.Module, fingerprint: str, states: list[dict[str, Any]]) -> None:
        self.config, self.model, self.fingerprint, self.states = config, model, fingerprint, states
        self.folder = Path(config.output_dir)


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, tiny_stream: Path, seeing: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """name → its run; each is made once."""
    made: dict[str, Finished] = {}

    def get(method: str) -> Finished:
        if method in made:
            return made[method]
        with pytest.MonkeyPatch.context() as patched:
            register_documented(patched)
            loaded: list[Any] = []
            states: list[dict[str, Any]] = []
            save = run_folder._save_method

            def remember(*arguments: Any) -> Any:
                loaded.append(load_backbone(*arguments))
                return loaded[-1]

            def keep(combined: Combined, folder: Path) -> None:
                states.append(combined.state_dict())
                save(combined, folder)

            patched.setattr(run, "load_backbone", remember)
            patched.setattr(run_folder, "_save_method", keep)
            config = parse_config(
                {
                    "stream": str(tiny_stream),
                    "model": str(tiny_model),
                    "method": method,
                    "output_dir": str(tmp_path_factory.mktemp("finished") / method),
                    "dtype": "float32",
                    "max_steps": 3,
                    "per_device_train_batch_size": 4,
                    "learning_rate": 1e-2,
                    "lora_r": 4,
                    "max_length": 256,
                    "max_new_tokens": 2,
                    "max_eval_examples": 1,
                    "logging_steps": 1,
                    **(seeing if method in NEEDS_IMAGES else {}),
                },
                where="test",
            )
            measure(config)
        made[method] = Finished(config, loaded[0].model, loaded[0].fingerprint, states)
        return made[method]

    return get


@pytest.mark.parametrize("method", entries())
def test_the_base_model_never_moves(documented, finished, method) -> None:
    """The very model in memory that was trained on, not a copy read again from disk."""
    found = finished(method)
    if method in TRAINS_NOTHING:
        assert not RunFolder(found.folder).records("stage_learned")
    else:
        require_training(found.config)
    base = {
        name.replace(".base_layer", ""): value
        for name, value in found.model.named_parameters()
        if "lora_" not in name and ".adapters." not in name
    }
    assert weights_sha256(base) == found.fingerprint


@pytest.mark.parametrize("method", entries())
def test_state_survives_save_and_load(documented, finished, method) -> None:
    """A run opened again carries the very state it ended with, its tensors in float32."""
    found = finished(method)
    combined = build_method(found.config.method_parts())
    expected = found.states[-1] if found.states else combined.state_dict()
    carries = any(type(leaf).state_dict is not Method.state_dict for leaf in combined.leaves())
    assert bool(expected) == (carries and method not in STATELESS)
    state = open_run(found.folder).method.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert state[key].dtype == value.dtype == torch.float32
            assert torch.equal(state[key], value)
        else:
            assert state[key] == value


@pytest.mark.parametrize("method", entries(TRAINS_NOTHING))
def test_what_a_method_says_of_its_tasks_is_what_it_does(documented, finished, method) -> None:
    """Compositions are refused by it: whether an adapter learns a second task, and what happens to its first."""
    found = finished(method)
    combined = build_method(found.config.method_parts())
    learned = RunFolder(found.folder).records("stage_learned")
    adapters = [next(iter(stage["placements"].values()))["adapter"] for stage in learned]
    if combined.one_task_per_adapter:
        assert len(set(adapters)) == len(adapters)
    else:
        assert len(set(adapters)) < len(adapters)
    first, plain = (snapshots(get.folder).get("colours/shared") for get in (found, finished("lora")))
    if first is not None and first.keys() == plain.keys():
        same = all(torch.equal(first[key], weight) for key, weight in plain.items())
        assert same == (combined.idle_on_first_task or method == "lora")


# --- runs of their own


@pytest.mark.parametrize("method", entries(TRAINS_NOTHING))
def test_a_killed_task_goes_on_to_the_same_bits(documented, law_config, tmp_path, monkeypatch, method) -> None:
    """The last task dies behind its checkpoint: weights, state, scores, log and counted passes are a whole run's.

    With dropout, so that random states count too.
    """
    options = {"method": method, "max_steps": 4, "save_steps": 2, "lora_dropout": 0.1}
    whole = measure(law_config(**options, output_dir=str(tmp_path / "whole")))
    on_step_end, taken = training._Moments.on_step_end, 0

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 11:  # of 12: the third task's third, or the only stage's eleventh
            raise Killed
        return on_step_end(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(training._Moments, "on_step_end", dying)
        with pytest.raises(Killed):
            measure(law_config(**options, output_dir=str(tmp_path / "cut")))
    (checkpoint,) = (tmp_path / "cut" / "state").iterdir()
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert step in (2, 10)
    assert (checkpoint / "complete.json").is_file()
    first: list[int] = []

    def counting(self: Any, args: Any, state: Any, *others: Any, **kwargs: Any) -> Any:
        first.append(state.global_step)
        return on_step_end(self, args, state, *others, **kwargs)

    monkeypatch.setattr(training._Moments, "on_step_end", counting)
    with Reporter() as reporter:
        resumed = resume(tmp_path / "cut", reporter)
    assert first == [step + 1, step + 2]  # nothing is trained twice
    for found in (whole, resumed):
        del found["date"]
        found["cost"] = {key: value for key, value in found["cost"].items() if key not in TIMES}
    assert resumed == whole
    for stage in RunFolder(tmp_path / "whole").records("stage_learned"):
        left, right = (tmp_path / run / "history" / stage["stage"] for run in ("whole", "cut"))
        files = sorted(path.relative_to(left) for path in left.rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(right) for path in right.rglob("*") if path.is_file())
        for file in files:
            if file.name != "README.md":
                assert (left / file).read_bytes() == (right / file).read_bytes(), file
    logs = [
        [
            {key: value for key, value in json.loads(line).items() if key != "examples_per_s"}
            for line in (tmp_path / run / "training_log.jsonl").read_text().splitlines()
        ]
        for run in ("whole", "cut")
    ]
    assert logs[0] == logs[1]
    require_training(law_config(**options, output_dir=str(tmp_path / "cut")))


@pytest.mark.parametrize("method", entries(TRAINS_NOTHING))
def test_trains_in_bfloat16_with_float32_adapters(documented, law_config, method) -> None:
    config = law_config(method, dtype="bfloat16", tasks=["colours", "paints"])
    measure(config)
    require_training(config)
    folder = Path(config.output_dir)
    for weights in snapshots(folder).values():
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
    session = open_run(folder)
    trained = {id(p) for name in session.pool.names for p in session.pool.parameters(name).values()}
    assert {p.dtype for p in session.pool.model.parameters() if id(p) not in trained} == {torch.bfloat16}
    tensors = [value for value in session.method.state_dict().values() if isinstance(value, torch.Tensor)]
    assert {tensor.dtype for tensor in tensors} <= {torch.float32}


@pytest.mark.parametrize(("whole", "part", "rows"), [(4, 2, 16), (6, 3, 5)], ids=["halves", "unequal"])
@pytest.mark.parametrize("method", entries(TRAINS_NOTHING))
def test_accumulated_micro_batches_are_one_batch(documented, law_config, tmp_path, method, whole, part, rows) -> None:
    """Two micro-batches accumulated give the update of the whole batch, to rounding; also 3 rows and then the last 2.

    Plain SGD without clipping: Adam would hide a loss that is wrong by a constant factor.
    """
    # A stiffer penalty is unstable under plain SGD with this learning rate, and makes much of rounding.
    mild = {"ewc": {"strength": 3.0}}
    pools = []
    for name, size, accumulation in (("whole", whole, 1), ("parts", part, 2)):
        config = law_config(
            method,
            mild.get(method),
            tasks=["colours", "paints"],
            max_train_examples=rows,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            output_dir=str(tmp_path / name),
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=0.3,
        )
        measure(config)
        require_training(config)
        pools.append(snapshots(tmp_path / name))
    assert pools[0].keys() == pools[1].keys()
    for place, weights in pools[0].items():
        for key, weight in weights.items():
            torch.testing.assert_close(weight, pools[1][place][key], atol=1e-6, rtol=1e-4)


def live_tensors() -> tuple[int, int]:
    """(how many tensors are alive, their elements together)."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return len(found), sum(tensor.numel() for tensor in found)


def held(method: Method) -> int:
    """Bytes of all Python objects that the method leads to, tensors apart: numbers in lists, rows, texts, settings.

    Counted once for every reference: a list of one row a thousand times is a long list.
    """
    size, seen, waiting = 0, {id(method)}, [method]
    while waiting:
        for part in gc.get_referents(waiting.pop()):
            if issubclass(type(part), ELSEWHERE):
                continue
            size += sys.getsizeof(part)
            if id(part) not in seen:
                seen.add(id(part))
                waiting.append(part)
    return size


def stored(method: Method) -> tuple[int, int]:
    """(tensor elements in the state, characters of the rest of it)."""
    state = method.state_dict()
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    rest = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    return sum(tensor.numel() for tensor in tensors), len(json.dumps(rest))


def sizes_by_step(make: Callable[..., Any], method: str, monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """[what is alive and stored after 3 steps of a stage, after 30] for each stage of a run.

    Every step sees all rows, replayed ones too, so that no padded batch is larger than another.
    """
    on_step_end, sizes = training._Moments.on_step_end, []

    def counting(self: Any, args: Any, state: Any, *others: Any, **kwargs: Any) -> Any:
        result = on_step_end(self, args, state, *others, **kwargs)
        if state.global_step in (3, 30):
            sizes.append((*live_tensors(), held(self._method), *stored(self._method)))
        return result

    monkeypatch.setattr(training._Moments, "on_step_end", counting)
    joint = method == "multi_task"  # its one stage has the steps, and the rows, of all tasks
    measure(
        make(
            method,
            tasks=["colours", "paints"],
            max_steps=15 if joint else 30,
            max_train_examples=2 if joint else 4,
            per_device_train_batch_size=8,
            logging_steps=30,
        )
    )
    return [sizes[i : i + 2] for i in range(0, len(sizes), 2)]


@pytest.mark.parametrize("method", entries(TRAINS_NOTHING))
def test_memory_does_not_grow_with_the_steps(documented, law_config, monkeypatch, method) -> None:
    found = sizes_by_step(law_config, method, monkeypatch)
    assert len(found) == (1 if method == "multi_task" else 2)
    for early, late in found:
        assert early == late


@pytest.mark.parametrize("what", ["nothing", "tensors", "numbers", "one row", "text", "closures", "state"])
def test_growing_memory_would_be_seen(law_config, monkeypatch, what) -> None:
    """Kept in a private list, the state saying nothing of it; or in the state."""

    class Leaking(Method):
        name = "leaking"

        def __init__(self) -> None:
            self._kept: list[Any] = []
            self._text = ""

        def begin(self, training: Training) -> None:
            self._training = training

        def after_step(self) -> None:
            step = len(self._kept) + len(self._text)
            if what == "text":
                self._text += "."
            elif what != "nothing":
                row = self._training.rows[0]
                kept = {"tensors": torch.zeros(1), "one row": row, "closures": partial(print, step)}
                self._kept.append(kept.get(what, 0.5 + step))

        def state_dict(self) -> dict[str, Any]:
            return {"kept": self._kept} if what == "state" else {}

        def load_state_dict(self, state: Any) -> None:
            self._kept = list(state.get("kept", []))

    monkeypatch.setitem(METHODS, "leaking", Leaking)
    for early, late in sizes_by_step(law_config, "leaking", monkeypatch):
        assert (early == late) == (what == "nothing")


@pytest.mark.parametrize("method", entries())
def test_an_unknown_option_is_refused(documented, method) -> None:
    with pytest.raises(UserError, match=f"{method} has no option 'no_such_option'"):
        build_method([(method, {"no_such_option": 1})])


# --- what some methods share


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lcia", {"retained": None}, "retained is null"),
        ("lcia", {"rule": "fisher", "retained": 0.3}, "the rule fisher has no constant"),
        ("lcia", {"retained": 0.3, "fallback": 0.99}, "retained and fallback are two ways"),
        ("stable_ema", {"retained": 0.3, "beta": 0.99}, "retained and beta are two ways"),
        ("llaca", {"strength": 0.3}, "strength: only the rule fisher has it; this rule is fixed"),
        ("llaca", {"rule": "eq45", "forgetting": 1.0}, "forgetting: only the rule fisher"),
        ("llaca", {"fisher_source": "adamw"}, "fisher_source: only the rule fisher"),
        ("llaca", {"rule": "fisher", "fisher_source": "per_example"}, "fisher_source must be running or adamw"),
    ],
)
def test_an_option_of_averaging_that_would_do_nothing_is_refused(method, options, message) -> None:
    with pytest.raises(UserError, match=message):
        build_method([(method, options)])


def test_a_fallback_replaces_the_default_of_retained() -> None:
    """`{name: lcia, rule: eq45, fallback: 0.99}` is the paper's rule with the paper's constant."""
    average = build_method([("lcia", {"rule": "eq45", "fallback": 0.99})]).leaves()[1]
    assert average.options == {"rule": "eq45", "rest": 0.0, "fallback": 0.99}
    assert build_method([("lcia", {})]).leaves()[1].options["retained"] == 0.3


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
    """lcia and a share of its way: groups as lcia alone, weights that stay closer."""
    alone = measure(tiny_config(output_dir=str(tmp_path / "alone")))
    both = measure(tiny_config(method=["lcia", {"name": "wise_ft", "alpha": 0.1}]))
    assert both["method"] == "lcia+wise_ft"
    assert both["groups"] == alone["groups"]
    moved = []
    for folder in (tmp_path / "alone", tmp_path / "run"):
        first, last = (_adapter(folder / "history" / task / "colours") for task in ("colours", "paints"))
        moved.append(sum(float((last[key] - first[key]).norm()) for key in first))
    assert moved[1] < 0.5 * moved[0]


def test_two_averages_are_refused() -> None:
    with pytest.raises(UserError, match="two parts average"):
        build_method([("lcia", {}), ("stable_ema", {})])


@pytest.mark.parametrize("source", ["running", "adamw"])
def test_fisher_importance_is_carried_between_tasks(source: str, tiny_config) -> None:
    config = tiny_config(method={"name": "lcia", "rule": "fisher", "fisher_source": source})
    results = measure(config)
    assert results["ema"]["fallback_fraction"] == 0.0
    assert 0.0 < results["ema"]["retained_mass"]["paints"] < 1.0
    state = open_run(Path(config.output_dir)).method.state_dict()
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert all((tensor >= 0).all() and tensor.dtype == torch.float32 for tensor in tensors)
    assert any((tensor > 0).any() for tensor in tensors)


def test_an_optimizer_without_second_moments_is_refused(tiny_config) -> None:
    config = tiny_config(method={"name": "lcia", "rule": "fisher", "fisher_source": "adamw"}, optim="sgd")
    with pytest.raises(UserError, match=r"fisher_source adamw reads the second moment.*'optim'"):
        measure(config)
