"""What is exported: plain PEFT and plain transformers load it, and it computes what the run computed."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lcia import cli, learning
from lcia.config import parse_config
from lcia.errors import UserError
from lcia.export import export_run, layouts, merge_active
from lcia.export.cards import adapter_card, serve_script, serving_guide
from lcia.export.source import open_source, prompt_examples
from lcia.grouping import load_routes
from lcia.progress import Reporter
from lcia.run import resume, train
from lcia.run_folder import RunFolder
from lcia.session import open_run
from lcia.stream import Row

PROMPT = torch.tensor([[7, 50, 61, 72, 83, 94, 105, 12]])
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
ALPHA, R = 6.0, 4


@pytest.fixture(scope="module")
def made(tiny_model, tiny_stream, tmp_path_factory) -> Any:
    """A finished run, made from a base that samples by default; keywords change its configuration."""
    model = tmp_path_factory.mktemp("base") / "tiny"
    shutil.copytree(tiny_model, model)
    GenerationConfig(do_sample=True, temperature=0.5, eos_token_id=1, pad_token_id=0).save_pretrained(model)

    def make(**changes: Any) -> Path:
        values = {
            "stream": str(tiny_stream),
            "model": str(model),
            "method": {"name": "lcia", "route_threshold": 0.3},
            "output_dir": str(tmp_path_factory.mktemp("run") / "mine"),
            "dtype": "float32",
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lora_r": R,
            "lora_alpha": ALPHA,
            "max_length": 256,
            "max_new_tokens": 2,
            "max_eval_examples": 2,
        }
        config = parse_config({**values, **changes}, where="test")
        with Reporter() as reporter:
            train(config, reporter)
        return Path(config.output_dir)

    return make


@pytest.fixture(scope="module")
def run(made) -> Path:
    return made()


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """The run once more, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


