"""Models that see, on tiny random LLaVA and Qwen-VL: batches, what is trained, projectors, a whole run."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, AutoProcessor

from conftest import interrupted
from lcia import run
from lcia.adapters import AdapterPool, find_projector, language_targets
from lcia.adapters.projector import PROJECTOR_FILE, Projectors
from lcia.answering import answer_requests
from lcia.backbone import Backbone, answer_logits, load_backbone, packing
from lcia.backbone.loading import weights_sha256
from lcia.errors import UserError
from lcia.evaluation import Decoding, generate_answers
from lcia.export import export_run
from lcia.methods import METHODS
from lcia.progress import Reporter
from lcia.report import load_run, write_report
from lcia.run import resume, train
from lcia.session import load_run_stream, make_pool, open_run
from lcia.stream import Row, load_stream
from lcia.training import TaskTrainer
from tiny_vision import COLOURS, IMAGE, square_stream, tiny_llava, tiny_qwen, tiny_qwen3, tiny_qwen25

MAKERS = {"llava": tiny_llava, "qwen": tiny_qwen, "qwen2.5": tiny_qwen25, "qwen3": tiny_qwen3}
TWO = ("llava", "qwen")  # one of each layout, where a model more tells nothing more


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return square_stream(tmp_path_factory.mktemp("squares"))


@pytest.fixture(params=list(MAKERS))
def backbone(request: pytest.FixtureRequest, models: dict[str, Path]) -> Backbone:
    return load_backbone(str(models[request.param]), dtype="float32")


@pytest.fixture
def see_config(tiny_config: Callable[..., Any], models: dict[str, Path], squares: Path) -> Callable[..., Any]:
    def make(model: str = "llava", **changes: Any) -> Any:
        return tiny_config(**{"model": str(models[model]), "stream": str(squares), **changes})

    return make


def measure(config: Any) -> dict[str, Any]:
    with Reporter() as reporter:
        return train(config, reporter)


def some_rows(squares: Path) -> list[Row]:
    """With an image, without one, and with two."""
    stream = load_stream(str(squares))
    seeing, other = [row for row in stream[1].train if row.images][:2]
    text = next(row for row in stream[1].train if not row.images)
    return [seeing, text, replace(other, images=(*other.images, *seeing.images))]


# --- batches


def test_a_batch_of_text_and_images_is_its_rows_one_by_one(backbone: Backbone, squares: Path) -> None:
    rows = [backbone.reader.encode(row) for row in some_rows(squares)]
    logits, targets = answer_logits(backbone.model, backbone.reader.collate(rows))
    alone = [answer_logits(backbone.model, backbone.reader.collate([row])) for row in rows]
    torch.testing.assert_close(logits, torch.cat([part for part, _ in alone]), rtol=1e-4, atol=1e-5)
    assert targets.tolist() == [token for row in rows for token in row.answer]


def test_the_loss_sees_the_plain_model_s_logits(backbone: Backbone, squares: Path) -> None:
    """Against the model called as its own documentation does, with all positions and all logits."""
    for row in some_rows(squares):
        encoded = backbone.reader.encode(row)
        logits, _ = answer_logits(backbone.model, backbone.reader.collate([encoded]))
        images = [Image.open(path) for path in row.images]
        shown = dict(backbone.reader.chat(text=[encoded.text], images=images, return_tensors="pt")) if images else {}
        prompt = shown.pop("input_ids", torch.tensor([encoded.prompt]))
        assert prompt[0].tolist() == list(encoded.prompt)
        answer = torch.tensor([encoded.answer])
        shown["attention_mask"] = torch.ones(1, len(encoded), dtype=torch.long)
        if "mm_token_type_ids" in shown:
            shown["mm_token_type_ids"] = torch.cat([shown["mm_token_type_ids"], torch.zeros_like(answer)], dim=1)
        full = backbone.model(input_ids=torch.cat([prompt, answer], dim=1), use_cache=False, **shown).logits[0]
        torch.testing.assert_close(logits, full[len(encoded.prompt) - 1 : -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("written", ["", "<|system|>"])
def test_prompts_begin_as_transformers_begins_them(models: dict[str, Path], squares: Path, written: str) -> None:
    """LLaVA-1.5's template leaves the token that begins a text to its tokenizer; others write it."""
    reader = load_backbone(str(models["llava"]), dtype="float32").reader
    begin = "<|system|>"  # any token that the vocabulary has
    tokenizer = reader.tokenizer
    tokenizer.bos_token = begin
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    reader.chat.chat_template = written + reader.chat.chat_template
    for row in some_rows(squares):
        parts = [{"type": "image", "path": path} for path in row.images] + [
            {"type": "text", "text": row.messages[0][1]}
        ]
        turns = [{"role": "user", "content": parts}]
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        expected = reader.chat.apply_chat_template(turns, **options)["input_ids"][0]
        assert list(reader.encode_prompt(row).prompt) == list(expected)
        assert (expected[0], list(expected).count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)
        if row.images:
            assert reader.collate([reader.encode(row)])["input_ids"][0].tolist()[: len(expected)] == list(expected)


