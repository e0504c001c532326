"""LLaVA-1.5-7B without its weights, and rows like CoIN's: all that the figures of docs/coin-on-gpus.md need.

python tests/llava_7b.py DIR && lcia plan DIR/coin.yaml max_length=1024 --gpus 8 --memory 80
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from PIL import Image

from coin_folder import INSTRUCTIONS
from conftest import byte_tokenizer
from lcia.backbone import load_layout, load_reader
from lcia.bench import BENCHMARKS
from lcia.config import load_config
from lcia.session import load_run_stream
from tiny_vision import CHAT_TEMPLATE, IMAGE

LENGTHS = (1024, 2048)  # tokens; `max_length` leaves the longer rows out
ROWS = 40  # of each length, to train on and to be answered


def write_model(folder: Path, layers: int = 32) -> Path:
    """Configuration and processor as llava-hf/llava-1.5-7b-hf describes them, with a tokenizer of one token a byte."""
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaProcessor

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = None
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_id).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE.replace("IMAGE", f"'{IMAGE}'"),
    ).save_pretrained(folder)
    return folder


def write_stream(folder: Path) -> Path:
    """CoIN's tasks with its instructions, a short row each to train on and to be answered."""
    folder.mkdir()
    Image.new("RGB", (48, 32)).save(folder / "image.png")
    for name in INSTRUCTIONS:
        write_task(folder, name, {"train": ["x"], "test": ["x"]})
    (folder / "tasks.json").write_text(json.dumps(list(INSTRUCTIONS)))
    return folder


def write_task(folder: Path, name: str, texts: Mapping[str, Sequence[str]]) -> None:
    """Rows by split, with these texts before the instruction."""
    row = {"instruction": INSTRUCTIONS[name]["origin"][0], "output": "B", "image": "image.png"}
    lines = [
        {**row, "input": text, "split": split, "id": f"{split}-{number}"}
        for split, wanted in texts.items()
        for number, text in enumerate(wanted)
    ]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write(folder: Path, lengths: Sequence[int] = LENGTHS, rows: int = ROWS, layers: int = 32) -> Path:
    """`folder`/coin.yaml, with the settings of `lcia bench run coin`, and what it names.

    Rows of the first task take all `lengths`, prompt and answer together; a prompt that is answered leaves room for
    `max_new_tokens`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream, model = write_stream(folder / "stream"), str(write_model(folder / "model", layers))
    values = {
        **BENCHMARKS["coin"].settings,
        "stream": str(stream),
        "model": model,
        "method": {"name": "lcia", "threshold": 0.9},
        "output_dir": str(folder / "run"),
    }
    path = folder / "coin.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    config = load_config(path)
    task = load_run_stream(config)[0]
    short = load_reader(model, model, load_layout(model, model)).encode(task.train[0])
    longer = {"train": -len(short.prompt) - len(short.answer), "test": -len(short.prompt) - config.max_new_tokens}
    texts = {split: ["x" * (1 + length + more) for length in lengths] * rows for split, more in longer.items()}
    write_task(stream, task.name, texts)
    return path


if __name__ == "__main__":
    print(write(Path(sys.argv[1]).absolute()))