def loaded(folder: Any) -> Any:
    """With plain transformers, and the attention of a run on a CPU: sums in another order would end otherwise."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(PROMPT).logits


def expected_logits(run: Path, group: str | None) -> torch.Tensor:
    with open_run(run).pool.active(group) as model:
        return logits(model)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """{name of the weight: α/r · B·A}, float64, entry by entry from the files of one adapter."""
    state = {name: tensor.double() for name, tensor in load_file(folder / WEIGHTS).items()}
    found = {}
    for name, down in state.items():
        if ".lora_A." in name:
            up = state[name.replace(".lora_A.", ".lora_B.")]
            target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            found[target] = torch.stack([(row[:, None] * down).sum(0) for row in up]) * (ALPHA / R)
    assert found
    return found


# --- peft


def test_a_group_loads_with_plain_peft_and_gives_the_same_logits(run, tmp_path) -> None:
    exported = export_run(run, tmp_path / "out")
    assert exported.groups == ["colours", "animals"]
    assert exported.finished
    assert files(tmp_path / "out") == sorted(
        f"{group}/{name}" for group in exported.groups for name in ("README.md", SETTINGS, WEIGHTS)
    )
    for group in exported.groups:
        folder = tmp_path / "out" / group
        assert (folder / WEIGHTS).read_bytes() == (run / "pool" / group / WEIGHTS).read_bytes()
        base = json.loads((folder / SETTINGS).read_text())["base_model_name_or_path"]
        model = PeftModel.from_pretrained(loaded(base), folder)
        assert torch.equal(logits(model), expected_logits(run, group))
        assert not torch.allclose(logits(model), expected_logits(run, None), atol=1e-3)


def test_the_card_says_what_was_learned_and_how_well(run, tmp_path) -> None:
    export_run(run, tmp_path / "out", group="colours")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["colours"]
    card = (tmp_path / "out" / "colours" / "README.md").read_text()
    results = json.loads((run / "results.json").read_text())
    scores = dict(zip(results["tasks"], results["matrix"][-1], strict=True))
    for task in ("colours", "paints"):
        assert f"| {task} | {scores[task]:.1f} | {results['scorers'][task]} |" in card
    assert "| animals |" not in card
    assert "tasks learned, in order: colours, paints" in card
    assert "not finished" not in card
    assert str(open_source(run).base) in card
    assert "base_model:" not in card.partition("# colours")[0]  # a folder is no id of the hub


def test_the_card_of_a_hub_model_names_it(run) -> None:
    card = adapter_card(dataclasses.replace(open_source(run), base="owner/name"), "colours", "owner/name")
    assert "base_model: owner/name\n" in card
    assert "from_pretrained('owner/name', dtype='float32')" in card
    assert "find_model" not in card


METHODS = {
    "alone": {
        **{"name": "lcia", "rule": "eq45", "threshold": 0.7, "reduce": "max", "similarity": "sentence"},
        "route_threshold": 0.2,
    },
    "composed": [
        {"name": "lcia", "threshold": 0.7, "similarity": "sentence", "route_threshold": 0.2},
        {"name": "replay", "fraction": 0.05, "keep": "the first rows"},
        "ewc",
    ],
    "text": "lcia",
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_cards_tell_the_whole_method(run, method) -> None:
    """As the configuration states it, in one line however long it is."""
    source, session = open_source(run), open_run(run)
    config = source.config.model_copy(update={"method": method})
    cards = [
        adapter_card(dataclasses.replace(source, config=config), "colours", "base"),
        learning.model_card(dataclasses.replace(session, config=config), "colours"),
    ]
    for card in cards:
        (line,) = (line for line in card.splitlines() if line.startswith("- method: "))
        told = line.removeprefix("- method: ").removesuffix(", seed 0")
        assert json.dumps(yaml.safe_load(told)) == json.dumps(method)  # keys in their order, too


# --- the prompt that was trained


def form(text: str) -> str:
    """The first block of a card or guide that is code of no language."""
    return text.partition("\n\n```\n")[2].partition("\n```\n")[0]


def test_the_card_says_the_prompt_of_a_task_with_examples(made, tiny_stream, tmp_path) -> None:
    run = made(method="lora", stream=[{"name": "colours", "path": str(tiny_stream / "colours.jsonl"), "examples": 0}])
    source = open_source(run)
    assert source.examples == {"colours": 0}
    card = adapter_card(source, "shared", source.base)
    assert "a new line the instruction" not in card
    answered = json.loads((run / "predictions" / "1" / "colours.jsonl").read_text().splitlines()[0])
    asked = answered["id"].replace("-", " item ")
    assert form(card).replace("INSTRUCTION", "Name the colour").replace("INPUT", asked) in answered["prompt"]
    guide = serving_guide(source, "base/tiny")
    assert form(guide) == form(card)
    body = shlex.split(guide.partition("curl ")[2].partition("```")[0].replace("\\\n", " "))[-1]
    assert json.loads(body)["messages"] == [{"role": "user", "content": form(card)}]


def test_a_card_tells_tasks_with_examples_from_those_without(run) -> None:
    source = dataclasses.replace(open_source(run), examples={"colours": 2, "animals": None, "paints": None})
    card = adapter_card(source, "colours", "base")
    assert "**colours**: A prompt is" in card
    assert "**paints**: A prompt is" in card
    assert form(card).count("Positive Example") == 2
    assert form(card).endswith("\n\nNow complete the following example -\nInput: INPUT.\nOutput: ")
    plain = adapter_card(source, "animals", "base")
    assert "Positive Example" not in plain
    assert "`INPUT\\nINSTRUCTION\\n`). Answers were measured" in plain


LISTED = [{"name": "a", "path": "a.jsonl", "examples": 1}, {"name": "b", "path": "b.jsonl"}]


@pytest.mark.parametrize(
    ("stream", "task", "count"),
    [
        ("instrdialog", "a", 2),
        ({"name": "instrdialog", "order": 2}, "a", 2),
        ({"name": "instrdialog", "examples": 0}, "a", 0),
        (LISTED, "a", 1),
        (LISTED, "b", None),
        ({"name": "coin"}, "a", None),
        ("/data/folder", "a", None),
    ],
)
def test_what_a_configuration_says_of_examples(stream, task, count) -> None:
    assert prompt_examples(stream, task) == count


# --- merged


def test_a_merged_model_is_base_plus_adapter_to_fp32_rounding(run, tmp_path) -> None:
    exported = export_run(run, tmp_path / "out", "merged", group="animals")
    assert exported.rounding == 0
    source = Path(open_source(run).base)
    merged, base = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    change = updates(run / "pool" / "animals")
    assert set(merged) == set(base)
    assert set(change) < set(base)
    for name, weight in merged.items():
        assert weight.dtype == torch.float32
        if name in change:
            exact = base[name].double() + change[name]
            assert (weight.double() - exact).abs().max() <= 2**-22 * exact.abs().max()
            assert not torch.equal(weight, base[name])
        else:
            assert torch.equal(weight, base[name])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits(model), expected_logits(run, "animals"), atol=1e-5, rtol=0)
    kept = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert kept == json.loads((source / "generation_config.json").read_text())
    assert kept["do_sample"]
    text = [{"role": "user", "content": "hello"}]
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "out")]
    assert len({str(tokenizer.apply_chat_template(text)) for tokenizer in tokenizers}) == 1


def test_the_sum_is_rounded_once_and_the_loss_is_told(run, tmp_path) -> None:
    exported = export_run(run, tmp_path / "out", "merged", group="colours", dtype="bfloat16")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    base = load_file(Path(open_source(run).base) / "model.safetensors")
    change = updates(run / "pool" / "colours")
    error = 0.0
    for name, weight in merged.items():
        assert weight.dtype == torch.bfloat16
        exact = base[name].double() + change.get(name, 0)
        step = 2.0 ** (exact.abs().clamp(min=2**-20).log2().floor() - 7)  # between neighbours in bf16
        summed = 2.0**-22 * base[name].double().abs()  # the sum's own rounding in fp32, felt where it nearly cancels
        assert ((weight.double() - exact).abs() <= step * 0.501 + summed).all()
        error += (weight.double() - exact).square().sum().item() if name in change else 0.0
    size = sum(update.square().sum().item() for update in change.values())
    assert exported.rounding == pytest.approx((error / size) ** 0.5, rel=1e-4)
    assert exported.rounding > 1e-4
    assert f"{exported.rounding:.1%}" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_adapters_that_are_active_together_are_summed(tiny_model) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=R, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config, "one")
    model.add_adapter("two", config)
    model.base_model.set_adapter(["one", "two"])
    before = logits(model)
    merge_active(model, None)
    torch.testing.assert_close(logits(model.unload()), before, atol=1e-5, rtol=0)


def test_a_shared_weight_is_not_merged_into(tiny_model) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = get_peft_model(base, LoraConfig(r=R, target_modules=["lm_head"], init_lora_weights=False))
    with pytest.raises(UserError, match=r"shared.*embed_tokens"):
        merge_active(model, None)


def test_a_merged_model_of_an_adapter_that_learned_nothing_is_the_base(tiny_model) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = logits(base)
    model = get_peft_model(base, LoraConfig(r=R, target_modules=["q_proj"]))
    assert merge_active(model, None) == 0
    assert torch.equal(logits(model.unload()), before)


# --- vllm


@pytest.fixture
def served(run, tmp_path) -> Path:
    export_run(run, tmp_path / "served", "vllm")
    return tmp_path / "served"


def started(folder: Path, *options: str) -> tuple[str, list[str]]:
    """Run serve.sh from elsewhere with a stand-in for vllm: (its working directory, its arguments)."""
    stand_in = folder.parent / "bin" / "vllm"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text(f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.getcwd(), sys.argv[1:]]))\n")
    stand_in.chmod(0o755)
    environment = {**os.environ, "PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [folder / "serve.sh", *options], env=environment, cwd="/", check=True, capture_output=True, text=True
    )
    where, arguments = json.loads(done.stdout)
    return where, arguments


def test_the_script_starts_vllm_with_every_adapter(run, served) -> None:
    where, arguments = started(served, "--port", "8001")
    assert where == str(served.resolve())
    assert arguments[:2] == ["serve", "base"]
    flags = {arguments[i]: arguments[i + 1] for i in range(2, len(arguments) - 1) if arguments[i].startswith("--")}
    assert flags == {
        "--served-model-name": "base/tiny",
        "--dtype": "bfloat16",  # the run's float32 is nothing that vLLM's kernels for adapters take
        "--generation-config": "vllm",
        "--enable-lora": "--max-lora-rank",
        "--max-lora-rank": "8",  # the least allowed value that is not under r = 4
        "--max-loras": "2",
        "--max-cpu-loras": "2",
        "--port": "8001",
        "--lora-modules": "colours=adapters/colours",
    }
    assert arguments[-2:] == ["colours=adapters/colours", "animals=adapters/animals"]
    base = loaded(served / "base")
    assert torch.equal(logits(base), expected_logits(run, None))
    model = PeftModel.from_pretrained(base, served / "adapters" / "animals")
    assert torch.equal(logits(model), expected_logits(run, "animals"))
    assert AutoTokenizer.from_pretrained(served / "base").chat_template is not None


def test_names_that_a_shell_or_vllm_would_split(run) -> None:
    names = ["it's two words", "a=b, c", "$HOME"]
    script = serve_script(open_source(run), "owner/name", "owner/name", {name: f"adapters/{name}" for name in names}, 8)
    words = shlex.split(script.partition("exec ")[2].replace("\\\n", " "))
    modules = words[words.index("--lora-modules") + 1 :]
    assert modules[0] == "it's two words=adapters/it's two words"
    assert json.loads(modules[1]) == {"name": "a=b, c", "path": "adapters/a=b, c"}
    assert modules[2] == "$HOME=adapters/$HOME"


def test_routes_alone_send_requests_where_the_run_sends_them(run, served) -> None:
    requests = ["Name the colour", "Which animal is it", "Name the animal", "Translate to French"]
    session = open_run(run)
    expected = [match.group for match in session.method.route([Row("", text, (), ()) for text in requests])]
    assert None in expected
    assert {"colours", "animals"} <= set(expected)
    script = (
        "import json, sys\nfrom lcia.grouping import load_routes\nrouter = load_routes(sys.argv[1])\n"
        "print(json.dumps([match.group for match in router.route_many(sys.argv[2:])]))\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'peft')))"
    )
    command = [sys.executable, "-c", script, str(served / "routes.json"), *requests]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == expected
    routes = json.loads((served / "routes.json").read_text())
    assert routes["base"] == "base/tiny"
    assert (routes["threshold"], routes["route_threshold"]) == (0.9, 0.3)
    for group in routes["groups"].values():
        assert (served / group["adapter"] / WEIGHTS).is_file()


@pytest.mark.parametrize("text", ["", "[]", '{"threshold": 0.9}', None])
def test_a_file_that_holds_no_routes(tmp_path, text) -> None:
    if text is not None:
        (tmp_path / "routes.json").write_text(text)
    with pytest.raises(UserError, match=r"routes\.json"):
        load_routes(tmp_path / "routes.json")


def test_a_base_on_the_hub_is_named_not_copied(run, tmp_path, monkeypatch) -> None:
    source = dataclasses.replace(open_source(run), base="owner/name")
    monkeypatch.setattr(layouts, "open_source", lambda run: source)
    export_run(run, tmp_path / "out", "vllm")
    assert not (tmp_path / "out" / "base").exists()
    assert started(tmp_path / "out")[1][:4] == ["serve", "owner/name", "--served-model-name", "owner/name"]
    settings = json.loads((tmp_path / "out" / "adapters" / "animals" / SETTINGS).read_text())
    assert settings["base_model_name_or_path"] == "owner/name"


def test_one_adapter_needs_no_routes(made, tmp_path) -> None:
    run = made(method="lora", tasks=["colours"])
    export_run(run, tmp_path / "out", "vllm")
    assert not (tmp_path / "out" / "routes.json").exists()
    assert "Every request goes to `shared`" in (tmp_path / "out" / "README.md").read_text()
    assert export_run(run, tmp_path / "merged", "merged").groups == ["shared"]


# --- what is refused, and what an error leaves


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "gguf"}, "--as: 'gguf'"),
        ({"group": "colors"}, "Did you mean 'colours'"),
        ({"layout": "merged"}, "--group: colours, animals"),
        ({"layout": "vllm", "group": "colours"}, "every group"),
        ({"dtype": "float32"}, "--as merged"),
        ({"layout": "merged", "group": "colours", "dtype": "int8"}, "--dtype: 'int8'"),
    ],
)
def test_options_that_do_not_fit(run, tmp_path, options, message) -> None:
    with pytest.raises(UserError, match=message):
        export_run(run, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("change", "message"), [({"r": 513}, "513"), ({"task_type": "SEQ_2_SEQ_LM"}, "decoder-only")])
def test_what_vllm_does_not_serve(run, tmp_path, monkeypatch, change, message) -> None:
    source = open_source(run)
    altered = dataclasses.replace(source, lora={**source.lora, **change})
    monkeypatch.setattr(layouts, "open_source", lambda run: altered)
    with pytest.raises(UserError, match=message):
        export_run(run, tmp_path / "out", "vllm")


def test_sums_of_adapters_are_merged_or_refused(made, tmp_path) -> None:
    run = made(method="o_lora", tasks=["colours", "animals"])
    with pytest.raises(UserError, match="--as merged"):
        export_run(run, tmp_path / "out")
    assert export_run(run, tmp_path / "out", "merged").groups == ["colours+animals"]
    expected = expected_logits(run, "colours+animals")
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), expected, atol=1e-5, rtol=0)
    assert not torch.allclose(expected, expected_logits(run, "animals"), atol=1e-3)
    assert "learned, in order: colours, animals" in (tmp_path / "out" / "README.md").read_text()


def test_a_run_without_lora_adapters(made, copy, tmp_path) -> None:
    with pytest.raises(UserError, match="no adapter was learned"):
        export_run(made(method="zero_shot"), tmp_path / "out")
    ledger = copy / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace(WEIGHTS, "weights.safetensors"))
    with pytest.raises(UserError, match="not LoRA adapters"):
        export_run(copy, tmp_path / "out")


def test_an_altered_adapter_is_not_exported(copy, tmp_path) -> None:
    path = copy / "history" / "paints" / "animals" / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="not what the ledger recorded"):
        export_run(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(run, tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="name a new folder"):
            export_run(run, out)
    assert files(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("exists", [False, True])
def test_an_export_that_fails_leaves_nothing(run, tmp_path, monkeypatch, exists) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()
    original, written = layouts.write_text, []

    def failing(path: Path, text: str) -> None:
        if written:
            raise OSError("the disk is full")
        written.append(path)
        original(path, text)

    monkeypatch.setattr(layouts, "write_text", failing)
    with pytest.raises(OSError, match="full"):
        export_run(run, out)
    assert written
    assert out.exists() == exists
    assert files(tmp_path) == []
    monkeypatch.setattr(layouts, "write_text", original)
    (out / ".export.part" / "colours").mkdir(parents=True)  # left by a process that was killed
    export_run(run, out)
    assert sorted(path.name for path in out.iterdir()) == ["animals", "colours"]


# --- unfinished runs


def test_an_unfinished_run_is_exported_as_it_is(made, tmp_path, monkeypatch) -> None:
    class Killed(Exception):
        pass

    original, calls = learning.learn_task, []

    def dying(*arguments: Any, **named: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise Killed
        return original(*arguments, **named)

    monkeypatch.setattr(learning, "learn_task", dying)
    with pytest.raises(Killed):
        made(output_dir=str(tmp_path / "run"))
    monkeypatch.setattr(learning, "learn_task", original)
    exported = export_run(tmp_path / "run", tmp_path / "early")
    assert (exported.groups, exported.finished) == (["colours"], False)
    card = (tmp_path / "early" / "colours" / "README.md").read_text()
    assert "not finished**: 1 of 3 tasks are learned" in card
    assert "## Scores" not in card
    with Reporter() as reporter:
        resume(tmp_path / "run", reporter)
    assert export_run(tmp_path / "run", tmp_path / "late").finished


@pytest.mark.parametrize(
    ("line", "learned"),
    [
        ({"event": "extended", "data_sha256": {"later": "0"}}, "3 of 4 tasks"),
        ({"event": "rolled_back", "to": "animals"}, "2 of 2 tasks"),  # the row without the third task is not measured
        ({"event": "groups_changed"}, "3 of 3 tasks"),  # the weights are others than those measured
    ],
)
def test_results_of_before_are_not_told(copy, tmp_path, line, learned) -> None:
    assert (copy / "results.json").is_file()
    snapshot = RunFolder(copy).snapshots()[-1]
    with (copy / "ledger.jsonl").open("a") as ledger:
        ledger.write(json.dumps({**(snapshot if line["event"] == "groups_changed" else {}), **line}) + "\n")
    assert not export_run(copy, tmp_path / "out").finished
    card = (tmp_path / "out" / "colours" / "README.md").read_text()
    assert learned in card
    assert "## Scores" not in card


# --- the command


def test_the_command(run, tmp_path, monkeypatch, capsys) -> None:
    arguments = ["lcia", "export", str(run), str(tmp_path / "out"), "--group", "animals", "--as", "merged", "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    told = json.loads(capsys.readouterr().out)
    assert told["groups"] == ["animals"]
    assert told["rounding"] == 0
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "not empty" in capsys.readouterr().err