def test_the_text_before_the_first_image_is_read_once(models: dict[str, Path], squares: Path) -> None:
    backbone = load_backbone(str(models["llava"]), dtype="float32")
    said = "the same long beginning of every one of them"
    rows = [replace(row, messages=(("system", said), *row.messages)) for row in some_rows(squares)[::2]]
    batch = backbone.reader.collate([backbone.reader.encode(row) for row in rows])
    packed = packing.of_batch(backbone.model, batch, backbone.model.config.image_token_id)
    assert packed is not None
    text = backbone.reader.encode(rows[0]).text
    assert packed.shared == len(backbone.tokenizer(text[: text.index(IMAGE)])["input_ids"])
    logits, _ = answer_logits(backbone.model, batch)
    alone = [answer_logits(backbone.model, backbone.reader.collate([backbone.reader.encode(row)]))[0] for row in rows]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-4, atol=1e-5)
    prompts = [backbone.reader.encode_prompt(row) for row in rows]
    pool = AdapterPool(backbone.model, {"r": 2, "target_modules": language_targets(backbone.model, "all-linear")}, "x")
    decoding = Decoding(max_new_tokens=5, batch_size=3, max_length=256)
    together = generate_answers(pool, backbone.reader, [None] * 2, prompts, decoding)
    assert together == [generate_answers(pool, backbone.reader, [None], [one], decoding)[0] for one in prompts]


def test_another_image_gives_another_answer(backbone: Backbone, squares: Path) -> None:
    rows = [row for row in load_stream(str(squares))[0].train if row.images][:2]
    asked = [replace(rows[0], images=row.images) for row in rows]
    first, second = (answer_logits(backbone.model, backbone.reader.collate([backbone.reader.encode(r)])) for r in asked)
    assert (first[0] - second[0]).abs().max() > 1e-3


def test_answers_of_a_batch_are_those_of_its_rows(backbone: Backbone, squares: Path) -> None:
    pool = AdapterPool(backbone.model, {"r": 2, "target_modules": language_targets(backbone.model, "all-linear")}, "x")
    pool.add("a")
    prompts = [backbone.reader.encode_prompt(row) for row in some_rows(squares)]
    decoding = Decoding(max_new_tokens=5, batch_size=3, max_length=256)
    together = generate_answers(pool, backbone.reader, ["a"] * 3, prompts, decoding)
    assert together == [generate_answers(pool, backbone.reader, ["a"], [one], decoding)[0] for one in prompts]


def test_text_that_stands_for_an_image_is_refused_with_the_row(backbone: Backbone) -> None:
    token = backbone.reader.image_token  # type: ignore[attr-defined]
    row = Row("1", "x", (("user", f"what does {token} mean"),), ("y",), source="file.jsonl:7")
    with pytest.raises(UserError, match=r"file\.jsonl:7.*stands for an image"):
        backbone.reader.encode(row)


# --- what is trained


def test_lora_changes_the_language_model_alone(backbone: Backbone, see_config: Callable[..., Any]) -> None:
    pool = make_pool(see_config(), backbone)
    pool.add("a")
    trained = pool.train_only("a")
    projector = pool.projector_parameters("a")
    assert projector
    assert all(".language_model." in name for name in set(trained) - projector)
    assert len({name.split(".lora_")[0] for name in set(trained) - projector}) == 2 * 7  # layers x linear layers
    assert all(weights.dtype == torch.float32 for weights in trained.values())
    # Qwen3-VL's other projectors, of what earlier layers of its tower see, stay frozen
    assert not any("deepstack" in name for name in trained)


