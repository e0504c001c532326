"""Plans against runs: bytes against torch's allocator, steps and evaluations against a ledger, disk against files."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import lcia.evaluation
import lcia.learning
import lcia.planning.plan
import lcia.training
import llava_7b
from lcia import run
from lcia.config import load_config, parse_config
from lcia.errors import UserError
from lcia.grouping import Codebook
from lcia.machine import has_glibc
from lcia.methods import METHODS
from lcia.planning import Plan, plan_run
from lcia.planning.lengths import Lengths
from lcia.planning.live import LiveBytes
from lcia.planning.outline import outline
from lcia.planning.parts import ACTIVATIONS, ADAPTERS, BASE, CACHE, GATHERED, GRADIENTS, METHOD, OPTIMIZER
from lcia.planning.rehearsal import Rehearsal
from lcia.planning.table import size
from lcia.planning.zeros import floats_are_zero
from lcia.progress import Reporter
from lcia.session import load_run_stream
from lcia.stream import load_stream
from lcia.validate import planned_groups
from tiny_vision import square_stream, tiny_llava, tiny_qwen

Config = Callable[..., Any]
META = torch.device("meta")
BYTES_OF_AN_IMAGE = 3 * 28 * 28 * 4  # numpy makes them, unseen by torch's allocator
SMALL = {"tasks": ["colours"], "lora_target_modules": ["q_proj"], "per_device_train_batch_size": 2, "max_new_tokens": 1}


def plan(config: Any, **options: Any) -> Plan:
    with Reporter() as reporter:
        return plan_run(config, reporter, **options)


def train(config: Any) -> dict[str, Any]:
    with Reporter() as reporter:
        return run.train(config, reporter)


def printed(planned: Plan) -> str:
    console = Console(file=io.StringIO(), width=300)
    console.print(planned)
    return console.file.getvalue()


# --- five runs that were planned, and then made under the eyes of torch's allocator


@dataclass
class Allocated:
    """What torch's allocator gave out, by its own profiler: the peak of each call, in bytes above what there was."""

    peaks: list[int] = field(default_factory=list)

    @contextmanager
    def watch(self) -> Iterator[None]:
        with profile(profile_memory=True) as seen:
            yield
        events = (event for event in seen.kineto_results.events() if event.name() == "[memory]")
        total = peak = 0
        for _, change in sorted((event.start_ns(), event.nbytes()) for event in events):
            total += change
            peak = max(peak, total)
        self.peaks.append(peak)

    def around(self, module: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Watch every call of a function."""
        function = getattr(module, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            with self.watch():
                return function(*arguments, **options)

        monkeypatch.setattr(module, name, watched)


@dataclass
class Lived:
    """A run, and the plan of it."""

    config: Any
    planned: Plan
    learning: list[int]  # peak bytes of each stage, above what there was
    answering: int  # the same of all answers

    @property
    def stream(self) -> int:
        """Of all stages behind an Init stage."""
        return max(self.learning[1 if self.planned.init else 0 :])


LIVES: dict[str, dict[str, Any]] = {
    # one step is all rows of a task, so that the longest are in it
    "llama": {
        "method": {"name": "lcia", "rule": "fisher"},
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
    },
    "t5": {"method": "ewc", "attn_implementation": "sdpa", "tasks": ["colours", "paints"]},
    "llava": {"method": "lcia", "activation_checkpointing": True, "tasks": ["colours", "paints"]},
    "init": {"method": "llaca", "tasks": ["colours", "paints"], "init_max_steps": 1},
    # half of the prompts are much longer than the others
    "lengths": {"method": "lora"},
}


@pytest.fixture(scope="module")
def lives(
    tiny_model: Path, tiny_t5: Path, tiny_stream: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Lived]:
    """Makes one of `LIVES`, each once."""
    known: dict[str, Lived] = {}

    def make(kind: str) -> Lived:
        folder = tmp_path_factory.mktemp(kind)
        values = {
            "stream": str(tiny_stream),
            "model": str(tiny_t5 if kind == "t5" else tiny_model),
            "output_dir": str(folder / "run"),
            "dtype": "float32",
            "max_steps": 2,
            "per_device_train_batch_size": 16,
            "lora_r": 4,
            "max_length": 256,
            "max_new_tokens": 16,  # of which a plan generates four
            "logging_steps": 1,
            **LIVES[kind],
        }
        if kind == "llava":
            (folder / "squares").mkdir()
            values |= {"model": str(tiny_llava(folder / "model")), "stream": str(square_stream(folder / "squares"))}
        if kind == "lengths":
            values["stream"] = str(folder / "stream")
            _unlike_lengths(folder / "stream")
        if kind == "init":
            values["init_stream"] = {"path": str(tiny_stream), "tasks": ["animals", "paints"]}
        config = parse_config(values, "test")
        learning, answering = Allocated(), Allocated()
        gc.collect()  # or the last run's tensors would go while this one is watched
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setenv("LCIA_CACHE", str(folder / "cache"))  # no answers of other runs
            monkeypatch.setattr("lcia.backbone.loading._greedy", _endless)
            learning.around(lcia.learning, "learn_task", monkeypatch)
            answering.around(lcia.evaluation, "generate_answers", monkeypatch)
            planned = plan(config, memory_gib=100.0)
            train(config)
        return Lived(config, planned, learning.peaks, max(answering.peaks))

    def get(kind: str) -> Lived:
        if kind not in known:
            known[kind] = make(kind)
        return known[kind]

    return get


def _endless(model: Any, tokenizer: Any) -> Any:
    """No answer ends before its time."""
    from transformers import GenerationConfig

    start = getattr(model.config, "decoder_start_token_id", None)
    return GenerationConfig(do_sample=False, pad_token_id=tokenizer.pad_token_id, decoder_start_token_id=start)


def _unlike_lengths(folder: Path) -> None:
    folder.mkdir()
    rows = [
        {
            "instruction": "Name it",
            "input": "item " * (1 + 20 * (i % 2)) + str(i),
            "output": "red",
            "split": "train" if i % 3 else "test",
        }
        for i in range(48)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def without(moment: Any, *parts: str) -> int:
    return int(moment.peak - sum(moment.parts.get(part, 0) for part in parts))


@pytest.mark.parametrize("kind", LIVES)
def test_training_takes_the_bytes_that_were_planned(lives: Callable[[str], Lived], kind: str) -> None:
    """Gradients, the optimizer, averages and activations: all that lives above the weights of model and adapters."""
    lived = lives(kind)
    training = lived.planned.training
    assert training is not None
    images = 12 * BYTES_OF_AN_IMAGE if kind == "llava" else 0
    assert without(training, BASE, ADAPTERS) == pytest.approx(lived.stream + images, rel=0.05)
    assert sum(training.parts.values()) == training.peak <= lived.planned.peak


@pytest.mark.parametrize("kind", LIVES)
def test_answering_takes_the_bytes_that_were_planned(lives: Callable[[str], Lived], kind: str) -> None:
    lived = lives(kind)
    assert lived.planned.how.startswith("rehearsed")
    images = 3 * BYTES_OF_AN_IMAGE if kind == "llava" else 0
    above = without(lived.planned.evaluating, BASE, ADAPTERS, METHOD)  # what was there when a batch came
    assert above == pytest.approx(lived.answering + images, rel=0.05)


@pytest.mark.skipif(not has_glibc(), reason="another allocator leaves other gaps")
def test_a_process_takes_what_was_planned(tiny_model: Path, tmp_path: Path) -> None:
    """On a CPU, libraries and all: the highest resident memory of a run in a process of its own."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    _unlike_lengths(tmp_path / "stream")
    values = {
        "stream": str(tmp_path / "stream"),
        "model": str(tmp_path / "model"),
        "method": "lcia",
        "output_dir": str(tmp_path / "run"),
        "max_steps": 4,
        "per_device_train_batch_size": 16,
        "max_new_tokens": 4,
    }
    (tmp_path / "config.yaml").write_text(json.dumps(values))

    def command(*arguments: str) -> dict[str, Any]:
        words = [sys.executable, "-m", "lcia", *arguments, "--json"]
        on_cpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(words, cwd=tmp_path, env=on_cpu, capture_output=True, text=True, check=True)
        return dict(json.loads(done.stdout))

    planned, results = command("plan", "config.yaml"), command("train", "config.yaml")
    assert planned["peak"] > 700 * 2**20  # or it would say little
    assert planned["needed"] == planned["peak"] + planned["libraries"]
    assert planned["needed"] / 2**20 == pytest.approx(results["cost"]["peak_memory_mib"], rel=0.15)


def test_an_init_stage_is_a_run_before_the_run(lives: Callable[[str], Lived]) -> None:
    lived = lives("init")
    planned, folder = lived.planned, Path(lived.config.output_dir)
    init = planned.init
    assert init is not None
    assert without(init.training, BASE, ADAPTERS) == pytest.approx(lived.learning[0], rel=0.05)
    assert init.exchanging.parts[BASE] == 2 * planned.base_bytes
    assert planned.peak == max(init.training.peak, planned.training.peak, init.exchanging.peak)
    assert [(task.name, task.train_rows, task.eval_rows) for task in init.tasks] == [
        ("animals", 16, 0),
        ("paints", 16, 0),
    ]
    made = [len((log / "training_log.jsonl").read_text().splitlines()) for log in (folder / "init", folder)]
    assert [init.stage.steps, planned.steps] == [made[0], sum(made)]
    files = {path.stat().st_ino: path.stat().st_size for path in (folder / "init").rglob("*.safetensors")}
    assert 0 <= sum(files.values()) - planned.disk.init < 4000 * len(files)  # names and shapes of tiny tensors
    assert "Init: 2 tasks at once, 32 rows, 2 of the steps" in printed(planned)


def test_the_parts_are_what_they_are_called(lives: Callable[[str], Lived]) -> None:
    planned = lives("llama").planned
    numbers = planned.lora
    assert planned.projector == 0
    assert planned.training is not None
    parts = planned.training.parts
    assert parts[BASE] == planned.base_bytes
    assert planned.base_parameters == {"float32": 26944}
    assert parts[ADAPTERS] == 2 * 4 * numbers  # the groups of colours and of animals
    # AdamW's two means, and a count for each tensor
    assert parts[OPTIMIZER] == pytest.approx(2 * 4 * numbers, rel=0.02)
    assert parts[GRADIENTS] == planned.gradients == 4 * numbers  # of the micro-batch before
    assert parts[METHOD] >= 2 * 4 * numbers  # θ* and F
    assert parts[ACTIVATIONS] > 0
    assert lives("llava").planned.projector == 2 * (32 * 32 + 32)
    text = printed(planned)
    assert "fits, " in text
    assert "time: not measured" in text
    assert planned.fits


def test_rules_that_read_more_keep_more(tiny_config: Config) -> None:
    kept = {}
    for rule in ("fixed", "eq45", "eq12"):
        planned = plan(
            tiny_config(**{**SMALL, "method": {"name": "llaca", "rule": rule}, "tasks": ["colours", "paints"]})
        )
        assert planned.training is not None
        kept[rule] = planned.training.parts[METHOD]
    assert kept["fixed"] + 4 * planned.lora <= kept["eq45"]  # g_{t−1}
    assert kept["eq45"] + 4 * planned.lora <= kept["eq12"]  # θ_{t−1}


def test_longer_answers_take_more(tiny_config: Config) -> None:
    plans = [plan(tiny_config(**{**SMALL, "method": "zero_shot", "max_new_tokens": tokens})) for tokens in (144, 200)]
    shorter, longer = (planned.evaluating.parts[CACHE] for planned in plans)
    # of 2 layers, keys and values of 2 heads of 8 in float32, for 4 rows and 56 tokens more
    assert longer - shorter == 2 * 2 * 2 * 8 * 4 * 4 * 56


def test_a_gpu_has_kernels_that_keep_no_attention_weights(tiny_config: Config) -> None:
    wide = {"per_device_train_batch_size": 16, "lora_target_modules": "all-linear"}
    config = tiny_config(**{**SMALL, **wide, "method": "lora"})
    fused = plan(config, gpus=1)
    eager = plan(config.model_copy(update={"attn_implementation": "eager"}), gpus=1)
    assert fused.device == eager.device == "cuda"
    assert fused.training is not None
    assert eager.training is not None
    weights = 16 * 4 * 20 * 40 * 4  # of one layer: 16 rows, 4 heads, 20 tokens of their own, which see 40
    assert fused.training.parts[ACTIVATIONS] + weights < eager.training.parts[ACTIVATIONS]


def test_a_model_that_cannot_be_rehearsed_is_measured_with_fewer_layers(
    tiny_config: Config, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weights are needed for that either."""
    folder = without_weights(tiny_model, tmp_path / "model", num_hidden_layers=5)
    config = tiny_config(
        model=str(folder), tasks=["colours", "paints"], per_device_train_batch_size=16, max_new_tokens=8
    )
    rehearsed = plan(config)
    rehearse = lcia.planning.plan.rehearse

    def refusing(config: Any, backbone: Any, *others: Any) -> Rehearsal:
        if backbone.model.device == META:
            raise RuntimeError("numbers are wanted")
        return rehearse(config, backbone, *others)

    monkeypatch.setattr(lcia.planning.plan, "rehearse", refusing)
    measured = plan(config)
    assert rehearsed.how.startswith("rehearsed")
    assert "1 and 2 layers" in measured.how
    assert "numbers are wanted" in measured.how
    for one, other in ((rehearsed.training, measured.training), (rehearsed.evaluating, measured.evaluating)):
        assert one is not None
        assert other is not None
        # a peak is the largest of several: with few layers it may be another of them
        assert other.peak == pytest.approx(one.peak, rel=0.08)
        assert other.parts[BASE] == one.parts[BASE]
        assert other.parts[ADAPTERS] == one.parts[ADAPTERS]
    assert measured.lora == rehearsed.lora
    with pytest.raises(UserError, match="no weights"):
        train(config)


def without_weights(model: Path, folder: Path, **changes: Any) -> Path:
    """Configuration and tokenizer alone."""
    folder.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **changes}))
    return folder


@pytest.mark.parametrize(
    "method", [name for name in METHODS if name not in ("continual_llava", "eproj", "lcia", "llaca", "lora", "ewc")]
)
def test_every_method_can_be_planned(tiny_config: Config, method: str) -> None:
    planned = plan(tiny_config(**{**SMALL, "method": method, "tasks": ["colours", "paints"]}))
    adapters = {"zero_shot": 0, "o_lora": 2, "adapter_cl": 2}
    assert len(planned.adapters) == adapters.get(method, 1)
    assert planned.how.startswith("rehearsed")
    assert any("pgp" in note for note in planned.notes) == (method == "pgp")


# --- what is counted, against a run


def test_steps_cells_adapters_and_disk_are_those_of_the_run(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LCIA_CACHE", str(tmp_path / "cache"))  # no answers of other runs
    checkpoints = []
    mark = lcia.training.mark_complete

    def marked(folder: Path, *others: Any) -> None:
        mark(folder, *others)
        checkpoints.append(sum(path.stat().st_size for path in folder.iterdir()))

    monkeypatch.setattr(lcia.training, "mark_complete", marked)
    batches = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "save_steps": 2}
    config = tiny_config(max_steps=-1, num_train_epochs=1.5, max_length=41, **batches)
    planned = plan(config)
    results = train(config)
    folder = Path(config.output_dir)
    steps = [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]
    made = {task: sum(record["task"] == task for record in steps) for task in ("colours", "animals", "paints")}
    assert {stage.tasks[0]: stage.steps for stage in planned.stages} == made
    assert planned.steps == len(steps)
    left_out = {task.name: task.left_out for task in planned.tasks if task.left_out}
    assert left_out == results["left_out"]
    assert left_out  # some rows are longer than 41 tokens
    cost = results["cost"]
    assert planned.evaluations.cells == cost["evaluations_run"] + cost["evaluations_reused"]
    assert planned.evaluations.reusable >= cost["evaluations_reused"] > 0
    assert {task: name for name, tasks in planned.adapters.items() for task in tasks} == results["groups"]
    assert planned.lora == cost["trained_parameters"]
    assert planned.lora * len(planned.adapters) == cost["stored_parameters"]
    groups = planned_groups(load_run_stream(config), Codebook())
    assert {task.name: (task.adapter, task.similarity) for task in planned.tasks} == groups
    files = {path.stat().st_ino: path.stat().st_size for path in (folder / "history").rglob("*.safetensors")}
    headers = 4000 * len(files)  # names and shapes of tiny tensors
    assert 0 <= sum(files.values()) - planned.disk.history < headers
    pool = sum(path.stat().st_size for path in (folder / "pool").rglob("*.safetensors"))
    assert 0 <= pool - planned.disk.pool < headers
    # two of them, and the method's scratch space is none of a file
    assert max(checkpoints) < planned.disk.checkpoints < 4 * max(checkpoints)


@pytest.mark.parametrize("method", ["zero_shot", "multi_task", "o_lora"])
def test_cells_of_other_methods_are_those_of_their_runs(
    tiny_config: Config, method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LCIA_CACHE", str(tmp_path / "cache"))
    config = tiny_config(**{**SMALL, "method": method, "max_steps": 1, "tasks": ["colours", "animals"]})
    planned, cost = plan(config), train(config)["cost"]
    oracle = {"o_lora": 1}.get(method, 0)  # in the last row the first task is also answered by what learned it
    assert planned.evaluations.cells == cost["evaluations_run"] + cost["evaluations_reused"] - oracle
    assert planned.evaluations.reusable >= cost["evaluations_reused"] - oracle
    assert planned.disk.checkpoints == 0


@pytest.mark.parametrize(
    ("maker", "sizes"), [(tiny_llava, [(28, 28)]), (tiny_qwen, [(28, 28), (32, 28), (28, 90), (100, 16)])]
)
def test_tokens_of_rows_with_images_are_the_processors_own(
    maker: Callable[[Path], Path], sizes: list[tuple[int, int]], tmp_path: Path, tiny_config: Config
) -> None:
    (tmp_path / "rows").mkdir()
    rows = load_stream(str(square_stream(tmp_path / "rows")))[1].train
    seeing = next(row for row in rows if row.images)
    for number, wanted in enumerate(sizes):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", wanted).save(path)
        rows = (*rows, replace(seeing, images=(str(path), str(path))))
    turns = (("system", "Look."), ("user", "which"), ("assistant", "red"), ("user", "again"))
    rows = (*rows, replace(seeing, messages=turns, every_answer=True))
    folder = str(maker(tmp_path))
    for padding in (None, "square"):
        reader = outline(tiny_config(model=folder, image_padding=padding), "cpu").reader
        reader = reader.with_padding(padding)
        lengths = Lengths(reader)
        assert len({lengths(row).prompt for row in rows}) > 2
        for row in rows:
            encoded = reader.encode(row)
            counted = lengths(row)
            assert (counted.prompt, counted.answer) == (len(encoded.prompt), len(encoded.answer))
            if row.images:
                own = reader._process([encoded.text], [row.images])["input_ids"][0].tolist()
                assert list(encoded.prompt) == own
        assert reader._alike == {1: True, 2: True}


# --- LLaVA-1.5-7B, of which only the configuration is needed


def test_llava_7b_is_planned_from_its_configuration(tmp_path: Path) -> None:
    """All of it is outlined; two of its 32 layers are rehearsed."""
    config = load_config(llava_7b.write(tmp_path / "two", lengths=[1024], rows=2, layers=2))
    full = config.model_copy(update={"model": str(llava_7b.write_model(tmp_path / "full"))})
    numbers = sum(weights.numel() for weights in outline(full, "cuda").model.parameters())
    assert numbers == 7_063_427_072
    planned = plan(config.model_copy(update={"tasks": ["ScienceQA"], "max_new_tokens": 1}), gpus=1, memory_gib=80)
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008 + 2 * 4096
    assert planned.base_parameters == {"bfloat16": numbers - 30 * layer}
    # r (inputs + outputs) of q, k, v, o and of gate, up, down in 2 layers
    assert planned.lora == 128 * 2 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert planned.projector == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert planned.train_batch is not None
    assert planned.train_batch.longest == 1024
    assert planned.fits
    assert any("576 tokens" in note for note in planned.notes)


# --- several devices, and the command


def test_several_gpus_share_rows_and_what_can_be_sharded(tiny_config: Config) -> None:
    config = tiny_config(**{**SMALL, "max_steps": -1, "tasks": ["colours", "paints"]})
    one, four = plan(config, gpus=1), plan(config, gpus=4, memory_gib=1e-3)
    assert [stage.steps for stage in one.stages] == [8, 8]
    assert [stage.steps for stage in four.stages] == [2, 2]
    assert four.devices is not None
    assert four.training is not None
    ddp, sharded = four.devices.ddp, four.devices.fsdp2
    assert sharded is not None
    assert ddp.peak == four.training.peak + four.gradients
    for part in (BASE, ADAPTERS, OPTIMIZER, METHOD):
        assert sharded.parts[part] == four.training.parts[part] // 4
    assert sharded.parts[ACTIVATIONS] == four.training.parts[ACTIVATIONS]
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32  # q, k and v, o, the three of the MLP, two norms
    outside = 26944 - 2 * layer  # embeddings, which are the vocabulary too, and the last norm
    assert sharded.parts[GATHERED] == 4 * (2 * (layer + four.lora // 2) + outside)
    assert four.fits is (ddp.peak <= 1e-3 * 2**30)
    assert "(FSDP2)" in printed(four)
    assert any("not rehearsed" in note for note in four.notes)


def test_fsdp2_is_not_planned_where_it_would_be_refused(tiny_config: Config, tmp_path: Path) -> None:
    """Of the task `tints` only some rows have images."""
    values = {"stream": str(square_stream(tmp_path / "squares")), "model": str(tiny_llava(tmp_path / "llava"))}
    of_images = plan(tiny_config(**values, tasks=["colours", "paints"], max_length=512), gpus=2).devices
    mixed = plan(tiny_config(**values, tasks=["colours", "tints"], max_length=512), gpus=2).devices
    assert of_images is not None
    assert of_images.fsdp2 is not None
    assert mixed is not None
    assert mixed.fsdp2 is None


def test_the_command_writes_one_document_and_no_file(
    lcia: Callable[..., tuple[int, str, str]], tiny_config: Config, tmp_path: Path
) -> None:
    config = tiny_config(**{**SMALL, "method": "zero_shot"})
    path = tmp_path / "config.yaml"
    path.write_text(config.as_yaml())
    code, out, _ = lcia("plan", path, "--json", "--memory", "100")
    document = json.loads(out)
    assert code == 0
    assert document["fits"] is True
    assert document["measured"] is document["training_s"] is None
    assert not Path(config.output_dir).exists()
    code, out, _ = lcia("plan", path, "--memory", "0.0001")
    assert code == 0
    assert "does not fit" in out


def test_a_time_is_given_where_steps_were_made(tiny_config: Config) -> None:
    config = tiny_config(**{**SMALL, "max_steps": 7})
    planned = plan(config, measure=2)
    assert planned.measured is not None
    assert planned.measured.steps == 2
    assert planned.measured.seconds_per_step > 0
    assert planned.training_s == pytest.approx(7 * planned.measured.seconds_per_step)
    assert not Path(config.output_dir).exists()
    with pytest.raises(UserError, match="leave out --gpus"):
        plan(config, measure=2, gpus=1)


def operations(config: Any, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of every training of a run, by torch's own counter."""
    counted = 0
    learn = lcia.training.TaskTrainer.train

    def counting(*arguments: Any, **options: Any) -> Any:
        nonlocal counted
        with FlopCounterMode(display=False) as counter:
            result = learn(*arguments, **options)
        counted += counter.get_total_flops()
        return result

    monkeypatch.setattr(lcia.training.TaskTrainer, "train", counting)
    train(config)
    return counted


@pytest.mark.parametrize("method", ["lora", {"name": "agem", "memory": 2}])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_operations_are_those_that_a_run_makes(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int, method: Any
) -> None:
    """All rows are equally long. agem: once a step, not a batch."""
    row = {"input": "one two three", "instruction": "say it", "output": "four"}
    lines = [{**row, "id": str(i), "split": "train" if i < 12 else "test"} for i in range(16)]
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = tiny_config(
        stream=[{"name": name, "path": str(tmp_path / "same.jsonl")} for name in ("same", "again")],
        method=method,
        tasks=None,
        max_steps=-1,
        num_train_epochs=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
    )
    planned, counted = plan(config, tflops=2.0), operations(config, monkeypatch)
    assert counted > 0
    assert planned.flops == pytest.approx(counted, rel=1e-3)
    assert planned.training_s == pytest.approx(planned.flops / 2e12)
    assert "floating-point operations in products of matrices" in printed(planned)
    assert "if the device makes 2 · 10¹² of them a second" in printed(planned)
    with pytest.raises(UserError, match="two ways to a time"):
        plan(config, tflops=2.0, measure=1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_of_rows_of_unlike_lengths(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """One row in sixteen is long: in a padded batch (layers that are computed again) the others pay for it."""
    rows = [
        {"input": "one " * (40 if i % 16 == 0 else 1 + i % 3), "instruction": "say it", "output": "four", "id": str(i)}
        for i in range(64)
    ]
    lines = [{**row, "split": "train" if i < 60 else "test"} for i, row in enumerate(rows)]
    (tmp_path / "unlike.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = tiny_config(
        stream=[{"name": "unlike", "path": str(tmp_path / "unlike.jsonl")}],
        method="lora",
        tasks=None,
        max_steps=-1,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        activation_checkpointing=checkpointing,
    )
    planned, counted = plan(config).flops, operations(config, monkeypatch)
    assert planned == pytest.approx(counted, rel=0.15)


def test_a_task_that_shares_nothing_takes_more_than_a_longer_one_that_does(tiny_config: Config, tmp_path: Path) -> None:
    """What all rows begin with is passed once: the batch with most tokens is not the one with most to pass."""
    said = {"alike": "the same long words before everything " * 3, "unlike": ""}
    for name, first in said.items():
        inputs = [f"{first}{i}" if first else f"{i} " + f"word{i} " * 12 for i in range(12)]
        lines = [
            {"input": "", "instruction": text, "output": "four", "id": str(i), "split": "train" if i < 8 else "test"}
            for i, text in enumerate(inputs)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def peak(*names: str) -> int:
        stream = [{"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in names]
        found = plan(tiny_config(stream=stream, method="lora", tasks=None, max_steps=2, per_device_train_batch_size=8))
        assert found.training is not None
        return found.training.peak

    alike, unlike = peak("alike"), peak("unlike")
    assert unlike > alike
    assert peak("alike", "unlike") == pytest.approx(unlike, rel=0.02)


def test_a_run_that_would_be_refused_is_not_planned(tiny_config: Config, tiny_stream: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lora_target_modules"):
        plan(tiny_config(lora_target_modules=["nowhere"]))
    with pytest.raises(UserError, match="no training row fits"):
        plan(tiny_config(max_length=8))
    with pytest.raises(UserError, match="reads text only"):
        plan(tiny_config(stream=str(square_stream(tmp_path))))
    with pytest.raises(UserError, match="an adapted weight is shared"):
        plan(tiny_config(init_stream=str(tiny_stream), lora_target_modules=["lm_head"]))


# --- arithmetic without numbers


def test_integers_are_computed_and_floats_are_zero() -> None:
    with floats_are_zero("cpu"):
        weights = torch.ones(5, 3, device="meta")
        ids = torch.tensor([4, 1, 1], device="meta")
        assert ids.tolist() == [4, 1, 1]
        assert torch.arange(3, device="meta").sum().item() == 3
        rows = weights[ids]
        assert (rows.is_meta, rows.shape) == (True, (3, 3))
        assert rows[ids == 1].shape == (2, 3)
        assert rows.masked_select(ids[:, None] == 1).shape == (6,)
        assert float(rows.sum()) == 0.0
        assert rows.sum(0).tolist() == [0.0, 0.0, 0.0]
        assert bool(torch.isfinite(rows).all())
        assert rows.argmax(-1).tolist() == [0, 0, 0]
        values, chosen = rows.topk(2)
        assert values.is_meta
        assert chosen.shape == (3, 2)
        assert not chosen.is_meta
        assert (chosen == 0).nonzero().shape[1] == 2
        real = torch.full((3,), 7.0)
        real.copy_(rows[0])
        assert real.tolist() == [0.0, 0.0, 0.0]


def test_results_have_the_shape_dtype_and_strides_that_torch_gives_them() -> None:
    """The short way, against real tensors."""
    matrix, turned, row = torch.ones(4, 3), torch.ones(3, 4).T, torch.ones(3)
    column, number, whole = torch.ones(4, 1), torch.tensor(2.0), torch.ones(4, 3, dtype=torch.long)
    others = [matrix, turned, row, column, number, whole, matrix.double(), matrix.bfloat16(), torch.ones(1, 4, 3)]
    cases: list[tuple[Any, ...]] = [(torch.sqrt, one) for one in (matrix, turned, number)]
    for one in (matrix, turned, row, column, number, torch.ones(3).double()):
        cases += [(do, one, other) for other in others for do in (torch.add, torch.sub, torch.mul, torch.div)]
    cases += [(torch.Tensor.add_, matrix, row), (torch.Tensor.mul_, turned, 2.0), (torch.mul, matrix, 0.5)]
    for do, *inputs in cases:
        real = do(*(part.clone() if isinstance(part, torch.Tensor) else part for part in inputs))
        with floats_are_zero("cpu"):
            moved = [
                part.to("meta") if isinstance(part, torch.Tensor) and part.is_floating_point() else part
                for part in inputs
            ]
            shown = do(*moved)
        assert (shown.shape, shown.dtype) == (real.shape, real.dtype), (do, inputs)
        assert shown.squeeze().stride() == real.squeeze().stride(), (do, inputs)


def test_what_a_random_draw_decides_is_not_made_up() -> None:
    with floats_are_zero("cpu"):
        kept, dropped = torch.native_dropout(torch.ones(8, device="meta"), 0.5, True)
        assert kept.is_meta
        assert dropped.is_meta
        for decide in (
            dropped.nonzero,
            lambda: bool(dropped.any()),
            lambda: torch.zeros(8, dtype=torch.bool).copy_(dropped),
        ):
            with pytest.raises(RuntimeError, match="drawn at random"):
                decide()


def test_gradients_have_shapes_without_numbers() -> None:
    with floats_are_zero("cpu"):
        weights = torch.nn.Parameter(torch.ones(5, 3, device="meta"))
        target = torch.tensor([2, 0])
        loss = torch.nn.functional.cross_entropy(weights[torch.tensor([4, 1])], target)
        loss.backward()
        assert weights.grad is not None
        assert (weights.grad.is_meta, weights.grad.shape) == (True, (5, 3))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_keeps_no_weights(device: str, masked: bool) -> None:
    with floats_are_zero(device), LiveBytes() as live:
        parts = [torch.empty(2, 4, 64, 8, device="meta", requires_grad=True) for _ in range(3)]
        before = live.peak
        mask = torch.ones(2, 1, 64, 64, dtype=torch.bool) if masked else None
        result = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, is_causal=not masked)
        result.sum().backward()
        assert result.shape == parts[0].shape
        assert all(part.grad is not None and part.grad.shape == part.shape for part in parts)
        one, weights = 2 * 4 * 64 * 8 * 4, 2 * 4 * 64 * 64 * 4
        assert live.peak - before < 6 * one + (weights if masked else 0)  # a mask becomes numbers
        assert torch.ones(2).is_cuda == (device == "cuda")
    assert not torch.ones(2).is_cuda


def test_live_bytes_are_counted_once_and_until_they_go() -> None:
    there = torch.zeros(10)
    with LiveBytes(lambda tensor: "named" if tensor.shape == (3,) else None) as live:
        live.add([there], "old")
        with live.part("new"):
            first = torch.ones(100)
            view = first.view(10, 10)[2:]
        named = torch.ones(3)
        assert live.now == {"old": 40, "new": 400, "named": 12}
        live.move(first, "moved")
        del first
        assert live.now["moved"] == 400  # the view holds it
        del view
        assert live.now["moved"] == 0
        assert (live.peak, live.at_peak["new"]) == (452, 400)
        live.forget_peak()
        assert live.peak == 52
        del named
    assert live.now == {"old": 40, "new": 0, "named": 0, "moved": 0}


def test_sizes_have_three_digits() -> None:
    expected = {0: "0 B", 999: "999 B", 1000: "0.977 KiB", 1536: "1.5 KiB", 10 * 2**20: "10 MiB", 2**40: "1 TiB"}
    assert {count: size(count) for count in expected} == expected
