"""Two data sets after one another with TRL's SFTTrainer, LoRA and the dynamic EMA: a complete script.

    pip install -e ".[trl]"          # in a clone of lcia
    python examples/trl_sft.py MODEL first.jsonl second.jsonl --output out

MODEL is a hub id or a folder with a chat template; each line of a data file is
{"messages": [{"role": ..., "content": ...}, ...]}. The second data set is learned by the adapter of the first. The rule
`fisher` keeps what the first one needs where it needs it: its importance is estimated during the first training, from
gradients that are made anyway, and handed to the second. OUT/1 and OUT/2 are plain PEFT adapters.

A training that was interrupted goes on with the same command and --resume: every checkpoint holds the average.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from lcia import DynamicEMACallback


def learn(model_name: str, data: Path, folder: Path, before: Path | None, arguments: argparse.Namespace) -> None:
    """Learn one data set; `before` is the folder of the adapter to go on with, and of what it needs."""
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
    lora: LoraConfig | None = LoraConfig(r=arguments.r, target_modules="all-linear", task_type="CAUSAL_LM")
    importance = None
    if before is not None:
        model, lora = PeftModel.from_pretrained(model, before, is_trainable=True), None
        importance = load_file(before / "importance.safetensors")
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(model_name),
        args=SFTConfig(
            output_dir=str(folder / "checkpoints"),
            num_train_epochs=arguments.epochs,
            max_steps=arguments.max_steps,
            per_device_train_batch_size=arguments.batch,
            learning_rate=arguments.learning_rate,
            save_steps=arguments.save_steps,
            logging_steps=10,
            report_to="none",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=load_dataset("json", data_files=str(data), split="train"),
        peft_config=lora,
    )
    # it knows the trainer, so that the trainer's loggers (report_to) see β and the retained mass, too
    ema = DynamicEMACallback(rule="fisher", importance=importance, trainer=trainer)
    trainer.add_callback(ema)
    trainer.train(resume_from_checkpoint=arguments.resume and any(folder.glob("checkpoints/checkpoint-*")))
    assert ema.ema is not None
    trainer.save_model(str(folder))  # the averaged weights: the model holds them since the end of the training
    save_file(ema.ema.importance, folder / "importance.safetensors")
    masses = ema.ema.retained_mass.values()
    print(f"{data}: {folder} keeps {sum(masses) / len(masses):.2f} of the weights it began with")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path, nargs="+", help="data sets in the order in which they arrive")
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--save-steps", type=int, default=100)
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    before: Path | None = None
    for number, data in enumerate(arguments.data, start=1):
        folder = arguments.output / str(number)
        if not (arguments.resume and (folder / "importance.safetensors").is_file()):
            learn(arguments.model, data, folder, before, arguments)
        before = folder


if __name__ == "__main__":
    main()