@pytest.mark.parametrize(
    ("targets", "named"),
    [(r".*\.vision_tower\..*q_proj", "language model"), (["fc1"], "language model"), (r".*q_proj", "vision_tower")],
)
def test_a_target_in_the_vision_tower_is_refused(models: dict[str, Path], targets: Any, named: str) -> None:
    model = load_backbone(str(models["llava"]), dtype="float32").model
    with pytest.raises(UserError, match=f"lora_target_modules.*{named}"):
        language_targets(model, targets)


def test_targets_by_their_ends_are_those_of_the_language_model(models: dict[str, Path]) -> None:
    model = load_backbone(str(models["llava"]), dtype="float32").model
    pool = AdapterPool(model, {"r": 2, "target_modules": language_targets(model, ["q_proj", "v_proj"])}, "x")
    pool.add("a")
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in pool.parameters("a")} == {"q_proj", "v_proj"}
    assert all(".language_model." in name for name in pool.parameters("a"))


def test_an_unknown_projector_is_named(models: dict[str, Path]) -> None:
    model = load_backbone(str(models["llava"]), dtype="float32").model
    with pytest.raises(UserError, match=r"key 'projector'.*no module bridge"):
        find_projector(model, "bridge", "tiny")
    assert find_projector(model, "none", "tiny") is None
    assert find_projector(model, "auto", "tiny") == "model.multi_modal_projector"


class Sized(torch.nn.Module):
    """A projector that is told the images' sizes and a mask, as those of Mistral 3, Idefics and Aria are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, sizes: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        parts = x.split(sizes.tolist())  # numbers that must stay whole
        return self.linear(torch.cat(parts)) * (1 if mask is None else mask[:, None])


def test_a_projector_may_be_given_more_than_features() -> None:
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.bridge = Sized().bfloat16()
    projectors = Projectors(model, "bridge")  # type: ignore[arg-type]
    x, sizes, mask = torch.randn(5, 4).bfloat16(), torch.tensor([2, 3]), torch.tensor([1, 0, 1, 1, 0])
    projectors.add("a")
    before = model.bridge(x, sizes, mask=mask)
    projectors.active = "a"
    torch.testing.assert_close(model.bridge(x, sizes, mask=mask), before, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        next(iter(projectors.parameters("a").values())).zero_()  # the weights: the bias is left
    bias = model.bridge.linear.bias * mask[:, None]
    torch.testing.assert_close(model.bridge(x, sizes, mask=mask), bias)


def test_another_image_processor_is_another_engine_and_stops_a_run(
    tiny_config: Callable[..., Any], tmp_path: Path, models: dict[str, Path], squares: Path
) -> None:
    """Same weights, same number of tokens, other pixels: no kept answer may pass for one of these."""
    copied = tmp_path / "model"
    shutil.copytree(models["llava"], copied)
    config = tiny_config(model=str(copied), stream=str(squares), tasks=["colours"], max_steps=1)
    measure(config)
    folder = Path(config.output_dir)
    before = open_run(folder).engine()
    assert open_run(folder).engine() == before
    settings = next(path for path in copied.glob("*processor_config.json") if "image_mean" in path.read_text())
    text = settings.read_text()
    settings.write_text(re.sub(r'("image_mean": \[)[^,]*', r"\g<1>0.25", text))
    assert settings.read_text() != text
    with pytest.raises(UserError, match=r"image processor of model .* is not the one the run began with"):
        open_run(folder)
    settings.write_text(text)
    assert open_run(folder).engine() == before


def test_the_projector_has_a_learning_rate_of_its_own(
    see_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: Counter[float] = Counter()
    original = TaskTrainer.create_optimizer

    def noted(self: TaskTrainer, model: Any = None) -> Any:
        optimizer = original(self, model)
        for group in optimizer.param_groups:
            rates[group["lr"]] += len(group["params"])
        return optimizer

    monkeypatch.setattr(TaskTrainer, "create_optimizer", noted)
    config = see_config(tasks=["colours"], projector_learning_rate=1e-3, max_steps=1)
    measure(config)
    assert rates == {1e-2: 2 * 7 * 2, 1e-3: 4}  # A and B of 14 matrices; two matrices and biases


# --- a whole run


@pytest.mark.parametrize(
    ("model", "method"), [*((model, "lcia") for model in MAKERS), ("llava", {"name": "moelora", "experts": 2})]
)
def test_a_run_keeps_each_group_s_projector_and_touches_nothing_else(
    see_config: Callable[..., Any], model: str, method: Any
) -> None:
    config = see_config(model, method=method)
    before = load_backbone(config.model, dtype="float32").fingerprint
    results = measure(config)
    assert all(score is not None for score in results["matrix"][-1])
    session = open_run(Path(config.output_dir))
    base = {name: w for name, w in session.backbone.model.named_parameters() if ".adapters." not in name}
    base = {name.replace(".base_layer", ""): weights for name, weights in base.items() if ".lora_" not in name}
    assert weights_sha256(base) == before
    pool = session.pool
    start = session.backbone.model.get_submodule(find_projector(session.backbone.model, "auto", "x") or "")
    untrained = [weights for name, weights in start.named_parameters() if not name.startswith("adapters.")]
    copies = {
        name: [pool.parameters(name)[key] for key in sorted(pool.projector_parameters(name))] for name in pool.names
    }
    for name, weights in copies.items():
        moved = sum(
            float((mine - old).abs().max()) for mine, old in zip(weights, sorted_like(untrained, weights), strict=True)
        )
        assert moved > 1e-4, name
        saved = load_file(Path(config.output_dir) / "pool" / name / PROJECTOR_FILE)
        assert all(torch.equal(saved[key], mine) for key, mine in zip(sorted(saved), weights, strict=True))
        assert set(saved) <= set(base)  # the names of the base's own
    if len(pool.names) > 1:
        assert any(not torch.equal(a, b) for a, b in zip(*copies.values(), strict=True))


def sorted_like(weights: list[Any], others: list[Any]) -> list[Any]:
    """`weights` in an order in which their shapes are those of `others`."""
    left = list(weights)
    return [left.pop(next(i for i, w in enumerate(left) if w.shape == other.shape)) for other in others]


def test_projectors_after_the_second_task_are_those_learned(
    see_config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released code writes the projector under other keys than it reads: after a restart it is the base's again."""
    learned: dict[str, torch.Tensor] = {}
    original = run.learn_stage

    def noted(session: Any, stage: Any, reporter: Any) -> None:
        original(session, stage, reporter)
        for name in session.pool.names:
            parameters = session.pool.parameters(name)
            learned.update({key: parameters[key].clone() for key in session.pool.projector_parameters(name)})

    monkeypatch.setattr(run, "learn_stage", noted)
    config = see_config(tasks=["colours", "tints"])
    measure(config)
    again = open_run(Path(config.output_dir)).pool
    found = {key: again.parameters(name)[key] for name in again.names for key in again.projector_parameters(name)}
    assert len(found) == 8
    assert found.keys() == learned.keys()
    assert all(torch.equal(found[key], learned[key]) for key in found)


def test_projector_weights_under_other_names_are_refused(
    backbone: Backbone, see_config: Callable[..., Any], tmp_path: Path
) -> None:
    """What makes the released code lose the projector without a word is an error here."""
    pool = make_pool(see_config(), backbone)
    pool.add("a")
    pool.save("a", tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    state = load_file(path)
    projector = [key for key in state if ".lora_" not in key]
    assert projector
    for key in projector:
        state[key.replace("base_model.model.", "")] = state.pop(key)
    save_file(state, path)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: its weights do not fit"):
        pool.load("a", tmp_path / "a")


def test_the_average_holds_the_projector(see_config: Callable[..., Any]) -> None:
    """Retained mass 1 keeps everything: the second task of the group must not move its projector."""
    kept = {}
    for tasks in (["colours"], ["colours", "paints"]):
        method = {"name": "lcia", "rule": "fixed", "fallback": 1.0}
        config = see_config(tasks=tasks, method=method, output_dir=str(Path(see_config().output_dir) / str(len(tasks))))
        measure(config)
        kept[len(tasks)] = open_run(Path(config.output_dir)).pool.sha256("colours")
    assert kept[1] == kept[2]


@pytest.mark.parametrize("model", TWO)
def test_activation_checkpointing_learns_the_same(
    see_config: Callable[..., Any], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, recomputed = [], set()
    original = TaskTrainer.compute_loss

    def noted(self: TaskTrainer, network: Any, *args: Any, **kwargs: Any) -> Any:
        recomputed.add((self.args.activation_checkpointing, network.is_activation_checkpointing))
        return original(self, network, *args, **kwargs)

    monkeypatch.setattr(TaskTrainer, "compute_loss", noted)
    for option in (False, True):
        folder = str(tmp_path / str(option))
        config = see_config(model, tasks=["colours"], method="lora", activation_checkpointing=option, output_dir=folder)
        measure(config)
        pool = open_run(Path(config.output_dir)).pool
        found.append(pool.parameters("shared"))
    for name, weights in found[0].items():
        torch.testing.assert_close(found[1][name], weights, rtol=1e-4, atol=1e-5)
    assert recomputed == {(False, False), (True, True)}


@pytest.mark.parametrize("model", TWO)
def test_a_kill_inside_a_task_changes_nothing(see_config: Callable[..., Any], model: str, tmp_path: Path) -> None:
    options = {"tasks": ["colours", "paints"], "save_steps": 1, "projector_learning_rate": 5e-3}
    whole = see_config(model, **options, output_dir=str(tmp_path / "whole"))
    measure(whole)
    cut = see_config(model, **options, output_dir=str(tmp_path / "cut"))
    with interrupted(6):  # the third step of the second task
        measure(cut)
    with Reporter() as reporter:
        resume(Path(cut.output_dir), reporter)
    files = [
        {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "pool").rglob("*.safetensors")}
        for folder in (Path(whole.output_dir), Path(cut.output_dir))
    ]
    assert files[0] == files[1]
    assert any(path.endswith(PROJECTOR_FILE) for path in files[0])


@pytest.mark.parametrize("model", MAKERS)
def test_exports_answer_as_the_run_does(
    see_config: Callable[..., Any], squares: Path, tmp_path: Path, model: str
) -> None:
    config = see_config(model, tasks=["colours", "tints"], max_steps=5, max_eval_examples=1, max_new_tokens=1)
    measure(config)
    session = open_run(Path(config.output_dir))
    reader = session.backbone.reader
    batch = reader.collate([reader.encode(row) for row in some_rows(squares)])
    with session.pool.active("tints") as active, torch.no_grad():
        expected, _ = answer_logits(active, batch)
    with session.pool.active(None) as active, torch.no_grad():
        untrained, _ = answer_logits(active, batch)
    assert (expected - untrained).abs().max() > 1e-2

    export_run(Path(config.output_dir), tmp_path / "peft")
    base = AutoModelForImageTextToText.from_pretrained(config.model)
    plain = PeftModel.from_pretrained(base, tmp_path / "peft" / "tints").eval()
    with torch.no_grad():
        torch.testing.assert_close(answer_logits(plain, batch)[0], expected, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "peft" / "tints" / PROJECTOR_FILE).is_file()

    export_run(Path(config.output_dir), tmp_path / "merged", layout="merged", group="tints")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(answer_logits(merged, batch)[0], expected, rtol=1e-4, atol=1e-4)
    AutoProcessor.from_pretrained(tmp_path / "merged")
    assert not [key for key in load_file(tmp_path / "merged" / "model.safetensors") if "adapters" in key]
    with pytest.raises(UserError, match=r"--as vllm.*projector"):
        export_run(Path(config.output_dir), tmp_path / "vllm", layout="vllm")


def test_predictions_name_their_images(see_config: Callable[..., Any]) -> None:
    config = see_config(tasks=["colours"], method="lora")
    measure(config)
    line = (Path(config.output_dir) / "predictions" / "1" / "colours.jsonl").read_text().splitlines()[0]
    assert Path(json.loads(line)["images"][0]).is_file()


def test_the_report_shows_the_images(see_config: Callable[..., Any], tmp_path: Path) -> None:
    stream = square_stream(tmp_path / "squares")
    config = see_config(stream=str(stream), tasks=["colours"], method="lora")
    measure(config)
    write_report([load_run(config.output_dir)], tmp_path / "first.html")
    page = (tmp_path / "first.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 3
    assert "<image>" in html.unescape(page)
    other = see_config(stream=str(stream), tasks=["colours"], method="stable_ema", output_dir=str(tmp_path / "other"))
    measure(other)
    write_report([load_run(config.output_dir), load_run(other.output_dir)], tmp_path / "both.html")
    page = html.unescape((tmp_path / "both.html").read_text())
    assert page.count('<img src="data:image/jpeg;base64,') == 3  # once, however many have answered
    shown = page.partition("data:image/jpeg;base64,")[2].partition("data:image/jpeg;base64,")[0]  # the first example
    for run_folder in (config.output_dir, other.output_dir):
        answers = (Path(run_folder) / "predictions/1/colours.jsonl").read_text().splitlines()
        assert json.loads(answers[0])["prediction"][:20] in shown
    assert "lora" in shown
    assert "stable_ema" in shown
    for path in (stream / "images" / "colours").iterdir():
        path.unlink()
    write_report([load_run(config.output_dir)], tmp_path / "second.html")
    page = (tmp_path / "second.html").read_text()
    assert "<img" not in page
    assert page.count("not there any more") == 3


def test_a_request_with_an_image_is_answered(see_config: Callable[..., Any], squares: Path, tmp_path: Path) -> None:
    config = see_config(method="lcia", tasks=["colours", "tints"])
    measure(config)
    image = squares / "images" / "colours" / "0.png"
    asked = [("which is it", "Name the colour")]
    answer = answer_requests(Path(config.output_dir), asked, images=[image])[0]
    assert answer.group == "colours"
    assert answer.similarity == pytest.approx(1.0)
    with pytest.raises(UserError, match=r"nothing\.png: no such file"):
        answer_requests(Path(config.output_dir), asked, images=[tmp_path / "nothing.png"])


@pytest.mark.parametrize("model", TWO)
def test_eval_and_generate_on_the_command_line(
    see_config: Callable[..., Any],
    squares: Path,
    tmp_path: Path,
    model: str,
    lcia: Callable[..., tuple[int, str, str]],
) -> None:
    """They answer the run's own rows as the run did."""

    def told(*arguments: object) -> str:
        code, out, _ = lcia(*arguments)
        assert code == 0
        return out

    config = see_config(model, tasks=["colours", "tints"], max_steps=2)
    results = measure(config)
    folder = Path(config.output_dir)
    found = json.loads(told("eval", folder, "--recompute", "--json"))
    assert found["rows"][-1]["scores"] == dict(zip(results["tasks"], results["matrix"][-1], strict=True))
    again, before = (
        [json.loads(line) for line in (folder / place / "tints.jsonl").read_text().splitlines()]
        for place in ("evaluations/test/2", "predictions/2")
    )
    assert again == before
    dev = json.loads(told("eval", folder, "--split", "dev", "--tasks", "colours", "--json"))
    assert list(dev["rows"][-1]["scores"]) == ["colours"]

    row = next(row for row in load_stream(str(squares))[1].test if row.images)
    record = next(line for line in before if line["id"] == row.id)
    text = row.messages[0][1].removesuffix(f"\n{row.instruction}")
    command = ["generate", folder, text, "--instruction", row.instruction, "--image", row.images[0]]
    answer = json.loads(told(*command, "--json"))
    assert (answer["answer"], answer["group"]) == (record["prediction"], record["group"])
    assert answer["similarity"] == pytest.approx(1.0)
    assert "[group tints, similarity 1.000]" in " ".join(told(*command).split())


def test_no_similarity_is_told_where_none_is_computed(
    see_config: Callable[..., Any], squares: Path, tmp_path: Path
) -> None:
    config = see_config(method="lora", tasks=["colours"], max_steps=1)
    measure(config)
    (answer,) = answer_requests(Path(config.output_dir), [("which is it", None)], 2)
    assert (answer.group, answer.similarity) == ("shared", None)
    assert str(answer.__rich__()).endswith("   [group shared]")


def test_a_run_of_a_model_of_text_takes_no_image(tiny_config: Callable[..., Any], squares: Path) -> None:
    config = tiny_config(tasks=["colours"], method="lora")
    measure(config)
    with pytest.raises(UserError, match=r"--image: .* reads text only"):
        answer_requests(Path(config.output_dir), [("x", "y")], images=[squares / "images" / "colours" / "0.png"])


# --- images that cannot be used


def test_a_broken_image_stops_the_run_before_training(
    see_config: Callable[..., Any], squares: Path, tmp_path: Path
) -> None:
    broken = square_stream(tmp_path / "broken")
    path = broken / "images" / "tints" / "4.png"
    path.write_bytes(path.read_bytes()[:40])
    config = see_config(stream=str(broken))
    with pytest.raises(UserError, match=r"tints\.jsonl:5.*4\.png"):
        measure(config)
    assert not Path(config.output_dir).exists()


def test_broken_images_are_left_out_and_counted(
    see_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With skip_bad_rows: cut off, empty, and no image; the run ends as one that never had these rows."""
    broken, clean = square_stream(tmp_path / "broken"), square_stream(tmp_path / "clean")
    images = broken / "images" / "colours"
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:60])
    (images / "5.png").write_bytes(b"")  # of a test row
    (images / "7.png").write_text("<!doctype html>")
    rows = (clean / "colours.jsonl").read_text().splitlines()
    (clean / "colours.jsonl").write_text("\n".join(row for n, row in enumerate(rows) if n not in (2, 5, 7)))
    config = see_config(
        stream=str(broken), tasks=["colours", "tints"], skip_bad_rows=True, output_dir=str(tmp_path / "a")
    )
    with interrupted(5):
        measure(config)
    with Reporter() as reporter:
        results = resume(Path(config.output_dir), reporter)
    notes = load_run_stream(config).notes
    told = notes.index("colours: 3 rows skipped whose image cannot be opened")
    why = " ".join(notes[told + 1 : told + 4])
    assert (why.count("broken or cut off"), why.count("not an image that is understood")) == (1, 2)
    assert all(f"colours.jsonl:{line}: image " in why for line in (3, 6, 8))
    answered = (Path(config.output_dir) / "predictions/1/colours.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in answered] == ["colours-11", "colours-17"]
    other = see_config(stream=str(clean), tasks=["colours", "tints"], output_dir=str(tmp_path / "b"))
    assert measure(other)["matrix"] == results["matrix"]
    pools = [open_run(Path(one.output_dir)).pool for one in (config, other)]
    assert pools[0].sha256("colours") == pools[1].sha256("colours")


def test_a_split_without_usable_images_stops(see_config: Callable[..., Any], tmp_path: Path) -> None:
    broken = square_stream(tmp_path / "broken")
    for number in (5, 11, 17):
        (broken / f"images/colours/{number}.png").write_bytes(b"")
    config = see_config(stream=str(broken), tasks=["colours"], skip_bad_rows=True)
    with pytest.raises(UserError, match=r"task 'colours': no test row is left .*colours\.jsonl:6: image .*5\.png"):
        measure(config)


def test_a_model_of_text_refuses_image_rows(tiny_config: Callable[..., Any], squares: Path) -> None:
    with pytest.raises(UserError, match=r"colours\.jsonl:1.*reads text only"):
        measure(tiny_config(stream=str(squares)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (28, 28), (300, 20)])
@pytest.mark.parametrize("backbone", TWO, indirect=True)
def test_images_of_every_kind_are_read(backbone: Backbone, tmp_path: Path, mode: str, size: tuple[int, int]) -> None:
    path = tmp_path / ("x.tif" if mode in ("CMYK", "I;16") else "x.png")
    Image.new("RGB", size, COLOURS["red"]).convert("L" if mode == "I;16" else mode).convert(mode).save(path)
    row = Row("1", "x", (("user", "what is it"),), ("y",), images=(str(path),), source="file.jsonl:3")
    batch = backbone.reader.collate([backbone.reader.encode(row)])
    logits, _ = answer_logits(backbone.model, batch)
    assert torch.isfinite(logits).all()


def test_a_stream_without_images_runs_on_a_model_that_sees(see_config: Callable[..., Any], tiny_stream: Path) -> None:
    results = measure(see_config(stream=str(tiny_stream), tasks=["colours"], method="lora"))
    assert results["matrix"][1][0] is not None


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_learns_what_is_shown(see_config: Callable[..., Any], method: str) -> None:
    only_lora = {"projector": "none"} if method in ("model_tailor", "pgp") else {}
    results = measure(see_config(method=method, tasks=["colours", "tints", "paints"], max_steps=2, **only_lora))
    assert None not in results["matrix"][-1]


@pytest.mark.parametrize("method", ["model_tailor", "pgp"])
def test_methods_of_linear_layers_name_the_way_out(see_config: Callable[..., Any], method: str) -> None:
    with pytest.raises(UserError, match=rf"{method}: .*projector.*projector: none"):
        measure(see_config(method=method, tasks=["colours"]))


@pytest.mark.parametrize("method", ["lcia", "agem", "ewc", {"name": "llaca", "rule": "fisher"}])
def test_steps_without_images_leave_nothing_undone(
    see_config: Callable[..., Any], tiny_stream: Path, method: Any
) -> None:
    """No gradient reaches the projector there: that is a gradient of 0, not a missing one."""
    results = measure(see_config(stream=str(tiny_stream), tasks=["colours", "paints"], method=method))
    assert None not in results["matrix"][-1]
